"""The cases that a report shows: which ones, and what the viewer gets of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from tokenseg.config import Label, Plan
from tokenseg.datasets.cases import Dataset
from tokenseg.datasets.inputs import read_input, read_written_mask
from tokenseg.datasets.layouts import load_image
from tokenseg.errors import TokenSegError
from tokenseg.evaluation.metrics import CaseLabelScore
from tokenseg.evaluation.results import CaseLabelRow, Evaluation
from tokenseg.imaging.orientation import to_canonical
from tokenseg.imaging.volume import Mask, Volume, check_same_grid, read_mask
from tokenseg.plan_grid.intensities import channel_image
from tokenseg.report.viewer import CaseView
from tokenseg.segmentation.results import CaseResult, segmented_worst_first
from tokenseg.shapes import Affine, BoolMask, MaskArray
from tokenseg.tokens.case import TokenBoxes
from tokenseg.tokens.find import ShownTokens

MAX_CHANNELS_SHOWN = 2
MAX_SEGMENTED_SHOWN = 12
_WORST = ("worst", "2nd worst", "3rd worst")
_OBLIQUE_DEGREES = 5.0


class Selected(NamedTuple):
    """A case to show, and why."""

    case_id: str
    caption: str


def select_cases(evaluation: Evaluation) -> list[Selected]:
    """Choose the median case, the best, and up to three worst, by the mean Dice over labels; each case once.

    A missed or invented label counts 0, one with both masks empty does not count, and a case without any other is not
    chosen. Ties go by case id. The median comes first, as the typical one; of an even number it is the lower of two.
    Of two cases one is the best and one the worst.
    """
    dice: dict[str, list[float]] = {}
    for row in evaluation.rows:
        if not math.isnan(row.score.dice):
            dice.setdefault(row.case_id, []).append(row.score.dice)
    ranked = sorted((float(np.mean(values)), case_id) for case_id, values in dice.items())
    if not ranked:
        return []
    last, middle = len(ranked) - 1, (len(ranked) - 1) // 2
    names = dict(enumerate(_WORST[:middle])) | {middle: "median", last: "best"}
    if last < 2:
        names = {0: "worst", last: "best"} if last else {0: "only case"}
    order = sorted(names, key=lambda place: (names[place] != "median", -place))
    return [Selected(ranked[place][1], f"{names[place]}: Dice {ranked[place][0]:.2f}") for place in order]


def evaluation_views(
    evaluation: Evaluation, dataset: Dataset | None, tokens: Mapping[str, tuple[TokenBoxes, ...]] | None = None
) -> Iterator[CaseView]:
    """Read the cases that `select_cases` chooses, one after the other.

    Args:
        evaluation: Says which cases, and where their masks are.
        dataset: Where their images are; without it, and for a case that it does not have, contours stand alone.
        tokens: By case id, for those cases whose tokens are known.

    Raises:
        TokenSegError: A mask cannot be read any more. An image that cannot be shown is left out, with a note.
    """
    cases = {case.case_id: case for case in dataset.cases} if dataset else {}
    for selected in select_cases(evaluation):
        rows = [row for row in evaluation.rows if row.case_id == selected.case_id]
        case = cases.get(selected.case_id)
        boxes = (tokens or {}).get(selected.case_id, ())
        if dataset is None or case is None:
            yield _scored_view(selected, rows, None, (), boxes)
        else:
            yield _scored_view(selected, rows, partial(load_image, dataset, case), dataset.channels, boxes)


def segmentation_views(
    results: Sequence[CaseResult], plan: Plan, tokens: Mapping[str, tuple[TokenBoxes, ...]] | None = None
) -> Iterator[CaseView]:
    """Read up to twelve segmented cases, one after the other, the least sure first.

    Args:
        results: What became of the cases; failed ones are left out.
        plan: The settings of the model.
        tokens: By case id, for those cases whose tokens are known.

    Raises:
        TokenSegError: A mask cannot be read any more. An image that cannot be shown is left out, with a note.
    """
    for result in segmented_worst_first(results)[:MAX_SEGMENTED_SHOWN]:
        yield _segmented_view(result, plan, (tokens or {}).get(result.case_id, ()))


def boxes_by_case(shown: Sequence[ShownTokens]) -> dict[str, tuple[TokenBoxes, ...]]:
    """Tokens for drawing, by case, one set a model."""
    case_ids = dict.fromkeys(each.case_id for each in shown)
    return {case_id: tuple(each.boxes for each in shown if each.case_id == case_id) for case_id in case_ids}


class _Scan(NamedTuple):
    volume: Volume | None
    notes: tuple[str, ...]


def _read(read: Callable[[], Volume] | None, mask: Mask, case_id: str) -> _Scan:
    if read is None:
        return _Scan(None, ())
    try:
        volume = read()
        check_same_grid(volume, mask, (f"image of {case_id}", "its mask"))
    except TokenSegError as error:
        # The scores stand without the picture, and took longer to get.
        return _Scan(None, (f"The image cannot be shown: {error}.",))
    return _Scan(volume, ())


def _scored_view(
    selected: Selected,
    rows: Sequence[CaseLabelRow],
    read: Callable[[], Volume] | None,
    channels: Sequence[str],
    tokens: tuple[TokenBoxes, ...],
) -> CaseView:
    labels = tuple(row.label for row in rows)
    reference = read_mask(rows[0].reference)
    scan = _read(read, reference, selected.case_id)
    prediction = None if rows[0].prediction is None else _label_masks(read_mask(rows[0].prediction), labels)
    return CaseView(
        case_id=selected.case_id,
        caption=selected.caption,
        channels={} if scan.volume is None else _shown_channels(scan.volume, channels),
        spacing_mm=to_canonical(reference.array, reference.affine)[1],
        labels=labels,
        reference=_label_masks(reference, labels),
        prediction=prediction,
        tokens=tokens,
        facts={row.label.name: _fact(row.score) for row in rows},
        notes=(
            *scan.notes,
            *_oblique(reference.affine),
            *(("There is no prediction.",) if prediction is None else ()),
        ),
    )


def _segmented_view(result: CaseResult, plan: Plan, tokens: tuple[TokenBoxes, ...]) -> CaseView:
    if result.mask is None:
        raise ValueError(f"{result.case_id} has no mask to show")
    mask = read_written_mask(result.case, result.mask, plan)
    scan = _read(partial(read_input, result.case, plan), mask, result.case_id)
    largest = max(result.volumes_ml, key=lambda name: result.volumes_ml[name])
    return CaseView(
        case_id=result.case_id,
        caption=f"{largest} {result.volumes_ml[largest]:.2f} ml",
        channels={} if scan.volume is None else _shown_channels(scan.volume, plan.channels),
        spacing_mm=to_canonical(mask.array, mask.affine)[1],
        labels=plan.labels,
        reference=None,
        prediction=_label_masks(mask, plan.labels),
        tokens=tokens,
        facts={name: f"{volume:.2f} ml" for name, volume in result.volumes_ml.items()},
        notes=(*scan.notes, *_oblique(mask.affine)),
    )


def _shown_channels(volume: Volume, expressions: Sequence[str]) -> dict[str, Float[np.ndarray, "X Y Z"]]:
    """Differences first: where a contrast agent has come, a lesion shows best."""
    ordered = sorted(expressions, key=lambda expression: " - " not in expression)[:MAX_CHANNELS_SHOWN]
    return {name: to_canonical(channel_image(name, volume), volume.affine)[0] for name in ordered}


def _label_masks(mask: Mask, labels: Sequence[Label]) -> Bool[np.ndarray, "R X Y Z"]:
    return np.stack([to_canonical(_in_any(mask.array, label.values), mask.affine)[0] for label in labels])


def _in_any(array: MaskArray, values: Sequence[int]) -> BoolMask:
    # As numpy's `isin`, in a third of the time where a label has one value.
    return array == values[0] if len(values) == 1 else np.isin(array, values)


def _fact(score: CaseLabelScore) -> str:
    volumes = f"{score.prediction_ml:.2f} ml (reference {score.reference_ml:.2f} ml)"
    what = {"missed": "missed", "false_positive": "invented", "both_empty": "empty in both"}
    if score.status in what:
        return f"{what[score.status]}, {volumes}"
    return f"Dice {score.dice:.3f}, HD95 {score.hd95_mm:.1f} mm, {volumes}"


def _oblique(affine: Affine) -> tuple[str, ...]:
    cosines = np.abs(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)).max(axis=0)
    degrees = float(np.degrees(np.arccos(np.clip(cosines, 0, 1))).max())
    if degrees < _OBLIQUE_DEGREES:
        return ()
    return (f"The scan is oblique by {degrees:.0f} degrees; letters name the nearest directions.",)
