from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenseg.errors import DataError
from tokenseg.tokens.boundary import boundary_distances_mm, near_boundary

# Ten cells of one voxel thickness along x; the foreground is x >= 5, so its surface is the plane x = 5.
SLABS = np.array([[[[x, 0, 0], [x + 1, 4, 4]] for x in range(10)]], dtype=float)
MASK = np.zeros((10, 4, 4), dtype=bool)
MASK[5:] = True


def flags(*true: int, count: int = 10) -> np.ndarray:
    return np.isin(np.arange(count), true)[None]


@pytest.mark.parametrize(("radius_mm", "near"), [(0.0, {5}), (2.0, {4, 5, 6}), (4.0, {3, 4, 5, 6, 7})])
def test_slabs_by_hand(radius_mm: float, near: set[int]) -> None:
    kept = {4, 5, 9}
    distance_mm = boundary_distances_mm(SLABS, MASK, (2.0, 1.0, 1.0), 4.0)
    measured = near_boundary(distance_mm, flags(*kept), flags(*range(10)), radius_mm)
    share, base_rate = len(near & kept) / 3, len(near) / 10
    assert measured.radius_mm == radius_mm
    assert measured.share == pytest.approx(share)
    assert measured.base_rate == pytest.approx(base_rate)
    assert measured.enrichment == pytest.approx(share / base_rate)
    assert measured.ceiling == pytest.approx(min(1.0, len(near) / 3))


def test_distances_of_slabs_by_hand() -> None:
    distance_mm = boundary_distances_mm(SLABS, MASK, (2.0, 1.0, 1.0), 6.5)
    np.testing.assert_array_equal(distance_mm, [[np.inf, np.inf, 6, 4, 2, 0, 2, 4, 6, np.inf]])


def test_a_cell_meets_every_voxel_that_it_covers_in_part() -> None:
    boxes = np.array([[[[4.0, 0, 0], [5.0, 4, 4]], [[4.5, 0, 0], [5.1, 4, 4]], [[4.5, 0, 0], [5.0 + 1e-9, 4, 4]]]])
    np.testing.assert_array_equal(boundary_distances_mm(boxes, MASK, (1.0, 1.0, 1.0), 5.0), [[1, 0, 1]])


def test_cells_in_padding_are_never_near_nor_in_the_base_rate_but_cost_when_kept() -> None:
    boxes = np.concatenate([SLABS, [[[[10, 0, 0], [10, 4, 4]]] * 10]], axis=1)
    distance_mm = boundary_distances_mm(boxes, MASK, (1.0, 1.0, 1.0), 0.0)
    assert np.isinf(distance_mm[0, 10:]).all()
    measured = near_boundary(distance_mm, flags(5, 10, count=20), flags(*range(10), count=20), 0.0)
    assert (measured.share, measured.base_rate, measured.ceiling) == (0.5, 0.1, 0.5)


def test_each_pass_has_a_ceiling_of_its_own() -> None:
    """Two near in the first pass and none in the second; each keeps one: the best choice has one of two."""
    distance_mm = np.array([[0.0, 0.0, 9.0], [9.0, 9.0, 9.0]])
    kept = np.array([[True, False, False], [True, False, False]])
    measured = near_boundary(distance_mm, kept, np.ones((2, 3), bool), 1.0)
    assert (measured.share, measured.ceiling) == (0.5, 0.5)
    assert measured.base_rate == pytest.approx(2 / 6)


def test_nothing_near_leaves_the_enrichment_undefined() -> None:
    measured = near_boundary(np.full((1, 4), np.inf), flags(0, count=4), np.ones((1, 4), bool), 2.0)
    assert (measured.share, measured.base_rate, measured.ceiling) == (0, 0, 0)
    assert math.isnan(measured.enrichment)


@pytest.mark.parametrize("value", [False, True])
def test_a_mask_without_boundary_is_refused(value: bool) -> None:
    with pytest.raises(DataError, match="no boundary: it is empty or fills"):
        boundary_distances_mm(SLABS, np.full((10, 4, 4), value), (1.0, 1.0, 1.0), 2.0)


def test_the_edge_of_the_scan_is_no_boundary() -> None:
    """The foreground reaches the last slab, but its end there is the end of the scan."""
    assert boundary_distances_mm(SLABS, MASK, (1.0, 1.0, 1.0), 9.0)[0, 9] == 4


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    shape=st.tuples(*[st.integers(2, 9)] * 3),
    spacing_mm=st.tuples(*[st.floats(0.4, 4)] * 3),
    most_mm=st.floats(0, 8),
)
def test_distances_equal_those_over_all_pairs_of_voxels(seed, shape, spacing_mm, most_mm) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < 0.2
    mask[tuple(size // 2 for size in shape)] = True
    mask[0, 0, 0] = False
    ends = np.sort(rng.uniform(-0.49, 0.99, (1, 6, 2, 3)).clip(0) * shape, axis=2)
    surface = [
        index
        for index in np.argwhere(mask)
        if any(
            0 <= index[axis] + step < shape[axis] and not mask[tuple(index + step * np.eye(3, dtype=int)[axis])]
            for axis in range(3)
            for step in (-1, 1)
        )
    ]
    expected = []
    for low, high in ends[0]:
        inside = [v for v in np.ndindex(shape) if all(v[i] < high[i] and v[i] + 1 > low[i] for i in range(3))]
        empty = (high <= low).any()
        gaps = [np.linalg.norm((np.array(v) - s) * spacing_mm) for v in inside for s in surface]
        nearest = np.inf if empty else min(gaps)
        expected.append(nearest if nearest <= most_mm else np.inf)
    np.testing.assert_allclose(boundary_distances_mm(ends, mask, spacing_mm, most_mm)[0], expected, rtol=1e-9)
