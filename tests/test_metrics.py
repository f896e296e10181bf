"""Metrics against hand-computed solids, a second implementation by distance transforms, properties and real masks."""

from __future__ import annotations

import math
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from tokenseg.errors import ConfigError, GeometryError
from tokenseg.evaluation.lesions import LesionCounts, match_lesions
from tokenseg.evaluation.metrics import (
    CaseLabelScore,
    bootstrap_interval,
    dice,
    hd95_mm,
    image_diagonal_mm,
    iou,
    normalised_surface_dice,
    relative_volume_error,
    score_label,
    volume_error_ml,
    volume_ml,
)
from tokenseg.evaluation.surfaces import surface_distances_mm

ISOTROPIC = (1.0, 1.0, 1.0)
ANISOTROPIC = (0.7, 1.3, 5.0)
SCORES_HIGH_IS_GOOD = ("dice", "iou", "nsd", "lesion_f1")
SCORES_LOW_IS_GOOD = ("hd95_mm", "relative_volume_error")


def box_mask(shape: tuple[int, int, int], *boxes: tuple[slice, slice, slice]) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    for box in boxes:
        mask[box] = True
    return mask


def cube(start: int, stop: int) -> tuple[slice, slice, slice]:
    return (slice(start, stop),) * 3


# --- a second implementation: whole volume, distance transforms, explicit neighbour shifts ---------------------------


def edges_by_shifts(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    inner = padded.copy()
    for axis in range(3):
        for step in (-1, 1):
            inner &= np.roll(padded, step, axis)
    return (padded & ~inner)[1:-1, 1:-1, 1:-1]


def directed_by_transform(source: np.ndarray, target: np.ndarray, spacing_mm: tuple) -> np.ndarray:
    return ndimage.distance_transform_edt(~edges_by_shifts(target), sampling=spacing_mm)[edges_by_shifts(source)]


def second_hd95_mm(reference: np.ndarray, prediction: np.ndarray, spacing_mm: tuple) -> float:
    there = directed_by_transform(reference, prediction, spacing_mm)
    back = directed_by_transform(prediction, reference, spacing_mm)
    return max(np.percentile(there, 95), np.percentile(back, 95))


def second_surface_dice(reference: np.ndarray, prediction: np.ndarray, spacing_mm: tuple, tolerance_mm: float) -> float:
    there = directed_by_transform(reference, prediction, spacing_mm) <= tolerance_mm + 1e-6
    back = directed_by_transform(prediction, reference, spacing_mm) <= tolerance_mm + 1e-6
    return (there.sum() + back.sum()) / (there.size + back.size)


def second_dice(reference: np.ndarray, prediction: np.ndarray) -> float:
    first, second = set(np.flatnonzero(reference)), set(np.flatnonzero(prediction))
    return 2 * len(first & second) / (len(first) + len(second))


def assert_implementations_agree(reference: np.ndarray, prediction: np.ndarray, spacing_mm: tuple) -> None:
    score = score_label(reference, prediction, spacing_mm, 1.0)
    assert score.dice == pytest.approx(second_dice(reference, prediction), abs=1e-6)
    assert score.iou == pytest.approx(score.dice / (2 - score.dice), abs=1e-6)
    assert score.hd95_mm == pytest.approx(second_hd95_mm(reference, prediction, spacing_mm), abs=1e-3)
    assert score.nsd == pytest.approx(second_surface_dice(reference, prediction, spacing_mm, 1.0), abs=1e-6)


@pytest.mark.parametrize("spacing_mm", [ISOTROPIC, ANISOTROPIC, (0.5, 0.5, 0.9)])
@pytest.mark.parametrize("seed", range(4))
def test_random_blobs_agree_with_the_second_implementation(spacing_mm, seed):
    generator = np.random.default_rng(seed)
    reference, prediction = (
        ndimage.gaussian_filter(generator.normal(size=(24, 19, 13)), sigma=2) > threshold for threshold in (0.02, 0.05)
    )
    assert_implementations_agree(reference, prediction, spacing_mm)


@pytest.mark.parametrize("density", [0.002, 0.5])
def test_random_voxels_agree_with_the_second_implementation(density):
    generator = np.random.default_rng(7)
    reference, prediction = (generator.random((15, 12, 9)) < density for _ in range(2))
    assert_implementations_agree(reference, prediction, ANISOTROPIC)


@pytest.mark.parametrize("value", [1, 2])
def test_real_masks_agree_with_the_second_implementation(real_data: Path, value):
    paths = sorted((real_data / "Task04_Hippocampus" / "labelsTr").glob("hippocampus_*.nii.gz"))[:6]
    for path in paths:
        reference = np.asarray(nibabel.load(path).dataobj) == value
        prediction = np.roll(ndimage.binary_dilation(reference), (1, -2, 0), (0, 1, 2))
        assert_implementations_agree(reference, prediction, ISOTROPIC)
        assert_implementations_agree(reference, prediction, ANISOTROPIC)


# --- solids with answers by hand -------------------------------------------------------------------------------------


def test_shifted_cube_by_hand():
    reference = box_mask((10, 10, 10), cube(2, 6))
    prediction = box_mask((10, 10, 10), (slice(3, 7), slice(2, 6), slice(2, 6)))  # one voxel along the first axis
    score = score_label(reference, prediction, (2.0, 1.0, 1.0), 1.0)
    assert score.status == "both_present"
    assert score.dice == pytest.approx(2 * 48 / 128)
    assert score.iou == pytest.approx(48 / 80)
    # A 4-cube has 64 - 8 surface voxels; the face of 16 that sticks out is a voxel of 2 mm away from the other cube.
    assert surface_distances_mm(reference, prediction, (2.0, 1.0, 1.0)).reference_to_prediction_mm.size == 56
    assert score.hd95_mm == pytest.approx(2.0)
    assert score.reference_ml == score.prediction_ml == pytest.approx(64 * 2 / 1000)
    assert score.volume_error_ml == score.relative_volume_error == 0
    assert score.voxels == (48, 16, 16, 920)
    assert score.lesions == (1, 0, 0)


def test_two_single_voxels_are_their_distance_apart():
    reference, prediction = (box_mask((9, 9, 9), index) for index in (cube(1, 2), cube(3, 4)))
    expected_mm = math.sqrt((2 * 0.7) ** 2 + (2 * 1.3) ** 2 + (2 * 5.0) ** 2)
    assert hd95_mm(reference, prediction, ANISOTROPIC) == pytest.approx(expected_mm, abs=1e-9)
    assert dice(reference, prediction) == iou(reference, prediction) == 0
    assert normalised_surface_dice(reference, prediction, ANISOTROPIC, expected_mm) == 1
    assert normalised_surface_dice(reference, prediction, ANISOTROPIC, expected_mm - 0.01) == 0


def test_hd95_is_the_larger_direction_not_the_pooled_one():
    reference = box_mask((40, 8, 8), (slice(0, 20), slice(2, 4), slice(2, 4)))
    prediction = box_mask(
        (40, 8, 8), (slice(0, 20), slice(2, 4), slice(2, 4)), (slice(38, 40), cube(2, 4)[0], cube(2, 4)[0])
    )
    distances = surface_distances_mm(reference, prediction, ISOTROPIC)
    assert distances.reference_to_prediction_mm.max() == 0
    expected_mm = np.percentile([0.0] * 80 + [19.0] * 4 + [20.0] * 4, 95)  # all 88 voxels are surface
    pooled_mm = np.percentile(np.concatenate(distances), 95)
    assert hd95_mm(reference, prediction, ISOTROPIC) == pytest.approx(expected_mm)
    assert pooled_mm == 0


def test_border_of_the_volume_is_surface():
    full = np.ones((5, 5, 5), dtype=bool)
    core = box_mask((5, 5, 5), cube(2, 3))
    distances = surface_distances_mm(full, core, ISOTROPIC)
    assert distances.reference_to_prediction_mm.size == 5**3 - 3**3
    assert distances.prediction_to_reference_mm.tolist() == [2.0]


def test_volumes_are_in_ml_and_the_error_is_signed():
    reference, prediction = box_mask((20, 20, 20), cube(0, 10)), box_mask((20, 20, 20), cube(0, 5))
    assert volume_ml(reference, ANISOTROPIC) == pytest.approx(1000 * 0.7 * 1.3 * 5.0 / 1000)
    assert volume_error_ml(reference, prediction, ISOTROPIC) == pytest.approx(-0.875)
    assert volume_error_ml(prediction, reference, ISOTROPIC) == pytest.approx(0.875)
    assert relative_volume_error(reference, prediction) == pytest.approx(2 * 875 / 1125)


def test_thin_and_one_slice_volumes_are_measured():
    reference, prediction = np.ones((6, 6, 1), dtype=bool), box_mask((6, 6, 1), (slice(0, 3), slice(0, 6), slice(0, 1)))
    assert hd95_mm(reference, prediction, ISOTROPIC) == pytest.approx(3.0)
    assert normalised_surface_dice(reference, prediction, ISOTROPIC, 0.0) == pytest.approx((18 + 18) / (36 + 18))


# --- lesions ---------------------------------------------------------------------------------------------------------


def test_lesions_touching_by_a_corner_are_one():
    corner = box_mask((6, 6, 6), cube(0, 2), cube(2, 4))
    apart = box_mask((6, 6, 6), cube(0, 2), cube(3, 5))
    assert match_lesions(corner, corner) == (1, 0, 0)
    assert match_lesions(apart, apart) == (2, 0, 0)


def test_lesions_found_invented_and_overlooked():
    reference = box_mask((20, 20, 20), cube(0, 3), cube(8, 11))
    prediction = box_mask((20, 20, 20), cube(0, 3), cube(15, 18), cube(19, 20))
    counts = match_lesions(reference, prediction)
    assert counts == LesionCounts(true_positive=1, false_positive=2, false_negative=1)
    assert counts.f1 == pytest.approx(2 / 5)


@pytest.mark.parametrize(("length", "found"), [(10, 1), (11, 0)])
def test_a_match_needs_a_tenth_of_the_union(length, found):
    reference = box_mask((12, 3, 3), (slice(0, 1), slice(1, 2), slice(1, 2)))
    prediction = box_mask((12, 3, 3), (slice(0, length), slice(1, 2), slice(1, 2)))
    assert match_lesions(reference, prediction) == (found, 1 - found, 1 - found)


def test_one_prediction_over_two_lesions_finds_the_one_it_covers_best():
    row = (slice(1, 2), slice(1, 2))
    reference = box_mask((12, 3, 3), (slice(0, 3), *row), (slice(5, 11), *row))
    joined = box_mask((12, 3, 3), (slice(0, 11), *row))
    assert match_lesions(reference, joined) == (1, 0, 1)
    assert match_lesions(joined, reference) == (1, 1, 0)


def test_greedy_matching_takes_the_largest_overlap_first():
    row = (slice(1, 2), slice(1, 2))
    reference = box_mask((20, 3, 3), (slice(0, 6), *row), (slice(7, 12), *row))
    prediction = box_mask((20, 3, 3), (slice(3, 4), *row), (slice(5, 12), *row))
    # The long prediction overlaps both lesions (1/12 and 5/7) and takes the second; the short one has 1/6 of the first.
    assert match_lesions(reference, prediction) == (2, 0, 0)


# --- empty masks -----------------------------------------------------------------------------------------------------


def test_two_empty_masks_are_counted_and_not_scored():
    empty = np.zeros((4, 5, 6), dtype=bool)
    score = score_label(empty, empty, ISOTROPIC, 1.0)
    assert score.status == "both_empty"
    assert all(math.isnan(getattr(score, name)) for name in SCORES_HIGH_IS_GOOD + SCORES_LOW_IS_GOOD)
    assert score.volume_error_ml == score.reference_ml == score.prediction_ml == 0
    assert score.voxels == (0, 0, 0, 120)


@pytest.mark.parametrize("status", ["missed", "false_positive"])
def test_one_empty_mask_gets_the_worst_values(status):
    masks = [box_mask((4, 5, 6), cube(1, 3)), np.zeros((4, 5, 6), dtype=bool)]
    reference, prediction = masks if status == "missed" else reversed(masks)
    score = score_label(reference, prediction, ANISOTROPIC, 1.0)
    assert score.status == status
    assert all(getattr(score, name) == 0 for name in SCORES_HIGH_IS_GOOD)
    assert score.hd95_mm == pytest.approx(math.sqrt((4 * 0.7) ** 2 + (5 * 1.3) ** 2 + (6 * 5.0) ** 2))
    assert score.relative_volume_error == 2
    assert score.lesions == ((0, 0, 1) if status == "missed" else (0, 1, 0))
    assert hd95_mm(reference, prediction, ANISOTROPIC) == score.hd95_mm
    assert normalised_surface_dice(reference, prediction, ANISOTROPIC, 1.0) == 0


SHAPE = (5, 4, 3)
masks = hnp.arrays(bool, SHAPE)
lesions = masks.filter(np.any)


def case_means(cases: list[CaseLabelScore]) -> dict[str, float]:
    names = SCORES_HIGH_IS_GOOD + SCORES_LOW_IS_GOOD
    return {
        name: bootstrap_interval(np.array([getattr(case, name) for case in cases]), resamples=1).mean for name in names
    }


@settings(max_examples=150, deadline=None)
@given(
    cases=st.lists(st.tuples(masks, masks), max_size=4),
    lesion=lesions,
    prediction=masks,
    spacing_mm=st.tuples(*[st.floats(0.2, 6.0)] * 3),
)
def test_a_missed_lesion_never_improves_a_mean(cases, lesion, prediction, spacing_mm):
    others = [score_label(*case, spacing_mm, 1.0) for case in cases]
    before = case_means([*others, score_label(lesion, prediction, spacing_mm, 1.0)])
    after = case_means([*others, score_label(lesion, np.zeros(SHAPE, dtype=bool), spacing_mm, 1.0)])
    for name in SCORES_HIGH_IS_GOOD:
        assert after[name] <= before[name] + 1e-9
    for name in SCORES_LOW_IS_GOOD:
        assert after[name] >= before[name] - 1e-9


@settings(max_examples=60, deadline=None)
@given(reference=lesions, prediction=lesions, spacing_mm=st.tuples(*[st.floats(0.2, 6.0)] * 3))
def test_scores_are_symmetric_and_in_range(reference, prediction, spacing_mm):
    score = score_label(reference, prediction, spacing_mm, 1.0)
    swapped = score_label(prediction, reference, spacing_mm, 1.0)
    for name in ("dice", "iou", "nsd", "hd95_mm", "relative_volume_error"):
        assert getattr(score, name) == pytest.approx(getattr(swapped, name))
    assert all(0 <= getattr(score, name) <= 1 for name in SCORES_HIGH_IS_GOOD)
    assert 0 <= score.hd95_mm < image_diagonal_mm(SHAPE, spacing_mm)
    assert sum(score.voxels) == reference.size


@settings(max_examples=30, deadline=None)
@given(mask=lesions)
def test_a_mask_agrees_with_itself(mask):
    score = score_label(mask, mask, ANISOTROPIC, 0.0)
    assert (score.dice, score.iou, score.nsd, score.lesion_f1) == (1, 1, 1, 1)
    assert (score.hd95_mm, score.volume_error_ml, score.relative_volume_error) == (0, 0, 0)


# --- wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", [dice, iou, relative_volume_error, match_lesions])
def test_masks_of_different_shape_are_refused(measure):
    message = r"reference mask has shape \(4, 4, 4\), prediction \(4, 4, 1\); .* resample the prediction"
    with pytest.raises(GeometryError, match=message):
        measure(np.ones((4, 4, 4), dtype=bool), np.ones((4, 4, 1), dtype=bool))


def test_spacing_must_be_positive():
    mask = np.ones((2, 2, 2), dtype=bool)
    with pytest.raises(GeometryError, match=r"spacing is \(1.0, 0.0, 1.0\) mm; all three must be positive"):
        hd95_mm(mask, mask, (1.0, 0.0, 1.0))


@pytest.mark.parametrize("tolerance_mm", [-1.0, math.nan, math.inf])
def test_tolerance_must_be_a_length(tolerance_mm):
    mask = np.ones((2, 2, 2), dtype=bool)
    with pytest.raises(ConfigError, match=f"tolerance is {tolerance_mm} mm; give a finite number"):
        score_label(mask, mask, ISOTROPIC, tolerance_mm)


# --- bootstrap -------------------------------------------------------------------------------------------------------


def test_bootstrap_of_nothing_and_of_one_value():
    assert all(math.isnan(part) for part in bootstrap_interval(np.array([math.nan, math.nan])))
    assert all(math.isnan(part) for part in bootstrap_interval(np.array([])))
    assert bootstrap_interval(np.array([0.3, math.nan])) == (0.3, 0.3, 0.3)


def test_bootstrap_of_two_values_by_hand():
    # Resamples of {0, 1} have the means 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4: both tails reach the ends.
    assert bootstrap_interval(np.array([0.0, 1.0])) == (0.5, 0.0, 1.0)


def test_bootstrap_of_many_values_is_near_the_normal_interval_and_repeatable():
    values = np.random.default_rng(1).normal(5.0, 2.0, size=400)
    interval = bootstrap_interval(values, seed=3)
    half_width = 1.96 * values.std() / math.sqrt(values.size)
    assert interval.low == pytest.approx(values.mean() - half_width, abs=0.03)
    assert interval.high == pytest.approx(values.mean() + half_width, abs=0.03)
    assert interval == bootstrap_interval(values, seed=3)
    assert interval != bootstrap_interval(values, seed=4)
