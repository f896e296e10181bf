"""Cases of a cohort: which are left to do, and what became of each, on disk as it happens.

Whoever computes, this process (`segment.py`) or workers elsewhere (`cluster.py`), takes cases from here and brings back
results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tokenseg.datasets.cases import Case
from tokenseg.files import remove_leftovers, write_atomically
from tokenseg.inference.quality import read_quality
from tokenseg.plan_grid.probabilities import is_probabilities
from tokenseg.segmentation.job import SegmentJob
from tokenseg.segmentation.output_files import (
    MANIFEST_NAME,
    STATUS_NAME,
    SUMMARY_NAME,
    mask_name,
    no_findings_file,
    part_name,
    probabilities_file,
    quality_file,
)
from tokenseg.segmentation.privacy import shown_name
from tokenseg.segmentation.provenance import segment_manifest
from tokenseg.segmentation.results import CaseResult, rank, summary
from tokenseg.segmentation.stages import CaseToDo
from tokenseg.segmentation.status import CaseStatus, append_status, case_key, current_mask, read_statuses

_SUMMARIES = 100
"""How often the summary is written on the way, at most; each time as a whole."""


class Cohort:
    """Cases of a cohort, in their order.

    Args:
        job: What was asked for.
        cases: The cohort, or this part of it.
        folder: Where masks go; beside them `manifest.json`, `status.jsonl`, and `summary.csv`, kept up to date.

    Raises:
        FileError: The folder cannot be written.
    """

    def __init__(self, job: SegmentJob, cases: Sequence[Case], folder: Path) -> None:
        self.job = job
        self._cases, self._folder = cases, folder
        # Cases still to come stand in the summary too, so that an interrupted run does not pass for a complete one.
        self.results = [CaseResult(case, None, {}, "not segmented yet") for case in cases]
        self._with_tokens: list[int] = []
        if job.options.part()[1] == 1:  # other parts may be at work in this folder
            remove_leftovers(folder)
        self._earlier = read_statuses(folder)
        self.close()
        write_atomically(folder / part_name(MANIFEST_NAME, job.options), segment_manifest(job))
        job.progress.stage("segmenting", len(cases))

    def left(self) -> Iterator[tuple[int, CaseToDo]]:
        """Cases with their numbers, but for those that an earlier call did from the same input in the same way."""
        for number, case in enumerate(self._cases):
            to_do = self._to_do(case)
            known = self._done_before(to_do)
            if known is None:
                yield number, to_do
            else:
                self.finish(number, known, None)

    def finish(self, number: int, result: CaseResult, status: CaseStatus | None) -> None:
        """Note what became of a case; `status` is None where a line says so already."""
        self.results[number] = result
        if result.tokens is not None:
            self._keep_tokens(number)
        if status is not None:
            append_status(self._folder / part_name(STATUS_NAME, self.job.options), status)
        if number % max(1, len(self._cases) // _SUMMARIES) == 0:
            self.close()
        self.job.progress.advance(shown_name(result.case_id, show_names=self.job.options.show_names))

    def close(self) -> None:
        """Write the summary, also of a cohort that somebody interrupts."""
        write_atomically(self._folder / part_name(SUMMARY_NAME, self.job.options), summary(self.results, self.job.plan))

    def _keep_tokens(self, number: int) -> None:
        """Keep tokens of the least sure cases only: those of a large cohort would fill the memory."""
        self._with_tokens.append(number)
        if len(self._with_tokens) > self.job.tokens_of:
            surest = max(self._with_tokens, key=lambda each: rank(self.results[each]))
            self._with_tokens.remove(surest)
            self.results[surest] = replace(self.results[surest], tokens=None)

    def _to_do(self, case: Case) -> CaseToDo:
        job = self.job
        names = [shown_name(case.case_id, show_names=show) for show in (False, True)]
        known = next((self._earlier[name] for name in names if name in self._earlier), None)
        in_same_way = known is not None and known.key and known.key == case_key(case, known.input_sha256, job.settings)
        return CaseToDo(
            case,
            self._folder / mask_name(case),
            job.options,
            job.settings if job.ensemble.is_saved else (),
            tokens=job.tokens_of > 0,
            earlier=known if in_same_way else None,
        )

    def _done_before(self, to_do: CaseToDo) -> CaseResult | None:
        """The result of an earlier call that still holds."""
        known, target = to_do.earlier, to_do.target
        if known is None:
            return None
        mask = current_mask(known, to_do.key, (target, no_findings_file(target)))
        quality = read_quality(quality_file(target))
        complete = not self.job.options.probabilities or is_probabilities(probabilities_file(target))
        if mask is None or quality is None or not complete:
            return None
        if known.volumes_ml.keys() != {label.name for label in self.job.plan.labels}:
            return None  # a line that somebody changed
        return CaseResult(
            to_do.case,
            mask,
            known.volumes_ml,
            windows_run=known.windows_run,
            windows_full=known.windows_full,
            warnings=known.warnings,
            notes=known.notes,
            quality=quality,
        )
