"""The way back: the network's answers on the plan grid become a mask on the scan's own grid, row by row.

Answers come as rows, planes across the first axis of `GridRecord.order`, of all the scan or of a part of it. Logits are
interpolated before the largest is taken, in the plane's part that can hold foreground only, and never more than a few
planes exist at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

from tokenseg.config import Label, Plan
from tokenseg.errors import GeometryError
from tokenseg.imaging.boxes import box_of
from tokenseg.imaging.orientation import turn_to_ras
from tokenseg.outputs import outputs_of
from tokenseg.plan_grid.preprocess import GridRecord
from tokenseg.plan_grid.probabilities import ProbabilityFile
from tokenseg.plan_grid.resampling import Axis, axis_between, between, interpolated
from tokenseg.shapes import MaskArray

_STRETCH_VALUES = 1 << 20
"""Of the probabilities that exist at once before they are on disk."""


class Slab(NamedTuple):
    """A part of a scan: all of its rows, and of the second axis in `GridRecord.order` a stretch."""

    crop: slice
    """Voxels of the scan, as cropped."""
    grid: slice
    """Voxels of the plan's grid that these are interpolated from; together the slabs have all of them."""


def slabs_of(record: GridRecord, count: int) -> list[Slab]:
    """Cut a scan into even slabs; fewer where there are not as many voxels."""
    second = record.order[1]
    axis = axis_between(record.grid_shape[second], record.crop_shape[second])
    ends = np.linspace(0, record.crop_shape[second], min(count, record.crop_shape[second]) + 1).round().astype(int)
    slabs: list[Slab] = []
    for first, stop in itertools.pairwise(ends.tolist()):
        start, end = axis.part(first, stop).needed()
        # No voxel of the plan's grid is left out, also where the scan's are coarser and need fewer.
        start = min(start, slabs[-1].grid.stop if slabs else 0)
        slabs.append(Slab(slice(first, stop), slice(start, record.grid_shape[second] if stop == ends[-1] else end)))
    return slabs


def empty_mask(record: GridRecord, plan: Plan) -> MaskArray:
    """Zeros on the scan's own grid; uint8, or int32 where an output value is above 255."""
    values = [label.output_value for label in plan.labels]
    return np.zeros(record.native_shape, np.uint8 if max(values) <= np.iinfo(np.uint8).max else np.int32)


def painted_values(label: Label, plan: Plan) -> list[int]:
    """Values in a written mask that belong to a label: its own, and those of the regions within it."""
    return [other.output_value for other in plan.labels if set(other.values) <= set(label.values)]


def restore_rows(
    rows: Iterator[Float[Tensor, "L b c"]],
    slab: Slab,
    record: GridRecord,
    plan: Plan,
    mask: MaskArray,
    probabilities: ProbabilityFile | None = None,
) -> None:
    """Paint a slab of a mask from the network's answers, in the user's label values.

    Exclusive labels: the largest output wins, background in a tie. Regions: positive logits, painted in the order of
    `plan.labels`, later over earlier. What was cropped stays background.

    Args:
        rows: Every row of the plan's grid, of the slab's stretch only.
        slab: From `slabs_of`.
        record: Of the scan.
        plan: The settings of the dataset.
        mask: From `empty_mask`; changed in place.
        probabilities: Where they go, if they are wanted.
    """
    first, second, third = record.order
    target = turn_to_ras(mask, record.axes, record.flipped)[record.kept_box].transpose(record.order)[:, slab.crop]
    along = axis_between(record.grid_shape[first], record.crop_shape[first])
    across = (
        axis_between(record.grid_shape[second], record.crop_shape[second])
        .part(slab.crop.start, slab.crop.stop)
        .shifted(slab.grid.start, slab.grid.stop),
        axis_between(record.grid_shape[third], record.crop_shape[third]),
    )
    held: dict[int, Float[Tensor, "L b c"]] = {}
    numbered = enumerate(rows)
    steps = zip(target, *(each.tolist() for each in along[:3]), strict=True)
    for line, (plane, low, high, share) in enumerate(steps):
        while high not in held:
            number, row = next(numbered)
            held[number] = row
        for number in [number for number in held if number < low]:
            del held[number]
        logits = between(held[low], held[high], share)
        _paint(plane, logits, across, plan)
        if probabilities is not None:
            _write_row(probabilities, line, slab, logits, across)


def _write_row(
    probabilities: ProbabilityFile, line: int, slab: Slab, logits: Float[Tensor, "L b c"], across: tuple[Axis, Axis]
) -> None:
    """Write probabilities of a row, in stretches: with many labels it is large."""
    along, deep = across
    count = len(along.low)
    step = max(1, _STRETCH_VALUES // (len(logits) * len(deep.low)))
    for first in range(0, count, step):
        stop = min(count, first + step)
        part = torch.stack([interpolated(logit, (along.part(first, stop), deep)) for logit in logits])
        probabilities.write(line, slice(slab.crop.start + first, slab.crop.start + stop), part)


def restore_logits(logits: Float[Tensor, "L Xp Yp Zp"], record: GridRecord, plan: Plan) -> MaskArray:
    """Turn outputs for all of a scan into a mask, see `restore_rows`.

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
    mask = empty_mask(record, plan)
    (slab,) = slabs_of(record, 1)
    turned = logits.float().cpu().permute(record.order[0] + 1, 0, record.order[1] + 1, record.order[2] + 1)
    restore_rows(iter(turned), slab, record, plan, mask)
    return mask


def restore_labels(labels: UInt8[np.ndarray, "R Xp Yp Zp"], record: GridRecord, plan: Plan) -> MaskArray:
    """Take label maps, as `prepare_labels` makes them, back to the scan's own grid and the user's label values.

    Raises:
        GeometryError: The maps are not on the grid of the record.
    """
    logits = outputs_of(plan).sure_logits(torch.from_numpy(labels), plan.num_outputs)
    return restore_logits(logits, record, plan)


def _paint(
    plane: Integer[np.ndarray, "b c"], logits: Float[Tensor, "L bp cp"], across: Sequence[Axis], plan: Plan
) -> None:
    """Paint one plane of the scan where any foreground can be: between voxels that have some."""
    # Interpolated values lie between those that they come from, also when rounded: no foreground is missed.
    outputs = outputs_of(plan)
    box = box_of(outputs.may_be_found(logits).numpy())
    if box is None:
        return
    touched = [slice(*axis.touching(side.start, side.stop)) for axis, side in zip(across, box, strict=True)]
    needed = [axis.part(side.start, side.stop) for axis, side in zip(across, touched, strict=True)]
    resampled = (interpolated(logit, needed) for logit in logits)
    values = [label.output_value for label in plan.labels]
    dtype = torch.uint8 if plane.dtype == np.uint8 else torch.int32
    plane[tuple(touched)] = outputs.painted(resampled, values, dtype).numpy()
