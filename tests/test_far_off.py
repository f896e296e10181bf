"""Voxels that are far off are found, said and cut off, and other scans stay as they are."""

from __future__ import annotations

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from phantoms import write_msd
from plans import make_plan
from tokenseg.checking.findings import check_dataset, compare_cases
from tokenseg.datasets.layouts import open_dataset
from tokenseg.imaging.far_off import Spread, spread_of, spread_of_difference
from tokenseg.imaging.volume import Volume, read_volume
from tokenseg.inference.predict import segment_volume
from tokenseg.plan_grid.intensities import find_scalings
from tokenseg.plan_grid.preprocess import prepare_image
from tokenseg.planning.fingerprint import take_fingerprint
from tokenseg.planning.suitability import ChannelRange, InputFacts, check_input
from tokenseg.progress import Silent
from tokenseg.saved_model.checkpoint import load_model

SHAPE = (24, 20, 22)
INFINITE = (-np.inf, np.inf)


def ramp() -> np.ndarray:
    """Values 0 to 1000 in no order, so that the middle 99.8 % are about 1 to 999."""
    values = np.linspace(0, 1000, int(np.prod(SHAPE)), dtype=np.float32)
    return np.random.default_rng(0).permutation(values).reshape(SHAPE)


def volume(*channels: np.ndarray) -> Volume:
    names = tuple(f"c{number}" for number in range(len(channels)))
    return Volume(np.stack(channels).astype(np.float32), np.eye(4), names)


def with_hot(values: np.ndarray, hot: float, count: int = 3) -> np.ndarray:
    changed = values.copy()
    changed.reshape(-1)[:count] = hot
    return changed


def test_by_hand() -> None:
    spread = spread_of(with_hot(ramp(), 1e6))
    assert (spread.least, spread.most) == (0, 1e6)
    assert spread.low == pytest.approx(1, abs=0.2)
    assert spread.high == pytest.approx(999, abs=0.5)
    assert spread.ratio == pytest.approx(1e6 / 998, rel=1e-3)
    assert spread.limits == (-np.inf, pytest.approx(999 + 998, abs=2))
    assert str(spread).startswith("values from 0 to 1e+06, but 99.8 % of them between 1")


@pytest.mark.parametrize(("most", "few"), [(9_900, False), (10_100, True)])
def test_far_off_is_beyond_ten_times_the_middle(most: float, few: bool) -> None:
    spread = Spread(0, most, 0, 1000)
    assert spread.is_ruled_by_few is few
    assert (spread.limits == INFINITE) is not few


def test_what_says_nothing_is_left_alone() -> None:
    assert spread_of(ramp()).limits == INFINITE
    assert spread_of(np.full(SHAPE, 7.0)).limits == INFINITE
    # Nearly all the same: there is no range to compare with.
    assert spread_of(with_hot(np.zeros(SHAPE), 1e6)).limits == INFINITE
    # Hounsfield units, with metal.
    assert spread_of(with_hot(ramp() - 1000, 30_000)).limits == INFINITE


def test_the_difference_is_that_of_the_array() -> None:
    first, second = with_hot(ramp(), 1e6), ramp()[::-1].copy()
    assert spread_of_difference([first, second]) == spread_of(first - second)
    assert spread_of_difference([first]) == spread_of(first)


def test_a_hot_voxel_changes_no_other() -> None:
    clean, hot = (prepare_image(volume(values), make_plan()).image for values in (ramp(), with_hot(ramp(), 1e6)))
    np.testing.assert_allclose(hot.reshape(-1)[3:], clean.reshape(-1)[3:], atol=0.01)
    assert hot.reshape(-1)[:3] == pytest.approx((1997 - 500) / 288.7, abs=0.05), "bright, and no more than that"


def test_a_dark_fill_value_does_not_hide_the_padding() -> None:
    padded = ramp()
    padded[:12] = 0
    filled = padded.copy()
    filled[-1, -1, :3] = -32768
    clean, dark = (find_scalings(volume(values), make_plan())[0] for values in (padded, filled))
    assert dark.mean == pytest.approx(clean.mean, rel=0.01)
    assert dark.std == pytest.approx(clean.std, rel=0.01)
    assert dark.low == pytest.approx(0, abs=0.5)


def test_of_phases_normalised_together_each_is_cut_off() -> None:
    plan = make_plan(channels=2).model_copy(update={"channels": ("c0", "c1 - c0"), "joint_zscore": True})
    clean, hot = (find_scalings(volume(first, 2 * ramp()), plan) for first in (ramp(), with_hot(ramp(), 1e6)))
    for before, after in zip(clean, hot, strict=True):
        assert after.mean == pytest.approx(before.mean, rel=0.01)
        assert after.std == pytest.approx(before.std, rel=0.01)
    assert (clean[0].low, clean[0].high) == INFINITE
    assert hot[0].high == pytest.approx(1997, abs=2)
    assert hot[1].low == pytest.approx(0, abs=2), "where c0 is hot, c1 - c0 is far below the rest"


def test_a_scan_is_told_of_it_and_a_ct_is_not() -> None:
    mr = ChannelRange(name="c0", minimum=(0, 3), negative_share=(0, 0))
    size = ((20, 24), (20, 24), (20, 24))
    facts = InputFacts(extent_mm=size, spacing_mm=((1, 1),) * 3, anisotropy=(1, 1), channels=(mr,))
    assert check_input(volume(ramp()), facts) == ()
    (warning,) = check_input(volume(with_hot(ramp(), 1e6)), facts)
    assert warning.startswith("c0: values from 0 to 1e+06, but 99.8 % of them between ")
    assert warning.endswith("the few that are far off are cut off; look at the scan")
    ct = facts.model_copy(
        update={"channels": (mr.model_copy(update={"minimum": (-1024.0, -900.0), "negative_share": (0.4, 1.0)}),)}
    )
    assert check_input(volume(with_hot(ramp() - 1000, 40_000)), ct) == ()


def test_check_and_train_name_the_case(tmp_path) -> None:
    root = write_msd(tmp_path / "d", 5, channels=("MRI", "T2"))
    path = root / "imagesTr" / "case_002.nii.gz"
    image = nib.load(path)
    values = np.asarray(image.dataobj, dtype=np.float32)
    values[3, 4, 5, 1] = 1e7
    nib.save(nib.Nifti1Image(values, image.affine), path)
    dataset = open_dataset(root)
    (found,) = check_dataset(dataset, Silent())
    assert (found.severity, found.case_id, found.kind) == ("warning", "case_002", "values")
    assert "case_002.nii.gz: values from " in found.text
    assert "to 1e+07" in found.text
    (told,) = compare_cases(take_fingerprint(dataset).cases)
    assert (told.case_id, told.text.split(",")[0]) == ("case_002", found.text.split(": ")[1].split(",")[0])


def test_real_scans_are_far_from_the_limit(real_data) -> None:
    ratios = [
        spread_of(np.asarray(nib.load(path).dataobj, dtype=np.float32)).ratio
        for name in ("Task04_Hippocampus", "LeftAtrium")
        for path in (real_data / name / "imagesTr").glob("[!.]*.nii.gz")
    ]
    assert len(ratios) == 280
    assert f"{max(ratios):.1f}" == "3.2"


def test_hot_voxels_leave_the_built_in_models_mask_as_it_is(real_data) -> None:
    scan = read_volume(real_data / "Task04_Hippocampus" / "imagesTr" / "hippocampus_003.nii.gz", ("MRI",))
    model = load_model("hippocampus")
    hot = with_hot(scan.array, 100 * float(scan.array.max()), 5)
    clean, spoiled = (segment_volume(model, replace(scan, array=array)) for array in (scan.array, hot))
    assert np.mean(clean[clean + spoiled > 0] == spoiled[clean + spoiled > 0]) > 0.98
