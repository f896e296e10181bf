"""The stages of a case on its way from files to a mask file: to do -> read -> computed -> written.

Each stage is a type of its own, and each step makes the next stage or a `FailedCase`, which later steps hand on. Steps
of different cases may overlap in a cohort: while one is computed, the next is read and the last one written.
"""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tokenseg.config import Plan
from tokenseg.datasets.cases import Case
from tokenseg.datasets.inputs import describe_input, input_size, read_input
from tokenseg.errors import TokenSegError
from tokenseg.files import write_atomically
from tokenseg.imaging.dicom_files import DicomFile
from tokenseg.imaging.volume import Volume
from tokenseg.inference.memory import MemoryPlan, parse_memory, plan_memory
from tokenseg.inference.predict import Manner, Segmented, segment_scan
from tokenseg.options import SegmentOptions
from tokenseg.plan_grid.restore import painted_values
from tokenseg.planning.suitability import check_input
from tokenseg.progress import Progress
from tokenseg.saved_model.checkpoint import Model
from tokenseg.saved_model.ensemble import Ensemble
from tokenseg.segmentation.output_files import (
    no_findings_file,
    probabilities_file,
    quality_file,
    remove_probabilities,
    write_output,
)
from tokenseg.segmentation.privacy import shown_name, without_names
from tokenseg.segmentation.results import CaseResult
from tokenseg.segmentation.status import CaseStatus, case_digest, case_key, file_digest, peak_mib
from tokenseg.shapes import MaskArray
from tokenseg.stopwatch import Stopwatch

_NO_MEMORY = "{} needs more memory than there is; check the spacing in its header, or use a computer with more memory"
_EXPECTED = (TokenSegError, MemoryError, RuntimeError)


@dataclass(frozen=True)
class CaseToDo:
    """A case, and how it is to be segmented."""

    case: Case
    target: Path
    """Where its mask goes."""
    options: SegmentOptions
    settings: tuple[str, ...] = ()
    """All that its mask depends on besides the input; empty where nobody asks."""
    tokens: bool = False
    """Whether what the tokenizers choose is kept."""
    alone: bool = False
    """Whether it is no part of a cohort: then what an earlier call wrote stays where this one fails."""
    earlier: CaseStatus | None = None
    """What became of it in an earlier call with the same weights and settings."""

    @property
    def shown(self) -> str:
        """What the case is called in outputs."""
        return shown_name(self.case.case_id, show_names=self.options.show_names)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of its files; empty where one cannot be read."""
        return case_digest(self.case)

    @property
    def key(self) -> str:
        """Fingerprint of input and settings; empty where there is none."""
        return case_key(self.case, self.digest, self.settings) if self.settings else ""

    @property
    def kept(self) -> CaseStatus | None:
        """Of the mask of an earlier call, which stays: where the input is away, nothing says that it changed."""
        return None if self.digest else self.earlier


@dataclass(frozen=True, eq=False)
class ReadCase:
    """A case whose scan is in memory."""

    to_do: CaseToDo
    volume: Volume
    memory: MemoryPlan
    notes: tuple[str, ...]
    watch: Stopwatch


@dataclass(frozen=True, eq=False)
class ComputedCase:
    """A case whose mask is in memory."""

    read: ReadCase
    segmented: Segmented

    @property
    def to_do(self) -> CaseToDo:
        """What was asked for."""
        return self.read.to_do


class WrittenCase(NamedTuple):
    """What became of a case: for the caller, and for `status.jsonl`."""

    result: CaseResult
    status: CaseStatus


@dataclass(frozen=True, eq=False)
class FailedCase:
    """A case that ends here, and how far it came."""

    to_do: CaseToDo
    error: str
    watch: Stopwatch
    read: ReadCase | None = None
    segmented: Segmented | None = None


def read_case(to_do: CaseToDo, ensemble: Ensemble, progress: Progress) -> ReadCase | FailedCase:
    """Read the scan, after saying how much memory it will take where a limit was given."""
    watch = Stopwatch()
    try:
        with watch.stage("load"):
            return _read(to_do, ensemble, progress, watch)
    except _EXPECTED as error:
        return FailedCase(to_do, _reason(error, to_do), watch)


def compute_mask(read: ReadCase | FailedCase, ensemble: Ensemble, progress: Progress) -> ComputedCase | FailedCase:
    """Segment the scan; where a GPU runs out of memory once more with what it had cached, and then on the CPU."""
    if isinstance(read, FailedCase):
        return read
    try:
        return _computed_somehow(read, ensemble, progress)
    except _EXPECTED as error:
        return FailedCase(read.to_do, _reason(error, read.to_do), read.watch, read)


def write_case(computed: ComputedCase | FailedCase, ensemble: Ensemble) -> WrittenCase:
    """Write the mask and its quality signals, and say what became of the case."""
    if isinstance(computed, FailedCase):
        return _given_up(computed)
    try:
        return _written(computed, ensemble)
    except _EXPECTED as error:
        read, segmented = computed.read, computed.segmented
        if segmented.probabilities is not None:
            segmented.probabilities.discard()
        return _given_up(FailedCase(read.to_do, _reason(error, read.to_do), read.watch, read, segmented))


def _read(to_do: CaseToDo, ensemble: Ensemble, progress: Progress, watch: Stopwatch) -> ReadCase:
    _ = to_do.digest  # before its files may change
    plan, limit = ensemble.plan, to_do.options.max_memory
    notes = describe_input(to_do.case, plan)
    memory = plan_memory(
        input_size(to_do.case, plan),
        plan,
        [model.facts.network for model in ensemble.models],
        limit_mib=parse_memory(limit),
        compiled=ensemble.is_compiled,
    )
    if limit:
        progress.message(f"{to_do.shown}: {memory}; limit {limit}")
    return ReadCase(to_do, read_input(to_do.case, plan), memory, notes, watch)


def _computed_somehow(read: ReadCase, ensemble: Ensemble, progress: Progress) -> ComputedCase:
    found = _if_it_fits(read, ensemble)
    if found is not None:
        return found
    torch.cuda.empty_cache()
    read = _noted(read, "the GPU ran out of memory: once more, with its cache emptied", progress)
    found = _if_it_fits(read, ensemble)
    if found is not None:
        return found
    torch.cuda.empty_cache()
    read = _noted(read, "the GPU ran out of memory again: on the CPU", progress)
    return _computed(read, Ensemble(tuple(map(_on_cpu, ensemble.models))))


def _if_it_fits(read: ReadCase, ensemble: Ensemble) -> ComputedCase | None:
    """None where a GPU has no memory for it. The error is gone by then, and the tensors that it held."""
    try:
        return _computed(read, ensemble)
    except torch.OutOfMemoryError:
        return None


def _computed(read: ReadCase, ensemble: Ensemble) -> ComputedCase:
    to_do = read.to_do
    manner = Manner(
        full=to_do.options.full,
        num_slabs=read.memory.num_slabs,
        probabilities=probabilities_file(to_do.target) if to_do.options.probabilities else None,
        tokens=to_do.tokens,
    )
    return ComputedCase(read, segment_scan(ensemble, read.volume, manner, read.watch))


def _noted(read: ReadCase, text: str, progress: Progress) -> ReadCase:
    progress.message(f"{read.to_do.shown}: {text}")
    return replace(read, notes=(*read.notes, text))


def _on_cpu(model: Model) -> Model:
    # Each tensor is told to be copied already, to the CPU: a copy on the full GPU would fail again.
    tensors = (*model.network.parameters(), *model.network.buffers())
    moved = {id(tensor): _like(tensor, tensor.detach().cpu()) for tensor in tensors}
    return replace(model, network=copy.deepcopy(model.network, moved), device=torch.device("cpu"), compiled=None)


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


def _written(computed: ComputedCase, ensemble: Ensemble) -> WrittenCase:
    read, segmented, to_do = computed.read, computed.segmented, computed.to_do
    mask, volume, facts = segmented.mask, read.volume, ensemble.facts
    warnings = check_input(volume, facts.inputs)
    volumes_ml = _volumes_ml(mask, volume, facts.plan)
    with read.watch.stage("quality"):
        quality = segmented.meter.quality(to_do.shown, mask, facts, volumes_ml, warnings)
    with read.watch.stage("save"):
        remove_probabilities(to_do.target)  # before the mask is another one
        place = write_output(to_do.target, mask, volume, facts, to_do.options)
        write_atomically(quality_file(to_do.target), quality.model_dump_json(indent=1).encode())
        if segmented.probabilities is not None:
            segmented.probabilities.place()
    result = CaseResult(
        to_do.case,
        place,
        volumes_ml,
        windows_run=segmented.windows_run,
        windows_full=segmented.windows_full,
        warnings=warnings,
        notes=read.notes,
        seconds=read.watch.seconds,
        quality=quality,
        tokens=segmented.tokens,
    )
    status = _status(to_do, read, segmented, read.watch).model_copy(
        update={
            "state": "done",
            "key": to_do.key,
            "input_sha256": to_do.digest,
            "mask_sha256": file_digest([DicomFile(place)]),
            "volumes_ml": volumes_ml,
            "windows_run": result.windows_run,
            "windows_full": result.windows_full,
            "warnings": warnings,
        }
    )
    return WrittenCase(result, status)


def _given_up(failed: FailedCase) -> WrittenCase:
    to_do, kept = failed.to_do, failed.to_do.kept
    shown_error = without_names(failed.error, to_do.case, show_names=to_do.options.show_names)
    if not to_do.alone and kept is None:
        _remove_earlier(to_do)
    status = _status(to_do, failed.read, failed.segmented, failed.watch).model_copy(
        update={
            "key": to_do.key if kept is None else kept.key,
            "input_sha256": to_do.digest if kept is None else kept.input_sha256,
            "mask_sha256": "" if kept is None else kept.mask_sha256,
            "error": shown_error,
        }
    )
    return WrittenCase(CaseResult(to_do.case, None, {}, failed.error, shown_error), status)


def _remove_earlier(to_do: CaseToDo) -> None:
    """What an earlier call left in the folder of a cohort would pass for a result of this one."""
    with suppress(TokenSegError):
        remove_probabilities(to_do.target)
    places = [to_do.target, quality_file(to_do.target)]
    places += [no_findings_file(to_do.target)] if to_do.case.exam is not None else []
    for path in places:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _status(to_do: CaseToDo, read: ReadCase | None, segmented: Segmented | None, watch: Stopwatch) -> CaseStatus:
    """What is known of a case however it ends, as of one that failed."""
    return CaseStatus(
        case=to_do.shown,
        state="failed",
        key="",
        shape_vox=() if segmented is None else segmented.mask.shape,
        affine=() if read is None else read.volume.affine.tolist(),
        plan_shape_vox=() if segmented is None else segmented.record.grid_shape,
        slabs=0 if read is None else read.memory.num_slabs,
        notes=() if read is None else read.notes,
        seconds={stage: round(seconds, 3) for stage, seconds in watch.seconds.items()},
        peak_mib=peak_mib(),
    )


def _volumes_ml(mask: MaskArray, volume: Volume, plan: Plan) -> dict[str, float]:
    voxel_ml = abs(float(np.linalg.det(volume.affine[:3, :3]))) / 1000
    counts = {label.output_value: 0 for label in plan.labels}
    for z in range(mask.shape[2]):  # a plane at a time takes no memory
        values, numbers = np.unique(mask[:, :, z], return_counts=True)
        for value, number in zip(values.tolist(), numbers.tolist(), strict=True):
            if value:
                counts[value] += number
    return {label.name: sum(counts[value] for value in painted_values(label, plan)) * voxel_ml for label in plan.labels}


def _reason(error: Exception, to_do: CaseToDo) -> str:
    """Why a case failed, in words; an error that nobody expects is a bug, and passes."""
    if isinstance(error, TokenSegError):
        return str(error)
    # Torch has a class of its own for devices only.
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return _NO_MEMORY.format(to_do.case.case_id)
    raise error
