"""The coarse grid of cells laid over a feature map, and the two linear maps between cells and voxels.

Paper: tokens are pooled from non-overlapping local cells of each pyramid level. With 4 x 5 x 5 cells a level and four
levels there are N = 400 candidates. Both maps are separable products with small matrices that are built from the
run-time size: cheaper on a CPU than adaptive pooling and trilinear resizing at full channel width, and exportable with
dynamic shapes.

What follows from sizes alone, matrices and boxes, is kept: making it anew was half of all operations of a pass, and a
GPU waits for each of them to be started.

Feature maps are (B, W, X, Y, Z) stored channels-last, so that a row of channels is contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokenseg.model import traced
from tokenseg.model.traced import is_recorded, traced_as
from tokenseg.shapes import Features

Size: TypeAlias = tuple[int, int, int]
_Build: TypeAlias = Callable[[int, int, torch.device], Tensor]

_KEPT_BOXES = 32


def pool_cells(features: Features, grid: tuple[int, int, int]) -> Float[Tensor, "B x y z W"]:
    """Average `features` over the cells of `grid`, like adaptive average pooling.

    A map with fewer voxels than cells along an axis gives neighbouring cells the same voxel.
    """
    cells = features.permute(0, 2, 3, 4, 1)
    for axis, count in enumerate(grid, start=1):
        cells = _along(cells, _matrix(_pooling, cells.shape[axis], count, features), axis)
    return cells


def expand_cells(cells: Float[Tensor, "B x y z W"], size: tuple[int, int, int]) -> Features:
    """Interpolate cell values linearly, from cell centre to cell centre, onto a map of `size` voxels."""
    voxels = cells
    for axis, count in enumerate(size, start=1):
        voxels = _along(voxels, _matrix(_interpolation, count, cells.shape[axis], cells), axis)
    return voxels.permute(0, 4, 1, 2, 3)


def cell_boxes_vox(
    level_sizes: list[Size], level_strides: list[Size], grid: Size, image_size: Size
) -> Int[Tensor, "N 2 3"]:
    """Corners (first voxel, one past the last) of every cell in voxels of the input, level after level.

    Cells that lie wholly in padding have an empty box at the image's edge.
    """
    sizes, strides = tuple(level_sizes), tuple(level_strides)
    if _is_recorded():
        return _boxes_vox(sizes, strides, grid, image_size)
    return _kept_boxes_vox(sizes, strides, grid, image_size).clone()


def _along(values: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Multiply `matrix` (out, in) into one axis of `values`, keeping all others."""
    before, after = values.shape[:axis], values.shape[axis + 1 :]
    columns = values.reshape(*before, values.shape[axis], -1)
    return torch.matmul(matrix, columns).reshape(*before, matrix.shape[0], *after)


def _is_recorded() -> bool:
    """Whether sizes may be symbols, or operations are written down instead of done: then nothing may be kept."""
    return is_recorded() or torch._C._len_torch_dispatch_stack() > 0


def _boxes_vox(sizes: tuple[Size, ...], strides: tuple[Size, ...], grid: Size, image_size: Size) -> Tensor:
    levels = []
    for size, stride in zip(sizes, strides, strict=True):
        starts, stops = [], []
        for axis in range(3):
            first, last = _cell_bounds(size[axis], grid[axis], torch.device("cpu"))
            starts.append((first * stride[axis]).clamp(max=image_size[axis]))
            stops.append((last * stride[axis]).clamp(max=image_size[axis]))
        start, stop = (torch.stack(torch.meshgrid(*corner, indexing="ij"), dim=-1) for corner in (starts, stops))
        levels.append(torch.stack([start.reshape(-1, 3), stop.reshape(-1, 3)], dim=1))
    return torch.cat(levels)


@lru_cache(maxsize=_KEPT_BOXES)
def _kept_boxes_vox(sizes: tuple[Size, ...], strides: tuple[Size, ...], grid: Size, image_size: Size) -> Tensor:
    with torch.inference_mode(mode=False):
        return _boxes_vox(sizes, strides, grid, image_size)


def _matrix(build: _Build, size: int, count: int, like: Tensor) -> Tensor:
    if _is_recorded() or type(like) is not Tensor:
        return _matrix_for(build(size, count, like.device).to(like.dtype), like)
    return _kept_matrix(build, size, count, like.device, like.dtype)


@traced_as(traced.matrix_for)
def _matrix_for(matrix: Tensor, like: Tensor) -> Tensor:
    del like
    return matrix


# For good: a recorded pass (`inference/cuda_graph.py`) reads them. The lengths that images have at four levels bound
# their number.
@cache
def _kept_matrix(build: _Build, size: int, count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    # What is made in inference mode cannot be trained with, and it may be needed there first.
    with torch.inference_mode(mode=False):
        return build(size, count, device).to(dtype)


def _cell_bounds(size: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    cell = torch.arange(count, device=device)
    start = torch.div(cell * size, count, rounding_mode="floor")
    stop = torch.div((cell + 1) * size + (count - 1), count, rounding_mode="floor")
    return start, stop


def _pooling(size: int, count: int, device: torch.device) -> Float[Tensor, "m n"]:
    start, stop = _cell_bounds(size, count, device)
    voxel = torch.arange(size, device=device)
    inside = ((voxel >= start[:, None]) & (voxel < stop[:, None])).float()
    return inside / inside.sum(dim=1, keepdim=True)


def _interpolation(size: int, count: int, device: torch.device) -> Float[Tensor, "n m"]:
    voxel = torch.arange(size, device=device, dtype=torch.float32)
    position = ((voxel + 0.5) * (count / size) - 0.5).clamp(0, count - 1)
    cell = torch.arange(count, device=device, dtype=torch.float32)
    return (1 - (position[:, None] - cell).abs()).clamp(min=0)
