from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from plans import make_plan
from tokenseg.inference.windows import predict_logits, torch_forward
from tokenseg.model.network import TokenSegOutput
from tokenseg.training.augment import Window
from tokenseg.training.batches import TrainingBatches, cut_window, draw_window
from tokenseg.training.cache import PreparedCase

Shape = tuple[int, int, int]
SIZES = st.tuples(*[st.integers(1, 12)] * 3)


def case_of(labels: np.ndarray, case_id: str = "case") -> PreparedCase:
    """A case whose image holds the number of each voxel, from 1 on, and whose points are all foreground voxels."""
    image = np.arange(1, labels.size + 1, dtype=np.float32).reshape(1, *labels.shape)
    places = np.argwhere(labels)
    points = np.column_stack([labels[tuple(places.T)], places]).astype(np.int32).reshape(-1, 4)
    return PreparedCase(case_id, image, labels[np.newaxis].astype(np.uint8), points)


class Recorder(nn.Module):
    """A network that only remembers what it was given."""

    def forward(self, images: torch.Tensor) -> TokenSegOutput:
        self.seen = images
        return TokenSegOutput(images, (), None)


def blocks(shape: Shape = (20, 20, 20)) -> np.ndarray:
    labels = np.zeros(shape, dtype=np.uint8)
    labels[2:8, 2:8, 2:8] = 1
    labels[15, 15, 15] = 2
    return labels


def unchanged(window: Window, _: int) -> Window:
    return window


def noisy(window: Window, seed: int) -> Window:
    noise = torch.randn(window["image"].shape, generator=torch.Generator().manual_seed(seed))
    return {"image": window["image"] + noise, "labels": window["labels"]}


def batches_of(*, fraction: float = 0.5, batch_size: int = 4, seed: tuple[int, ...] = (0, 0)) -> TrainingBatches:
    plan = make_plan(window_vox=(8, 8, 8)).model_copy(update={"batch_size": batch_size})
    cases = [case_of(blocks(), "a"), case_of(blocks((24, 16, 18)), "b")]
    return TrainingBatches(cases, plan, fraction, noisy, seed)


def same(one: object, other: object) -> bool:
    return torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


def test_a_batch_follows_from_seed_and_step_alone() -> None:
    first, second = batches_of(), batches_of()
    np.random.seed(1)  # noqa: NPY002 - the global generators must not matter
    torch.manual_seed(1)
    in_order = [first[step] for step in range(4)]
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(2)
    backwards = [second[step] for step in (3, 2, 1, 0)][::-1]
    assert all(same(one, other) for one, other in zip(in_order, backwards, strict=True))
    assert [batch.case_ids for batch in in_order] == [batch.case_ids for batch in backwards]


def test_steps_and_seeds_differ() -> None:
    batches = [batches_of()[0], batches_of()[1], batches_of(seed=(1, 0))[0], batches_of(seed=(0, 1))[0]]
    assert not any(same(one, other) for number, one in enumerate(batches) for other in batches[:number])


@pytest.mark.parametrize("count", [2, 4])
def test_shares_of_processes_make_up_the_batch_of_one(count: int) -> None:
    plan = make_plan(window_vox=(8, 8, 8)).model_copy(update={"batch_size": 4, "coarse_factor": (3, 3, 3)})
    cases = [with_coarse(blocks(), "a"), with_coarse(blocks((24, 21, 18)), "b")]
    whole = TrainingBatches(cases, plan, 0.5, noisy, (0, 0))
    shares = [TrainingBatches(cases, plan, 0.5, noisy, (0, 0), part=(number, count)) for number in range(count)]
    for step in range(5):
        batches = [share[step] for share in shares]
        assert torch.equal(torch.cat([batch.images for batch in batches]), whole[step].images)
        assert torch.equal(torch.cat([batch.labels for batch in batches]), whole[step].labels)
        assert all(batch.case_ids == whole[step].case_ids for batch in batches)
        assert all(batch.coarse == whole[step].coarse for batch in batches)


def test_a_batch_has_the_plans_shape_and_names_its_cases() -> None:
    plan = make_plan(window_vox=(8, 6, 4)).model_copy(update={"batch_size": 16})
    cases = [case_of(blocks(), "a"), case_of(blocks(), "b")]
    batch = TrainingBatches(cases, plan, 0.5, unchanged, (0, 0))[0]
    assert (batch.images.shape, batch.images.dtype) == ((16, 1, 8, 6, 4), torch.float32)
    assert (batch.labels.shape, batch.labels.dtype) == ((16, 1, 8, 6, 4), torch.uint8)
    assert set(batch.case_ids) == {"a", "b"}
    assert len(batch.case_ids) == 16


def test_image_and_labels_are_cut_at_one_place() -> None:
    plan = make_plan(window_vox=(8, 8, 8)).model_copy(update={"batch_size": 8})
    case = case_of(blocks())
    batch = TrainingBatches([case], plan, 0.5, unchanged, (3, 0))[5]
    label_of_number = np.concatenate([[0], case.labels.ravel()])
    assert np.array_equal(label_of_number[batch.images.numpy().astype(int)], batch.labels.numpy())


@pytest.mark.parametrize(
    ("batch_size", "fraction", "total"), [(1, 0.5, 50), (2, 0.5, 100), (3, 0.25, 75), (5, 1.0, 500)]
)
def test_the_share_of_foreground_windows_is_exact_over_many_steps(batch_size: int, fraction: float, total: int) -> None:
    batches = batches_of(fraction=fraction, batch_size=batch_size)
    counts = [batches.num_foreground(step) for step in range(100)]
    assert sum(counts) == total
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_that_many_windows_hold_foreground(fraction: float) -> None:
    labels = np.zeros((40, 40, 40), dtype=np.uint8)
    labels[20, 20, 20] = 1
    plan = make_plan(window_vox=(4, 4, 4)).model_copy(update={"batch_size": 4})
    batches = TrainingBatches([case_of(labels)], plan, fraction, unchanged, (0, 0))
    with_foreground = [int(batches[step].labels.amax(dim=(1, 2, 3, 4)).sum()) for step in range(20)]
    # By chance a window holds the voxel once in 800 draws.
    assert with_foreground == [4 * fraction] * 20


def test_a_rare_label_is_drawn_as_often_as_a_frequent_one() -> None:
    case, rng = case_of(blocks()), np.random.default_rng(0)
    windows = [
        cut_window(case.labels, draw_window(rng, case, (5, 5, 5), on_foreground=True), (5, 5, 5)) for _ in range(400)
    ]
    rare = sum(bool((window == 2).any()) for window in windows)
    assert all(bool((window > 0).any()) for window in windows)
    assert 160 < rare < 240  # four standard deviations around one half


@given(size=SIZES, window=SIZES, seed=st.integers(0, 2**32 - 1), data=st.data())
@settings(deadline=None)
def test_a_foreground_window_holds_its_voxel_and_stays_in_the_image(
    size: Shape, window: Shape, seed: int, data: st.DataObject
) -> None:
    place = tuple(data.draw(st.integers(0, length - 1)) for length in size)
    labels = np.zeros(size, dtype=np.uint8)
    labels[place] = 7
    start = draw_window(np.random.default_rng(seed), case_of(labels), window, on_foreground=True)
    for first, length, whole, voxel in zip(start, window, size, place, strict=True):
        assert first <= voxel < first + length
        if whole > length:
            assert 0 <= first <= whole - length


def test_other_windows_start_everywhere_and_nowhere_else() -> None:
    rng, case = np.random.default_rng(0), case_of(np.zeros((6, 5, 4), dtype=np.uint8))
    starts = {draw_window(rng, case, (4, 4, 4), on_foreground=False) for _ in range(200)}
    assert starts == set(product(range(3), range(2), range(1)))


def test_a_case_without_foreground_gives_any_window() -> None:
    rng, case = np.random.default_rng(0), case_of(np.zeros((6, 4, 4), dtype=np.uint8))
    starts = {draw_window(rng, case, (4, 4, 4), on_foreground=True) for _ in range(50)}
    assert starts == {(0, 0, 0), (1, 0, 0), (2, 0, 0)}


@given(size=SIZES, window=SIZES)
@settings(deadline=None)
def test_a_smaller_image_is_centred_in_zeros_just_as_in_inference(size: Shape, window: Shape) -> None:
    small = tuple(min(pair) for pair in zip(size, window, strict=True))
    case = case_of(np.zeros(small, dtype=np.uint8))
    start = draw_window(np.random.default_rng(0), case, window, on_foreground=False)
    cut = cut_window(case.image, start, window)
    network = Recorder()
    predict_logits(torch_forward(network, torch.device("cpu")), case.image, make_plan(window_vox=window))
    assert torch.equal(cut, network.seen[0])
    assert int((cut != 0).sum()) == np.prod(small)
    for axis, length in enumerate(small, start=1):
        used = torch.nonzero(cut.amax(dim=[other for other in range(4) if other != axis]))
        before, after = int(used[0]), window[axis - 1] - 1 - int(used[-1])
        assert before + length + after == window[axis - 1]
        assert abs(before - after) <= 1


@given(size=SIZES, window=SIZES, start=st.tuples(*[st.integers(-12, 12)] * 3), channels=st.integers(1, 2))
@settings(deadline=None)
def test_cut_window_equals_a_voxel_by_voxel_copy(size: Shape, window: Shape, start: Shape, channels: int) -> None:
    # Windows without any overlap are never asked for.
    start = tuple(
        min(max(first, 1 - length), whole - 1) for first, length, whole in zip(start, window, size, strict=True)
    )
    array = np.arange(1, channels * np.prod(size) + 1, dtype=np.float32).reshape(channels, *size)
    expected = np.zeros((channels, *window), dtype=np.float32)
    for voxel in product(*map(range, window)):
        source = tuple(first + offset for first, offset in zip(start, voxel, strict=True))
        if all(0 <= place < whole for place, whole in zip(source, size, strict=True)):
            expected[(slice(None), *voxel)] = array[(slice(None), *source)]
    assert np.array_equal(cut_window(array, start, window).numpy(), expected)


def test_cut_window_copies() -> None:
    array = np.zeros((1, 4, 4, 4), dtype=np.float32)
    cut_window(array, (0, 0, 0), (4, 4, 4)).fill_(1)
    assert not array.any()


# ---- coarse views


def digest(batches: TrainingBatches, steps: int) -> tuple[str, list[str]]:
    content, names = hashlib.sha256(), []
    for step in range(steps):
        batch = batches[step]
        content.update(batch.images.numpy().tobytes())
        content.update(batch.labels.numpy().tobytes())
        names.append("".join(batch.case_ids))
    return content.hexdigest()[:16], names


def test_without_a_coarse_factor_batches_are_those_of_earlier_versions() -> None:
    plan = make_plan(window_vox=(8, 8, 8)).model_copy(update={"batch_size": 4})
    cases = [case_of(blocks(), "a"), case_of(blocks((24, 16, 18)), "b")]
    expected = "c4c07924ca028d38", ["baab", "bbaa", "aaba", "baba", "aaba", "baba"]
    assert digest(TrainingBatches(cases, plan, 0.5, unchanged, (0, 0)), 6) == expected


def with_coarse(labels: np.ndarray, case_id: str) -> PreparedCase:
    """A case whose coarse view holds negative numbers."""
    coarse = case_of(labels[::3, ::3, ::3], case_id)
    return replace(case_of(labels, case_id), coarse=replace(coarse, image=-coarse.image))


def test_every_fourth_batch_holds_coarse_views_and_nothing_else() -> None:
    plan = make_plan(window_vox=(8, 8, 8)).model_copy(update={"batch_size": 3, "coarse_factor": (3, 3, 3)})
    cases = [with_coarse(blocks(), "a"), with_coarse(blocks((24, 21, 18)), "b")]
    batches = TrainingBatches(cases, plan, 0.5, unchanged, (0, 0))
    for step in range(8):
        is_coarse = [bool((image < 0).any()) for image in batches[step].images]
        assert is_coarse == [step in (3, 7)] * 3
        assert batches[step].coarse == (step in (3, 7))
        assert same(batches[step], batches[step])


def test_a_coarse_view_is_the_whole_case_centred_in_the_window() -> None:
    plan = make_plan(window_vox=(8, 8, 8)).model_copy(update={"batch_size": 4, "coarse_factor": (3, 3, 3)})
    case = with_coarse(blocks((24, 21, 18)), "a")
    view = TrainingBatches([case], plan, 0.5, unchanged, (0, 0))[3].images[0]
    np.testing.assert_array_equal(view[:, 0:8, 0:7, 1:7], case.coarse.image)
    assert int((view != 0).sum()) == 8 * 7 * 6


def test_the_other_batches_are_the_same_with_and_without_coarse_views() -> None:
    plan = make_plan(window_vox=(8, 8, 8)).model_copy(update={"batch_size": 4})
    cases = [with_coarse(blocks(), "a"), with_coarse(blocks((24, 21, 18)), "b")]
    plain = TrainingBatches(cases, plan, 0.5, unchanged, (0, 0))
    mixed = TrainingBatches(cases, plan.model_copy(update={"coarse_factor": (3, 3, 3)}), 0.5, unchanged, (0, 0))
    assert [same(plain[step], mixed[step]) for step in range(8)] == [True, True, True, False] * 2
