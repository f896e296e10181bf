from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from phantoms import write_mamamia, write_msd, write_nifti
from plans import make_plan
from tokenseg.checking.findings import check_files
from tokenseg.cli import main
from tokenseg.datasets.layouts import load_case, open_dataset
from tokenseg.imaging.volume import Volume, read_volume
from tokenseg.planning.fingerprint import Fingerprint, take_fingerprint
from tokenseg.planning.suitability import ChannelRange, InputFacts, check_input, describe_inputs, summarise_inputs
from tokenseg.saved_model.checkpoint import load_model, save_model
from tokenseg.segmentation.privacy import shown_name
from tokenseg.segmentation.segment import segment_files
from toy_models import as_stored, job_of, untrained

MR = ChannelRange(name="MRI", minimum=(0, 3), negative_share=(0, 0))
CT = ChannelRange(name="MRI", minimum=(-1024, -900), negative_share=(0.4, 0.7))
CROPS = InputFacts(
    content="crops around the hippocampus",
    extent_mm=((31, 43), (40, 59), (24, 47)),
    spacing_mm=((1, 1), (1, 1), (1, 1)),
    anisotropy=(1, 1),
    channels=(MR,),
)


def scan(
    shape: tuple[int, int, int] = (35, 50, 35), spacing_mm=(1.0, 1.0, 1.0), array: np.ndarray | None = None, affine=None
) -> Volume:
    affine = np.diag([*spacing_mm, 1.0]) if affine is None else affine
    values = np.full(shape, 100) if array is None else array
    values = values.astype(np.float32)
    if array is None:
        values[0] += 1
    return Volume(values[np.newaxis], affine, ("MRI",))


def with_channel(channel: ChannelRange) -> InputFacts:
    return CROPS.model_copy(update={"channels": (channel,)})


def test_a_scan_like_those_of_training_gives_no_warning():
    assert check_input(scan(), CROPS) == ()
    assert check_input(scan((31, 59, 24)), CROPS) == ()


def test_a_model_that_does_not_tell_gives_no_warning():
    assert check_input(scan((300, 300, 300)), None) == ()


@pytest.mark.parametrize("facts", [None, CROPS])
def test_one_value_everywhere(facts):
    constant = scan(array=np.full((35, 50, 35), 7))
    assert check_input(constant, facts) == ("MRI has one value everywhere; is it the scan?",)


@pytest.mark.parametrize(("qform", "sform", "told"), [(0, 0, True), (1, 0, False), (0, 2, False), (1, 1, False)])
def test_a_header_without_orientation(tmp_path, qform, sform, told):
    image = nib.Nifti1Image(np.arange(24, dtype=np.float32).reshape(2, 3, 4), None)
    image.set_qform(np.diag([1.0, 1.0, 1.0, 1.0]), code=qform)
    image.set_sform(np.diag([1.0, 1.0, 1.0, 1.0]), code=sform)
    nib.save(image, tmp_path / "scan.nii.gz")
    warnings = check_input(read_volume(tmp_path / "scan.nii.gz", ("MRI",)), None)
    assert [("it may be mirrored" in warning) for warning in warnings] == [True] * told
    findings = check_files([tmp_path / "scan.nii.gz"] * 2)
    assert [("it may be mirrored" in finding.text) for finding in findings] == [True] * (2 * told)


def test_a_whole_head():
    assert check_input(scan((246, 256, 192)), CROPS) == (
        "field of view 246 x 256 x 192 mm; trained on 31-43 x 40-59 x 24-47 mm crops around the hippocampus; "
        "crop it first",
    )


def test_a_tiny_crop():
    assert check_input(scan((15, 50, 35)), CROPS) == (
        "field of view 15 x 50 x 35 mm; trained on 31-43 x 40-59 x 24-47 mm crops around the hippocampus; "
        "give more of the surroundings",
    )


@pytest.mark.parametrize(
    ("shape", "warned"), [((86, 118, 94), 0), ((87, 50, 35), 1), ((35, 119, 35), 1), ((35, 50, 95), 1)]
)
def test_far_begins_beyond_twice_the_largest_of_each_axis(shape, warned):
    assert len(check_input(scan(shape), CROPS)) == warned


@pytest.mark.parametrize(("shape", "warned"), [((16, 20, 12), 0), ((15, 20, 12), 1), ((16, 19, 12), 1)])
def test_far_begins_below_half_the_smallest_of_each_axis(shape, warned):
    assert len(check_input(scan(shape), CROPS)) == warned


def test_axes_are_those_of_the_body_whatever_the_stored_order():
    # Stored: superior-, right+, anterior+. Held against stored axes, 80 mm along the last would be too many.
    affine = np.array([[0, 1.0, 0, 0], [0, 0, 2.0, 0], [-1.0, 0, 0, 0], [0, 0, 0, 1]])
    assert check_input(scan((30, 40, 50), affine=affine), CROPS) == ()
    assert check_input(scan((30, 100, 25), affine=affine), CROPS)[0].startswith("field of view 100 x 50 x 30 mm;")


@pytest.mark.parametrize(("size", "warned"), [(2.0, False), (2.1, True), (0.5, False), (0.45, True)])
def test_spacing_far_off(size, warned):
    shape = tuple(round(length / size) for length in (35, 50, 35))
    found = check_input(scan(shape, (size, size, size)), CROPS)
    voxels = f"voxels {size:g} x {size:g} x {size:g} mm; trained on 1 x 1 x 1 mm; check the header, and look at the "
    assert found == ((voxels + "mask closely",) if warned else ())


def test_thick_slices_of_spacing_not_far_off():
    assert check_input(scan((50, 70, 18), (0.7, 0.7, 1.9)), CROPS) == (
        "voxels 0.7 x 0.7 x 1.9 mm are 2.71 times as long as wide; in training at most 1 times; "
        "look at the mask closely",
    )
    assert check_input(scan((50, 70, 25), (0.7, 0.7, 1.4)), CROPS) == ()


def ct_scan(shape=(35, 50, 35)) -> np.ndarray:
    """Air around and soft tissue inside, in Hounsfield units."""
    values = np.full(shape, -1000.0)
    values[8:-8, 8:-8, 8:-8] = 40
    return values + np.random.default_rng(0).normal(0, 10, shape).clip(-20, 20)


def test_ct_where_training_was_mr():
    array = ct_scan()
    (warning,) = check_input(scan(array=array), CROPS)
    air = float(((array >= -1100) & (array <= -900)).mean())
    assert warning == (
        f"values look like CT (Hounsfield units): minimum -1020, {air:.0%} near -1000 (air); "
        "the smallest value of a training scan of MRI was 0 to 3"
    )
    assert check_input(scan(array=array), with_channel(CT)) == ()


def test_a_scan_of_body_alone_in_hounsfield_units():
    array = np.full((35, 50, 35), 50.0)
    array[:20] = -100
    assert check_input(scan(array=array), CROPS) == (
        "57% of the voxels of MRI are below 0 (minimum -100), in training at most 0%; is it CT, or normalised?",
    )


def test_a_few_values_below_zero_come_from_resampling():
    array = np.full((35, 50, 35), 50.0)
    array[0] = -1
    assert check_input(scan(array=array), CROPS) == ()


def test_mr_where_training_was_ct():
    assert check_input(scan(), with_channel(CT)) == (
        "no value below 0, so MRI is not in Hounsfield units; the smallest value of a training scan of MRI was "
        "-1020 to -900; check how it was converted",
    )


def test_every_channel_is_checked_by_its_name():
    other = ChannelRange(name="T2", minimum=(0, 0), negative_share=(0, 0))
    facts = CROPS.model_copy(update={"channels": (MR, other)})
    arrays = np.stack([scan().array[0], ct_scan()]).astype(np.float32)
    for names, warned in ((("MRI", "T2"), "T2"), (("T2", "MRI"), "MRI")):
        (warning,) = check_input(Volume(arrays, np.eye(4), names), facts)
        assert warning.endswith(
            f"the smallest value of a training scan of {warned} was " + ("0" if warned == "T2" else "0 to 3")
        )


# ---- facts


def test_facts_are_the_ranges_of_the_training_scans(tmp_path: Path):
    write_msd(tmp_path, 3, shape=(10, 12, 14))
    write_nifti(tmp_path / "imagesTr" / "case_001.nii.gz", np.full((20, 12, 14), -4, np.float32), (0.5, 1, 3))
    write_nifti(tmp_path / "labelsTr" / "case_001.nii.gz", np.ones((20, 12, 14), np.uint8), (0.5, 1, 3))
    dataset = open_dataset(tmp_path)
    facts = summarise_inputs(take_fingerprint(dataset).cases, dataset.source_channels)
    assert facts.extent_mm == ((10, 10), (12, 12), (14, 42))
    assert facts.spacing_mm == ((0.5, 1), (1, 1), (1, 3))
    assert facts.anisotropy == (1, 6)
    (channel,) = facts.channels
    assert (channel.name, channel.negative_share) == ("MRI", (0, 1))
    smallest = [float(load_case(dataset, dataset.cases[number]).volume.array.min()) for number in (0, 2)]
    assert channel.minimum == (-4, max(smallest))
    assert describe_inputs(facts) == "scans, 10 x 12 x 14-42 mm (right, anterior, superior), voxels 0.5-1 x 1 x 1-3 mm"


def test_facts_of_an_exam_with_phases_are_of_the_source_channels(tmp_path: Path):
    write_mamamia(tmp_path, 2, shape=(10, 12, 14), num_phases=(4,))
    dataset = open_dataset(tmp_path)
    facts = summarise_inputs(take_fingerprint(dataset).cases, dataset.source_channels)
    assert tuple(channel.name for channel in facts.channels) == dataset.source_channels
    assert check_input(load_case(dataset, dataset.cases[0]).volume, facts) == ()


def test_a_fingerprint_of_an_earlier_version_gives_sizes_only(tmp_path: Path):
    write_msd(tmp_path, 2, shape=(10, 12, 14))
    dataset = open_dataset(tmp_path)
    values = take_fingerprint(dataset).model_dump(mode="json")
    for case in values["cases"]:
        del case["all_voxels"]
    facts = summarise_inputs(Fingerprint.model_validate(values).cases, dataset.source_channels)
    assert facts.channels == ()
    assert facts.extent_mm == ((10, 10), (12, 12), (14, 14))
    assert check_input(scan((10, 12, 14), array=ct_scan((10, 12, 14))), facts) == ()


# ---- where it is told


def test_segment_tells_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    plan = as_stored(make_plan(), channels=("MRI",), source_channels=("MRI",))
    model = untrained(plan)
    facts = model.facts.model_copy(update={"inputs": CROPS})
    save_model(tmp_path / "model", model.network, facts)
    save_model(tmp_path / "silent", model.network, model.facts)
    write_nifti(tmp_path / "in" / "far.nii.gz", scan((100, 40, 40)).array[0])
    write_nifti(tmp_path / "in" / "near.nii.gz", scan((40, 50, 40)).array[0])
    warning = (
        "field of view 100 x 40 x 40 mm; trained on 31-43 x 40-59 x 24-47 mm crops around the hippocampus; "
        "crop it first"
    )
    results = segment_files(job_of([load_model(tmp_path / "model")]), tmp_path / "in", tmp_path / "library")
    assert [result.warnings for result in results] == [(warning,), ()]
    assert all(result.mask is not None for result in results)
    assert capsys.readouterr() == ("", "")
    for name, told in (("model", [f"warning: {shown_name('far', show_names=False)}: {warning}"]), ("silent", [])):
        arguments = [
            str(tmp_path / "in"),
            str(tmp_path / f"{name}-masks"),
            "--model",
            str(tmp_path / name),
            "--threads",
            "1",
        ]
        assert main(["segment", *arguments]) == 0
        printed = capsys.readouterr()
        assert [line for line in printed.err.splitlines() if "warning" in line] == told
        assert "warning" not in printed.out


# ---- real scans


@pytest.fixture(scope="module")
def hippocampus(real_data: Path) -> tuple[InputFacts, list[Volume]]:
    """Facts of 190 cases, and the 10 others."""
    dataset = open_dataset(real_data / "Task04_Hippocampus")
    cases = take_fingerprint(dataset).cases
    facts = summarise_inputs([case for number, case in enumerate(cases) if number % 20], dataset.source_channels)
    return facts, [load_case(dataset, case).volume for case in dataset.cases[::20]]


def test_held_out_hippocampus_crops_give_no_warning(hippocampus):
    facts, held_out = hippocampus
    assert len(held_out) == 10
    assert [check_input(volume, facts) for volume in held_out] == [()] * 10
    assert facts.spacing_mm == ((1, 1), (1, 1), (1, 1))


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("LeftAtrium/imagesTr/la_0*.nii.gz", "mm; trained on "),
        ("brain_tumour_2ch/images/*/T1c*.nii.gz", "field of view 240 x 240 x 155 mm; trained on "),
    ],
    ids=["left atrium", "whole head"],
)
def test_other_scans_give_a_warning(hippocampus, real_data: Path, pattern, said):
    paths = sorted(real_data.glob(pattern))[:5]
    assert paths
    for path in paths:
        first, second = check_input(read_volume(path, ("MRI",)), hippocampus[0])
        assert said in first
        assert "crop it first" in first
        assert "of the voxels of MRI are below 0" in second
