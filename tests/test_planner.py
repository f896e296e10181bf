from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phantoms import write_mamamia, write_msd, write_nnunet
from tokenseg.config import Label, Plan
from tokenseg.datasets.cases import Dataset
from tokenseg.datasets.layouts import open_dataset
from tokenseg.planning.fingerprint import CaseFingerprint, Fingerprint, Intensities, take_fingerprint
from tokenseg.planning.planner import make_plan

PLANNED = {"spacing_mm", "window_vox", "whole_limit_vox", "strides", "grid", "batch_size", "steps", "normalisation"}
Triple = tuple[int, int, int]
STATS = Intensities(minimum=-5, maximum=9, mean=2, std=3, percentile_00_5=-4, percentile_99_5=8)


def dataset_of(channels: tuple[str, ...] = ("MRI",), ct: tuple[bool, ...] = (False,)) -> Dataset:
    labels = (Label(name="a", values=(1,), output_value=1), Label(name="b", values=(2,), output_value=2))
    return Dataset(Path("x"), "msd", "made up", (), channels, channels, False, ct, labels, False, ".nii.gz")


def plan_from(*cases: tuple[Triple, tuple[float, float, float]]) -> Plan:
    """Plan for cases given as shape and spacing; only label 1 occurs."""
    return make_plan(
        dataset_of(),
        Fingerprint(
            cases=tuple(
                CaseFingerprint(
                    case_id=str(index),
                    shape_vox=shape,
                    spacing_mm=spacing,
                    intensities=(STATS,),
                    label_voxels={0: 10, 1: 5},
                )
                for index, (shape, spacing) in enumerate(cases)
            ),
            intensities=(STATS,),
        ),
    )


def test_spacing_is_the_median_of_each_axis():
    plan = plan_from(*(((20, 20, 20), (1.0, 1.0, z)) for z in (1.0, 1.5, 2.0)))
    assert plan.spacing_mm == (1.0, 1.0, 1.5)
    assert plan.reasons["spacing_mm"] == "median of 3 cases; its coarsest axis is 1.5 times its finest"


def test_the_coarse_axis_of_anisotropic_data_takes_its_10th_percentile():
    plan = plan_from(*(((20, 20, 20), (1.0, 1.0, float(z))) for z in range(2, 13)))  # 2..12, median 7
    assert plan.spacing_mm == (1.0, 1.0, 3.0)
    assert "is 7 times its finest, at least 3, so axis 2 takes its 10th percentile" in plan.reasons["spacing_mm"]


def test_the_coarse_axis_gets_no_finer_than_the_others():
    spacings = [(1.0, 1.0, 0.2)] * 4 + [(1.0, 1.0, 5.0)] * 6
    assert plan_from(*(((20, 20, 20), spacing) for spacing in spacings)).spacing_mm == (1.0, 1.0, 1.0)


def test_shapes_are_taken_at_the_planned_spacing():
    # At the median of 1 mm the three cases are 20, 40 and 60 voxels long: the window is 1.1 x 40.
    plan = plan_from(*(((40, 40, 40), (mm, mm, mm)) for mm in (0.5, 1.0, 1.5)))
    assert plan.window_vox == (44, 44, 44)
    assert plan.whole_limit_vox == (66, 66, 66)


@pytest.mark.parametrize(
    ("shape", "spacing", "window", "strides"),
    [
        ((36, 50, 35), (1, 1, 1), (40, 56, 40), [(2, 2, 2)] * 4),
        ((119, 89, 55), (1, 1, 1), (132, 96, 60), [(2, 2, 2)] * 4),
        ((240, 240, 155), (1, 1, 1), (96, 96, 96), [(2, 2, 2)] * 4),
        # 564 x 564 x 24: the plane is shortened to 232 (116 mm), then the slices (120 mm) to 16. Slices are halved when
        # the plane is at 4 mm (5 <= 2 x 4), not yet at 2 mm (5 > 2 x 2).
        ((512, 512, 20), (0.5, 0.5, 5.0), (232, 232, 16), [(2, 2, 1), (2, 2, 1), (2, 2, 1), (2, 2, 2)]),
        # 7 slices: halved to 4 and to 2, too few for more.
        ((64, 64, 6), (1, 1, 1), (72, 72, 7), [(2, 2, 2), (2, 2, 2), (2, 2, 1), (2, 2, 1)]),
        # One slice is never halved.
        ((64, 64, 1), (1, 1, 1), (72, 72, 1), [(2, 2, 1)] * 4),
        # The long axis is coarse, but alone long enough to be halved: 0.5 mm over 2 voxels, 4 mm over 100.
        ((2, 2, 100), (0.5, 0.5, 4.0), (2, 2, 112), [(1, 1, 2)] * 4),
        ((3, 1, 1), (1, 1, 1), (3, 1, 1), [(2, 1, 1), (2, 1, 1), (1, 1, 1), (1, 1, 1)]),
        ((1, 1, 1), (1, 1, 1), (1, 1, 1), [(2, 2, 2), (1, 1, 1), (1, 1, 1), (1, 1, 1)]),
    ],
)
def test_windows_and_strides(shape: Triple, spacing: tuple[float, float, float], window: Triple, strides: list[Triple]):
    plan = plan_from((shape, spacing))
    assert plan.window_vox == window
    assert list(plan.strides) == strides


def test_large_windows_are_shortened_along_the_longest_axis_in_mm():
    plan = plan_from(((240, 240, 155), (1, 1, 1)))
    assert plan.window_vox == (96, 96, 96)  # 884 736 voxels; 96 x 96 x 104 would be 958 464
    assert "264 x 264 x 172; then the longest axis in mm shortened in steps of 8" in plan.reasons["window_vox"]


def test_cases_that_are_too_large_for_one_pass_leave_the_window_as_the_limit():
    plan = plan_from(((240, 240, 155), (1, 1, 1)))
    assert plan.whole_limit_vox == plan.window_vox
    assert "240 x 240 x 155, plus 10 % would be 264 x 264 x 171, over 4000000" in plan.reasons["whole_limit_vox"]
    # The largest case, not the median, decides.
    plan = plan_from(*[((32, 32, 32), (1, 1, 1))] * 4, ((100, 32, 32), (1, 1, 1)))
    assert plan.window_vox == (36, 36, 36)
    assert plan.whole_limit_vox == (110, 54, 54)


def test_four_cells_along_the_shortest_extent_in_mm():
    assert plan_from(((40, 60, 50), (1, 1, 1))).grid == (4, 5, 5)
    assert plan_from(((40, 60, 50), (2, 1, 1))).grid == (5, 5, 4)
    assert plan_from(((40, 40, 40), (1, 1, 1))).grid == (5, 5, 4)


@pytest.mark.parametrize(
    ("size", "batch", "steps"), [(20, 8, 4000), (40, 5, 4000), (56, 2, 4000), (88, 2, 3000), (200, 2, 3000)]
)
def test_effort_by_the_size_of_the_window(size: int, batch: int, steps: int):
    plan = plan_from(((size, size, size), (1, 1, 1)))
    assert (plan.batch_size, plan.steps) == (batch, steps)


def test_labels_that_never_occur_are_said():
    assert plan_from(((20, 20, 20), (1, 1, 1))).reasons["labels"] == (
        "2 exclusive label(s), as the dataset gives them; no voxel of b in 1 cases"
    )


def test_ct_is_windowed_by_the_dataset_and_mr_by_the_volume(tmp_path: Path):
    dataset = open_dataset(write_nnunet(tmp_path, 2, channels=("CT", "PET")))
    fingerprint = take_fingerprint(dataset)
    ct, pet = make_plan(dataset, fingerprint).normalisation
    stats = fingerprint.intensities[0]
    assert (ct.kind, ct.low, ct.high) == ("window", stats.percentile_00_5, stats.percentile_99_5)
    assert (ct.mean, ct.std) == (stats.mean, stats.std)
    assert pet.kind == "zscore"


def test_constant_ct_has_no_deviation_to_divide_by():
    flat = STATS.model_copy(update={"std": 0.0})
    case = CaseFingerprint(
        case_id="a", shape_vox=(9, 9, 9), spacing_mm=(1, 1, 1), intensities=(flat,), label_voxels={1: 729}
    )
    plan = make_plan(dataset_of(("CT",), (True,)), Fingerprint(cases=(case,), intensities=(flat,)))
    assert plan.normalisation[0].std == 1.0


def test_mamamia_plan(tmp_path: Path):
    dataset = open_dataset(write_mamamia(tmp_path, 2))
    plan = make_plan(dataset, take_fingerprint(dataset))
    assert plan.channels == ("phase1", "phase1 - phase0")
    assert plan.needed_channels == ("phase1", "phase0")
    assert plan.joint_zscore
    assert plan.num_outputs == 2
    assert plan.reasons["normalisation"] == "by mean and deviation over all phases of an exam together"


def test_region_plan(tmp_path: Path):
    root = write_nnunet(tmp_path, 2, labels={"whole": [1, 2], "core": 2}, regions_class_order=[1, 2])
    dataset = open_dataset(root)
    plan = make_plan(dataset, take_fingerprint(dataset))
    assert (plan.regions, plan.num_outputs) == (True, 2)
    assert plan.reasons["labels"] == "2 region(s) that may overlap, as the dataset gives them"


def test_the_same_plan_every_time(tmp_path: Path):
    dataset = open_dataset(write_msd(tmp_path, 3, channels=("a", "b")))
    plan = make_plan(dataset, take_fingerprint(dataset))
    assert make_plan(dataset, take_fingerprint(dataset)) == plan
    assert plan.window_vox == (28, 28, 28)
    assert set(plan.reasons) >= PLANNED


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.tuples(*[st.integers(1, 600)] * 3),
            st.tuples(*[st.floats(0.05, 10, allow_nan=False)] * 3),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_any_dataset_gets_a_plan_within_its_budgets(cases: list[tuple[Triple, tuple[float, float, float]]]):
    plan = plan_from(*cases)
    assert math.prod(plan.window_vox) <= 900_000
    assert math.prod(plan.whole_limit_vox) <= 4_000_000
    assert all(whole >= window for whole, window in zip(plan.whole_limit_vox, plan.window_vox, strict=True))
    assert plan.strides[0] != (1, 1, 1)
    left = list(plan.window_vox)
    for stride in plan.strides:
        # While any axis is long enough, some axis is halved.
        assert 2 in stride or max(left) < 4
        left = [-(-size // factor) for size, factor in zip(left, stride, strict=True)]
    assert sorted(plan.grid) == [4, 5, 5]
    assert 2 <= plan.batch_size <= 8


def test_hippocampus(real_data: Path):
    dataset = open_dataset(real_data / "Task04_Hippocampus")
    plan = make_plan(dataset, take_fingerprint(dataset))
    assert plan.spacing_mm == (1.0, 1.0, 1.0)
    assert plan.window_vox == (40, 56, 40)
    assert plan.whole_limit_vox == (60, 84, 60)
    assert (plan.batch_size, plan.steps) == (4, 4000)


def test_left_atrium(real_data: Path):
    dataset = open_dataset(real_data / "LeftAtrium")
    plan = make_plan(dataset, take_fingerprint(dataset))
    assert plan.window_vox == (132, 96, 60)
    assert plan.whole_limit_vox == (198, 144, 90)
    assert plan.grid == (5, 5, 4)
    assert (plan.batch_size, plan.steps) == (2, 3000)
