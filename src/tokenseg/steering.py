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
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenseg.checkpoint import Model
from tokenseg.config import Plan, Vox3
from tokenseg.data.coarse import coarse_image
from tokenseg.errors import ConfigError
from tokenseg.shapes import ImageArray
from tokenseg.windows import (
    WindowSum,
    forward_of,
    num_windows,
    pad_to_window,
    predict_logits,
    sum_windows,
    unpad,
    window_corners,
)

KEPT_PROBABILITY = 0.5
"""Coarse voxels are kept from this probability of foreground on. Training weighs both classes the same, and labels a
coarse voxel by what is around it too, so that a lesion shows well above this (decision 0018). No higher, so that all
that the coarse view calls foreground is looked at."""

Corner = tuple[int, int, int]


class Steered(NamedTuple):
    """Logits of a scan, and how many windows they took."""

    logits: Float[Tensor, "L X Y Z"]
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
    plan = model.facts.plan
    # Windows lie on the image as it is padded to one window at least.
    padded, start = pad_to_window(torch.from_numpy(image), plan.window_vox)
    size = _shape3(padded.shape[1:])
    full = window_corners(size, plan)
    if full is None or plan.coarse_factor is None:
        return predict_full(model, image)
    coarse = look_coarsely(model, padded)
    corners = cover(kept_voxels(coarse, plan), size, plan.window_vox, plan.coarse_factor)
    if len(corners) >= len(full):
        return predict_full(model, image)
    logits = _spread(coarse, plan.coarse_factor, size)
    if corners:
        with torch.inference_mode():
            total = sum_windows(forward_of(model), padded, plan.window_vox, corners)
            _join(logits, total, fine_share(corners, size, plan.window_vox), _hull(corners, plan.window_vox))
    return Steered(unpad(logits, start, image.shape[1:]), len(corners), len(full))


def predict_full(model: Model, image: ImageArray) -> Steered:
    """Run a network over all of a prepared image at full spacing."""
    plan = model.facts.plan
    count = num_windows(image, plan)
    return Steered(predict_logits(forward_of(model), image, plan), count, count)


def look_coarsely(model: Model, image: Float[Tensor, "C X Y Z"]) -> Float[Tensor, "L Xc Yc Zc"]:
    """Logits of the coarse view of a whole image, in one pass.

    Args:
        model: Its plan has a `coarse_factor`.
        image: On the plan's grid, normalised.
    """
    plan = model.facts.plan
    if plan.coarse_factor is None:
        raise ConfigError(f"model {model.facts.name!r} was trained without coarse views; run all windows")
    view = torch.from_numpy(coarse_image(image.numpy(), plan.coarse_factor))
    padded, start = pad_to_window(view, plan.window_vox)
    with torch.inference_mode():
        return unpad(forward_of(model)(padded[None])[0], start, view.shape[1:])


def kept_voxels(
    logits: Float[Tensor, "L Xc Yc Zc"], plan: Plan, least_probability: float = KEPT_PROBABILITY
) -> Bool[np.ndarray, "Xc Yc Zc"]:
    """Coarse voxels that probably hold foreground or touch some, as training labels them.

    Args:
        logits: From `look_coarsely`.
        plan: Says how outputs are to be read.
        least_probability: Voxels are kept from this probability of foreground on.
    """
    kept: Bool[np.ndarray, "Xc Yc Zc"] = foreground_probability(logits, plan) >= least_probability
    return kept


def foreground_probability(logits: Float[Tensor, "L X Y Z"], plan: Plan) -> Float[np.ndarray, "X Y Z"]:
    """Probability that a voxel is no background; of regions, the largest."""
    if plan.regions:
        return logits.sigmoid().amax(dim=0).numpy()
    return 1 - logits.softmax(dim=0)[0].numpy()


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
        counts: Int[np.ndarray, "x y z"] = left.astype(np.int32)
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


def fine_share(corners: Sequence[Corner], size: Vox3, window: Vox3) -> Float[Tensor, "X Y Z"]:
    """How much the answer at full spacing counts in each voxel: 1 in the middle half of a window, 0 outside of all.

    From the middle half to the edge of the window the share falls linearly, except towards the edge of the scan.
    """
    share = torch.zeros(size)
    for corner in corners:
        x, y, z = (_ramp(*axis) for axis in zip(corner, size, window, strict=True))
        place = tuple(slice(first, first + length) for first, length in zip(corner, window, strict=True))
        own = torch.minimum(torch.minimum(x[:, None, None], y[None, :, None]), z[None, None, :])
        share[place] = torch.maximum(share[place], own)
    return share


class _Places(NamedTuple):
    """All places of a window along an axis: place n begins at voxel n of the scan."""

    low: Int[np.ndarray, " places"]
    """First coarse voxel whose centre lies in the middle half."""
    high: Int[np.ndarray, " places"]
    """One past the last."""
    searched: Int[np.ndarray, " some"]
    """Places that the search looks at: about one a coarse voxel, close enough to reach every voxel."""
    window: int
    factor: int

    def sums(self, values: Int[np.ndarray, "x y z"], axis: int) -> Int[np.ndarray, "X Y Z"]:
        """Sum the values along an axis over the middle half of each place that is searched."""
        table = np.insert(values.cumsum(axis, dtype=np.int32), 0, 0, axis=axis)
        sums: Int[np.ndarray, "X Y Z"] = table.take(self.high[self.searched], axis) - table.take(
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


def _ramp(first: int, size: int, window: int) -> Float[Tensor, " w"]:
    inwards = torch.arange(window) + 0.5
    below = inwards if first > 0 else torch.full_like(inwards, math.inf)
    above = inwards.flip(0) if first + window < size else torch.full_like(inwards, math.inf)
    share: Float[Tensor, " w"] = (torch.minimum(below, above) / max(1, window // 4)).clamp(max=1)
    return share


def _join(
    coarse: Float[Tensor, "L X Y Z"], fine: WindowSum, share: Float[Tensor, "X Y Z"], box: tuple[slice, ...]
) -> None:
    """Put the answer at full spacing into the coarse one, within a box that holds all windows."""
    own, share = coarse[(slice(None), *box)], share[box]
    logits = fine.weighted[(slice(None), *box)] / fine.weight[box].clamp(min=torch.finfo(torch.float32).tiny)
    # A share of exactly 1 must give the very value.
    own.copy_(torch.where(share == 1, logits, torch.lerp(own, logits, share)))


def _hull(corners: Sequence[Corner], window: Vox3) -> tuple[slice, ...]:
    """The box around all windows."""
    ends = zip(zip(*corners, strict=True), window, strict=True)
    return tuple(slice(min(firsts), max(firsts) + length) for firsts, length in ends)


def _spread(logits: Float[Tensor, "L Xc Yc Zc"], factor: Vox3, size: Vox3) -> Float[Tensor, "L X Y Z"]:
    """Interpolate coarse logits linearly to full spacing."""
    whole = [count * length for count, length in zip(factor, logits.shape[1:], strict=True)]
    x, y, z = size
    return F.interpolate(logits[None], size=whole, mode="trilinear", align_corners=False)[0, :, :x, :y, :z]


def _shape3(sizes: Sequence[int]) -> Vox3:
    x, y, z = sizes
    return x, y, z
