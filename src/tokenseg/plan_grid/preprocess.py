"""A scan on the plan grid: axes to the closest RAS+ order, border cropped, intensities normalised, resampled.

Every step is noted in a `GridRecord`, by which the network's answers go the same way back (`restore.py`). A scan is
prepared whole, for training, or a few rows at a time, for segmenting it in little memory (`open_scan`); the values are
the same, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from tokenseg.config import Plan
from tokenseg.errors import DataError, GeometryError
from tokenseg.imaging.boxes import box_of_planes
from tokenseg.imaging.orientation import (
    Shape3,
    from_rows,
    in_row_order,
    orientation,
    row_order,
    shape3,
    to_rows,
    turn_to_ras,
)
from tokenseg.imaging.volume import Mask, Volume
from tokenseg.messages import times
from tokenseg.outputs import outputs_of
from tokenseg.plan_grid.intensities import Scaling, channel_terms, check_channels, find_scalings
from tokenseg.plan_grid.resampling import axis_between, between, interpolated, resampled
from tokenseg.shapes import ImageArray

MAX_GRID_VOXELS = 2**31
"""Largest volume that is prepared; beyond it a wrong spacing is the likely cause."""
MAX_GROWTH, SMALL_VOXELS = 1000, 2**24
"""Voxels that are prepared of one of the scan, at most; small volumes may have more."""


@dataclass(frozen=True)
class GridRecord:
    """The way between a scan's stored grid and the plan's grid.

    Attributes:
        native_shape: Shape of the scan as stored.
        axes: For each stored axis, the RAS+ axis (0 right, 1 anterior, 2 superior) that it runs along.
        flipped: For each stored axis, whether it runs against that direction.
        spacing_mm: The scan's own spacing along right, anterior, superior.
        crop_start: First voxel kept, in RAS+ axes.
        crop_stop: One past the last voxel kept, in RAS+ axes.
        grid_shape: Shape on the plan's grid; the voxels fill the same box as the cropped ones.
    """

    native_shape: Shape3
    axes: Shape3
    flipped: tuple[bool, bool, bool]
    spacing_mm: tuple[float, float, float]
    crop_start: Shape3
    crop_stop: Shape3
    grid_shape: Shape3

    @property
    def canonical_shape(self) -> Shape3:
        """Shape of the whole scan in RAS+ axes."""
        return shape3(self.native_shape[stored] for stored in np.argsort(self.axes))

    @property
    def crop_shape(self) -> Shape3:
        """Shape of what is kept of it, before resampling."""
        return shape3(stop - start for start, stop in zip(self.crop_start, self.crop_stop, strict=True))

    @property
    def order(self) -> Shape3:
        """RAS+ axes from the one with most voxels on the plan's grid to the one with fewest: rows lie across the first.

        It follows from the grid alone, like all that decides in which order a scan is computed.
        """
        return row_order(self.grid_shape)

    @property
    def kept_box(self) -> tuple[slice, slice, slice]:
        """What is kept of the scan, in RAS+ axes."""
        x, y, z = (slice(start, stop) for start, stop in zip(self.crop_start, self.crop_stop, strict=True))
        return x, y, z


@dataclass(frozen=True, eq=False)
class Prepared:
    """A scan as the network takes it, and the way back."""

    image: ImageArray
    record: GridRecord


@dataclass(frozen=True, eq=False)
class Rows:
    """An image that is read a few rows at a time; a row is a plane across its first axis in `order`.

    Attributes:
        shape: Voxels along X, Y, Z.
        order: Axes of the image, as the rows have them: read from row 2 to before row 5, C channels give (C, 3, b, c).
        num_channels: C.
        read: Gives rows from a first one to before another; float32.
    """

    shape: Shape3
    order: Shape3
    num_channels: int
    read: Callable[[int, int], Float[Tensor, "C n b c"]]

    @property
    def size(self) -> Shape3:
        """Number of rows, and voxels of a row along both of its axes."""
        return in_row_order(self.shape, self.order)


@dataclass(frozen=True, eq=False)
class OpenedScan:
    """A scan that is prepared as it is read, and the way back."""

    rows: Rows
    record: GridRecord


def prepare_image(volume: Volume, plan: Plan, *, covering: Mask | None = None) -> Prepared:
    """Bring a scan to the plan's grid and intensities.

    The border is cropped only where every channel is at its minimum, and only if all eight corners are too.
    Intensity statistics are of the whole scan, so the crop does not change them. Resampling is trilinear and keeps
    the outer edges of the grid in place; where the number of voxels stays, values stay untouched.

    Args:
        volume: The scan.
        plan: The settings of the dataset.
        covering: Reference mask, whose foreground the crop must not cut (in training, where a label may reach into
            the constant border).

    Raises:
        DataError: A channel is missing.
        GeometryError: The mask has another shape, or the scan is absurdly large at the plan's spacing.
    """
    scan = open_scan(volume, plan, covering=covering)
    return Prepared(whole_image(scan.rows), scan.record)


def open_scan(volume: Volume, plan: Plan, *, covering: Mask | None = None) -> OpenedScan:
    """Make a scan ready to be prepared row by row; the arguments and errors are those of `prepare_image`."""
    check_channels(volume, plan)
    record = _find_way(volume, plan, covering)
    order = record.order
    channels = [
        _Channel(
            [
                turn_to_ras(term, record.axes, record.flipped)[record.kept_box].transpose(order)
                for term in channel_terms(expression, volume)
            ],
            scaling,
            in_row_order(record.grid_shape, order),
        )
        for expression, scaling in zip(plan.channels, find_scalings(volume, plan), strict=True)
    ]

    def read(first: int, stop: int) -> Float[Tensor, "C n b c"]:
        return torch.stack([channel.read(first, stop) for channel in channels])

    return OpenedScan(Rows(record.grid_shape, order, len(channels), read), record)


def rows_of(image: ImageArray) -> Rows:
    """An image at hand as rows, in the order of a scan of its size."""
    shape = shape3(image.shape[1:])
    order = row_order(shape)
    turned = to_rows(torch.from_numpy(image), order)
    return Rows(shape, order, len(image), lambda first, stop: turned[:, first:stop])


def whole_image(rows: Rows) -> ImageArray:
    """Read all rows, and put the axes back in their places."""
    return from_rows(rows.read(0, rows.size[0]), rows.order).contiguous().numpy()


class _Channel:
    """One channel of the network, prepared a few rows at a time.

    A plane of the scan is scaled and resampled within itself, and rows are blended from two such planes. The last two
    planes are kept, since the next row needs them as a rule.
    """

    def __init__(self, terms: Sequence[Float[np.ndarray, "a b c"]], scaling: Scaling, grid: Shape3) -> None:
        self._terms, self._scaling = terms, scaling
        self._along, *self._across = (axis_between(*counts) for counts in zip(terms[0].shape, grid, strict=True))
        self._planes: dict[int, Float[Tensor, "b c"]] = {}

    def read(self, first: int, stop: int) -> Float[Tensor, "n b c"]:
        part = self._along.part(first, stop)
        rows = torch.empty(stop - first, *(len(axis.low) for axis in self._across))
        for row, low, high, share in zip(rows, *(each.tolist() for each in part[:3]), strict=True):
            planes = {index: self._planes.get(index) for index in ((low, high) if share else (low,))}
            self._planes = {i: self._plane(i) if plane is None else plane for i, plane in planes.items()}
            row.copy_(between(self._planes[low], self._planes.get(high, self._planes[low]), share))
        return rows

    def _plane(self, index: int) -> Float[Tensor, "b c"]:
        stored = reduce(np.subtract, [term[index] for term in self._terms])
        return interpolated(torch.from_numpy(self._scaling.applied(stored)), self._across)


def prepare_labels(mask: Mask, record: GridRecord, plan: Plan) -> UInt8[np.ndarray, "R Xp Yp Zp"]:
    """Bring a reference mask to the grid of its prepared scan.

    Each label is resampled by itself, trilinearly, and the largest wins (regions: more than half), so that a label's
    number favours none; where the grid stays, the result is exact.

    Returns:
        Exclusive labels: one map with 0 for background and n + 1 for `plan.labels[n]`. Regions: a 0/1 map each.

    Raises:
        DataError: The mask holds values that no label names, or foreground outside the crop (then prepare the image
            with `covering`). Foreground is never dropped in silence.
        GeometryError: The mask has another shape than the scan.
    """
    _check_mask_shape(mask, record.native_shape)
    _check_known_values(mask, plan)
    canonical = turn_to_ras(mask.array, record.axes, record.flipped)
    cropped = canonical[record.kept_box]
    num_lost = np.count_nonzero(canonical) - np.count_nonzero(cropped)
    if num_lost:
        raise DataError(
            f"mask has {num_lost} foreground voxel(s) in the constant border that was cropped off its image; "
            "prepare the image with covering=mask"
        )
    outputs = outputs_of(plan)
    shares = (
        resampled(torch.from_numpy(np.isin(cropped, value).astype(np.float32)), record.grid_shape)
        for value in outputs.mask_values([label.values for label in plan.labels])
    )
    return outputs.labels_of_shares(shares, plan.num_outputs).numpy()


def _find_way(volume: Volume, plan: Plan, covering: Mask | None) -> GridRecord:
    native_shape = shape3(volume.array.shape[1:])
    if covering is not None:
        _check_mask_shape(covering, native_shape)
    axes, flipped = orientation(volume.affine)
    start, stop = _to_ras(_crop_box(volume, covering), native_shape, axes, flipped)
    right, anterior, superior = (volume.spacing_mm[stored] for stored in np.argsort(axes))
    spacing_mm = right, anterior, superior
    return GridRecord(
        native_shape=native_shape,
        axes=axes,
        flipped=flipped,
        spacing_mm=spacing_mm,
        crop_start=start,
        crop_stop=stop,
        grid_shape=grid_shape([last - first for first, last in zip(start, stop, strict=True)], spacing_mm, plan),
    )


def grid_shape(crop_shape: Sequence[int], spacing_mm: tuple[float, float, float], plan: Plan) -> Shape3:
    """Voxels that a box of a scan, in RAS+ axes, has at the plan's spacing.

    Raises:
        GeometryError: They are absurdly many.
    """
    sizes = zip(crop_shape, spacing_mm, plan.spacing_mm, strict=True)
    shape = shape3(max(1, int(size * own / target + 0.5)) for size, own, target in sizes)
    if math.prod(shape) > min(MAX_GRID_VOXELS, max(MAX_GROWTH * math.prod(crop_shape), SMALL_VOXELS)):
        raise GeometryError(
            f"scan has voxels of {times(spacing_mm)} mm and would be {times(shape)} voxels at the plan's "
            f"{times(plan.spacing_mm)} mm; correct the spacing in its header, or choose a coarser spacing_mm"
        )
    return shape


def _crop_box(volume: Volume, covering: Mask | None) -> tuple[Shape3, Shape3]:
    """First and one past the last voxel of what is not border, along the stored axes."""
    shape = shape3(volume.array.shape[1:])
    least = [min(float(channel[:, :, z].min()) for z in range(shape[2])) for channel in volume.array]
    corners = np.ix_((0, -1), (0, -1), (0, -1))
    if any((channel[corners] != low).any() for channel, low in zip(volume.array, least, strict=True)):
        return (0, 0, 0), shape

    def kept(z: int) -> Bool[np.ndarray, "X Y"]:
        wanted = [channel[:, :, z] != low for channel, low in zip(volume.array, least, strict=True)]
        return reduce(np.logical_or, wanted if covering is None else [*wanted, covering.array[:, :, z] != 0])

    box = box_of_planes(kept(z) for z in range(shape[2]))
    if box is None:
        return (0, 0, 0), shape
    return shape3(side.start for side in box), shape3(side.stop for side in box)


def _to_ras(
    box: tuple[Shape3, Shape3], shape: Shape3, axes: Shape3, flipped: tuple[bool, bool, bool]
) -> tuple[Shape3, Shape3]:
    """A box along the stored axes in RAS+ axes."""
    sides = [
        (count - stop, count - start) if flip else (start, stop)
        for start, stop, count, flip in zip(*box, shape, flipped, strict=True)
    ]
    turned = [sides[stored] for stored in np.argsort(axes)]
    return shape3(start for start, _ in turned), shape3(stop for _, stop in turned)


def _check_mask_shape(mask: Mask, native_shape: Shape3) -> None:
    if mask.array.shape != native_shape:
        raise GeometryError(
            f"mask is {times(mask.array.shape)} voxels, its scan {times(native_shape)}; "
            "resample the mask to the grid of the scan"
        )


def _check_known_values(mask: Mask, plan: Plan) -> None:
    known = {value: label.name for label in plan.labels for value in label.values}
    unlisted = np.unique(mask.array[~np.isin(mask.array, [0, *known])]).tolist()
    if not unlisted:
        return
    if unlisted == [255] and len(plan.labels) == 1 and not np.isin(mask.array, list(known)).any():
        label = plan.labels[0]
        raise DataError(
            f"mask holds 0 and 255, as image editors write black and white, but {label.name!r} is "
            f"{_listed(label.values)}; replace 255 by {label.values[0]} in the masks, or list 255 as its value"
        )
    names = ", ".join(f"{value} ({name})" for value, name in sorted(known.items()))
    raise DataError(
        f"mask holds unlisted labels {_listed(unlisted)}; known are 0 (background), {names}. "
        "Correct the mask, or add them to the labels of the dataset"
    )


def _listed(values: Iterable[int]) -> str:
    return ", ".join(str(value) for value in values)
