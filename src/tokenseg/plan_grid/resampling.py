"""Linear interpolation between grids that share their outer edges.

Every value comes from its neighbours by one multiplication each and one addition, none of them fused. So it is the
same bit for bit whether a whole volume, some of its planes or a part of a plane is asked for, and where no neighbour is
above 0, neither is the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Axis(NamedTuple):
    """For each voxel along an axis of the new grid, its neighbours in the old one.

    Attributes:
        low: Neighbour at or before its centre.
        high: Neighbour after it; the same at the ends.
        share: Weight of `high`; `low` has the rest.
        size: Voxels of the old grid.
    """

    low: Int[Tensor, " n"]
    high: Int[Tensor, " n"]
    share: Float[Tensor, " n"]
    size: int

    def part(self, first: int, stop: int) -> Axis:
        """The voxels from `first` to before `stop`."""
        return Axis(self.low[first:stop], self.high[first:stop], self.share[first:stop], self.size)

    def needed(self) -> tuple[int, int]:
        """First old voxel that is asked for, and one past the last."""
        return int(self.low[0]), int(self.high[-1]) + 1

    def shifted(self, first: int, stop: int) -> Axis:
        """The same, where of the old grid only the voxels from `first` to before `stop` are at hand."""
        return Axis(self.low - first, self.high - first, self.share, stop - first)

    def touching(self, first: int, stop: int) -> tuple[int, int]:
        """First new voxel with a neighbour among the old ones from `first` to before `stop`, and one past the last."""
        return int((self.high < first).sum()), int((self.low < stop).sum())


def axis_between(count: int, new_count: int) -> Axis:
    """How `new_count` voxels lie on the extent of `count` voxels."""
    centres = ((torch.arange(new_count, dtype=torch.float64) + 0.5) * count / new_count - 0.5).clamp(0, count - 1)
    low = centres.floor().long()
    return Axis(low, (low + 1).clamp(max=count - 1), (centres - low).float(), count)


def interpolated(values: Float[Tensor, "*shape"], axes: Sequence[Axis]) -> Float[Tensor, "*shape2"]:
    """Interpolate along the last axes of an array, one of `axes` for each.

    An axis on which the grid stays costs nothing, and leaves the values untouched.
    """
    for dim, axis in enumerate(axes, start=values.ndim - len(axes)):
        values = _along(values, axis, dim)
    return values


def between(low: Float[Tensor, "*shape"], high: Float[Tensor, "*shape"], share: float) -> Float[Tensor, "*shape"]:
    """Blend two planes as `interpolated` does; with a share of 0 the first itself."""
    if share == 0:
        return low
    weight = torch.tensor(share)
    return low * (1 - weight) + high * weight


def resampled(volume: Float[Tensor, "X Y Z"], shape: tuple[int, int, int]) -> Float[Tensor, "X2 Y2 Z2"]:
    """Resample a whole volume; the same shape returns the volume itself."""
    return interpolated(volume, [axis_between(*counts) for counts in zip(volume.shape, shape, strict=True)])


def _along(values: Float[Tensor, "*shape"], axis: Axis, dim: int) -> Float[Tensor, "*shape2"]:
    if not axis.share.any():
        stays = len(axis.low) == axis.size == values.shape[dim]
        return values if stays else values.index_select(dim, axis.low)
    shape = [1] * values.ndim
    shape[dim] = -1
    share = axis.share.reshape(shape)
    low = values.index_select(dim, axis.low).mul_(1 - share)
    return low.add_(values.index_select(dim, axis.high).mul_(share))
