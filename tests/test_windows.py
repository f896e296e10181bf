"""Windows: where they lie, how they are blended, and how a network runs over an image."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plans import make_plan
from tokenseg.config import Plan
from tokenseg.inference.windows import (
    full_rows,
    num_windows,
    pad_rows,
    predict_logits,
    torch_forward,
    window_corners,
    window_rows,
    window_starts,
    window_weight,
)
from tokenseg.plan_grid.preprocess import rows_of
from toy_models import Toy, as_stored, mixing, nearest_level

CPU = torch.device("cpu")


def toy_plan(**changes: object) -> Plan:
    defaults = {"window_vox": (16, 16, 16), "whole_limit_vox": (40, 40, 40)}
    return as_stored(make_plan(labels=2), **(defaults | changes))


@given(size=st.integers(1, 300), window=st.integers(1, 96))
def test_windows_cover_overlap_and_stay_inside(size, window):
    starts = window_starts(size, window)
    assert starts[0] == 0
    assert starts == sorted(set(starts))
    if size <= window:
        assert starts == [0]
        return
    assert starts[-1] == size - window
    steps = np.diff(starts)
    assert (steps <= max(1, window // 2)).all()
    # Evenly spread, and no window more than needed.
    assert steps.max() - steps.min() <= 1
    assert (len(starts) - 2) * max(1, window // 2) < size - window


@pytest.mark.parametrize("window", [(1, 1, 1), (16, 24, 7), (96, 96, 96)])
def test_gaussian_is_positive_symmetric_and_highest_in_the_middle(window):
    weight = window_weight(window)
    assert weight.shape == window
    assert 1e-3 <= weight.min() <= weight.max() <= 1
    assert torch.equal(weight, weight.flip(0, 1, 2))
    assert weight[tuple(size // 2 for size in window)] == weight.max()
    middle = weight[:, window[1] // 2, window[2] // 2]
    assert (middle[: window[0] // 2].diff() >= 0).all()


def test_the_plan_alone_decides_between_whole_and_windows():
    image = np.zeros((1, 20, 21, 30), np.float32)
    for limit, whole in {(20, 21, 30): True, (20, 21, 29): False, (19, 21, 30): False, (500, 20, 500): False}.items():
        network = nearest_level(3)
        logits = predict_logits(torch_forward(network, CPU), image, toy_plan(whole_limit_vox=limit))
        assert logits.shape == (3, 20, 21, 30)
        windows = [(1, 1, 16, 16, 16)] * (2 * 2 * 3)
        assert network.seen == ([(1, 1, 20, 21, 30)] if whole else windows)
        assert num_windows(image, toy_plan(whole_limit_vox=limit)) == len(network.seen)
    # An axis that is shorter than a window is padded to one.
    assert num_windows(np.zeros((1, 9, 20, 40), np.float32), toy_plan(whole_limit_vox=(9, 9, 9))) == 1 * 2 * 4


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 40)] * 3), window=st.tuples(*[st.integers(4, 20)] * 3), seed=st.integers(0, 2**32)
)
def test_windows_of_a_pointwise_network_equal_the_whole(shape, window, seed):
    image = np.random.default_rng(seed).uniform(0, 2, (1, *shape)).astype(np.float32)
    in_windows = predict_logits(
        torch_forward(nearest_level(3), CPU), image, toy_plan(window_vox=window, whole_limit_vox=(1, 1, 1))
    ).numpy()
    expected = np.stack([-((image[0] - level) ** 2) for level in range(3)])
    np.testing.assert_allclose(in_windows, expected, atol=1e-5)
    whole = predict_logits(
        torch_forward(nearest_level(3), CPU), image, toy_plan(window_vox=window, whole_limit_vox=(40, 40, 40))
    )
    np.testing.assert_allclose(whole.numpy(), expected, atol=1e-6)


def test_windows_are_blended_by_their_weights():
    """Two windows that disagree: near a window's middle its own answer counts, halfway both count the same."""
    answers = iter([0.0, 1.0])

    def next_answer(images: torch.Tensor) -> torch.Tensor:
        return torch.full_like(images, next(answers)).expand(-1, 3, -1, -1, -1)

    plan = toy_plan(window_vox=(16, 16, 16), whole_limit_vox=(16, 16, 16))
    line = predict_logits(torch_forward(Toy(next_answer), CPU), np.zeros((1, 24, 16, 16), np.float32), plan)[0, :, 8, 8]
    assert (line[:8] == 0).all()
    assert (line[16:] == 1).all()
    assert (line.diff() >= 0).all()
    torch.testing.assert_close(line + line.flip(0), torch.ones(24))
    # Voxel 9 lies 1.5 from the first middle and 6.5 from the second; sigma is 2.
    first, second = np.exp(-0.5 * (1.5 / 2) ** 2), max(np.exp(-0.5 * (6.5 / 2) ** 2), 1e-3)
    centre = np.exp(-0.5 * (0.5 / 2) ** 2) ** 2
    assert line[9] == pytest.approx(
        max(second * centre, 1e-3) / (first * centre + max(second * centre, 1e-3)), rel=1e-4
    )


def test_small_images_are_centred_in_a_window_and_cropped_back():
    image = np.random.default_rng(0).uniform(1, 2, (1, 5, 16, 30)).astype(np.float32)
    seen = []

    def remember(images: torch.Tensor) -> torch.Tensor:
        seen.append(images.clone())
        return images.expand(-1, 3, -1, -1, -1)

    logits = predict_logits(torch_forward(Toy(remember), CPU), image, toy_plan())
    (padded,) = seen
    assert padded.shape == (1, 1, 16, 16, 30)
    np.testing.assert_array_equal(padded[0, 0, 5:10].numpy(), image[0])
    assert padded.count_nonzero() == image.size
    np.testing.assert_array_equal(logits[0].numpy(), image[0])


def test_a_caller_may_run_some_of_the_windows():
    image = torch.rand(1, 24, 16, 16)
    plan = toy_plan(whole_limit_vox=(16, 16, 16))
    corners = window_corners((24, 16, 16), plan)
    assert corners == [(0, 0, 0), (8, 0, 0)]
    forward = torch_forward(nearest_level(3), CPU)
    rows = list(window_rows(forward, rows_of(image.numpy()), plan.window_vox, corners[1:], slice(0, 16)))
    assert not any(row is not None and row.weight.any() for row in rows[:8])
    weight = torch.stack([row.weight for row in rows[8:]])
    torch.testing.assert_close(weight, window_weight((16, 16, 16)))
    answer = torch.stack([row.weighted / row.weight for row in rows[8:]], dim=1)
    torch.testing.assert_close(answer, forward(image[None, :, 8:]).logits[0])


def test_rows_beyond_the_last_window_have_no_answer():
    image = rows_of(np.zeros((1, 24, 16, 16), np.float32))
    forward = torch_forward(nearest_level(3), CPU)
    rows = list(window_rows(forward, image, (8, 16, 16), [(4, 0, 0)], slice(0, 16)))
    assert [row is not None and bool(row.weight.any()) for row in rows] == [4 <= n < 12 for n in range(24)]
    assert list(window_rows(forward, image, (8, 16, 16), [], slice(0, 16))) == [None] * 24


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 40)] * 3),
    window=st.tuples(*[st.integers(4, 20)] * 3),
    cuts=st.lists(st.integers(0, 40), max_size=3),
    seed=st.integers(0, 2**32),
)
def test_a_stretch_has_the_very_values_of_the_whole(shape, window, cuts, seed):
    """Bit for bit, however the second axis is cut: what is held at once must not show in a mask."""
    rows = rows_of(np.random.default_rng(seed).normal(size=(1, *shape)).astype(np.float32))
    plan = toy_plan(window_vox=window, whole_limit_vox=(1, 1, 1))
    forward = torch_forward(mixing(), CPU)
    padded = pad_rows(rows, window)
    corners = window_corners(padded.rows.shape, plan)
    count = shape[rows.order[1]]
    ends = sorted({0, count, *(cut for cut in cuts if cut < count)})
    whole = torch.stack(list(full_rows(forward, padded, plan, corners, slice(0, count))))
    parts = [
        torch.stack(list(full_rows(forward, padded, plan, corners, slice(first, stop))))
        for first, stop in itertools.pairwise(ends)
    ]
    assert whole.shape == (shape[rows.order[0]], 3, count, shape[rows.order[2]])
    assert torch.equal(torch.cat(parts, dim=2), whole)
