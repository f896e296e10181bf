"""The reports of the commands: a training, an evaluation, a segmentation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from tokenseg.config import Plan
from tokenseg.datasets.cases import Dataset
from tokenseg.evaluation.results import Evaluation
from tokenseg.report.cases import (
    boxes_by_case,
    evaluation_views,
    segmentation_views,
    select_cases,
)
from tokenseg.report.curves import curves_section
from tokenseg.report.markup import Html, element, join
from tokenseg.report.page import Section, write_page
from tokenseg.report.scores import (
    evaluation_lead,
    evaluation_section,
    number_cell,
    scrollable,
    sortable_head,
    tile,
)
from tokenseg.report.token_table import tokens_section
from tokenseg.report.viewer import viewer_section
from tokenseg.segmentation.job import SegmentJob
from tokenseg.segmentation.privacy import shown_name
from tokenseg.segmentation.results import CaseResult, segmented_worst_first, worst_results_first
from tokenseg.tokens.find import ShownTokens, tokens_of_result

MAX_TOKENS_SHOWN = 3
"""Segmented cases whose tokens a report shows."""


def train_report(
    path: Path,
    evaluation: Evaluation,
    dataset: Dataset,
    log: Sequence[Mapping[str, str]],
    facts: Mapping[str, str],
    made: str,
    *,
    tokens: Sequence[ShownTokens] = (),
) -> None:
    """Write the report of a training: its validation, its pictures, its curves.

    Args:
        path: The HTML file.
        evaluation: Of the validation cases.
        dataset: Where their images are.
        log: Rows of `log.csv`.
        facts: What else to say of the run, such as steps, seed and fold, by name.
        made: Date for the footer.
        tokens: From `tokens_of_selected`; empty leaves them out.

    Raises:
        TokenSegError: A mask cannot be read, or the file cannot be written.
    """
    curves = curves_section(log)
    run = Section("run", "This run", fact_list(facts))
    name = dataset.root.resolve().name
    _write(path, f"Training on {name}", evaluation, dataset, tokens, (curves, run), made)


def evaluation_report(
    path: Path,
    evaluation: Evaluation,
    dataset: Dataset | None,
    made: str,
    *,
    title: str = "Evaluation",
    tokens: Sequence[ShownTokens] = (),
) -> None:
    """Write the report of an evaluation.

    Args:
        path: The HTML file.
        evaluation: What to show.
        dataset: Where the images are; without one, contours stand alone.
        made: Date for the footer.
        title: Of the page.
        tokens: From `tokens_of_selected`; empty leaves them out.

    Raises:
        TokenSegError: A mask cannot be read, or the file cannot be written.
    """
    _write(path, title, evaluation, dataset, tokens, (), made)


def segmentation_report(
    path: Path,
    results: Sequence[CaseResult],
    plan: Plan,
    made: str,
    *,
    tokens: Sequence[ShownTokens] = (),
    show_names: bool = False,
) -> None:
    """Write the report of a segmentation: volumes and quality, failed cases and why, the least sure in pictures.

    Args:
        path: The HTML file.
        results: From `segment_files`.
        plan: The settings of the model.
        made: Date for the footer.
        tokens: Of some of the cases; empty leaves them out.
        show_names: Call cases by their names, not by a hash.

    Raises:
        TokenSegError: A mask cannot be read, or the file cannot be written.
    """
    shown = {result.case_id: shown_name(result.case_id, show_names=show_names) for result in results}
    views = segmentation_views(results, plan, boxes_by_case(tokens))
    named = (replace(view, case_id=shown[view.case_id]) for view in views)
    names = [label.name for label in plan.labels]
    table = _volume_table(worst_results_first(results), names, shown)
    sections = [viewer_section(named), Section("volumes", "Volumes", table)]
    if tokens:
        sections.append(tokens_section([replace(each, case_id=shown[each.case_id]) for each in tokens]))
    write_page(path, "Segmentation", _segmentation_lead(results, names), sections, made)


def tokens_of_selected(job: SegmentJob, results: Sequence[CaseResult], evaluation: Evaluation) -> list[ShownTokens]:
    """Tokens of the cases that the report of an evaluation will show; near the reference boundary.

    Args:
        job: By which they were segmented.
        results: What became of the cases.
        evaluation: Says which cases, and where their references are.

    Raises:
        TokenSegError: An image or reference cannot be read or used.
    """
    by_id = {result.case_id: result for result in results}
    references = {row.case_id: row.reference for row in evaluation.rows}
    chosen = [case_id for case_id, _ in select_cases(evaluation) if case_id in by_id]
    return [report for case_id in chosen for report in tokens_of_result(job, by_id[case_id], references[case_id])]


def tokens_of_worst(job: SegmentJob, results: Sequence[CaseResult]) -> list[ShownTokens]:
    """Tokens of the segmented cases that come first in the report: unusual ones, then the least sure.

    Args:
        job: By which they were segmented; says of how many.
        results: From `segment_files`.

    Raises:
        TokenSegError: An image cannot be read any more.
    """
    shown = segmented_worst_first(results)[: job.tokens_of]
    return [report for result in shown for report in tokens_of_result(job, result)]


def fact_list(facts: Mapping[str, str]) -> Html:
    """Names and what they stand for, one below the other."""
    pairs = (join((element("dt", name), element("dd", fact))) for name, fact in facts.items())
    return element("dl", *pairs, class_="run")


def _write(
    path: Path,
    title: str,
    evaluation: Evaluation,
    dataset: Dataset | None,
    tokens: Sequence[ShownTokens],
    more: Sequence[Section],
    made: str,
) -> None:
    views = evaluation_views(evaluation, dataset, boxes_by_case(tokens))
    sections = [viewer_section(views), evaluation_section(evaluation)]
    if tokens:
        sections.append(tokens_section(tokens))
    # The layout's reason also says where exams are synthetic.
    origin = element("p", f"Images and references: {dataset.reason}.", class_="help") if dataset else ""
    write_page(path, title, join((evaluation_lead(evaluation), origin)), [*sections, *more], made)


def _segmentation_lead(results: Sequence[CaseResult], names: Sequence[str]) -> Html:
    done = [result for result in results if result.mask is not None]
    failed = len(results) - len(done)
    sentence = f"{len(done)} of {len(results)} case{'' if len(results) == 1 else 's'} segmented"
    ending = f"; {failed} failed, the reasons are in the table." if failed else "."
    tiles = [tile("Failed", str(failed), f"of {len(results)}", bad=failed > 0)]
    for name in names[:3]:
        volumes = [result.volumes_ml[name] for result in done]
        if volumes:
            found = sum(volume > 0 for volume in volumes)
            spread = f"{min(volumes):.2f} to {max(volumes):.2f} ml, found in {found} of {len(volumes)}"
            tiles.append(tile(f"{name}, median", f"{median(volumes):.2f} ml", spread))
    return join((element("p", sentence + ending, class_="result"), element("div", *tiles, class_="tiles")))


def _volume_table(results: Sequence[CaseResult], names: Sequence[str], shown: Mapping[str, str]) -> Html:
    columns = [("Case", False), ("Entropy", True), *((f"{name} (ml)", True) for name in names)]
    columns.append(("Unusual, or why it failed", False))
    rows = [
        element(
            "tr",
            element("th", shown[result.case_id], scope="row"),
            number_cell(_entropy(result), 3),
            *(number_cell(result.volumes_ml.get(name, math.nan), 2) for name in names),
            element("td", _remarks(result), class_="prose"),
            class_="bad" if result.mask is None else None,
        )
        for result in results
    ]
    table = element("table", sortable_head(columns), element("tbody", *rows), class_="sortable")
    return scrollable(table, "Volumes of each case", tall=True)


def _entropy(result: CaseResult) -> float:
    value = None if result.quality is None else result.quality.entropy
    return math.nan if value is None else value


def _remarks(result: CaseResult) -> str:
    return result.shown_error if result.quality is None else "; ".join(result.quality.flags)
