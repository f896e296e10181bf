"""Segmentation of files: a scan, a folder of cases, a dataset or DICOM, each case on its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeAlias

from tokenseg.config import Plan, SegmentOptions
from tokenseg.datasets.case_table import is_case_table
from tokenseg.datasets.cases import Case
from tokenseg.datasets.inputs import input_size, list_inputs
from tokenseg.errors import ConfigError, FileError, TokenSegError
from tokenseg.files import write_atomically
from tokenseg.imaging.formats import IMAGE_ENDINGS
from tokenseg.inference.memory import available_mib, parse_memory
from tokenseg.inference.predict import check_ensemble
from tokenseg.progress import Progress, Silent
from tokenseg.saved_model.checkpoint import Model
from tokenseg.segmentation.case_work import Work, compute_mask, read_case, write_case
from tokenseg.segmentation.cohort import Cohort, key_settings
from tokenseg.segmentation.outputs import CaseResult, check_output_file, check_output_folder, manifest_file
from tokenseg.segmentation.provenance import segment_manifest
from tokenseg.segmentation.status import CaseStatus

Written: TypeAlias = Future[tuple[CaseResult, CaseStatus]]
Compute: TypeAlias = Callable[[Cohort], None]
"""Who does the cases of a cohort that are left."""

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
    compute: Compute | None = None,
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
        compute: Who does the cases of a folder; this process if not given.

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
    if (len(cases) == 1 and named_as_file) if is_dicom else _is_one_image(input_path):
        check_output_file(output_path, input_path, endings, wanted=options.probabilities)
        if compute is not None:
            raise ConfigError("a single scan needs no cluster: leave out --engine ray, or give a folder of cases")
        return [_segment_alone(models, cases[0], output_path, options, progress or Silent(), command)]
    check_output_folder(output_path, cases, wanted=options.probabilities)
    cases = cases[part - 1 :: count]
    return segment_cases(
        models, cases, output_path, progress or Silent(), options=options, command=command, compute=compute
    )


def _is_one_image(path: Path) -> bool:
    return path.is_file() and not is_case_table(path)


def segment_cases(
    models: Sequence[Model],
    cases: Sequence[Case],
    folder: Path,
    progress: Progress,
    *,
    options: SegmentOptions | None = None,
    command: str = "",
    compute: Compute | None = None,
) -> list[CaseResult]:
    """Segment cases into `folder`: `CASE` with the input's ending, and `CASE_qc.json`; see `Cohort` for what else.

    Cases that an earlier call did from the same input with the same weights and settings are not done again.
    """
    cohort = Cohort(models, cases, folder, progress, options or SegmentOptions(), command)
    try:
        (compute or compute_here)(cohort)
    finally:
        cohort.close()
    return cohort.results


def compute_here(cohort: Cohort) -> None:
    """Do all cases that are left, one after the other; a thread reads ahead, another writes behind."""
    models, options = cohort.models, cohort.options
    written: list[tuple[int, Written]] = []
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        try:
            for number, read in _one_ahead(_begin(cohort, reader)):
                if options.max_memory:
                    _take(written, cohort)  # what is still being written would count
                work = read()
                compute_mask(work, models, cohort.progress)
                _take(written, cohort)
                written.append((number, writer.submit(write_case, work, models)))
        finally:
            _take(written, cohort)  # also where somebody interrupts


def _begin(cohort: Cohort, reader: ThreadPoolExecutor) -> Iterator[tuple[int, Callable[[], Work]]]:
    for number, work in cohort.left():
        read = partial(_read, work, cohort)
        yield number, reader.submit(read).result if _may_be_read_ahead(work, cohort.models[0].facts.plan) else read


def _read(work: Work, cohort: Cohort) -> Work:
    read_case(work, cohort.models, cohort.settings, cohort.progress)
    return work


def _may_be_read_ahead(work: Work, plan: Plan) -> bool:
    free = available_mib()
    if work.options.max_memory or free is None:
        return False
    try:
        work.size = input_size(work.case, plan)
    except TokenSegError:
        return True  # whose error comes when it is read
    return math.prod(work.size.shape) * work.size.num_channels * 4 / 2**20 < _AHEAD_SHARE * free


def _one_ahead(begun: Iterator[tuple[int, Callable[[], Work]]]) -> Iterator[tuple[int, Callable[[], Work]]]:
    """Ask for the next before each is given."""
    waiting = next(begun, None)
    while waiting is not None:
        current, waiting = waiting, next(begun, None)
        yield current


def _take(written: list[tuple[int, Written]], cohort: Cohort) -> None:
    while written:
        number, future = written[0]
        result, status = future.result()
        written.pop(0)  # not before: who interrupts the waiting loses nothing
        cohort.finish(number, result, status)


def _segment_alone(
    models: Sequence[Model], case: Case, target: Path, options: SegmentOptions, progress: Progress, command: str
) -> CaseResult:
    work = Work(case, target, options, alone=True)
    read_case(work, models, key_settings(models, options), progress)
    compute_mask(work, models, progress)
    result, status = write_case(work, models)
    if result.mask is not None:
        write_atomically(manifest_file(target), segment_manifest(models, options, command, [status]))
    return result
