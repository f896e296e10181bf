"""Segmentation of files: a scan, a folder of cases, a dataset or DICOM, each case on its own (`predict.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokenseg.checkpoint import Model
from tokenseg.config import Plan, SegmentOptions
from tokenseg.data.cases import Case
from tokenseg.data.dicom_files import DicomFile
from tokenseg.data.formats import IMAGE_ENDINGS
from tokenseg.data.inputs import describe_input, input_size, list_inputs, read_input
from tokenseg.data.restore import painted_values
from tokenseg.data.suitability import check_input
from tokenseg.data.volume import Volume
from tokenseg.errors import FileError, TokenSegError
from tokenseg.files import remove_leftovers, write_atomically
from tokenseg.memory import MemoryPlan, parse_memory, plan_memory
from tokenseg.outputs import (
    MANIFEST_NAME,
    STATUS_NAME,
    SUMMARY_NAME,
    CaseResult,
    check_output_file,
    check_output_folder,
    manifest_file,
    mask_name,
    no_findings_file,
    part_name,
    quality_file,
    summary,
    write_output,
)
from tokenseg.predict import check_ensemble, segment_in_slabs
from tokenseg.privacy import shown_name, without_names
from tokenseg.progress import Progress, Silent
from tokenseg.provenance import segment_manifest
from tokenseg.quality import read_quality
from tokenseg.shapes import MaskArray
from tokenseg.status import (
    CaseStatus,
    append_status,
    case_digest,
    case_key,
    current_mask,
    file_digest,
    peak_mib,
    read_statuses,
)
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
    command: str = "",
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
        command: For the manifest.

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
        return [_segment_alone(models, cases[0], output_path, options, progress or Silent(), command)]
    check_output_folder(output_path, cases)
    cases = cases[part - 1 :: count]
    return segment_cases(models, cases, output_path, progress or Silent(), options=options, command=command)


def segment_cases(
    models: Sequence[Model],
    cases: Sequence[Case],
    folder: Path,
    progress: Progress,
    *,
    options: SegmentOptions | None = None,
    command: str = "",
) -> list[CaseResult]:
    """Segment cases into `folder`: `CASE` with the input's ending, and `CASE_qc.json`.

    Beside the masks are `manifest.json`, `status.jsonl`, a line a case as it is done, and `summary.csv`, kept up to
    date. Cases that an earlier call did from the same input with the same weights and settings are not done again.
    """
    options = options or SegmentOptions()
    status_path, summary_path = (folder / part_name(name, options) for name in (STATUS_NAME, SUMMARY_NAME))
    plan = models[0].facts.plan
    # Cases still to come stand in the summary too, so that an interrupted run does not pass for a complete one.
    results = [CaseResult(case.case_id, None, {}, "not segmented yet") for case in cases]
    remove_leftovers(folder)
    write_atomically(summary_path, summary(results, plan))
    write_atomically(folder / part_name(MANIFEST_NAME, options), segment_manifest(models, options, command))
    earlier = read_statuses(folder)
    settings = _key_settings(models, options)
    progress.stage("segmenting", len(cases))
    for number, case in enumerate(cases):
        results[number] = _done_before(models, case, folder, earlier, settings)
        if results[number].mask is None:
            results[number], status = _segment_into(models, case, folder, options, progress, settings)
            append_status(status_path, status)
        if number % max(1, len(cases) // _SUMMARIES) == 0 or number == len(cases) - 1:
            write_atomically(summary_path, summary(results, plan))
        progress.advance(_shown(case, options))
    return results


def _segment_alone(
    models: Sequence[Model], case: Case, target: Path, options: SegmentOptions, progress: Progress, command: str
) -> CaseResult:
    result, status = _segment_whole(models, case, target, options, progress, _key_settings(models, options))
    if result.mask is not None:
        write_atomically(manifest_file(target), segment_manifest(models, options, command, [status]))
    return result


def _segment_into(
    models: Sequence[Model],
    case: Case,
    folder: Path,
    options: SegmentOptions,
    progress: Progress,
    settings: Sequence[str],
) -> tuple[CaseResult, CaseStatus]:
    target = folder / mask_name(case)
    result, status = _segment_whole(models, case, target, options, progress, settings)
    if result.mask is None:
        # What an earlier call left would pass for a result of this one.
        quality_file(target).unlink(missing_ok=True)
        target.unlink(missing_ok=True)
        if case.exam is not None:
            no_findings_file(target).unlink(missing_ok=True)
    return result, status


def _segment_whole(
    models: Sequence[Model],
    case: Case,
    target: Path,
    options: SegmentOptions,
    progress: Progress,
    settings: Sequence[str],
) -> tuple[CaseResult, CaseStatus]:
    """Segment a case and say what became of it."""
    facts: dict[str, Any] = {"input_sha256": case_digest(case)}
    # Weights that were never saved have no fingerprint: with them everything is done anew.
    saved = all(model.facts.weights_sha256 for model in models)
    facts["key"] = case_key(case, facts["input_sha256"], settings) if saved else ""
    result = _segment_case(models, case, target, options, progress, facts)
    result = replace(result, shown_error=without_names(result.error, case, show_names=options.show_names))
    if result.quality is not None:
        write_atomically(quality_file(target), result.quality.model_dump_json(indent=1).encode())
    return result, _status(result, case, options, facts)


def _done_before(
    models: Sequence[Model], case: Case, folder: Path, earlier: Mapping[str, CaseStatus], settings: Sequence[str]
) -> CaseResult:
    """The result of an earlier call that still holds; else one without a mask."""
    target = folder / mask_name(case)
    names = [shown_name(case.case_id, show_names=show) for show in (False, True)]
    known = next((earlier[name] for name in names if name in earlier), None)
    key = "" if known is None else case_key(case, case_digest(case), settings)
    mask = current_mask(known, key, (target, no_findings_file(target)))
    quality = read_quality(quality_file(target))
    if known is None or mask is None or quality is None or not all(model.facts.weights_sha256 for model in models):
        return CaseResult(case.case_id, None, {})
    return CaseResult(
        case.case_id,
        mask,
        known.volumes_ml,
        windows_run=known.windows_run,
        windows_full=known.windows_full,
        warnings=known.warnings,
        notes=known.notes,
        quality=quality,
    )


def _key_settings(models: Sequence[Model], options: SegmentOptions) -> list[str]:
    """All that a mask depends on besides the input."""
    facts = [model.facts.model_dump_json() for model in models]  # the plan, and the fingerprint of the weights
    engines = ["torch" if model.compiled is None else "openvino" for model in models]
    wanted = [str(options.full), str(options.empty_seg), options.series]
    return [version("tokenseg"), *facts, *engines, models[0].device.type, *wanted]


def _status(result: CaseResult, case: Case, options: SegmentOptions, facts: Mapping[str, Any]) -> CaseStatus:
    mask = result.mask
    return CaseStatus(
        case=_shown(case, options),
        state="failed" if mask is None else "done",
        mask_sha256="" if mask is None else file_digest([DicomFile(mask)]),
        volumes_ml=result.volumes_ml,
        windows_run=result.windows_run,
        windows_full=result.windows_full,
        warnings=result.warnings,
        notes=result.notes,
        error=result.shown_error,
        seconds={stage: round(seconds, 3) for stage, seconds in result.seconds.items()},
        peak_mib=peak_mib(),
        **facts,
    )


def _shown(case: Case, options: SegmentOptions) -> str:
    return shown_name(case.case_id, show_names=options.show_names)


def _segment_case(
    models: Sequence[Model],
    case: Case,
    target: Path,
    options: SegmentOptions,
    progress: Progress,
    facts: dict[str, Any],
) -> CaseResult:
    """Segment a case; what is to stand in its status besides the result is put into `facts`."""
    plan, watch = models[0].facts.plan, Stopwatch()
    try:
        with watch.stage("load"):
            notes = describe_input(case, plan)
            memory = _plan_memory(models, case, options)
            if options.max_memory:
                progress.message(f"{_shown(case, options)}: {memory}; limit {options.max_memory}")
            volume = read_input(case, plan)
        segmented = segment_in_slabs(models, volume, watch, full=options.full, num_slabs=memory.num_slabs)
        mask = segmented.mask
        facts |= {
            "shape_vox": mask.shape,
            "affine": volume.affine.tolist(),
            "plan_shape_vox": segmented.record.grid_shape,
            "slabs": memory.num_slabs,
        }
        with watch.stage("save"):
            written = write_output(target, mask, volume, models[0], options)
    except TokenSegError as error:
        return CaseResult(case.case_id, None, {}, str(error))
    except (MemoryError, RuntimeError) as error:
        if not _is_memory_error(error):
            raise
        return CaseResult(case.case_id, None, {}, _NO_MEMORY.format(case.case_id))
    warnings = check_input(volume, models[0].facts.inputs)
    volumes_ml = _volumes_ml(mask, volume, plan)
    with watch.stage("quality"):
        quality = segmented.meter.quality(_shown(case, options), mask, models[0].facts, volumes_ml, warnings)
    return CaseResult(
        case.case_id,
        written,
        volumes_ml,
        windows_run=segmented.windows_run,
        windows_full=segmented.windows_full,
        warnings=warnings,
        notes=notes,
        seconds=watch.seconds,
        quality=quality,
    )


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
