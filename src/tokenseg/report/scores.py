"""Scores of an evaluation, for reading: a sentence, key figures, tables, one dot a case."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from tokenseg.evaluation.lesions import LESION_MIN_IOU
from tokenseg.evaluation.metrics import Interval, bootstrap_interval
from tokenseg.evaluation.results import CaseLabelRow, Evaluation, LabelSummary
from tokenseg.report.charts import Axis, Dot, Strip, axis_over, scatter_chart, strip_chart
from tokenseg.report.markup import Html, element, join
from tokenseg.report.page import Section

_MOST_TILES = 3

# Heading, measure, digits, whether a sign is wanted.
_COLUMNS = (
    ("Dice", "dice", 3, False),
    ("IoU", "iou", 3, False),
    ("HD95 (mm)", "hd95_mm", 2, False),
    ("NSD", "nsd", 3, False),
    ("Volume error (ml)", "volume_error_ml", 2, True),
    ("Lesion F1", "lesion_f1", 3, False),
)


def evaluation_lead(evaluation: Evaluation) -> Html:
    """The result in a sentence, and the key figures: Dice, surface distance and volume error; failures by count."""
    summaries = evaluation.summaries
    tiles = [_dice_tile(summary, remark) for summary, remark in _headed(summaries)]
    missed, invented = sum(each.n_missed for each in summaries), sum(each.n_false_positive for each in summaries)
    num_empty = invented + sum(each.n_both_empty for each in summaries)
    num_present = sum(each.n for each in summaries) - invented
    what = "cases" if len(summaries) == 1 else "masks"
    tiles.append(tile("Missed", f"{missed}", f"of {num_present} {what} with something to find", bad=missed > 0))
    if num_empty:
        tiles.append(tile("Invented", f"{invented}", f"of {num_empty} {what} with nothing to find", bad=invented > 0))
    return join((element("p", _sentence(evaluation), class_="result"), element("div", *tiles, class_="tiles")))


def evaluation_section(evaluation: Evaluation, anchor: str = "scores", title: str = "Scores") -> Section:
    """Means with intervals and counts of failures a label, charts with a dot a case, and every case in a table."""
    charts = _dice_strip(evaluation), _distance_strip(evaluation), _volume_scatter(evaluation)
    body = (
        summary_table(evaluation),
        element("p", *_definitions(evaluation), class_="help"),
        element("div", *charts, class_="charts"),
        element("h3", "Every case"),
        case_table(evaluation),
    )
    return Section(anchor, title, join(body))


def summary_table(evaluation: Evaluation) -> Html:
    """One row a label: mean and 95 % interval of each measure, and the counts of cases, failures and empty pairs."""
    counts = ("Cases", "Missed", "Invented", "Both empty")
    head = _head(("Label", *(column[0] for column in _COLUMNS), *counts))
    rows = [
        element(
            "tr",
            element("th", summary.label.name, scope="row"),
            *(_interval_cell(summary.intervals[name], digits, sign) for _, name, digits, sign in _COLUMNS),
            *map(_count_cell, (summary.n, summary.n_missed, summary.n_false_positive, summary.n_both_empty)),
        )
        for summary in evaluation.summaries
    ]
    table = element("table", element("caption", "Mean over cases, 95 % interval below"), head, element("tbody", *rows))
    return scrollable(table, "Scores of each label")


def case_table(evaluation: Evaluation) -> Html:
    """One row a case and label, sortable by every column; what is not defined is left empty."""
    columns = (
        ("Case", False),
        ("Label", False),
        ("Result", False),
        *((heading, True) for heading, *_ in _COLUMNS[:4]),
        ("Reference (ml)", True),
        ("Prediction (ml)", True),
        ("Error (ml)", True),
        ("Lesions found", True),
        ("Lesions overlooked", True),
        ("Lesions invented", True),
    )
    rows = [element("tr", *_case_cells(row), class_=_row_class(row)) for row in evaluation.rows]
    table = element("table", sortable_head(columns), element("tbody", *rows), class_="sortable")
    return scrollable(table, "Scores of each case", tall=True)


def tile(title: str, figure: str, detail: str, *, bad: bool = False) -> Html:
    """A key figure: what it is, the figure, and a remark; `bad` colours it as a failure."""
    parts = element("span", title), element("strong", figure), element("small", detail)
    return element("div", *parts, class_="tile bad" if bad else "tile")


def scrollable(table: Html, name: str, *, tall: bool = False) -> Html:
    """A box in which a wide table scrolls, so that the page does not; a tall one scrolls down, too."""
    class_ = "scroll tall" if tall else "scroll"
    return element("div", table, class_=class_, tabindex="0", role="region", aria_label=name)


def sortable_head(columns: Sequence[tuple[str, bool]]) -> Html:
    """A head whose headings are buttons; the flag says that a column holds numbers."""
    cells = (
        element("th", element("button", title, type="button"), scope="col", class_="number" if number else None)
        for title, number in columns
    )
    return element("thead", element("tr", *cells))


def number_cell(value: float, digits: int, *, sign: bool = False) -> Html:
    """A table cell with a number; NaN leaves it empty."""
    return element("td", _number(value, digits, sign=sign, missing=""), class_="number", data_value=_exact(value))


def _headed(summaries: Sequence[LabelSummary]) -> list[tuple[LabelSummary, str]]:
    """Labels with a key figure: all of a few that were scored, of many the best and the worst."""
    scored = [each for each in summaries if each.n] or list(summaries[:1])
    if len(scored) <= _MOST_TILES:
        return [(each, "") for each in scored]
    scored.sort(key=lambda each: each.intervals["dice"].mean)
    return [(scored[-1], " (best label)"), (scored[0], " (worst label)")]


def _sentence(evaluation: Evaluation) -> str:
    cases = len({row.case_id for row in evaluation.rows})
    scored = [each for each in evaluation.summaries if each.n]
    if not scored:
        return f"Nothing could be scored: in all {_cases(cases)} reference and prediction are empty."
    means = [f"{each.intervals['dice'].mean:.3f} for {each.label.name}" for each in scored]
    if len(scored) == 1:
        mean, low, high = scored[0].intervals["dice"]
        dice = f"{mean:.3f} (95 % interval {low:.3f} to {high:.3f}) for {scored[0].label.name}"
    elif len(scored) <= _MOST_TILES:
        dice = f"{', '.join(means[:-1])} and {means[-1]}"
    else:
        overall = sum(each.intervals["dice"].mean for each in scored) / len(scored)
        dice = f"{overall:.3f} (mean over {len(scored)} labels)"
    missing = evaluation.missing_predictions
    absent = f" {_cases(len(missing))} had no prediction and count{'s' if len(missing) == 1 else ''} as missed."
    return f"Over {_cases(cases)}, the mean Dice is {dice}.{absent if missing else ''}"


def _cases(count: int) -> str:
    return f"{count} case" if count == 1 else f"{count} cases"


def _dice_tile(summary: LabelSummary, remark: str) -> Html:
    dice, distance = summary.intervals["dice"], summary.intervals["hd95_mm"]
    error = summary.intervals["volume_error_ml"]
    failures = " with failures" if summary.n_missed + summary.n_false_positive else ""
    detail = (
        f"95 % interval {_number(dice.low, 3)} to {_number(dice.high, 3)}\n"
        f"HD95 {_number(distance.mean, 1)} mm{failures}, volume {_number(error.mean, 2, sign=True)} ml"
    )
    return tile(f"Dice, {summary.label.name}{remark}", _number(dice.mean, 3), detail)


def _definitions(evaluation: Evaluation) -> tuple[str, ...]:
    tolerance = f"{evaluation.tolerance_mm:g} mm"
    return (
        "A missed case (empty prediction) and an invented one (empty reference) count with the worst value: Dice 0, "
        "HD95 the diagonal of the image. Cases where both are empty are left out of means. ",
        f"NSD: share of both surfaces within {tolerance} of each other. ",
        f"Lesions match one to one from an IoU of {LESION_MIN_IOU:g}. ",
        "Volume error: prediction less reference.",
    )


def _head(titles: Sequence[str]) -> Html:
    cells = (
        element("th", title, scope="col", class_="number" if number else None) for number, title in enumerate(titles)
    )
    return element("thead", element("tr", *cells))


def _interval_cell(interval: Interval, digits: int, sign: bool) -> Html:
    mean, low, high = (_number(value, digits, sign=sign) for value in interval)
    spread = element("small", f"{low} to {high}") if not math.isnan(interval.mean) else ""
    return element("td", mean, spread, class_="number")


def _count_cell(count: int) -> Html:
    return element("td", str(count), class_="number")


def _case_cells(row: CaseLabelRow) -> tuple[Html, ...]:
    score = row.score
    found, invented, overlooked = score.lesions
    results = {
        "both_present": "",
        "missed": "missed" if row.prediction else "no prediction",
        "false_positive": "invented",
        "both_empty": "both empty",
    }
    return (
        element("th", row.case_id, scope="row"),
        element("td", row.label.name),
        element("td", results[score.status]),
        *(number_cell(getattr(score, name), digits) for _, name, digits, _ in _COLUMNS[:4]),
        number_cell(score.reference_ml, 2),
        number_cell(score.prediction_ml, 2),
        number_cell(score.volume_error_ml, 2, sign=True),
        *map(_count_cell, (found, overlooked, invented)),
    )


def _row_class(row: CaseLabelRow) -> str | None:
    return "bad" if _failed(row) else None


def _failed(row: CaseLabelRow) -> bool:
    return row.score.status in ("missed", "false_positive")


def _dice_strip(evaluation: Evaluation) -> Html:
    strips = []
    for summary in evaluation.summaries:
        dots = _dots(_scored_rows(evaluation, summary), lambda row: (row.score.dice, 0.0), "Dice {:.3f}")
        strips.append(Strip(summary.label.name, dots, *summary.intervals["dice"]))
    lowest = min((dot.x for strip in strips for dot in strip.dots), default=0.0)
    return strip_chart("Dice of each case", strips, Axis(max(0.0, math.floor(lowest * 10 - 0.5) / 10), 1.0, "Dice"))


def _distance_strip(evaluation: Evaluation) -> Html:
    """Only cases with both masks: the diagonal of the image, which the others count with, would dwarf all distances."""
    strips = []
    for summary in evaluation.summaries:
        found = [row for row in _scored_rows(evaluation, summary) if not _failed(row)]
        interval = bootstrap_interval(np.array([row.score.hd95_mm for row in found], dtype=np.float64))
        dots = _dots(found, lambda row: (row.score.hd95_mm, 0.0), "HD95 {:.2f} mm")
        strips.append(Strip(summary.label.name, dots, *interval))
    axis = axis_over([dot.x for strip in strips for dot in strip.dots], "HD95 (mm)", zero=True)
    return strip_chart("Surface distance, failures left out", strips, axis)


def _scored_rows(evaluation: Evaluation, summary: LabelSummary) -> list[CaseLabelRow]:
    return [row for row in evaluation.rows if row.label == summary.label and row.score.status != "both_empty"]


def _volume_scatter(evaluation: Evaluation) -> Html:
    groups = {
        summary.label.name: _dots(
            [row for row in evaluation.rows if row.label == summary.label],
            lambda row: (row.score.reference_ml, row.score.prediction_ml),
            "reference {:.2f} ml, prediction {:.2f} ml",
        )
        for summary in evaluation.summaries
    }
    return scatter_chart("Volume of each case", groups, "reference (ml)", "prediction (ml)")


def _dots(rows: Sequence[CaseLabelRow], place: Callable[[CaseLabelRow], tuple[float, float]], text: str) -> list[Dot]:
    return [Dot(*place(row), f"{row.case_id}: {text.format(*place(row))}", _failed(row)) for row in rows]


def _number(value: float, digits: int, *, sign: bool = False, missing: str = "n/a") -> str:
    if math.isnan(value):
        return missing
    rounded = round(value, digits) or 0.0  # never minus zero
    text = f"{rounded:+.{digits}f}" if sign and rounded else f"{rounded:.{digits}f}"
    return text.replace("-", "\u2212")


def _exact(value: float) -> str:
    return "" if math.isnan(value) else repr(float(value))
