"""Whole exams: the same from the same seed, lesions where the facts say, and no threshold that finds them."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import center_of_mass, label

from tokenseg.synthetic.exam import NUM_PHASES, make_exam


def rng(seed):
    return np.random.default_rng((7, seed))


@pytest.fixture(scope="module")
def exams():
    return [make_exam(rng(seed), "external" if seed == 7 else "internal", 1) for seed in range(8)]


def subtraction(exam):
    return exam.phases[1].astype(np.float32) - exam.phases[0]


def best_threshold_dice(images, masks):
    """Largest mean Dice that one threshold for all exams reaches, over all thresholds that matter."""
    candidates = np.quantile(np.concatenate([image.ravel() for image in images]), np.linspace(0.5, 0.9999, 800))
    curves = []
    for image, mask in zip(images, masks, strict=True):
        marked = image.size - np.searchsorted(np.sort(image.ravel()), candidates)
        hits = mask.sum() - np.searchsorted(np.sort(image[mask > 0]), candidates)
        curves.append(2 * hits / (marked + mask.sum()))
    return np.mean(curves, axis=0).max()


@pytest.mark.parametrize("normalise", [False, True], ids=["raw", "z-score"])
def test_no_fixed_threshold_on_the_subtraction_finds_the_lesions(exams, normalise):
    scales = [np.stack(exam.phases).std() if normalise else 1.0 for exam in exams]
    images = [subtraction(exam) / scale for exam, scale in zip(exams, scales, strict=True)]
    assert 0.15 < best_threshold_dice(images, [exam.mask for exam in exams]) < 0.6


def test_the_best_threshold_finds_what_stands_alone():
    mask = np.zeros((10, 10, 10), np.uint8)
    mask[3:6, 3:6, 3:6] = 1
    assert best_threshold_dice([mask * 5.0], [mask]) == pytest.approx(1)


def test_an_exam_depends_on_its_seed_alone(exams):
    again = make_exam(rng(2), "internal", 1)
    for one, two in zip((*exams[2].phases, exams[2].mask), (*again.phases, again.mask), strict=True):
        np.testing.assert_array_equal(one, two)
    assert again.lesions == exams[2].lesions
    assert (exams[2].phases[0].shape != exams[3].phases[0].shape) or (exams[2].phases[0] != exams[3].phases[0]).any()


def test_phases_are_whole_numbers_on_one_anisotropic_grid(exams):
    for exam in exams:
        assert len(exam.phases) == NUM_PHASES
        assert {phase.shape for phase in exam.phases} == {exam.mask.shape} == {exam.protocol.grid.shape_vox}
        assert {phase.dtype for phase in exam.phases} == {np.dtype(np.int16)}
        assert all(phase.min() >= 0 and 80 < phase.max() < 32767 for phase in exam.phases)
        spacing = nib.affines.voxel_sizes(exam.affine)
        assert spacing[2] > 1.4 * spacing[0]


def test_facts_give_place_and_volume_of_the_lesion(exams):
    for exam in exams:
        (lesion,) = exam.lesions
        found_mm = nib.affines.apply_affine(exam.affine, center_of_mass(exam.mask))
        assert np.linalg.norm(found_mm - lesion.centre_mm) < 0.2 * lesion.diameter_mm + 1.5
        assert exam.mask.sum() * exam.protocol.grid.voxel_ml == pytest.approx(lesion.volume_ml, rel=0.15)
        assert label(exam.mask, np.ones((3, 3, 3)))[1] == 1
        assert lesion.volume_ml == pytest.approx(np.pi / 6000 * lesion.diameter_mm**3, rel=0.05)


def test_lesions_enhance_and_wash_out(exams):
    for exam in exams:
        inside = exam.mask > 0
        before, early, late = (phase[inside].mean() for phase in exam.phases)
        assert early > 1.4 * before
        assert late < early


def test_air_is_dark(exams):
    for exam in exams:
        inside, air = exam.phases[1][exam.mask > 0], exam.phases[1][:, :4]
        assert 0 < air.mean() < 0.1 * inside.mean()


def test_distractors_enhance_as_strongly_as_the_dimmer_parts_of_lesions(exams):
    outside = []
    for exam in exams:
        difference, inside = subtraction(exam), exam.mask > 0
        bright = difference > np.percentile(difference[inside], 25)
        outside.append((bright & ~inside).sum() / (bright & inside).sum())
    assert min(outside) > 0.01, "vessels"
    assert sum(share > 1 for share in outside) >= 2, "exams with heart or liver in view have more of them than lesion"


@pytest.mark.parametrize(("count", "centre"), [(0, "internal"), (2, "external")])
def test_exams_have_as_many_lesions_as_asked(count, centre):
    exam = make_exam(rng(20), centre, count)
    assert len(exam.lesions) == count
    assert (exam.mask.sum() > 0) == (count > 0)
    assert exam.protocol.centre == centre
    total_ml = sum(lesion.volume_ml for lesion in exam.lesions)
    assert exam.mask.sum() * exam.protocol.grid.voxel_ml == pytest.approx(total_ml, rel=0.15, abs=0.01)
