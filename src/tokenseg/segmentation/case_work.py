"""The work on one case, in three steps: read it, compute its mask, write what came of it.

Steps of different cases may overlap in a cohort: while one is computed, the next is read and the last one written. A
step that fails says why, and the steps after it do nothing.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tokenseg.config import Plan, SegmentOptions
from tokenseg.datasets.cases import Case
from tokenseg.datasets.inputs import InputSize, describe_input, input_size, read_input
from tokenseg.errors import TokenSegError
from tokenseg.files import write_atomically
from tokenseg.imaging.dicom_files import DicomFile
from tokenseg.imaging.volume import Volume
from tokenseg.inference.memory import MemoryPlan, parse_memory, plan_memory
from tokenseg.inference.predict import Segmented, segment_in_slabs
from tokenseg.inference.quality import CaseQuality
from tokenseg.plan_grid.restore import painted_values
from tokenseg.planning.suitability import check_input
from tokenseg.progress import Progress
from tokenseg.saved_model.checkpoint import Model
from tokenseg.segmentation.outputs import (
    CaseResult,
    no_findings_file,
    probabilities_file,
    quality_file,
    remove_probabilities,
    write_output,
)
from tokenseg.segmentation.privacy import shown_name, without_names
from tokenseg.segmentation.status import CaseStatus, case_digest, case_key, file_digest, peak_mib
from tokenseg.shapes import MaskArray
from tokenseg.stopwatch import Stopwatch

_NO_MEMORY = "{} needs more memory than there is; check the spacing in its header, or use a computer with more memory"


@dataclass(eq=False)
class Work:
    """A case on its way, and what is known of it so far."""

    case: Case
    target: Path
    """Where its mask goes."""
    options: SegmentOptions
    alone: bool = False
    """Whether it is no part of a cohort: then what an earlier call wrote stays where this one fails."""
    error: str = ""
    digest: str = ""
    """Of its files; computed once, as soon as somebody asks."""
    earlier: CaseStatus | None = None
    """What became of it in an earlier call with the same weights and settings."""
    size: InputSize | None = None
    """From its headers, likewise."""
    key: str = ""
    notes: tuple[str, ...] = ()
    memory: MemoryPlan | None = None
    volume: Volume | None = None
    segmented: Segmented | None = None
    result: CaseResult | None = None
    """Once its mask is written."""
    mask_sha256: str = ""
    watch: Stopwatch = field(default_factory=Stopwatch)

    @property
    def shown(self) -> str:
        """What the case is called in outputs."""
        return shown_name(self.case.case_id, show_names=self.options.show_names)

    @property
    def kept(self) -> CaseStatus | None:
        """Of the mask that stays of an earlier call: where the input is away, nothing says that it changed."""
        return None if self.digest or self.result is not None else self.earlier


def _guarded(step: Callable[..., None]) -> Callable[..., None]:
    """Do nothing after a failed step; keep the reason of an expected failure, let a bug pass."""

    @functools.wraps(step)
    def guarded(work: Work, *arguments: object) -> None:
        if work.error:
            return
        try:
            step(work, *arguments)
        except TokenSegError as error:
            work.error = str(error)
        except (MemoryError, RuntimeError) as error:
            if not _is_memory_error(error):
                raise
            work.error = _NO_MEMORY.format(work.case.case_id)

    return guarded


@_guarded
def read_case(work: Work, models: Sequence[Model], settings: Sequence[str], progress: Progress) -> None:
    """Read the scan, after saying how much memory it will take where a limit was given."""
    plan = models[0].facts.plan
    with work.watch.stage("load"):
        work.digest = work.digest or case_digest(work.case)
        # Weights that were never saved have no fingerprint: with them everything is done anew.
        saved = all(model.facts.weights_sha256 for model in models)
        work.key = case_key(work.case, work.digest, settings) if saved else ""
        work.notes = describe_input(work.case, plan)
        work.memory = _memory_of(work, models)
        if work.options.max_memory:
            progress.message(f"{work.shown}: {work.memory}; limit {work.options.max_memory}")
        work.volume = read_input(work.case, plan)


@_guarded
def compute_mask(work: Work, models: Sequence[Model], progress: Progress) -> None:
    """Segment the scan; where a GPU runs out of memory once more with what it had cached, and then on the CPU."""
    if _fits(work, models):
        return
    torch.cuda.empty_cache()
    _note(work, "the GPU ran out of memory: once more, with its cache emptied", progress)
    if _fits(work, models):
        return
    torch.cuda.empty_cache()
    _note(work, "the GPU ran out of memory again: on the CPU", progress)
    _segment(work, [_on_cpu(model) for model in models])


def _fits(work: Work, models: Sequence[Model]) -> bool:
    """Segment; False where a GPU has no memory for it. The error is gone by then, and the tensors that it held."""
    try:
        _segment(work, models)
    except torch.OutOfMemoryError:
        return False
    return True


def write_case(work: Work, models: Sequence[Model]) -> tuple[CaseResult, CaseStatus]:
    """Write the mask and its quality signals, and say what became of the case."""
    _write(work, models)
    result = work.result
    if result is None:
        shown_error = without_names(work.error, work.case, show_names=work.options.show_names)
        result = CaseResult(work.case.case_id, None, {}, work.error, shown_error)
        _remove_earlier(work)
    status = _status(work, result)
    if work.segmented is not None and work.segmented.probabilities is not None:
        work.segmented.probabilities.discard()  # of a mask that could not be written
    work.volume = work.segmented = None  # free before the next is held
    return result, status


def _memory_of(work: Work, models: Sequence[Model]) -> MemoryPlan:
    plan, limit_mib = models[0].facts.plan, parse_memory(work.options.max_memory)
    networks = [model.facts.network for model in models]
    compiled = any(model.compiled is not None for model in models)
    return plan_memory(work.size or input_size(work.case, plan), plan, networks, limit_mib=limit_mib, compiled=compiled)


def _segment(work: Work, models: Sequence[Model]) -> None:
    if work.volume is None or work.memory is None:
        raise ValueError("read the case first")
    work.segmented = segment_in_slabs(
        models,
        work.volume,
        work.watch,
        full=work.options.full,
        num_slabs=work.memory.num_slabs,
        probabilities=probabilities_file(work.target) if work.options.probabilities else None,
    )


def _note(work: Work, text: str, progress: Progress) -> None:
    work.notes = (*work.notes, text)
    progress.message(f"{work.shown}: {text}")


def _on_cpu(model: Model) -> Model:
    # Each tensor is told to be copied already, to the CPU: a copy on the full GPU would fail again.
    tensors = (*model.network.parameters(), *model.network.buffers())
    moved = {id(tensor): _like(tensor, tensor.detach().cpu()) for tensor in tensors}
    return replace(model, network=copy.deepcopy(model.network, moved), device=torch.device("cpu"), compiled=None)


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


@_guarded
def _write(work: Work, models: Sequence[Model]) -> None:
    if work.volume is None or work.segmented is None:
        raise ValueError("compute the mask first")
    mask, volume, facts = work.segmented.mask, work.volume, models[0].facts
    warnings = check_input(volume, facts.inputs)
    volumes_ml = _volumes_ml(mask, volume, facts.plan)
    with work.watch.stage("quality"):
        quality: CaseQuality = work.segmented.meter.quality(work.shown, mask, facts, volumes_ml, warnings)
    with work.watch.stage("save"):
        remove_probabilities(work.target)  # before the mask is another one
        place = write_output(work.target, mask, volume, models[0], work.options)
        write_atomically(quality_file(work.target), quality.model_dump_json(indent=1).encode())
        if work.segmented.probabilities is not None:
            work.segmented.probabilities.place()
    work.mask_sha256 = file_digest([DicomFile(place)])
    work.result = CaseResult(
        work.case.case_id,
        place,
        volumes_ml,
        windows_run=work.segmented.windows_run,
        windows_full=work.segmented.windows_full,
        warnings=warnings,
        notes=work.notes,
        seconds=work.watch.seconds,
        quality=quality,
    )


def _remove_earlier(work: Work) -> None:
    """What an earlier call left in the folder of a cohort would pass for a result of this one."""
    if work.alone or work.kept is not None:
        return
    with suppress(TokenSegError):
        remove_probabilities(work.target)
    places = [work.target, quality_file(work.target)]
    places += [no_findings_file(work.target)] if work.case.exam is not None else []
    for path in places:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _status(work: Work, result: CaseResult) -> CaseStatus:
    segmented, kept = work.segmented, work.kept
    return CaseStatus(
        case=work.shown,
        state="failed" if work.result is None else "done",
        key=work.key if kept is None else kept.key,
        input_sha256=work.digest if kept is None else kept.input_sha256,
        mask_sha256=work.mask_sha256 if kept is None else kept.mask_sha256,
        shape_vox=() if segmented is None else segmented.mask.shape,
        affine=() if work.volume is None else work.volume.affine.tolist(),
        plan_shape_vox=() if segmented is None else segmented.record.grid_shape,
        slabs=0 if work.memory is None else work.memory.num_slabs,
        volumes_ml=result.volumes_ml,
        windows_run=result.windows_run,
        windows_full=result.windows_full,
        warnings=result.warnings,
        notes=work.notes,
        error=result.shown_error,
        seconds={stage: round(seconds, 3) for stage, seconds in work.watch.seconds.items()},
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


def _is_memory_error(error: Exception) -> bool:
    # Torch has a class of its own for devices only.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
