"""The coarse view: blocks by hand, and against a loop over blocks."""

from __future__ import annotations

from itertools import product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tokenseg.plan_grid.coarse import coarse_image, coarse_labels

SHAPES = st.tuples(*[st.integers(1, 9)] * 3)
FACTORS = st.tuples(*[st.integers(1, 4)] * 3)


def blocks_of(array: np.ndarray, factor: tuple[int, int, int]):
    """Place and voxels of every block of one map."""
    counts = [-(-size // count) for size, count in zip(array.shape, factor, strict=True)]
    for place in product(*map(range, counts)):
        yield place, array[tuple(slice(at * count, (at + 1) * count) for at, count in zip(place, factor, strict=True))]


def test_a_box_of_ones_by_hand() -> None:
    image = np.zeros((1, 6, 4, 5), np.float32)
    image[0, 2:5, 0:2, 1:5] = 1
    coarse = coarse_image(image, (3, 2, 2))
    assert (coarse.shape, coarse.dtype) == ((1, 2, 2, 3), np.float32)
    # Along the first axis 1 of 3 and 2 of 3 voxels; along the second all or none; along the third 1, 2 of 2 and 1 of 1.
    expected = np.outer([1 / 3, 2 / 3], [1 / 2, 1, 1]).reshape(2, 1, 3) * np.array([1, 0]).reshape(1, 2, 1)
    np.testing.assert_allclose(coarse[0], expected, rtol=1e-6)


@given(shape=SHAPES, factor=FACTORS, seed=st.integers(0, 99))
def test_means_equal_those_of_a_loop(shape, factor, seed) -> None:
    image = np.random.default_rng(seed).normal(size=(2, *shape)).astype(np.float32)
    coarse = coarse_image(image, factor)
    for channel in range(2):
        for place, block in blocks_of(image[channel], factor):
            np.testing.assert_allclose(coarse[(channel, *place)], block.mean(), rtol=1e-4, atol=1e-5)


@given(shape=SHAPES, factor=FACTORS, seed=st.integers(0, 99))
def test_labels_equal_those_of_a_loop(shape, factor, seed) -> None:
    labels = np.random.default_rng(seed).choice(4, size=(1, *shape), p=[0.7, 0.1, 0.1, 0.1]).astype(np.uint8)
    coarse = coarse_labels(labels, factor)
    counts = np.zeros((*coarse.shape[1:], 4))
    for place, block in blocks_of(labels[0], factor):
        counts[place] = np.bincount(block.ravel(), minlength=4)
    for place in product(*map(range, coarse.shape[1:])):
        around = counts[tuple(slice(max(0, at - 1), at + 2) for at in place)].sum(axis=(0, 1, 2))[1:]
        assert coarse[(0, *place)] == (around.argmax() + 1 if around.any() else 0)


def test_a_single_voxel_stays_in_sight_with_the_blocks_around_it() -> None:
    labels = np.zeros((1, 30, 30, 30), np.uint8)
    labels[0, 17, 4, 29] = 2  # block 3, 0, 9 of 6 x 6 x 10
    coarse = coarse_labels(labels, (5, 5, 3))
    expected = np.zeros((1, 6, 6, 10), np.uint8)
    expected[0, 2:5, 0:2, 8:10] = 2
    np.testing.assert_array_equal(coarse, expected)


def test_regions_are_kept_apart() -> None:
    regions = np.zeros((2, 8, 8, 8), np.uint8)
    regions[0, :2], regions[1, 0, 0, 7] = 1, 1
    coarse = coarse_labels(regions, (2, 2, 2))
    assert [np.argwhere(each).max(axis=0).tolist() for each in coarse] == [[1, 3, 3], [1, 1, 3]]
    assert coarse.sum(axis=(1, 2, 3)).tolist() == [2 * 4 * 4, 2 * 2 * 2]


def test_a_factor_of_one_changes_nothing_and_copies() -> None:
    image = np.random.default_rng(0).normal(size=(1, 3, 4, 5)).astype(np.float32)
    image.flags.writeable = False  # as a memory-mapped case is
    np.testing.assert_array_equal(coarse_image(image, (1, 1, 1)), image)


def test_no_foreground_gives_none() -> None:
    assert not coarse_labels(np.zeros((1, 4, 4, 4), np.uint8), (2, 2, 2)).any()
