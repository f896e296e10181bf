"""Segmentation of files: a scan, a folder of cases, a dataset or DICOM, each case on its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeAlias

from tokenseg.config import Plan
from tokenseg.datasets.case_table import is_case_table
from tokenseg.datasets.cases import Case
from tokenseg.datasets.inputs import input_size, list_inputs
from tokenseg.errors import ConfigError, FileError, TokenSegError
from tokenseg.files import write_atomically
from tokenseg.imaging.formats import IMAGE_ENDINGS
from tokenseg.inference.memory import available_mib, parse_memory
from tokenseg.segmentation.cohort import Cohort
from tokenseg.segmentation.job import SegmentJob
from tokenseg.segmentation.output_files import check_output_file, check_output_folder, manifest_file
from tokenseg.segmentation.provenance import segment_manifest
from tokenseg.segmentation.results import CaseResult
from tokenseg.segmentation.stages import (
    CaseToDo,
    ComputedCase,
    FailedCase,
    ReadCase,
    WrittenCase,
    compute_mask,
    read_case,
    write_case,
)

Read: TypeAlias = Callable[[], ReadCase | FailedCase]
"""Gives a case that is being read, or reads it now."""
Compute: TypeAlias = Callable[[Cohort], None]
"""Who does the cases of a cohort that are left."""

_AHEAD_SHARE = 1 / 8
"""The next scan is read while one is computed where it takes no more than this share of the free memory."""


def segment_files(
    job: SegmentJob, input_path: Path, output_path: Path, compute: Compute | None = None
) -> list[CaseResult]:
    """Segment a file, a folder of cases, or a dataset; write masks and, for a folder, `summary.csv`.

    A broken case is recorded in its result and does not stop the others. Masks of an earlier call are replaced; input
    images, and files that no earlier call wrote, never are.

    Args:
        job: Which models, what else was asked for, and who is told.
        input_path: An image file, a folder of images, a dataset folder, a table of cases (`.csv`), or DICOM (a folder,
            a zip archive or a file).
        output_path: A mask file for a single input file; else a folder, made if absent. For a single DICOM study
            either.
        compute: Who does the cases of a folder; this process if not given.

    Raises:
        TokenSegError: Input or output cannot be used at all.
    """
    options = job.options
    part, count = options.part()
    parse_memory(options.max_memory)
    cases = list_inputs(input_path, job.plan, options.series)
    is_dicom = cases[0].exam is not None
    endings = (*IMAGE_ENDINGS, ".dcm") if is_dicom else IMAGE_ENDINGS
    named_as_file = output_path.name.endswith(endings) and not output_path.is_dir()
    if is_dicom and input_path.is_dir() and output_path.resolve().is_relative_to(input_path.resolve()):
        raise FileError(f"output {output_path} lies among the DICOM files of {input_path}; name another place")
    if (len(cases) == 1 and named_as_file) if is_dicom else _is_one_image(input_path):
        check_output_file(output_path, input_path, endings, wanted=options.probabilities)
        if compute is not None:
            raise ConfigError("a single scan needs no cluster: leave out --engine ray, or give a folder of cases")
        return [_segment_alone(job, cases[0], output_path)]
    check_output_folder(output_path, cases, wanted=options.probabilities)
    return segment_cases(job, cases[part - 1 :: count], output_path, compute)


def segment_cases(
    job: SegmentJob, cases: Sequence[Case], folder: Path, compute: Compute | None = None
) -> list[CaseResult]:
    """Segment cases into `folder`: `CASE` with the input's ending, and `CASE_qc.json`; see `Cohort` for what else.

    Cases that an earlier call did from the same input with the same weights and settings are not done again.
    """
    cohort = Cohort(job, cases, folder)
    try:
        (compute or compute_here)(cohort)
    finally:
        cohort.close()
    return cohort.results


def segment_unwritten(job: SegmentJob, case: Case) -> ComputedCase:
    """Segment a case and write nothing: for what is told on the way, such as its tokens.

    Raises:
        TokenSegError: It cannot be segmented.
    """
    to_do = CaseToDo(case, Path(case.case_id), job.options, tokens=job.tokens_of > 0, alone=True)
    computed = compute_mask(read_case(to_do, job.ensemble, job.progress), job.ensemble, job.progress)
    if isinstance(computed, FailedCase):
        raise TokenSegError(computed.error)
    return computed


def compute_here(cohort: Cohort) -> None:
    """Do all cases that are left, one after the other; a thread reads ahead, another writes behind."""
    job, ensemble = cohort.job, cohort.job.ensemble
    written: list[tuple[int, Future[WrittenCase]]] = []
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        try:
            begun = _begin(cohort, reader)
            waiting = next(begun, None)
            while waiting is not None:
                (number, read), waiting = waiting, next(begun, None)
                if job.options.max_memory:
                    _take(written, cohort)  # what is still being written would count
                computed = compute_mask(read(), ensemble, job.progress)
                del read  # what holds a scan is let go before the next one is held
                _take(written, cohort)
                written.append((number, writer.submit(write_case, computed, ensemble)))
                del computed
        finally:
            _take(written, cohort)  # also where somebody interrupts


def _begin(cohort: Cohort, reader: ThreadPoolExecutor) -> Iterator[tuple[int, Read]]:
    job = cohort.job
    for number, to_do in cohort.left():
        read = partial(read_case, to_do, job.ensemble, job.progress)
        yield number, reader.submit(read).result if _may_be_read_ahead(to_do, job.plan) else read


def _may_be_read_ahead(to_do: CaseToDo, plan: Plan) -> bool:
    free = available_mib()
    if to_do.options.max_memory or free is None:
        return False
    try:
        size = input_size(to_do.case, plan)
    except TokenSegError:
        return True  # whose error comes when it is read
    return math.prod(size.shape) * size.num_channels * 4 / 2**20 < _AHEAD_SHARE * free


def _take(written: list[tuple[int, Future[WrittenCase]]], cohort: Cohort) -> None:
    while written:
        number, future = written[0]
        result, status = future.result()
        written.pop(0)  # not before: who interrupts the waiting loses nothing
        cohort.finish(number, result, status)


def _is_one_image(path: Path) -> bool:
    return path.is_file() and not is_case_table(path)


def _segment_alone(job: SegmentJob, case: Case, target: Path) -> CaseResult:
    settings = job.settings if job.ensemble.is_saved else ()
    to_do = CaseToDo(case, target, job.options, settings, tokens=job.tokens_of > 0, alone=True)
    computed = compute_mask(read_case(to_do, job.ensemble, job.progress), job.ensemble, job.progress)
    result, status = write_case(computed, job.ensemble)
    if result.mask is not None:
        write_atomically(manifest_file(target), segment_manifest(job, [status]))
    return result
