"""The network over an image of any size: in one pass, or in Gaussian-weighted sliding windows.

What computes a pass is a function of the caller: torch (`torch_forward`), or an engine. Which windows run is a list of
corners, so that a caller may run some of them only.

Windows run in the order of their first rows (`plan_grid.preprocess.Rows`), and a row of the answer is given out as soon
as no later window reaches it. So what is held follows from one window and the plane across, not from the length of the
scan. Where only a stretch of the second axis is asked for, the windows that meet it run, and give the same values.

Who listens is told of the tokens of each pass as it runs; nobody runs a network for them alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenseg.config import Plan, Vox3
from tokenseg.device import autocast
from tokenseg.imaging.orientation import from_row_order, from_rows, in_row_order, to_rows
from tokenseg.inference.cuda_graph import repeated
from tokenseg.model.passes import Forward, Pass, TokenChoice, pass_of
from tokenseg.plan_grid.preprocess import Rows, rows_of
from tokenseg.saved_model.checkpoint import Model
from tokenseg.shapes import ImageArray, Images

Corner: TypeAlias = tuple[int, int, int]
Listen: TypeAlias = Callable[[Corner, TokenChoice], None]
"""Told of the tokens of each pass at full spacing as it runs, and of its first voxel in the padded image."""


class PaddedRows(NamedTuple):
    """An image that is at least as large as a window, and where the image itself lies in it."""

    rows: Rows
    place: tuple[slice, slice, slice]
    """Along the axes in the order of the rows."""

    def holds(self, number: int) -> bool:
        """Whether a row is of the image itself."""
        return number in range(self.place[0].start, self.place[0].stop)

    def stretch(self, stretch: slice) -> slice:
        """A stretch of the second axis, with the padding at the ends of the image that it reaches."""
        return slice(stretch.start + self.place[1].start, stretch.stop + self.place[1].start)

    def cut(self, row: Float[Tensor, "L b _"]) -> Float[Tensor, "L b c"]:
        """Cut the padding off the third axis."""
        return row[:, :, self.place[2]]


def forward_of(model: Model) -> Forward:
    """One pass of a model, in the engine that it was given."""
    if model.compiled is not None:
        return model.compiled
    compute = _network_pass(model.network, model.device)
    return _from_cpu_to_cpu(repeated(compute) if model.device.type == "cuda" else compute, model.device)


def torch_forward(network: nn.Module, device: torch.device) -> Forward:
    """The network's own forward pass, in bf16 where that helps; takes and gives float32 on the CPU.

    Args:
        network: In evaluation mode, on `device`; returns a `TokenSegOutput`.
        device: Where to compute.
    """
    return _from_cpu_to_cpu(_network_pass(network, device), device)


def _network_pass(network: nn.Module, device: torch.device) -> Forward:
    def compute(images: Images) -> Pass:
        with torch.inference_mode(), autocast(device):
            found = pass_of(network(images))
        return found._replace(logits=found.logits.float())

    return compute


def _from_cpu_to_cpu(compute: Forward, device: torch.device) -> Forward:
    def forward(images: Images) -> Pass:
        found = compute(images.to(device))
        return found._replace(logits=found.logits.cpu())

    return forward


def predict_logits(forward: Forward, image: ImageArray, plan: Plan) -> Float[Tensor, "L X Y Z"]:
    """Run the network over a prepared image, whole or in windows as the plan says.

    Args:
        forward: One pass of the network.
        image: On the plan's grid, normalised.
        plan: Gives the window and the limit up to which an image runs whole.
    """
    rows = rows_of(image)
    padded = pad_rows(rows, plan.window_vox)
    corners = window_corners(padded.rows.shape, plan)
    return gathered(full_rows(forward, padded, plan, corners, slice(0, rows.size[1])), rows)


def full_rows(
    forward: Forward,
    image: PaddedRows,
    plan: Plan,
    corners: Sequence[Corner] | None,
    stretch: slice,
    listen: Listen | None = None,
) -> Iterator[Float[Tensor, "L b c"]]:
    """Logits of an image at full spacing, row by row.

    Args:
        forward: One pass of the network.
        image: Padded to a window at least.
        plan: Gives the window.
        corners: From `window_corners`; None for one pass over all.
        stretch: Voxels of the second axis, before padding, that are asked for.
        listen: Told of the tokens of each pass.
    """
    wanted = image.stretch(stretch)
    if corners is None:
        rows = (row[:, wanted] for row in _one_pass(forward, image.rows, listen))
    else:
        sums = window_rows(forward, image.rows, plan.window_vox, corners, wanted, listen)
        rows = (total.weighted.div_(total.weight) for total in sums if total is not None)
    for number, row in enumerate(rows):
        if image.holds(number):
            yield image.cut(row)


def gathered(answers: Iterator[Float[Tensor, "L b c"]], image: Rows) -> Float[Tensor, "L X Y Z"]:
    """Put all rows of an answer together, with the axes of the image in their places."""
    return from_rows(torch.stack(list(answers), dim=1), image.order)


def pad_rows(image: Rows, window: Vox3) -> PaddedRows:
    """Centre an image that is smaller than the training window in one, as training does."""
    sizes = [max(length, size) for length, size in zip(image.shape, window, strict=True)]
    starts = [(size - length) // 2 for length, size in zip(image.shape, sizes, strict=True)]
    x, y, z = (slice(starts[axis], starts[axis] + image.shape[axis]) for axis in image.order)
    rows, b, c = (sizes[axis] for axis in image.order)

    def read(first: int, stop: int) -> Float[Tensor, "C n b c"]:
        padded = torch.zeros(image.num_channels, stop - first, b, c)
        low, high = max(first, x.start), min(stop, x.stop)
        if low < high:
            padded[:, low - first : high - first, y, z] = image.read(low - x.start, high - x.start)
        return padded

    is_large = (rows, b, c) == image.size
    padded = Rows((sizes[0], sizes[1], sizes[2]), image.order, image.num_channels, image.read if is_large else read)
    return PaddedRows(padded, (x, y, z))


def window_corners(size: Vox3, plan: Plan) -> list[Vox3] | None:
    """First voxels of the sliding windows over a padded image of this size.

    None where the image runs whole.
    """
    if all(length <= limit for length, limit in zip(size, plan.whole_limit_vox, strict=True)):
        return None
    x, y, z = (window_starts(length, window) for length, window in zip(size, plan.window_vox, strict=True))
    return list(product(x, y, z))


def num_windows(image: ImageArray, plan: Plan) -> int:
    """Passes that `predict_logits` takes over an image."""
    x, y, z = (max(length, window) for length, window in zip(image.shape[1:], plan.window_vox, strict=True))
    corners = window_corners((x, y, z), plan)
    return 1 if corners is None else len(corners)


def window_starts(size: int, window: int) -> list[int]:
    """First voxels of evenly spread windows that overlap by at least half and cover `size` voxels."""
    steps = -(-(size - window) // max(1, window // 2)) if size > window else 0
    return [round(step * (size - window) / steps) for step in range(steps + 1)] if steps else [0]


class WindowSum(NamedTuple):
    """A row of the logits of overlapping windows before division."""

    weighted: Float[Tensor, "L b c"]
    """Sum of the windows' logits, each times the weight of the voxel in its window."""
    weight: Float[Tensor, "b c"]
    """Sum of these weights."""


def window_rows(
    forward: Forward,
    image: Rows,
    window: Vox3,
    corners: Sequence[Corner],
    stretch: slice,
    listen: Listen | None = None,
) -> Iterator[WindowSum | None]:
    """Run the windows at `corners` that meet a stretch of the second axis, and add up their logits row by row.

    Args:
        forward: One pass of the network.
        image: At least as large as the window.
        window: Size of every window, voxels.
        corners: First voxels of the windows along X, Y, Z.
        stretch: Voxels of the second axis that are asked for.
        listen: Told of the tokens of each pass.

    Returns:
        Every row of the image, in order: zeros where no window lies, None for a row that none reaches.
    """
    length, width, depth = in_row_order(window, image.order)
    turned = [in_row_order(corner, image.order) for corner in in_order(corners, image.order)]
    met = [corner for corner in turned if corner[1] < stretch.stop and corner[1] + width > stretch.start]
    num_rows, _, whole_depth = image.size
    sums = _RowSums(length, whole_depth, stretch)
    held = _HeldRows(
        image, length, slice(min((c[1] for c in met), default=0), max((c[1] for c in met), default=0) + width)
    )
    weight = window_weight((length, width, depth))
    given = 0
    for row, b, c in met:
        while given < row:
            yield sums.take(given)
            given += 1
        seen = held.read(row)[:, :, b - held.across.start : b - held.across.start + width, c : c + depth]
        logits = _heard(forward, from_rows(seen, image.order), from_row_order((row, b, c), image.order), listen)
        sums.add(to_rows(logits, image.order), weight, (row, b, c))
    for number in range(given, num_rows):
        yield sums.take(number)


def in_order(corners: Sequence[Corner], order: Vox3) -> list[Corner]:
    """Windows in the order in which they run: by their first rows."""
    return sorted(corners, key=lambda corner: in_row_order(corner, order))


def _one_pass(forward: Forward, image: Rows, listen: Listen | None) -> Iterator[Float[Tensor, "L b c"]]:
    whole = from_rows(image.read(0, image.size[0]), image.order)
    yield from to_rows(_heard(forward, whole, (0, 0, 0), listen), image.order).unbind(dim=1)


def _heard(
    forward: Forward, image: Float[Tensor, "C X Y Z"], corner: Corner, listen: Listen | None
) -> Float[Tensor, "L X Y Z"]:
    logits, tokens = forward(image[None].contiguous())
    if listen is not None and tokens is not None:
        listen(corner, tokens)
    return logits[0]


class _HeldRows:
    """The rows of an image that one window reaches over, read once each where windows follow each other."""

    def __init__(self, image: Rows, length: int, across: slice) -> None:
        self._image, self._length, self.across = image, length, across
        self._first = -length
        self._rows: Float[Tensor, "C n b c"] | None = None

    def read(self, first: int) -> Float[Tensor, "C n b c"]:
        """The rows from `first` on, and of the second axis those of `across`."""
        stop, known = first + self._length, self._first + self._length
        if self._rows is None or first >= known:
            self._rows = None  # free before more is read
            self._rows = self._image.read(first, stop)[:, :, self.across].clone()
        elif first > self._first:
            new = self._image.read(known, stop)[:, :, self.across]
            self._rows = torch.cat([self._rows[:, first - self._first :], new], dim=1)
        self._first = first
        return self._rows


class _RowSums:
    """Sums of the windows for as many rows as a window reaches over, in a ring; a row is free once it was taken."""

    def __init__(self, length: int, depth: int, stretch: slice) -> None:
        self._length, self._stretch = length, stretch
        self._reach = 0
        self._weight = torch.zeros(length, stretch.stop - stretch.start, depth)
        self._weighted: Float[Tensor, "L n b c"] | None = None

    def add(self, logits: Float[Tensor, "L n bw cw"], weight: Float[Tensor, "n bw cw"], corner: Corner) -> None:
        if self._weighted is None:
            self._weighted = torch.zeros(len(logits), *self._weight.shape)
        row, b, c = corner
        low, high = max(b, self._stretch.start), min(b + logits.shape[2], self._stretch.stop)
        own = slice(low - b, high - b)
        place = slice(low - self._stretch.start, high - self._stretch.start), slice(c, c + logits.shape[3])
        slot = row % self._length
        to_end = self._length - slot
        for part, slots in ((slice(0, to_end), slice(slot, None)), (slice(to_end, None), slice(0, slot))):
            if slots != slice(0, 0):
                # At once: a product of its own, as large as the logits, takes as long as the rest of it.
                self._weighted[(slice(None), slots, *place)].addcmul_(logits[:, part, own], weight[part, own])
                self._weight[(slots, *place)] += weight[part, own]
        self._reach = row + self._length

    def take(self, number: int) -> WindowSum | None:
        """Give a row out, and leave zeros; None beyond the last window."""
        if self._weighted is None or number >= self._reach:
            return None
        slot = number % self._length
        total = WindowSum(self._weighted[:, slot].clone(), self._weight[slot].clone())
        self._weighted[:, slot] = 0
        self._weight[slot] = 0
        return total


def window_weight(window: Vox3) -> Float[Tensor, "X Y Z"]:
    """Weight of each voxel of a window: a Gaussian of sigma 1/8 window, at least a thousandth."""
    axes = []
    for length in window:
        distance = (torch.arange(length) - (length - 1) / 2) / (length / 8)
        axes.append(torch.exp(-0.5 * distance.square()))
    weight = axes[0][:, None, None] * axes[1][None, :, None] * axes[2][None, None, :]
    return weight.clamp(min=1e-3)
