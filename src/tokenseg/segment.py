"""Segmentation of files: a scan, a folder of cases, a dataset or DICOM, each case on its own (`predict.py`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TypeAlias

from tokenseg.case_work import Work, compute_mask, read_case, write_case
from tokenseg.checkpoint import Model
from tokenseg.config import SegmentOptions
from tokenseg.data.cases import Case
from tokenseg.data.formats import IMAGE_ENDINGS
from tokenseg.data.inputs import input_size, list_inputs
from tokenseg.errors import FileError, TokenSegError
from tokenseg.files import remove_leftovers, write_atomically
from tokenseg.memory import available_mib, parse_memory
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
)
from tokenseg.predict import check_ensemble
from tokenseg.privacy import shown_name
from tokenseg.progress import Progress, Silent
from tokenseg.provenance import segment_manifest
from tokenseg.quality import read_quality
from tokenseg.status import CaseStatus, append_status, case_digest, case_key, current_mask, read_statuses

_SUMMARIES = 100
"""How often the summary is written on the way, at most; each time as a whole."""

_AHEAD_SHARE = 1 / 8
"""The next scan is read while one is computed where it takes no more than this share of the free memory."""


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
        input_path: An image file, a folder of images, a dataset folder, a table of cases (`.csv`), or DICOM (a folder,
            a zip archive or a file).
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
    if (len(cases) == 1 and named_as_file) if is_dicom else (input_path.is_file() and input_path.suffix != ".csv"):
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
    if options.part()[1] == 1:  # other parts may be at work in this folder
        remove_leftovers(folder)
    write_atomically(summary_path, summary(results, plan))
    write_atomically(folder / part_name(MANIFEST_NAME, options), segment_manifest(models, options, command))
    cohort = _Cohort(models, folder, options, read_statuses(folder), _key_settings(models, options), progress)
    progress.stage("segmenting", len(cases))

    def finish(number: int, result: CaseResult, status: CaseStatus | None) -> None:
        results[number] = result
        if status is not None:
            append_status(status_path, status)
        if number % max(1, len(cases) // _SUMMARIES) == 0:
            write_atomically(summary_path, summary(results, plan))
        progress.advance(shown_name(cases[number].case_id, show_names=options.show_names))

    # A thread reads ahead and another writes behind; results are taken in the order of the cases.
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        written: list[tuple[int, Future[tuple[CaseResult, CaseStatus]]]] = []
        try:
            for number, begun in _one_ahead(_begin(cohort, cases, reader)):
                if isinstance(begun, CaseResult):
                    _take(written, finish)
                    finish(number, begun, None)
                    continue
                if options.max_memory:
                    _take(written, finish)  # what is still being written would count
                work = begun()
                compute_mask(work, models, progress)
                _take(written, finish)
                written.append((number, writer.submit(write_case, work, models)))
        finally:
            _take(written, finish)  # also where somebody interrupts
            write_atomically(summary_path, summary(results, plan))
    return results


@dataclass(frozen=True, eq=False)
class _Cohort:
    """What all cases share."""

    models: Sequence[Model]
    folder: Path
    options: SegmentOptions
    earlier: Mapping[str, CaseStatus]
    settings: Sequence[str]
    progress: Progress


Begun: TypeAlias = CaseResult | Callable[[], Work]
"""A case that was done before, or what gives its work with the scan read."""


def _begin(cohort: _Cohort, cases: Sequence[Case], reader: ThreadPoolExecutor) -> Iterator[tuple[int, Begun]]:
    for number, case in enumerate(cases):
        work = Work(case, cohort.folder / mask_name(case), cohort.options)
        known = _done_before(cohort, work)
        if known is not None:
            yield number, known
            continue
        read = partial(_read, work, cohort)
        yield number, reader.submit(read).result if _may_be_read_ahead(cohort, work) else read


def _read(work: Work, cohort: _Cohort) -> Work:
    read_case(work, cohort.models, cohort.settings, cohort.progress)
    return work


def _may_be_read_ahead(cohort: _Cohort, work: Work) -> bool:
    free = available_mib()
    if cohort.options.max_memory or free is None:
        return False
    try:
        work.size = input_size(work.case, cohort.models[0].facts.plan)
    except TokenSegError:
        return True  # whose error comes when it is read
    return math.prod(work.size.shape) * work.size.num_channels * 4 / 2**20 < _AHEAD_SHARE * free


def _one_ahead(begun: Iterator[tuple[int, Begun]]) -> Iterator[tuple[int, Begun]]:
    """Ask for the next before each is given."""
    waiting = next(begun, None)
    while waiting is not None:
        current, waiting = waiting, next(begun, None)
        yield current


def _take(
    written: list[tuple[int, Future[tuple[CaseResult, CaseStatus]]]],
    finish: Callable[[int, CaseResult, CaseStatus | None], None],
) -> None:
    while written:
        number, future = written[0]
        result, status = future.result()
        written.pop(0)  # not before: who interrupts the waiting loses nothing
        finish(number, result, status)


def _segment_alone(
    models: Sequence[Model], case: Case, target: Path, options: SegmentOptions, progress: Progress, command: str
) -> CaseResult:
    work = Work(case, target, options, alone=True)
    read_case(work, models, _key_settings(models, options), progress)
    compute_mask(work, models, progress)
    result, status = write_case(work, models)
    if result.mask is not None:
        write_atomically(manifest_file(target), segment_manifest(models, options, command, [status]))
    return result


def _done_before(cohort: _Cohort, work: Work) -> CaseResult | None:
    """The result of an earlier call that still holds."""
    case, target, earlier = work.case, work.target, cohort.earlier
    names = [shown_name(case.case_id, show_names=show) for show in (False, True)]
    known = next((earlier[name] for name in names if name in earlier), None)
    if known is None:
        return None
    work.digest = case_digest(case)
    key = case_key(case, work.digest, cohort.settings)
    mask = current_mask(known, key, (target, no_findings_file(target)))
    quality = read_quality(quality_file(target))
    saved = all(model.facts.weights_sha256 for model in cohort.models)
    if mask is None or quality is None or not saved:
        return None
    if known.volumes_ml.keys() != {label.name for label in cohort.models[0].facts.plan.labels}:
        return None  # a line that somebody changed
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
