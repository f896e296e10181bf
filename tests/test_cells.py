"""The two maps between cells and voxels agree with torch's own, and the boxes with counting on paper."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from tokenseg.model.cells import cell_boxes_vox, expand_cells, pool_cells

Triple = tuple[int, int, int]
SIZES = st.tuples(st.integers(1, 13), st.integers(1, 13), st.integers(1, 13))
GRIDS = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))


def random_map(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(size=SIZES, grid=GRIDS, seed=st.integers(0, 99))
def test_pooling_is_adaptive_average_pooling(size: Triple, grid: Triple, seed: int) -> None:
    features = random_map(seed, 2, 3, *size)
    expected = torch.nn.functional.adaptive_avg_pool3d(features, grid)
    torch.testing.assert_close(pool_cells(features, grid).movedim(-1, 1), expected)


@settings(deadline=None)
@given(size=SIZES, grid=GRIDS, seed=st.integers(0, 99))
def test_expanding_is_trilinear_interpolation(size: Triple, grid: Triple, seed: int) -> None:
    cells = random_map(seed, 2, *grid, 3)
    expected = torch.nn.functional.interpolate(cells.movedim(-1, 1), size, mode="trilinear", align_corners=False)
    torch.testing.assert_close(expand_cells(cells, size), expected, atol=1e-5, rtol=1e-4)


def test_expanded_maps_are_channels_last() -> None:
    assert expand_cells(torch.zeros(2, 4, 5, 5, 3), (8, 9, 7)).is_contiguous(memory_format=torch.channels_last_3d)


def test_boxes_by_hand() -> None:
    # Axis 0: 10 voxels are 5 at stride 2, two cells share the middle one. Axis 1: 3 voxels in 2 at stride 2, the box
    # of the second is cut at the image's edge. Axis 2: one voxel at stride 1, two cells both see it.
    boxes = cell_boxes_vox([(5, 2, 1)], [(2, 2, 1)], (2, 2, 2), (10, 3, 1))
    x, y, z = [(0, 6), (4, 10)], [(0, 2), (2, 3)], [(0, 1), (0, 1)]
    expected = [[list(corner) for corner in zip(*box, strict=True)] for box in itertools.product(x, y, z)]
    assert boxes.tolist() == expected


def test_boxes_of_later_levels_follow_and_have_their_own_stride() -> None:
    boxes = cell_boxes_vox([(4, 4, 4), (2, 2, 2)], [(2, 2, 2), (4, 4, 4)], (2, 1, 1), (8, 8, 8))
    halves = [[[0, 0, 0], [4, 8, 8]], [[4, 0, 0], [8, 8, 8]]]
    assert boxes.tolist() == halves + halves


def test_cells_in_padding_have_empty_boxes_at_the_edge() -> None:
    boxes = cell_boxes_vox([(8, 1, 1)], [(2, 2, 2)], (4, 1, 1), (5, 2, 2))
    assert boxes[:, :, 0].tolist() == [[0, 4], [4, 5], [5, 5], [5, 5]]


@settings(deadline=None)
@given(size=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40)), grid=GRIDS)
def test_boxes_of_a_level_cover_every_voxel(size: Triple, grid: Triple) -> None:
    stride = (4, 2, 1)
    level_size = tuple(-(-length // factor) for length, factor in zip(size, stride, strict=True))
    boxes = cell_boxes_vox([level_size], [stride], grid, size)
    covered = torch.zeros(size, dtype=torch.bool)
    for (x0, y0, z0), (x1, y1, z1) in boxes.tolist():
        covered[x0:x1, y0:y1, z0:z1] = True
    assert covered.all()
    assert (boxes >= 0).all()
    assert (boxes[:, 1] >= boxes[:, 0]).all()
    assert (boxes <= torch.tensor(size)).all()


@pytest.mark.parametrize("grid", [(4, 5, 5), (2, 3, 1)])
def test_cells_are_in_the_same_order_as_their_boxes(grid: Triple) -> None:
    """Pooling an image must give the mean inside each box."""
    image = random_map(0, 1, 1, 20, 15, 30)
    means = pool_cells(image, grid).flatten()
    for mean, ((x0, y0, z0), (x1, y1, z1)) in zip(
        means, cell_boxes_vox([(20, 15, 30)], [(1, 1, 1)], grid, (20, 15, 30)).tolist(), strict=True
    ):
        torch.testing.assert_close(mean, image[0, 0, x0:x1, y0:y1, z0:z1].mean())


def test_what_was_kept_in_inference_can_be_trained_with() -> None:
    size = (9, 6, 5)  # of this test alone, so that inference comes first
    with torch.inference_mode():
        expand_cells(pool_cells(random_map(0, 1, 2, *size), (3, 2, 2)), size)
    features = random_map(0, 1, 2, *size).requires_grad_()
    torch.autograd.backward(expand_cells(pool_cells(features, (3, 2, 2)), size).sum())
    assert features.grad is not None
    # Every voxel of an even division counts alike; 5 voxels in 2 cells share the middle one.
    torch.testing.assert_close(features.grad.sum(), torch.tensor(2.0 * 9 * 6 * 5))


def test_whoever_changes_boxes_changes_no_others() -> None:
    arguments = [(4, 4, 4)], [(2, 2, 2)], (2, 2, 2), (8, 8, 8)
    first = cell_boxes_vox(*arguments)
    expected = first.clone()
    first.zero_()
    assert torch.equal(cell_boxes_vox(*arguments), expected)


def test_fake_tensors_leave_nothing_behind() -> None:
    size = (11, 8, 6)  # of this test alone
    with FakeTensorMode():
        assert pool_cells(torch.zeros(1, 2, *size), (3, 2, 2)).shape == (1, 3, 2, 2, 2)
    assert torch.equal(pool_cells(torch.ones(1, 2, *size), (3, 2, 2)), torch.ones(1, 3, 2, 2, 2))
    with FakeTensorMode():
        pool_cells(torch.zeros(1, 2, *size), (3, 2, 2))


def test_a_map_in_half_precision_has_its_own_matrices() -> None:
    features = random_map(0, 1, 2, 7, 6, 5)
    full = pool_cells(features, (2, 2, 2))
    half = pool_cells(features.bfloat16(), (2, 2, 2))
    assert (full.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(half.float(), full, atol=0.02, rtol=0.02)
