"""Steered windows: what is kept, where windows lie, and how their answers are joined with the coarse one."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phantoms import write_nifti
from plans import make_plan
from tokenseg.config import Plan
from tokenseg.errors import ConfigError
from tokenseg.imaging.volume import Volume
from tokenseg.inference.predict import segment_volume
from tokenseg.inference.steering import (
    cover,
    fine_share,
    kept_voxels,
    look_coarsely,
    predict_full,
    predict_steered,
    ramps_of,
)
from tokenseg.inference.windows import forward_of, predict_logits, window_corners
from tokenseg.options import SegmentOptions
from tokenseg.outputs import EXCLUSIVE, REGIONS
from tokenseg.plan_grid.coarse import coarse_image
from tokenseg.plan_grid.preprocess import rows_of
from tokenseg.saved_model.checkpoint import Model
from tokenseg.segmentation.segment import segment_files
from toy_models import Toy, above_level, as_stored, constant, job_of, toy_model

WINDOW, FACTOR, NUM_FULL = (32, 32, 32), (4, 4, 2), 5 * 4 * 3


def toy_plan(**changes: object) -> Plan:
    """Windows of 32 voxels of 1 mm; coarse voxels of 4 x 4 x 2 mm; one region."""
    defaults = {"window_vox": WINDOW, "whole_limit_vox": WINDOW, "coarse_factor": FACTOR}
    return as_stored(make_plan(labels=1, regions=True), **(defaults | changes))


def steep() -> Toy:
    """On where a voxel is above 0.02, and sure of it: a single voxel of 1 in a coarse one of 32 is enough."""
    return Toy(lambda images: 400 * (images[:, :1] - 0.02))


def scan(*boxes: tuple[slice, slice, slice], shape: tuple[int, int, int] = (96, 80, 64)) -> np.ndarray:
    image = np.zeros((1, *shape), np.float32)
    for box in boxes:
        image[(0, *box)] = 1
    return image


def cube(x: int, y: int, z: int, size: int = 8) -> tuple[slice, slice, slice]:
    return slice(x, x + size), slice(y, y + size), slice(z, z + size)


def share_of(corners: list[tuple[int, int, int]], size: tuple[int, int, int], window: tuple[int, int, int]):
    """The share in all of a scan whose rows lie across its first axis."""
    image = rows_of(np.zeros((1, *size), np.float32))
    assert image.order[0] == 0
    ramps = ramps_of(corners, image, window)
    _, second, third = (size[axis] for axis in image.order)
    rows = [fine_share(ramps, number, slice(0, second), third) for number in range(size[0])]
    return torch.stack(rows).permute(*(image.order.index(axis) for axis in range(3)))


# ---- where windows lie


def middle_half(corner: int, size: int, window: int) -> tuple[float, float]:
    low = -np.inf if corner == 0 else corner + window // 4
    high = np.inf if corner + window == size else corner + window - window // 4
    return low, high


def covered(corners, kept, size, window, factor) -> np.ndarray:
    """Coarse voxels whose centre lies in the middle half of a window, by a second way."""
    found = np.zeros_like(kept)
    centres = [(np.arange(count) + 0.5) * step for count, step in zip(kept.shape, factor, strict=True)]
    for corner in corners:
        axes = []
        for axis in range(3):
            low, high = middle_half(corner[axis], size[axis], window[axis])
            axes.append((centres[axis] >= low) & (centres[axis] < high))
        found |= axes[0][:, None, None] & axes[1][None, :, None] & axes[2][None, None, :]
    return found


@given(
    size=st.tuples(*[st.integers(12, 50)] * 3),
    factor=st.tuples(*[st.integers(1, 9)] * 3),
    share=st.floats(0, 0.2),
    seed=st.integers(0, 999),
)
@settings(deadline=None, max_examples=40)
def test_every_kept_voxel_lies_in_the_middle_of_a_window(size, factor, share, seed):
    window = (12, 11, 10)
    shape = [-(-length // count) for length, count in zip(size, factor, strict=True)]
    kept = np.random.default_rng(seed).random(shape) < share
    corners = cover(kept, size, window, factor)
    assert covered(corners, kept, size, window, factor)[kept].all()
    assert all(0 <= at <= length - w for corner in corners for at, length, w in zip(corner, size, window, strict=True))
    assert len(set(corners)) == len(corners) <= kept.sum()
    assert corners == cover(kept.copy(), size, window, factor)


def test_one_small_lesion_takes_one_window_with_the_lesion_in_its_middle():
    kept = np.zeros((25, 25, 25), bool)
    kept[10:12, 14:15, 9:12] = True  # voxels 40 to 48, 56 to 60, 36 to 48
    assert cover(kept, (100, 100, 100), (40, 40, 40), (4, 4, 4)) == [(24, 38, 22)]


def test_a_lesion_at_the_edge_takes_the_window_at_the_edge():
    kept = np.zeros((25, 25, 25), bool)
    kept[0, 24, 12] = True
    assert cover(kept, (100, 100, 100), (40, 40, 40), (4, 4, 4)) == [(0, 60, 30)]


def test_two_near_lesions_share_a_window_and_far_ones_do_not():
    kept = np.zeros((25, 25, 25), bool)
    kept[10, 10, 10] = kept[13, 10, 10] = True  # 40 to 56
    assert cover(kept, (100, 100, 100), (40, 40, 40), (4, 4, 4)) == [(28, 22, 22)]
    kept[20, 10, 10] = True  # 80 to 84
    assert cover(kept, (100, 100, 100), (40, 40, 40), (4, 4, 4)) == [(28, 22, 22), (60, 22, 22)]


def test_nothing_kept_takes_no_window():
    assert cover(np.zeros((9, 9, 9), bool), (36, 36, 36), (12, 12, 12), (4, 4, 4)) == []


# ---- how the answers are joined


def test_the_share_by_hand():
    share = share_of([(8, 0, 0)], (40, 16, 16), (16, 16, 16))
    line = share[:, 8, 8]
    assert not line[:8].any()
    assert not line[24:].any()
    # Quarter of a window: four voxels from 0.125 to 0.875 at each side.
    torch.testing.assert_close(line[8:12], torch.tensor([0.125, 0.375, 0.625, 0.875]))
    assert (line[12:20] == 1).all()
    torch.testing.assert_close(line[20:24], torch.tensor([0.875, 0.625, 0.375, 0.125]))
    # The other axes are as long as the window: no ramp towards the edges of the scan.
    torch.testing.assert_close(share, line[:, None, None].expand(40, 16, 16))


def test_a_window_at_the_edge_counts_up_to_the_edge():
    line = share_of([(0, 0, 0), (24, 0, 0)], (40, 16, 16), (16, 16, 16))[:, 0, 0]
    assert (line[:12] == 1).all()
    assert (line[28:] == 1).all()
    assert not line[16:24].any()


def test_the_largest_share_counts_where_windows_overlap():
    both = share_of([(8, 0, 0), (12, 0, 0)], (40, 16, 16), (16, 16, 16))
    each = [share_of([corner], (40, 16, 16), (16, 16, 16)) for corner in ((8, 0, 0), (12, 0, 0))]
    assert torch.equal(both, torch.maximum(*each))


class TwoAnswers:
    """A network that answers a coarse view by its values and any window by a constant."""

    def __init__(self, at_full_spacing: float) -> None:
        self.calls = 0
        self.at_full_spacing = at_full_spacing

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return 400 * (images[:, :1] - 0.02) if self.calls == 1 else torch.full_like(images[:, :1], self.at_full_spacing)


def test_windows_and_coarse_answer_are_joined_by_the_share():
    image = scan(cube(28, 24, 12))
    answered = predict_steered(toy_model(Toy(TwoAnswers(8.0)), toy_plan()), image)
    (corner,) = cover(
        kept_voxels(look_coarsely(toy_model(steep(), toy_plan()), rows_of(image)), toy_plan()),
        image.shape[1:],
        WINDOW,
        FACTOR,
    )
    share = share_of([corner], image.shape[1:], WINDOW)
    coarse = torch.from_numpy(400 * (coarse_image(image, FACTOR) - 0.02))
    spread = torch.nn.functional.interpolate(coarse[None], scale_factor=FACTOR, mode="trilinear")[0]
    torch.testing.assert_close(answered.logits, share * 8 + (1 - share) * spread)
    assert (answered.logits[0][share == 1] == 8).all()
    assert torch.equal(answered.logits[0][share == 0], spread[0][share == 0])


def test_a_kept_lesion_gets_the_answer_of_the_full_window_and_the_rest_the_coarse_one():
    image = scan(cube(28, 24, 12), cube(4, 3, 0, size=3))
    image[0, 33, 28, 16] = 0  # detail that a coarse view does not show
    network = steep()
    steered = predict_steered(toy_model(network, toy_plan()), image)
    full = predict_full(toy_model(steep(), toy_plan()), image)
    lesion = torch.from_numpy(image[0] > 0)
    torch.testing.assert_close(steered.logits[0][lesion], full.logits[0][lesion])
    assert torch.equal(steered.logits > 0, full.logits > 0)
    assert (steered.windows_run, steered.windows_full) == (2, NUM_FULL)
    assert network.seen == [(1, 1, 32, 32, 32)] * 3  # the coarse view is padded


def test_an_empty_scan_runs_no_window_and_gives_the_coarse_answer():
    network = steep()
    steered = predict_steered(toy_model(network, toy_plan()), scan())
    assert (steered.windows_run, len(network.seen)) == (0, 1)
    torch.testing.assert_close(steered.logits, torch.full((1, 96, 80, 64), -8.0))


def test_where_all_windows_would_run_the_full_sliding_window_runs():
    image = np.random.default_rng(0).uniform(0.5, 1, (1, 80, 80, 60)).astype(np.float32)
    model = toy_model(above_level(1), toy_plan())
    steered, full = predict_steered(model, image), predict_full(model, image)
    expected = predict_logits(forward_of(model), image, toy_plan())
    assert torch.equal(steered.logits, full.logits)
    assert torch.equal(full.logits, expected)
    assert steered.windows_run == steered.windows_full == len(window_corners((80, 80, 60), toy_plan())) == 4 * 4 * 3


@pytest.mark.parametrize("plan", [toy_plan(coarse_factor=None), toy_plan(whole_limit_vox=(96, 80, 64))])
def test_without_coarse_views_and_where_a_scan_runs_whole_nothing_is_steered(plan):
    image, network = scan(cube(28, 24, 12)), steep()
    steered = predict_steered(toy_model(network, plan), image)
    assert torch.equal(steered.logits, predict_logits(forward_of(toy_model(steep(), plan)), image, plan))
    assert steered.windows_run == steered.windows_full == len(network.seen)
    assert steered.windows_full == (1 if plan.coarse_factor else NUM_FULL)


@given(shape=st.tuples(st.integers(33, 70), st.integers(3, 70), st.integers(3, 40)), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_any_size_comes_back_in_its_size_with_its_lesion(shape, seed):
    place = [int(np.random.default_rng(seed).integers(max(1, size - 2))) for size in shape]
    image = scan(tuple(slice(at, at + 3) for at in place), shape=shape)
    steered = predict_steered(toy_model(steep(), toy_plan()), image)
    assert steered.logits.shape == image.shape
    np.testing.assert_array_equal(steered.logits[0].numpy() > 0, image[0] > 0)


# ---- what is kept


def test_probable_voxels_are_kept():
    probability = torch.full((1, 12, 12, 12), 0.3)
    probability[0, 2, 3, 4] = probability[0, 9, 9, 8] = 0.6
    logits = torch.logit(probability)
    np.testing.assert_array_equal(np.argwhere(kept_voxels(logits, toy_plan())), [[2, 3, 4], [9, 9, 8]])
    assert not kept_voxels(logits, toy_plan(), 0.7).any()
    assert kept_voxels(logits, toy_plan(), 0.2).all()


def test_foreground_is_what_is_no_background():
    exclusive = EXCLUSIVE.foreground(torch.log(torch.tensor([0.2, 0.5, 0.3])).reshape(3, 1, 1, 1))
    assert exclusive.item() == pytest.approx(0.8)
    regions = torch.logit(torch.tensor([0.2, 0.5])).reshape(2, 1, 1, 1)
    assert REGIONS.foreground(regions).item() == pytest.approx(0.5)


def test_a_coarse_view_that_is_smaller_than_a_window_comes_back_in_its_size():
    plan = toy_plan(coarse_factor=(4, 4, 4), window_vox=(16, 16, 16))
    image = scan(cube(28, 24, 12), shape=(64, 40, 32))
    logits = look_coarsely(toy_model(Toy(lambda images: images[:, :1]), plan), rows_of(image))
    torch.testing.assert_close(logits, torch.from_numpy(coarse_image(image, (4, 4, 4))))


def test_a_model_without_coarse_views_cannot_look_coarsely():
    model = toy_model(steep(), toy_plan(coarse_factor=None))
    with pytest.raises(ConfigError, match="model 'toy' was trained without coarse views; run all windows"):
        look_coarsely(model, rows_of(np.zeros((1, 20, 20, 20), np.float32)))


# ---- segmentation


def framed(*boxes: tuple[slice, slice, slice], shape: tuple[int, int, int] = (96, 80, 64)) -> np.ndarray:
    """A scan with one corner that is not constant, so that no border is cropped off it."""
    image = scan(*boxes, shape=shape)
    image[0, 0, 0, 0] = -1
    return image


def volume_of(image: np.ndarray) -> Volume:
    return Volume(image, np.eye(4), ("c0",))


def test_segmentation_is_steered_unless_full_is_asked_for():
    image, network = framed(cube(28, 24, 12)), steep()
    model: Model = toy_model(network, toy_plan())
    steered = segment_volume(model, volume_of(image))
    assert len(network.seen) == 2
    full = segment_volume(model, volume_of(image), full=True)
    assert len(network.seen) == 2 + NUM_FULL
    np.testing.assert_array_equal(steered, image[0] > 0)
    np.testing.assert_array_equal(full, image[0] > 0)


def test_the_summary_counts_windows(tmp_path):
    (tmp_path / "in").mkdir()
    write_nifti(tmp_path / "in" / "a.nii.gz", framed(cube(28, 24, 12))[0].astype(np.int16))
    write_nifti(
        tmp_path / "in" / "b.nii.gz", framed(cube(28, 24, 12), shape=(80, 80, 80))[0].astype(np.int16).clip(max=0)
    )
    (tmp_path / "in" / "c.nii.gz").write_bytes(b"broken")
    model = toy_model(steep(), toy_plan())
    rows = {}
    for full in (False, True):
        segment_files(job_of([model], options=SegmentOptions(full=full)), tmp_path / "in", tmp_path / "out")
        with (tmp_path / "out" / "summary.csv").open(newline="") as file:
            rows[full] = [(row["windows_run"], row["windows_full"]) for row in csv.DictReader(file)]
    assert rows == {False: [("1", "60"), ("0", "64"), ("", "")], True: [("60", "60"), ("64", "64"), ("", "")]}
    segment_files(job_of([toy_model(steep(), toy_plan(coarse_factor=None))]), tmp_path / "in", tmp_path / "plain")
    assert "windows" not in (tmp_path / "plain" / "summary.csv").read_text()


def test_windows_of_an_ensemble_are_added_up(tmp_path):
    write_nifti(tmp_path / "a.nii.gz", framed(cube(28, 24, 12))[0].astype(np.int16))
    models = [toy_model(steep(), toy_plan()), toy_model(constant(-9.0), toy_plan())]
    (result,) = segment_files(job_of(models), tmp_path / "a.nii.gz", tmp_path / "out.nii.gz")
    assert (result.windows_run, result.windows_full) == (1, 120)
