"""Steered windows: a coarse view of a large scan decides where the network runs at full spacing.

One pass over the whole scan, averaged by the plan's `coarse_factor`, gives a coarse answer. Coarse voxels that may hold
foreground are kept, however many there are. Windows at full spacing are placed so that each kept voxel lies in the
middle half of one, as every voxel does in the full sliding window.

The answer at full spacing counts alone in the middle half of each window, which reaches to the edge of the scan where
the window does. From there to the edge of the window its share falls linearly to zero, and the coarse answer,
interpolated, has the rest; where no window lies it stands alone. Where this would take as many windows as the full
sliding window, that one runs instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenseg.config import Plan, Vox3
from tokenseg.errors import ConfigError
from tokenseg.imaging.orientation import from_rows, in_row_order, to_rows
from tokenseg.inference.windows import (
    Corner,
    Listen,
    PaddedRows,
    WindowSum,
    forward_of,
    full_rows,
    gathered,
    pad_rows,
    window_corners,
    window_rows,
)
from tokenseg.outputs import outputs_of
from tokenseg.plan_grid.coarse import coarse_image
from tokenseg.plan_grid.preprocess import Rows, rows_of
from tokenseg.plan_grid.resampling import axis_between, between, interpolated
from tokenseg.saved_model.checkpoint import Model
from tokenseg.shapes import ImageArray

KEPT_PROBABILITY = 0.5
"""Coarse voxels are kept from this probability of foreground on. Training weighs both classes the same, and labels a
coarse voxel by what is around it too, so that a lesion shows well above this (decision 0018). No higher, so that all
that the coarse view calls foreground is looked at."""


class Steered(NamedTuple):
    """Logits of a scan, and how many windows they took."""

    logits: Float[Tensor, "L X Y Z"]
    windows_run: int
    """Passes at full spacing."""
    windows_full: int
    """Passes that the full sliding window takes; 1 where the scan runs whole."""


class Route(NamedTuple):
    """Where a network runs in a scan."""

    image: PaddedRows
    corners: Sequence[Corner] | None
    """First voxels of the windows; None for one pass over all."""
    coarse: Float[Tensor, "L Xc Yc Zc"] | None
    """The coarse answer, where windows are steered by one."""
    windows_run: int
    """Passes at full spacing."""
    windows_full: int
    """Passes that the full sliding window takes; 1 where the scan runs whole."""


def predict_steered(model: Model, image: ImageArray) -> Steered:
    """Run a network over a prepared image: whole, or at full spacing where a coarse view calls for it.

    Args:
        model: Without a `coarse_factor` in its plan, all windows run.
        image: On the plan's grid, normalised.
    """
    return _predict(model, image, full=False)


def predict_full(model: Model, image: ImageArray) -> Steered:
    """Run a network over all of a prepared image at full spacing."""
    return _predict(model, image, full=True)


def _predict(model: Model, image: ImageArray, *, full: bool) -> Steered:
    rows = rows_of(image)
    route = choose_route(model, rows, full=full)
    answers = logits_rows(model, route, slice(0, rows.size[1]))
    return Steered(gathered(answers, rows), route.windows_run, route.windows_full)


def choose_route(model: Model, image: Rows, *, full: bool = False) -> Route:
    """Decide where a network runs, by a coarse view if the model was trained on some.

    Args:
        model: Without a `coarse_factor` in its plan, all windows run.
        image: On the plan's grid, normalised.
        full: Run all windows in any case.
    """
    plan = model.facts.plan
    # Windows lie on the image as it is padded to one window at least.
    padded = pad_rows(image, plan.window_vox)
    corners = window_corners(padded.rows.shape, plan)
    count = 1 if corners is None else len(corners)
    if corners is None or plan.coarse_factor is None or full:
        return Route(padded, corners, None, count, count)
    coarse = look_coarsely(model, padded.rows)
    steered = cover(kept_voxels(coarse, plan), padded.rows.shape, plan.window_vox, plan.coarse_factor)
    if len(steered) >= count:
        return Route(padded, corners, None, count, count)
    return Route(padded, steered, coarse, len(steered), count)


def logits_rows(
    model: Model, route: Route, stretch: slice, listen: Listen | None = None
) -> Iterator[Float[Tensor, "L b c"]]:
    """Logits of a scan, row by row.

    Args:
        model: The same as for the route.
        route: From `choose_route`.
        stretch: Voxels of the second axis that are asked for.
        listen: Told of the tokens of each pass at full spacing.
    """
    plan, forward = model.facts.plan, forward_of(model)
    if route.coarse is None or route.corners is None or plan.coarse_factor is None:
        yield from full_rows(forward, route.image, plan, route.corners, stretch, listen)
        return
    image, wanted = route.image, route.image.stretch(stretch)
    spread = _Spread(route.coarse, plan.coarse_factor, image.rows, wanted)
    ramps, depth = ramps_of(route.corners, image.rows, plan.window_vox), image.rows.size[2]
    sums = window_rows(forward, image.rows, plan.window_vox, route.corners, wanted, listen)
    for number, total in enumerate(sums):
        if image.holds(number):
            coarse = spread.row(number)
            yield image.cut(
                coarse if total is None else _joined(coarse, total, fine_share(ramps, number, wanted, depth))
            )


def look_coarsely(model: Model, image: Rows) -> Float[Tensor, "L Xc Yc Zc"]:
    """Logits of the coarse view of a whole image, in one pass.

    Args:
        model: Its plan has a `coarse_factor`.
        image: On the plan's grid, normalised.
    """
    plan = model.facts.plan
    if plan.coarse_factor is None:
        raise ConfigError(f"model {model.facts.name!r} was trained without coarse views; run all windows")
    view = rows_of(_coarse_view(image, plan.coarse_factor))
    padded = pad_rows(view, plan.window_vox)
    return gathered(full_rows(forward_of(model), padded, plan, None, slice(0, view.size[1])), view)


def _coarse_view(image: Rows, factor: Vox3) -> ImageArray:
    """`coarse_image` of rows, a coarse row at a time."""
    turned, count = in_row_order(factor, image.order), image.size[0]
    rows = [
        coarse_image(image.read(at, min(at + turned[0], count)).numpy(), turned) for at in range(0, count, turned[0])
    ]
    whole = from_rows(torch.from_numpy(np.concatenate(rows, axis=1)), image.order)
    return whole.contiguous().numpy()


def kept_voxels(
    logits: Float[Tensor, "L Xc Yc Zc"], plan: Plan, least_probability: float = KEPT_PROBABILITY
) -> Bool[np.ndarray, "Xc Yc Zc"]:
    """Coarse voxels that probably hold foreground or touch some, as training labels them.

    Args:
        logits: From `look_coarsely`.
        plan: Says how outputs are to be read.
        least_probability: Voxels are kept from this probability of foreground on.
    """
    kept: Bool[np.ndarray, "Xc Yc Zc"] = outputs_of(plan).foreground(logits).numpy() >= least_probability
    return kept


def cover(kept: Bool[np.ndarray, "Xc Yc Zc"], size: Vox3, window: Vox3, factor: Vox3) -> list[Corner]:
    """Place windows so that every kept voxel lies in the middle half of one: the fewest that a greedy search finds.

    The middle half reaches to the edge of the scan where its window does. Each turn takes the place that covers most
    of what is left, the first in a tie, and then centres the window on what it covers.

    Args:
        kept: Voxels of the coarse view.
        size: Of the scan at full spacing; at least the window.
        window: Size of a window.
        factor: Voxels of the scan in one of the coarse view.

    Returns:
        First voxels of the windows, in the order in which they were chosen.
    """
    axes = [_places(*each) for each in zip(size, window, factor, kept.shape, strict=True)]
    left, corners = kept.copy(), list[Corner]()
    while left.any():
        counts: Int[np.ndarray, "_ _ _"] = left.astype(np.int32)
        for axis, places in enumerate(axes):
            counts = places.sums(counts, axis)
        turn = np.unravel_index(int(counts.argmax()), counts.shape)
        best = [int(places.searched[at]) for places, at in zip(axes, turn, strict=True)]
        inside = tuple(slice(places.low[at], places.high[at]) for places, at in zip(axes, best, strict=True))
        covered = np.argwhere(left[inside]) + [part.start for part in inside]
        corner = [
            places.centred(at, int(line.min()), int(line.max()))
            for places, at, line in zip(axes, best, covered.T, strict=True)
        ]
        left[tuple(slice(places.low[at], places.high[at]) for places, at in zip(axes, corner, strict=True))] = False
        corners.append((corner[0], corner[1], corner[2]))
    return corners


class Ramps(NamedTuple):
    """How much the answer of a window counts along each axis of the rows, from the first voxel of the window on."""

    corner: Corner
    along: tuple[Float[Tensor, " aw"], Float[Tensor, " bw"], Float[Tensor, " cw"]]


def ramps_of(corners: Sequence[Corner], image: Rows, window: Vox3) -> list[Ramps]:
    """Ramps of windows, in the order of the rows.

    A window counts in full in its middle half, and from there its share falls linearly to its edge, except towards the
    edge of the scan.
    """
    ramps = []
    for corner in corners:
        first, second, third = (_ramp(corner[axis], image.shape[axis], window[axis]) for axis in image.order)
        ramps.append(Ramps(in_row_order(corner, image.order), (first, second, third)))
    return ramps


def fine_share(ramps: Sequence[Ramps], number: int, stretch: slice, depth: int) -> Float[Tensor, "b c"]:
    """How much the answer at full spacing counts in a row: 1 in the middle half of a window, 0 outside of all."""
    share = torch.zeros(stretch.stop - stretch.start, depth)
    for (row, b, c), (along, across, deep) in ramps:
        low, high = max(b, stretch.start), min(b + len(across), stretch.stop)
        if row <= number < row + len(along) and low < high:
            own = torch.minimum(across[low - b : high - b, None], deep[None]).clamp(max=float(along[number - row]))
            place = slice(low - stretch.start, high - stretch.start), slice(c, c + len(deep))
            share[place] = torch.maximum(share[place], own)
    return share


class _Places(NamedTuple):
    """All places of a window along an axis: place n begins at voxel n of the scan."""

    low: Int[np.ndarray, " n"]
    """First coarse voxel whose centre lies in the middle half."""
    high: Int[np.ndarray, " n"]
    """One past the last."""
    searched: Int[np.ndarray, " m"]
    """Places that the search looks at: about one a coarse voxel, close enough to reach every voxel."""
    window: int
    factor: int

    def sums(self, values: Int[np.ndarray, "X Y Z"], axis: int) -> Int[np.ndarray, "X2 Y2 Z2"]:
        """Sum the values along an axis over the middle half of each place that is searched."""
        table = np.insert(values.cumsum(axis, dtype=np.int32), 0, 0, axis=axis)
        sums: Int[np.ndarray, "X2 Y2 Z2"] = table.take(self.high[self.searched], axis) - table.take(
            self.low[self.searched], axis
        )
        return sums

    def centred(self, place: int, first: int, last: int) -> int:
        """Move a place so that coarse voxels first to last lie in the middle of the window, if that keeps them in."""
        middle = (first + last + 1) * self.factor / 2
        moved = min(max(round(middle - self.window / 2), 0), len(self.low) - 1)
        return moved if self.low[moved] <= first and last < self.high[moved] else place


def _places(size: int, window: int, factor: int, num_coarse: int) -> _Places:
    first = np.arange(size - window + 1)
    low = np.ceil((first + window // 4) / factor - 0.5).astype(np.int64)
    high = np.ceil((first + window - window // 4) / factor - 0.5).astype(np.int64)
    low[0], high[-1] = 0, num_coarse
    searched = np.append(first[: -1 : min(factor, max(1, window // 4))], first[-1])
    return _Places(low, np.minimum(high, num_coarse), searched, window, factor)


def _ramp(first: int, size: int, window: int) -> Float[Tensor, " n"]:
    inwards = torch.arange(window) + 0.5
    below = inwards if first > 0 else torch.full_like(inwards, math.inf)
    above = inwards.flip(0) if first + window < size else torch.full_like(inwards, math.inf)
    share: Float[Tensor, " n"] = (torch.minimum(below, above) / max(1, window // 4)).clamp(max=1)
    return share


def _joined(coarse: Float[Tensor, "L b c"], fine: WindowSum, share: Float[Tensor, "b c"]) -> Float[Tensor, "L b c"]:
    """A row of the answer at full spacing put into the coarse one."""
    logits = fine.weighted / fine.weight.clamp(min=torch.finfo(torch.float32).tiny)
    # A share of exactly 1 must give the very value.
    return torch.where(share == 1, logits, coarse * (1 - share) + logits * share)


class _Spread:
    """Coarse logits, interpolated linearly to full spacing row by row."""

    def __init__(self, logits: Float[Tensor, "L Xc Yc Zc"], factor: Vox3, image: Rows, stretch: slice) -> None:
        along, across, deep = (
            axis_between(logits.shape[axis + 1], logits.shape[axis + 1] * factor[axis]) for axis in image.order
        )
        self._along = along
        self._across = across.part(stretch.start, stretch.stop), deep.part(0, image.size[2])
        self._coarse = to_rows(logits, image.order).unbind(dim=1)

    def row(self, number: int) -> Float[Tensor, "L b c"]:
        low, high, share = (values[number] for values in self._along[:3])
        return interpolated(between(self._coarse[low], self._coarse[high], float(share)), self._across)
