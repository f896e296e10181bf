"""The course of a training: losses, validation, learning rate and codebook over its steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from tokenseg.report.charts import Line, line_chart
from tokenseg.report.markup import Html, element
from tokenseg.report.page import Section

_PARTS = {"segmentation": "segmentation", "deep": "deep supervision", "score": "score", "commitment": "commitment"}
_SINGLE = (
    ("Learning rate", "learning_rate", "learning rate", True),
    ("Codebook perplexity", "code_perplexity", "codes", False),
    ("Codebook in use", "code_used_fraction", "share of codes", False),
)


def curves_section(rows: Sequence[Mapping[str, str]], anchor: str = "curves", title: str = "Training") -> Section:
    """Curves over the steps; a column without any number has no chart.

    Args:
        rows: As `tokenseg.training.csv_log.read_log` gives them: a text a column, empty where there is no value.
        anchor: `id` of the section.
        title: Its heading.
    """
    parts = [(name, _line(rows, column, name)) for column, name in _PARTS.items()]
    # A network without tokens logs zeros for their losses.
    losses = [line for _, line in parts if np.any(line.values)]
    charts = [_single(rows, "Loss", "loss", "loss", smooth=True)]
    if losses:
        charts.append(line_chart("Parts of the loss", losses, "loss (log scale)", log=True))
    charts.append(_single(rows, "Validation Dice", "val_dice", "Dice", smooth=False))
    charts += [_single(rows, *chart[:3], smooth=chart[3]) for chart in _SINGLE]
    drawn = [chart for chart in charts if chart]
    if not drawn:
        return Section(anchor, title, element("p", "No step was logged."))
    return Section(anchor, title, element("div", *drawn, class_="charts"))


def _single(rows: Sequence[Mapping[str, str]], title: str, column: str, y_label: str, *, smooth: bool) -> Html:
    line = _line(rows, column, y_label)
    return line_chart(title, [line], y_label, smooth=smooth) if len(line.values) else Html("")


def _line(rows: Sequence[Mapping[str, str]], column: str, name: str) -> Line:
    points = [(float(row["step"]), _number(row.get(column, ""))) for row in rows]
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    steps, values = np.array(finite, dtype=np.float64).reshape(-1, 2).T
    return Line(name, steps, values)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
