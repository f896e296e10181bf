"""From a scan to the network's grid, and from its outputs back to the scan's own grid, exactly.

Forward: axes to the closest RAS+ order, constant border cropped away, intensities normalised, resampled to the
plan's spacing. Every step is noted in a `GridRecord`, by which logits and labels go the same way back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer, Shaped, UInt8
from nibabel.orientations import io_orientation
from torch import Tensor

from tokenseg.config import ChannelNormalisation, Plan
from tokenseg.data.volume import Mask, Volume
from tokenseg.errors import DataError, GeometryError
from tokenseg.shapes import Affine, ImageArray, MaskArray, times

Shape3: TypeAlias = tuple[int, int, int]

PADDING_FRACTION = 0.25
"""Above this share of voxels at a channel's minimum, they are padding and left out of its statistics."""
MAX_GRID_VOXELS = 2**31
"""Largest volume that is prepared; beyond it a wrong spacing is the likely cause."""


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
        return _shape3(self.native_shape[stored] for stored in np.argsort(self.axes))

    @property
    def crop_shape(self) -> Shape3:
        """Shape of what is kept of it, before resampling."""
        return _shape3(stop - start for start, stop in zip(self.crop_start, self.crop_stop, strict=True))


@dataclass(frozen=True, eq=False)
class Prepared:
    """A scan as the network takes it, and the way back."""

    image: ImageArray
    record: GridRecord


def select_channels(volume: Volume, plan: Plan) -> ImageArray:
    """Pick the plan's channels by name, and form its differences, in stored intensities.

    Raises:
        DataError: The volume lacks a channel; channels are never matched by their position.
    """
    missing = [name for name in plan.needed_channels if name not in volume.channels]
    if missing:
        raise DataError(
            f"model expects {', '.join(plan.needed_channels)}; {', '.join(missing)} is missing "
            f"(given: {', '.join(volume.channels)}). Name the channels of the input, or add the missing one"
        )
    return np.stack([channel_image(expression, volume) for expression in plan.channels])


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
    selected = select_channels(volume, plan)
    record = _find_way(volume, plan, covering)
    image = np.empty((len(selected), *record.grid_shape), dtype=np.float32)
    for index, (channel, scaling) in enumerate(zip(selected, _find_scalings(selected, volume, plan), strict=True)):
        cropped = _cropped(turn_to_ras(channel, record.axes, record.flipped), record)
        image[index] = _resampled(torch.from_numpy(_scaled(cropped, scaling)), record.grid_shape).numpy()
    return Prepared(image, record)


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
    cropped = _cropped(canonical, record)
    num_lost = np.count_nonzero(canonical) - np.count_nonzero(cropped)
    if num_lost:
        raise DataError(
            f"mask has {num_lost} foreground voxel(s) in the constant border that was cropped off its image; "
            "prepare the image with covering=mask"
        )
    values = [label.values for label in plan.labels]
    shares = (
        _resampled(torch.from_numpy(np.isin(cropped, value).astype(np.float32)), record.grid_shape)
        for value in (values if plan.regions else [(0,), *values])
    )
    if plan.regions:
        return np.stack([(share > 0.5).numpy().astype(np.uint8) for share in shares])
    return _largest(shares, range(plan.num_outputs), torch.uint8).numpy()[np.newaxis]


def restore_logits(logits: Float[Tensor, "L Xp Yp Zp"], record: GridRecord, plan: Plan) -> MaskArray:
    """Turn network outputs on the plan's grid into a mask on the scan's own grid, in the user's label values.

    Logits are resampled one output at a time, so memory stays at a few volumes however many labels there are.
    Exclusive labels: the largest output wins, background in a tie. Regions: positive logits, painted in the order of
    `plan.labels`, later over earlier. What was cropped is background.

    Args:
        logits: One volume an output of the network, on any device.
        record: From `prepare_image`.
        plan: The settings of the dataset.

    Returns:
        Mask in stored axis order; uint8, or int32 where an output value is above 255.

    Raises:
        GeometryError: The logits are not on the grid of the record.
    """
    if logits.shape[1:] != record.grid_shape or len(logits) != plan.num_outputs:
        raise GeometryError(
            f"logits have shape {tuple(logits.shape)}; the record and plan say {(plan.num_outputs, *record.grid_shape)}"
        )
    values = [label.output_value for label in plan.labels]
    dtype = torch.uint8 if max(values) <= np.iinfo(np.uint8).max else torch.int32
    resampled = (_resampled(logit.float(), record.crop_shape) for logit in logits)
    cropped = _painted(resampled, values, dtype) if plan.regions else _largest(resampled, [0, *values], dtype)
    whole = _uncropped(cropped.cpu().numpy(), record)
    return np.ascontiguousarray(_native(whole, record.axes, record.flipped))


def restore_labels(labels: UInt8[np.ndarray, "R Xp Yp Zp"], record: GridRecord, plan: Plan) -> MaskArray:
    """Take label maps, as `prepare_labels` makes them, back to the scan's own grid and the user's label values.

    Raises:
        GeometryError: The maps are not on the grid of the record.
    """
    maps = torch.from_numpy(labels)
    if plan.regions:
        return restore_logits(maps.float() - 0.5, record, plan)
    return restore_logits(torch.cat([maps == value for value in range(plan.num_outputs)]).float(), record, plan)


class _Scaling(NamedTuple):
    """A channel becomes (clip(channel, low, high) - mean) / std."""

    mean: float
    std: float
    low: float = -np.inf
    high: float = np.inf


def channel_image(expression: str, volume: Volume) -> Float[np.ndarray, "X Y Z"]:
    """One entry of `Plan.channels`, a channel or a difference of two that the volume must have, as stored."""
    terms = [volume.array[volume.channels.index(name.strip())] for name in expression.split(" - ")]
    return reduce(np.subtract, terms)


def _find_scalings(selected: ImageArray, volume: Volume, plan: Plan) -> list[_Scaling]:
    if not plan.joint_zscore:
        return [_find_scaling(channel, rule) for channel, rule in zip(selected, plan.normalisation, strict=True)]
    mean, std = _mean_std(volume.array)
    # The mean cancels in a difference of two channels.
    return [_Scaling(0.0 if " - " in expression else mean, std) for expression in plan.channels]


def _find_scaling(channel: Float[np.ndarray, "X Y Z"], rule: ChannelNormalisation) -> _Scaling:
    if rule.kind == "window":
        return _Scaling(rule.mean, rule.std, rule.low, rule.high)
    inside = channel[channel != channel.min()]
    num_padding = channel.size - inside.size
    is_padded = num_padding > PADDING_FRACTION * channel.size and inside.size > 0 and inside.min() < inside.max()
    return _Scaling(*_mean_std(inside if is_padded else channel))


def _mean_std(values: Float[np.ndarray, "*shape"]) -> tuple[float, float]:
    if values.min() == values.max():
        return float(values.min()), 1.0
    return float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))


def _scaled(channel: Float[np.ndarray, "X Y Z"], scaling: _Scaling) -> Float[np.ndarray, "X Y Z"]:
    clipped = np.clip(channel.astype(np.float64, order="C"), scaling.low, scaling.high)
    return ((clipped - scaling.mean) / scaling.std).astype(np.float32)


def _find_way(volume: Volume, plan: Plan, covering: Mask | None) -> GridRecord:
    if covering is not None:
        _check_mask_shape(covering, _shape3(volume.array.shape[1:]))
    axes, flipped = _orientation(volume.affine)
    image = [turn_to_ras(channel, axes, flipped) for channel in volume.array]
    foreground = None if covering is None else turn_to_ras(covering.array, axes, flipped)
    start, stop = _crop_box(image, foreground)
    right, anterior, superior = (volume.spacing_mm[stored] for stored in np.argsort(axes))
    spacing_mm = right, anterior, superior
    return GridRecord(
        native_shape=_shape3(volume.array.shape[1:]),
        axes=axes,
        flipped=flipped,
        spacing_mm=spacing_mm,
        crop_start=start,
        crop_stop=stop,
        grid_shape=_grid_shape([last - first for first, last in zip(start, stop, strict=True)], spacing_mm, plan),
    )


def _grid_shape(crop_shape: Sequence[int], spacing_mm: tuple[float, float, float], plan: Plan) -> Shape3:
    sizes = zip(crop_shape, spacing_mm, plan.spacing_mm, strict=True)
    shape = _shape3(max(1, int(size * own / target + 0.5)) for size, own, target in sizes)
    if math.prod(shape) > MAX_GRID_VOXELS:
        raise GeometryError(
            f"scan has voxels of {times(spacing_mm)} mm and would be {times(shape)} voxels at the plan's "
            f"{times(plan.spacing_mm)} mm; correct the spacing in its header, or choose a coarser spacing_mm"
        )
    return shape


def _crop_box(image: Sequence[Float[np.ndarray, "Xc Yc Zc"]], foreground: MaskArray | None) -> tuple[Shape3, Shape3]:
    whole = (0, 0, 0), _shape3(image[0].shape)
    kept = np.zeros(image[0].shape, dtype=bool) if foreground is None else foreground != 0
    for channel in image:
        inside = channel != channel.min()
        if inside[np.ix_((0, -1), (0, -1), (0, -1))].any():
            return whole
        kept |= inside
    if not kept.any():
        return whole
    hits = [np.flatnonzero(kept.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
    return _shape3(hit[0] for hit in hits), _shape3(hit[-1] + 1 for hit in hits)


def _orientation(affine: Affine) -> tuple[Shape3, tuple[bool, bool, bool]]:
    """For each stored axis, the RAS+ axis that it runs along, and whether it runs against it."""
    orientation = io_orientation(affine)  # type: ignore[no-untyped-call]
    flips = orientation[:, 1] < 0
    return _shape3(orientation[:, 0]), (bool(flips[0]), bool(flips[1]), bool(flips[2]))


def turn_to_ras(
    array: Shaped[np.ndarray, "X Y Z"], axes: Shape3, flipped: tuple[bool, bool, bool]
) -> Shaped[np.ndarray, "Xc Yc Zc"]:
    """Turn stored axes to RAS+ (a view)."""
    steps = [slice(None, None, -1 if flip else 1) for flip in flipped]
    return array[tuple(steps)].transpose(np.argsort(axes))


def _native(
    array: Shaped[np.ndarray, "Xc Yc Zc"], axes: Shape3, flipped: tuple[bool, bool, bool]
) -> Shaped[np.ndarray, "X Y Z"]:
    """Undo `turn_to_ras` (a view)."""
    steps = [slice(None, None, -1 if flip else 1) for flip in flipped]
    return array.transpose(axes)[tuple(steps)]


def _cropped(array: Shaped[np.ndarray, "Xc Yc Zc"], record: GridRecord) -> Shaped[np.ndarray, "Xk Yk Zk"]:
    return array[_box(record)]


def _uncropped(array: Shaped[np.ndarray, "Xk Yk Zk"], record: GridRecord) -> Shaped[np.ndarray, "Xc Yc Zc"]:
    whole = np.zeros(record.canonical_shape, dtype=array.dtype)
    whole[_box(record)] = array
    return whole


def _box(record: GridRecord) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in zip(record.crop_start, record.crop_stop, strict=True))


def _resampled(volume: Float[Tensor, "X Y Z"], shape: Shape3) -> Float[Tensor, "Xr Yr Zr"]:
    """Resample trilinearly between grids with the same outer edges; the same shape returns the volume itself."""
    if volume.shape == shape:
        return volume
    return F.interpolate(volume[None, None], size=shape, mode="trilinear", align_corners=False)[0, 0]


def _largest(scores: Iterable[Tensor], values: Sequence[int], dtype: torch.dtype) -> Integer[Tensor, "X Y Z"]:
    """Give each voxel the value whose score is largest, the first in a tie, holding two scores at a time."""
    remaining = iter(scores)
    best = next(remaining)
    winner = torch.full_like(best, values[0], dtype=dtype)
    for score, value in zip(remaining, values[1:], strict=True):
        winner.masked_fill_(score > best, value)
        best = torch.maximum(best, score)
    return winner


def _painted(logits: Iterable[Tensor], values: Sequence[int], dtype: torch.dtype) -> Integer[Tensor, "X Y Z"]:
    """Give each voxel the value of the last region whose logit is positive, 0 where there is none."""
    pairs = zip(logits, values, strict=True)
    logit, value = next(pairs)
    painted = (logit > 0).to(dtype) * value
    for logit, value in pairs:
        painted.masked_fill_(logit > 0, value)
    return painted


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


def _shape3(sizes: Iterable[Any]) -> Shape3:
    x, y, z = (int(size) for size in sizes)
    return x, y, z


def _listed(values: Iterable[int]) -> str:
    return ", ".join(str(value) for value in values)


def to_canonical(
    array: Shaped[np.ndarray, "X Y Z"], affine: Affine
) -> tuple[Shaped[np.ndarray, "Xc Yc Zc"], tuple[float, float, float]]:
    """Turn stored axes to the closest RAS+ order, for showing.

    Returns:
        The array with axes along right, anterior and superior (a view), and its spacing in mm in that order. Of an
        oblique scan the axes only lie closest to these directions.
    """
    axes, flipped = _orientation(affine)
    right, anterior, superior = (float(np.linalg.norm(affine[:3, stored])) for stored in np.argsort(axes))
    return turn_to_ras(array, axes, flipped), (right, anterior, superior)
