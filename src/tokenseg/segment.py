"""Segmentation of files: a scan, a folder of cases, a dataset or DICOM, each case on its own (`predict.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from tokenseg.checkpoint import Model
from tokenseg.config import Plan, SegmentOptions
from tokenseg.data.cases import Case
from tokenseg.data.dicom_files import DicomFile
from tokenseg.data.formats import IMAGE_ENDINGS
from tokenseg.data.inputs import describe_input, input_size, list_inputs, read_input
from tokenseg.data.suitability import check_input
from tokenseg.data.volume import Volume
from tokenseg.errors import FileError, TokenSegError
from tokenseg.files import remove_leftovers, write_atomically
from tokenseg.memory import MemoryPlan, parse_memory, plan_memory
from tokenseg.outputs import (
    STATUS_NAME,
    SUMMARY_NAME,
    CaseResult,
    check_output_file,
    check_output_folder,
    mask_name,
    no_findings_file,
    painted_values,
    part_name,
    summary,
    write_output,
)
from tokenseg.predict import check_ensemble, segment_in_slabs
from tokenseg.progress import Progress, Silent
from tokenseg.shapes import MaskArray
from tokenseg.status import CaseStatus, append_status, case_key, file_digest, is_current, peak_mib, read_statuses
from tokenseg.stopwatch import Stopwatch

_SUMMARIES = 100
"""How often the summary is written on the way, at most; each time as a whole."""

_NO_MEMORY = "{} needs more memory than there is; check the spacing in its header, or use a computer with more memory"


def segment_files(
    models: Sequence[Model],
    input_path: Path,
    output_path: Path,
    progress: Progress | None = None,
    *,
    options: SegmentOptions | None = None,
) -> list[CaseResult]:
    """Segment a file, a folder of cases, or a dataset; write masks and, for a folder, `summary.csv`.

    A broken case is recorded in its result and does not stop the others. Masks of an earlier call are replaced; input
    images, and files that no earlier call wrote, never are.

    Args:
        models: One or several models of the same plan.
        input_path: An image file, a folder of images, a dataset folder, or DICOM (a folder, a zip archive or a file).
        output_path: A mask file for a single input file; else a folder, made if absent. For a single DICOM study
            either.
        progress: Told about each case.
        options: What else was asked for.

    Raises:
        TokenSegError: Input or output cannot be used at all.
    """
    check_ensemble(models)
    options = options or SegmentOptions()
    part, count = options.part()
    parse_memory(options.max_memory)
    cases = list_inputs(input_path, models[0].facts.plan, options.series)
    is_dicom = cases[0].exam is not None
    endings = (*IMAGE_ENDINGS, ".dcm") if is_dicom else IMAGE_ENDINGS
    named_as_file = output_path.name.endswith(endings) and not output_path.is_dir()
    if is_dicom and input_path.is_dir() and output_path.resolve().is_relative_to(input_path.resolve()):
        raise FileError(f"output {output_path} lies among the DICOM files of {input_path}; name another place")
    if (len(cases) == 1 and named_as_file) if is_dicom else input_path.is_file():
        check_output_file(output_path, input_path, endings)
        return [_segment_case(models, cases[0], output_path, options, progress or Silent())]
    check_output_folder(output_path, cases)
    cases = cases[part - 1 :: count]
    return segment_cases(models, cases, output_path, progress or Silent(), options=options)


def segment_cases(
    models: Sequence[Model],
    cases: Sequence[Case],
    folder: Path,
    progress: Progress,
    *,
    options: SegmentOptions | None = None,
) -> list[CaseResult]:
    """Segment cases into `folder`: `CASE` with the input's ending.

    Beside the masks are `status.jsonl`, a line a case as it is done, and `summary.csv`, kept up to date. Cases that an
    earlier call did from the same input with the same weights and settings are not done again.
    """
    options = options or SegmentOptions()
    status_path, summary_path = (folder / part_name(name, options) for name in (STATUS_NAME, SUMMARY_NAME))
    plan = models[0].facts.plan
    # Cases still to come stand in the summary too, so that an interrupted run does not pass for a complete one.
    results = [CaseResult(case.case_id, None, {}, "not segmented yet") for case in cases]
    remove_leftovers(folder)
    write_atomically(summary_path, summary(results, plan))
    earlier = read_statuses(folder)
    settings = _key_settings(models, options)
    progress.stage("segmenting", len(cases))
    for number, case in enumerate(cases):
        # Weights that were never saved have no fingerprint: with them everything is done anew.
        key = case_key(case, settings) if all(model.facts.weights_sha256 for model in models) else ""
        known = earlier.get(case.case_id)
        if known is not None and is_current(known, key, folder):
            results[number] = _known_result(known, folder)
        else:
            results[number] = _segment_into(models, case, folder, options, progress)
            append_status(status_path, _status(results[number], key))
        if number % max(1, len(cases) // _SUMMARIES) == 0 or number == len(cases) - 1:
            write_atomically(summary_path, summary(results, plan))
        progress.advance(case.case_id)
    return results


def _segment_into(
    models: Sequence[Model], case: Case, folder: Path, options: SegmentOptions, progress: Progress
) -> CaseResult:
    target = folder / mask_name(case)
    result = _segment_case(models, case, target, options, progress)
    if result.mask is None:
        # A mask of an earlier call would pass for a result of this one.
        target.unlink(missing_ok=True)
        if case.exam is not None:
            no_findings_file(target).unlink(missing_ok=True)
    return result


def _key_settings(models: Sequence[Model], options: SegmentOptions) -> list[str]:
    """All that a mask depends on besides the input."""
    facts = [model.facts.model_dump_json() for model in models]  # the plan, and the fingerprint of the weights
    engines = ["torch" if model.compiled is None else "openvino" for model in models]
    wanted = [str(options.full), str(options.empty_seg), options.series]
    return [version("tokenseg"), *facts, *engines, models[0].device.type, *wanted]


def _status(result: CaseResult, key: str) -> CaseStatus:
    mask = result.mask
    return CaseStatus(
        case=result.case_id,
        state="failed" if mask is None else "done",
        key=key,
        mask="" if mask is None else mask.name,
        mask_sha256="" if mask is None else file_digest([DicomFile(mask)]),
        volumes_ml=result.volumes_ml,
        windows_run=result.windows_run,
        windows_full=result.windows_full,
        warnings=result.warnings,
        notes=result.notes,
        error=result.error,
        seconds={stage: round(seconds, 3) for stage, seconds in result.seconds.items()},
        peak_mib=peak_mib(),
    )


def _known_result(status: CaseStatus, folder: Path) -> CaseResult:
    windows = status.windows_run, status.windows_full
    mask = folder / status.mask
    return CaseResult(status.case, mask, status.volumes_ml, "", *windows, status.warnings, status.notes)


def _segment_case(
    models: Sequence[Model], case: Case, target: Path, options: SegmentOptions, progress: Progress
) -> CaseResult:
    plan, watch = models[0].facts.plan, Stopwatch()
    try:
        with watch.stage("load"):
            notes = describe_input(case, plan)
            memory = _plan_memory(models, case, options)
            if options.max_memory:
                progress.message(f"{case.case_id}: {memory}; limit {options.max_memory}")
            volume = read_input(case, plan)
        segmented = segment_in_slabs(models, volume, watch, full=options.full, num_slabs=memory.num_slabs)
        mask = segmented.mask
        with watch.stage("save"):
            written = write_output(target, mask, volume, models[0], options)
    except TokenSegError as error:
        return CaseResult(case.case_id, None, {}, str(error))
    except (MemoryError, RuntimeError) as error:
        if not _is_memory_error(error):
            raise
        return CaseResult(case.case_id, None, {}, _NO_MEMORY.format(case.case_id))
    warnings = check_input(volume, models[0].facts.inputs)
    windows = segmented.windows_run, segmented.windows_full
    volumes_ml = _volumes_ml(mask, volume, plan)
    return CaseResult(case.case_id, written, volumes_ml, "", *windows, warnings, notes, watch.seconds)


def _plan_memory(models: Sequence[Model], case: Case, options: SegmentOptions) -> MemoryPlan:
    plan, limit_mib = models[0].facts.plan, parse_memory(options.max_memory)
    networks = [model.facts.network for model in models]
    compiled = any(model.compiled is not None for model in models)
    return plan_memory(input_size(case, plan), plan, networks, limit_mib=limit_mib, compiled=compiled)


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
