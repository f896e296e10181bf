"""The card of a published model, beyond its plan: figures with intervals, failure cases, limits, licence."""

from __future__ import annotations

from collections.abc import Iterable

from tokenseg.config import Fraction, PositiveInt, Settings


class Figure(Settings):
    """A mean over cases with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


class LabelFigures(Settings):
    """One label over all cases of a cross-validation."""

    label: str
    cases: PositiveInt
    """Cases in the means."""
    dice: Figure
    hd95_mm: Figure
    nsd: Figure
    """Normalised surface Dice."""


class CaseFigures(Settings):
    """One case of a cross-validation."""

    case: str
    dice: dict[str, float]
    """By label; labels that are empty in reference and prediction are left out."""


class CrossValidation(Settings):
    """How good networks are that were trained alike, each on the cases that it did not see."""

    cases: PositiveInt
    tolerance_mm: float
    """Of the surface Dice."""
    fold_steps: tuple[int, ...]
    """Training steps of each fold."""
    fold_dice: tuple[Fraction, ...]
    """Mean Dice of each fold, over cases and labels."""
    mean_dice: Figure
    """Over all cases; of a case, the mean over its labels."""
    labels: tuple[LabelFigures, ...]
    worst: tuple[CaseFigures, ...]
    """Cases with the lowest Dice, worst first."""


class Publication(Settings):
    """What those need to know who did not train the model."""

    source: str
    """The training data, and whose they are."""
    licence: str
    """Of the weights."""
    limits: tuple[str, ...]
    figures: CrossValidation


def publication_lines(publication: Publication) -> list[str]:
    """Sections of the card, in Markdown."""
    figures = publication.figures
    steps = " to ".join(f"{count}" for count in sorted({min(figures.fold_steps), max(figures.fold_steps)}))
    return [
        "## Data",
        "",
        publication.source,
        "",
        "## Figures",
        "",
        f"{len(figures.fold_dice)}-fold cross-validation: each of {figures.cases} cases segmented by a network that "
        f"was trained on the other folds ({steps} steps). Means over cases with 95 % bootstrap intervals. The weights "
        "here were trained on all cases in the same way, and so have no figures of their own.",
        "",
        *figures_lines(figures),
        "",
        "## Failure cases",
        "",
        "The lowest Dice in the cross-validation:",
        "",
        *_case_table(figures.worst, [each.label for each in figures.labels]),
        "",
        "## Limits",
        "",
        *(f"- {limit}" for limit in publication.limits),
        "",
        "## Licence",
        "",
        publication.licence,
        "",
    ]


def figures_lines(figures: CrossValidation) -> list[str]:
    """Figures by label as a table in Markdown, and their mean below it."""
    folds = ", ".join(f"{dice:.4f}" for dice in figures.fold_dice)
    return [
        f"| label | cases | Dice | HD95 (mm) | surface Dice at {figures.tolerance_mm:g} mm |",
        "| --- | --- | --- | --- | --- |",
        *map(_label_row, figures.labels),
        "",
        f"Mean Dice of the labels {_shown(figures.mean_dice, 4)}; of the folds {folds}.",
    ]


def _label_row(figures: LabelFigures) -> str:
    measures = (_shown(figures.dice, 4), _shown(figures.hd95_mm, 2), _shown(figures.nsd, 4))
    return f"| {figures.label} | {figures.cases} | {' | '.join(measures)} |"


def _shown(figure: Figure, digits: int) -> str:
    return f"{figure.mean:.{digits}f} ({figure.low:.{digits}f} to {figure.high:.{digits}f})"


def _case_table(cases: Iterable[CaseFigures], labels: list[str]) -> list[str]:
    rows = [
        f"| {each.case} | "
        + " | ".join(f"{each.dice[name]:.4f}" if name in each.dice else "" for name in labels)
        + " |"
        for each in cases
    ]
    return [f"| case | {' | '.join(labels)} |", "| --- " * (len(labels) + 1) + "|", *rows]
