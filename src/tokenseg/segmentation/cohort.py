"""Cases of a cohort: which cases are left, and what became of each, on disk as it happens.

Whoever computes, this process (`segment.py`) or workers elsewhere (`cluster.py`), takes cases from here and brings back
results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from tokenseg.config import SegmentOptions
from tokenseg.datasets.cases import Case
from tokenseg.files import remove_leftovers, write_atomically
from tokenseg.inference.quality import read_quality
from tokenseg.plan_grid.probabilities import is_probabilities
from tokenseg.progress import Progress
from tokenseg.saved_model.checkpoint import Model
from tokenseg.segmentation.case_work import Work
from tokenseg.segmentation.outputs import (
    MANIFEST_NAME,
    STATUS_NAME,
    SUMMARY_NAME,
    CaseResult,
    mask_name,
    no_findings_file,
    part_name,
    probabilities_file,
    quality_file,
    summary,
)
from tokenseg.segmentation.privacy import shown_name
from tokenseg.segmentation.provenance import segment_manifest
from tokenseg.segmentation.status import CaseStatus, append_status, case_digest, case_key, current_mask, read_statuses

_SUMMARIES = 100
"""How often the summary is written on the way, at most; each time as a whole."""


class Cohort:
    """Cases of a cohort, in their order.

    Args:
        models: That compute.
        cases: The cohort, or this part of it.
        folder: Where masks go; beside them `manifest.json`, `status.jsonl`, and `summary.csv`, kept up to date.
        progress: Told of each case.
        options: What was asked for.
        command: For the manifest.

    Raises:
        FileError: The folder cannot be written.
    """

    def __init__(
        self,
        models: Sequence[Model],
        cases: Sequence[Case],
        folder: Path,
        progress: Progress,
        options: SegmentOptions,
        command: str,
    ) -> None:
        self.models, self.options, self.progress = models, options, progress
        self.settings = key_settings(models, options)
        self._cases, self._folder = cases, folder
        # Cases still to come stand in the summary too, so that an interrupted run does not pass for a complete one.
        self.results = [CaseResult(case.case_id, None, {}, "not segmented yet") for case in cases]
        if options.part()[1] == 1:  # other parts may be at work in this folder
            remove_leftovers(folder)
        self._earlier = read_statuses(folder)
        self.close()
        write_atomically(folder / part_name(MANIFEST_NAME, options), segment_manifest(models, options, command))
        progress.stage("segmenting", len(cases))

    def left(self) -> Iterator[tuple[int, Work]]:
        """Cases with their numbers, but for those that an earlier call did from the same input in the same way."""
        for number, case in enumerate(self._cases):
            work = Work(case, self._folder / mask_name(case), self.options)
            known = self._done_before(work)
            if known is None:
                yield number, work
            else:
                self.finish(number, known, None)

    def finish(self, number: int, result: CaseResult, status: CaseStatus | None) -> None:
        """Note what became of a case; `status` is None where a line says so already."""
        self.results[number] = result
        if status is not None:
            append_status(self._folder / part_name(STATUS_NAME, self.options), status)
        if number % max(1, len(self._cases) // _SUMMARIES) == 0:
            self.close()
        self.progress.advance(shown_name(result.case_id, show_names=self.options.show_names))

    def close(self) -> None:
        """Write the summary, also of a cohort that somebody interrupts."""
        write_atomically(
            self._folder / part_name(SUMMARY_NAME, self.options), summary(self.results, self.models[0].facts.plan)
        )

    def _done_before(self, work: Work) -> CaseResult | None:
        """The result of an earlier call that still holds."""
        case, target = work.case, work.target
        names = [shown_name(case.case_id, show_names=show) for show in (False, True)]
        known = next((self._earlier[name] for name in names if name in self._earlier), None)
        if known is None:
            return None
        work.digest = case_digest(case)
        if known.key and known.key == case_key(case, known.input_sha256, self.settings):
            work.earlier = known
        key = case_key(case, work.digest, self.settings)
        mask = current_mask(known, key, (target, no_findings_file(target)))
        quality = read_quality(quality_file(target))
        saved = all(model.facts.weights_sha256 for model in self.models)
        complete = not self.options.probabilities or is_probabilities(probabilities_file(target))
        if mask is None or quality is None or not saved or not complete:
            return None
        if known.volumes_ml.keys() != {label.name for label in self.models[0].facts.plan.labels}:
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


def key_settings(models: Sequence[Model], options: SegmentOptions) -> list[str]:
    """All that a mask depends on besides the input."""
    facts = [model.facts.model_dump_json() for model in models]  # the plan, and the fingerprint of the weights
    engines = ["torch" if model.compiled is None else "openvino" for model in models]
    wanted = [str(options.full), str(options.empty_seg), options.series]
    return [version("tokenseg"), *facts, *engines, models[0].device.type, *wanted]
