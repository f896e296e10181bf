from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import tokenseg.inference.predict
from phantoms import phantom, write_mamamia, write_msd, write_nifti, write_nnunet
from plans import make_plan
from tokenseg.cli import main
from tokenseg.config import Plan
from tokenseg.datasets.inputs import list_inputs
from tokenseg.errors import ConfigError, DataError, FileError, ModelError, TokenSegError
from tokenseg.imaging.volume import Volume, read_mask, read_volume
from tokenseg.inference.predict import segment_volume
from tokenseg.options import SegmentOptions
from tokenseg.saved_model.checkpoint import Model
from tokenseg.segmentation.privacy import shown_name
from tokenseg.segmentation.segment import segment_files
from toy_models import (
    Toy,
    above_level,
    as_stored,
    constant,
    job_of,
    labels_of,
    nearest_level,
    save_untrained,
    toy_model,
    untrained,
)

CPU = torch.device("cpu")
TWO_LABELS = labels_of(outer=7, inner=255)
AFFINES = {
    "identity": np.diag([1.0, 1, 1, 1]),
    "anisotropic": np.diag([0.7, 0.8, 3.5, 1]),
    "flipped": np.array([[-1.0, 0, 0, 90], [0, -1.5, 0, 126], [0, 0, 2, -72], [0, 0, 0, 1]]),
    "permuted": np.array([[0, 0, 2.0, -90], [-1, 0, 0, 30], [0, 1.5, 0, -7], [0, 0, 0, 1]]),
    "oblique": np.array([[0.9, -0.3, 0.2, 4], [0.3, 0.9, -0.1, -8], [-0.15, 0.15, 2.1, 12.5], [0, 0, 0, 1]]),
    "oblique, flipped": np.array([[0.1, 0.2, -2.4, 4], [-0.95, 0.1, -0.1, 8], [0.1, 1.2, 0.1, 1], [0, 0, 0, 1]]),
}


def sphere(shape: tuple[int, int, int], radius: float) -> np.ndarray:
    """Levels 0, 1 and 2: background, a shell, and a core of half the radius."""
    axes = [np.arange(size) - (size - 1) / 2 for size in shape]
    distance = np.sqrt(sum(axis**2 for axis in np.meshgrid(*axes, indexing="ij")))
    return (distance < radius).astype(int) + (distance < radius / 2)


def spacing_ras(affine: np.ndarray) -> tuple[float, ...]:
    stored = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    orientation = nib.orientations.io_orientation(affine)
    return tuple(float(stored[axis]) for axis in np.argsort(orientation[:, 0]))


def volume_of(levels: np.ndarray, affine: np.ndarray = AFFINES["identity"], channels: tuple[str, ...] = ("c0",)):
    return Volume(np.stack([levels.astype(np.float32)] * len(channels)), affine, channels)


def toy_plan(**changes: object) -> Plan:
    defaults = {"labels": TWO_LABELS, "window_vox": (16, 16, 16), "whole_limit_vox": (40, 40, 40)}
    return as_stored(make_plan(labels=2), **(defaults | changes))


# ---- one volume


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", AFFINES)
def test_a_known_sphere_comes_back_exactly(name, whole):
    affine = AFFINES[name]
    levels = sphere((23, 18, 25), 8)
    levels[2, 3, 4] = 1  # nothing is symmetric
    limit = (40, 40, 40) if whole else (16, 16, 16)
    model = toy_model(nearest_level(3), toy_plan(spacing_mm=spacing_ras(affine), whole_limit_vox=limit))
    mask = segment_volume(model, volume_of(levels, affine))
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, np.array([0, 7, 255])[levels])


@pytest.mark.parametrize("name", AFFINES)
def test_the_network_sees_right_anterior_superior(name):
    """A network that marks the upper half of its last axis marks what lies superior, however it was stored."""
    affine, shape = AFFINES[name], (12, 14, 16)

    def upper_half(images: torch.Tensor) -> torch.Tensor:
        upper = torch.zeros_like(images)
        upper[..., images.shape[-1] // 2 :] = 1
        return torch.cat([0.5 - upper, upper - 0.5], dim=1)

    plan = toy_plan(labels=labels_of(upper=1), spacing_mm=spacing_ras(affine), window_vox=(1, 1, 1))
    noise = np.random.default_rng(0).uniform(size=shape)
    mask = segment_volume(toy_model(Toy(upper_half), plan), volume_of(noise, affine))
    canonical = nib.as_closest_canonical(nib.Nifti1Image(mask, affine)).get_fdata()
    expected = np.zeros_like(canonical)
    expected[..., canonical.shape[2] // 2 :] = 1
    np.testing.assert_array_equal(canonical, expected)


def test_a_sphere_survives_another_spacing():
    levels = np.minimum(sphere((40, 40, 20), 12), 1)
    affine = np.diag([1.0, 1, 2, 1])
    plan = toy_plan(spacing_mm=(1.5, 1.5, 1.5), labels=labels_of(ball=1))
    mask = segment_volume(toy_model(nearest_level(2), plan), volume_of(levels, affine))
    dice = 2 * np.sum(mask * levels) / (mask.sum() + levels.sum())
    assert dice > 0.9


def test_large_label_values():
    levels = sphere((20, 20, 20), 6)
    mask = segment_volume(toy_model(nearest_level(3), toy_plan(labels=labels_of(a=1, b=70_000))), volume_of(levels))
    np.testing.assert_array_equal(mask, np.array([0, 1, 70_000])[levels])


def test_regions_are_painted_in_the_order_of_the_plan():
    levels = sphere((20, 20, 20), 8)
    plan = as_stored(make_plan(labels=2, regions=True), window_vox=(16, 16, 16))
    mask = segment_volume(toy_model(above_level(2), plan), volume_of(levels))
    np.testing.assert_array_equal(mask, levels)
    backwards = as_stored(plan, labels=plan.labels[::-1])
    swapped = Toy(lambda images: above_level(2)(images).logits.flip(1))
    mask = segment_volume(toy_model(swapped, backwards), volume_of(levels))
    np.testing.assert_array_equal(mask, np.minimum(levels, 1))  # the outer one, painted last, covers the core


def test_ensembles_average_probabilities_not_logits_nor_votes():
    plan = toy_plan(labels=labels_of(a=1, b=2))
    volume = volume_of(sphere((4, 4, 4), 2))

    def of_probability(of_a: float) -> Model:
        return toy_model(constant(-30.0, np.log(of_a), np.log1p(-of_a)), plan)

    # Mean of a is 0.517, though two of three vote for b.
    assert (segment_volume([of_probability(p) for p in (0.9, 0.3, 0.35)], volume) == 1).all()
    # Mean of a is 0.467, though its mean logit is far ahead.
    extreme = toy_model(constant(-30.0, 20.0, -20.0), plan)
    assert (segment_volume([extreme, of_probability(0.2), of_probability(0.2)], volume) == 2).all()


def test_region_ensembles_average_probabilities():
    plan = as_stored(make_plan(labels=1, regions=True))
    volume = volume_of(sphere((4, 4, 4), 2))
    strong, weak = toy_model(constant(20.0), plan), toy_model(constant(-0.5), plan)
    assert (segment_volume([strong, weak, weak], volume) == 1).all()  # (1 + 0.378 + 0.378) / 3 = 0.585
    weaker = toy_model(constant(-2.0), plan)
    assert (segment_volume([strong, weaker, weaker], volume) == 0).all()  # (1 + 0.119 + 0.119) / 3 = 0.413


def test_sure_models_do_not_make_infinite_logits():
    plan = toy_plan(labels=labels_of(a=1, b=2), spacing_mm=(2, 2, 2))
    mask = segment_volume([toy_model(constant(0.0, 500.0, -500.0), plan)] * 2, volume_of(phantom(0)[0][0]))
    assert (mask == 1).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": labels_of(outer=7, inner=254)},
        {"spacing_mm": (1, 1, 1.1)},
        {"window_vox": (16, 16, 20)},
        {"source_channels": ("c0", "c1")},
    ],
)
def test_models_of_different_plans_are_not_averaged(changes):
    models = [toy_model(nearest_level(3), toy_plan(), "run1"), toy_model(nearest_level(3), toy_plan(**changes), "run2")]
    with pytest.raises(ConfigError, match=r"models 'run1' and 'run2' were trained with different plans; average only"):
        segment_volume(models, volume_of(sphere((8, 8, 8), 3)))


def test_the_words_of_a_plan_do_not_matter_to_an_ensemble():
    levels = sphere((8, 8, 8), 3)
    models = [toy_model(nearest_level(3), toy_plan(reasons=reasons)) for reasons in ({}, {"spacing_mm": "median"})]
    np.testing.assert_array_equal(segment_volume(models, volume_of(levels)), np.array([0, 7, 255])[levels])


def test_no_model_is_no_ensemble():
    with pytest.raises(ConfigError, match="no model given; name at least one"):
        segment_volume([], volume_of(sphere((8, 8, 8), 3)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_network_is_not_an_empty_mask(value):
    with pytest.raises(ModelError, match="model 'toy' gives NaN or infinity here; train it again"):
        segment_volume(toy_model(constant(0, value, 0), toy_plan()), volume_of(sphere((8, 8, 8), 3)))


def test_channels_are_taken_by_name():
    plan = as_stored(make_plan(channels=2, labels=2), channels=("t1gd", "FLAIR"), source_channels=("FLAIR", "t1gd"))
    levels = sphere((20, 20, 20), 8)
    array = np.stack([np.zeros_like(levels), levels]).astype(np.float32)
    model = toy_model(nearest_level(3), plan)
    np.testing.assert_array_equal(segment_volume(model, Volume(array, np.eye(4), ("FLAIR", "t1gd"))), levels)
    np.testing.assert_array_equal(
        segment_volume(model, Volume(array[::-1].copy(), np.eye(4), ("t1gd", "FLAIR"))), levels
    )
    with pytest.raises(DataError, match="model expects t1gd, FLAIR; t1gd is missing"):
        segment_volume(model, Volume(array, np.eye(4), ("FLAIR", "T2")))


# ---- files


@pytest.fixture
def toy() -> Model:
    return toy_model(nearest_level(3), toy_plan())


def write_scans(folder: Path, count: int = 3) -> Path:
    for index in range(count):
        write_nifti(folder / f"scan{index}.nii.gz", sphere((20, 18, 16), 5 + index).astype(np.float32))
    return folder


def summary(folder: Path) -> list[dict[str, str]]:
    with (folder / "summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


class Recorder:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def stage(self, name: str, total: int, done: int = 0) -> None:
        self.lines.append(f"{name} {total}")

    def advance(self, note: str = "") -> None:
        self.lines.append(note)

    def message(self, text: str) -> None:
        self.lines.append(text)


def test_a_file_becomes_a_file(toy, tmp_path):
    scan = write_scans(tmp_path) / "scan1.nii.gz"
    (result,) = segment_files(job_of([toy]), scan, tmp_path / "new" / "folder" / "mask.nii")
    assert result.mask == tmp_path / "new" / "folder" / "mask.nii"
    np.testing.assert_array_equal(read_mask(result.mask).array, np.array([0, 7, 255])[sphere((20, 18, 16), 6)])
    assert sorted(path.name for path in result.mask.parent.iterdir()) == [
        *("mask.nii", "mask_manifest.json", "mask_qc.json")
    ]


def test_a_folder_becomes_a_folder_with_each_ending_kept(toy, tmp_path):
    write_scans(tmp_path / "in", 2)
    write_nifti(tmp_path / "in" / "last.nii", sphere((20, 18, 16), 8).astype(np.float32))
    recorder = Recorder()
    results = segment_files(job_of([toy], progress=recorder), tmp_path / "in", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("last.nii", "last_qc.json", "manifest.json", "scan0.nii.gz", "scan0_qc.json", "scan1.nii.gz"),
        *("scan1_qc.json", "status.jsonl", "summary.csv"),
    ]
    assert [result.case_id for result in results] == ["last", "scan0", "scan1"]
    assert recorder.lines == [
        "segmenting 3",
        *(shown_name(name, show_names=False) for name in ("last", "scan0", "scan1")),
    ]
    np.testing.assert_array_equal(
        read_mask(tmp_path / "out" / "last.nii").array, np.array([0, 7, 255])[sphere((20, 18, 16), 8)]
    )


def test_volumes_in_ml_by_hand(tmp_path):
    levels = np.zeros((10, 10, 10), np.float32)
    levels[2:6, 2:5, 2:4] = 1  # 24 voxels
    levels[7:8, 7:9, 7:10] = 2  # 6 voxels
    affine = np.array([[0, 0, 0.5, 1], [-2.0, 0, 0, 2], [0, 3, 0, 3], [0, 0, 0, 1]])  # 3 mm3
    write_nifti(tmp_path / "in" / "a.nii.gz", levels, affine=affine)
    plan = toy_plan(spacing_mm=spacing_ras(affine))
    (result,) = segment_files(job_of([toy_model(nearest_level(3), plan)]), tmp_path / "in", tmp_path / "out")
    assert result.volumes_ml == pytest.approx({"outer": 0.072, "inner": 0.018})
    assert (tmp_path / "out" / "summary.csv").read_bytes() == b"case,outer_ml,inner_ml,error\r\na,0.0720,0.0180,\r\n"


def test_the_volume_of_a_region_includes_the_regions_in_it(tmp_path):
    levels = sphere((20, 20, 20), 8)
    write_nifti(tmp_path / "in.nii.gz", levels.astype(np.float32))
    plan = as_stored(make_plan(labels=2, regions=True))
    (result,) = segment_files(
        job_of([toy_model(above_level(2), plan)]), tmp_path / "in.nii.gz", tmp_path / "out.nii.gz"
    )
    assert result.volumes_ml == pytest.approx({"l0": (levels >= 1).sum() / 1000, "l1": (levels == 2).sum() / 1000})


def test_a_broken_case_does_not_stop_the_others(toy, tmp_path):
    folder = write_scans(tmp_path / "in")
    (folder / "scan1.nii.gz").write_bytes((folder / "scan1.nii.gz").read_bytes()[:-20])
    results = segment_files(job_of([toy]), folder, tmp_path / "out")
    assert [result.mask is not None for result in results] == [True, False, True]
    assert "scan1.nii.gz is truncated or empty" in results[1].error
    rows = summary(tmp_path / "out")
    assert [row["case"] for row in rows] == ["scan0", "scan1", "scan2"]
    assert [bool(row["error"]) for row in rows] == [False, True, False]
    assert (rows[1]["outer_ml"], rows[1]["error"]) == ("", results[1].error)
    assert float(rows[2]["outer_ml"]) == pytest.approx(results[2].volumes_ml["outer"], abs=1e-4)
    assert not (tmp_path / "out" / "scan1.nii.gz").exists()


def test_a_case_without_any_image_fails_by_itself(tmp_path):
    plan = as_stored(
        make_plan(channels=2, labels=1), channels=("phase0", "phase1"), source_channels=("phase0", "phase1")
    )
    write_mamamia(tmp_path / "ds", 2, num_phases=(2,))
    shutil.rmtree(tmp_path / "ds" / "images" / "DUKE_002")
    (tmp_path / "ds" / "images" / "DUKE_002").mkdir()
    results = segment_files(job_of([toy_model(constant(0.0, 1.0), plan)]), tmp_path / "ds", tmp_path / "out")
    assert [result.case_id for result in results] == ["DUKE_001", "DUKE_002"]
    assert results[0].mask == tmp_path / "out" / "DUKE_001.nii.gz"
    assert "phase0, phase1 is missing" in results[1].error


def test_an_interrupted_run_lists_what_was_not_reached(toy, tmp_path):
    folder = write_scans(tmp_path / "in")
    calls = []

    def interrupted(images: torch.Tensor) -> torch.Tensor:
        calls.append(images)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return toy.network(images).logits

    with pytest.raises(KeyboardInterrupt):
        segment_files(job_of([toy_model(Toy(interrupted), toy.facts.plan)]), folder, tmp_path / "out")
    assert [(row["case"], row["error"]) for row in summary(tmp_path / "out")] == [
        *(("scan0", ""), ("scan1", "not segmented yet"), ("scan2", "not segmented yet"))
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("manifest.json", "scan0.nii.gz", "scan0_qc.json", "status.jsonl", "summary.csv")
    ]
    # The same call again finishes it.
    assert all(result.mask for result in segment_files(job_of([toy]), folder, tmp_path / "out"))
    assert {row["error"] for row in summary(tmp_path / "out")} == {""}


def test_the_summary_is_there_before_the_first_case_is(toy, tmp_path):
    folder = write_scans(tmp_path / "in", 1)

    def interrupted(images: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        segment_files(job_of([toy_model(Toy(interrupted), toy.facts.plan)]), folder, tmp_path / "out")
    assert summary(tmp_path / "out")[0]["error"] == "not segmented yet"


def test_the_same_input_gives_the_same_bytes(tmp_path):
    write_nifti(tmp_path / "scan.nii.gz", phantom(0)[0][0])
    model = untrained()
    for name in ("a.nii.gz", "b.nii.gz"):
        segment_files(job_of([model]), tmp_path / "scan.nii.gz", tmp_path / name)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert len(np.unique(read_mask(tmp_path / "a.nii.gz").array)) == 2


def test_several_channels_as_files_or_as_one(tmp_path):
    plan = as_stored(make_plan(channels=2, labels=2), channels=("t1gd", "FLAIR"), source_channels=("FLAIR", "t1gd"))
    model = toy_model(nearest_level(3), plan)
    levels = sphere((20, 20, 20), 8)
    both = np.stack([np.zeros_like(levels), levels], axis=-1).astype(np.float32)
    write_nifti(tmp_path / "in" / "split_0000.nii.gz", both[..., 0])
    write_nifti(tmp_path / "in" / "split_0001.nii.gz", both[..., 1])
    write_nifti(tmp_path / "in" / "joint.nii.gz", both)
    write_nifti(tmp_path / "in" / "half_0000.nii.gz", both[..., 0])
    write_nifti(tmp_path / "in" / "thrice.nii.gz", both[..., [0, 1, 1]])
    results = {result.case_id: result for result in segment_files(job_of([model]), tmp_path / "in", tmp_path / "out")}
    for case_id in ("split", "joint"):
        np.testing.assert_array_equal(read_mask(tmp_path / "out" / f"{case_id}.nii.gz").array, levels)
    assert "model expects FLAIR, t1gd; half has FLAIR (half_0000.nii.gz): t1gd is missing" in results["half"].error
    assert "model expects FLAIR, t1gd; " in results["thrice"].error
    assert "holds 3 channel(s)" in results["thrice"].error


def test_dataset_layouts(toy, tmp_path):
    write_msd(tmp_path / "msd", 2, num_test=1)
    write_nnunet(tmp_path / "nnunet", 2, channels=("c0",), num_test=1, file_ending=".nii")
    for layout, ending in (("msd", ".nii.gz"), ("nnunet", ".nii")):
        segment_files(job_of([toy]), tmp_path / layout, tmp_path / f"{layout}_out")
        masks = sorted(path.name for path in (tmp_path / f"{layout}_out").iterdir())
        written = [f"case_00{index}{end}" for index in range(3) for end in (ending, "_qc.json")]
        assert masks == [*written, "manifest.json", "status.jsonl", "summary.csv"]


@pytest.mark.parametrize("output", ["mask.dcm", "mask", "mask.nii.gz.txt", "."])
def test_a_file_needs_a_file_to_go_to(toy, tmp_path, output):
    scan = write_scans(tmp_path, 1) / "scan0.nii.gz"
    with pytest.raises(
        FileError, match=r"output .* must be a file ending in .nii.gz, .nii, .nrrd, .*since the input is one"
    ):
        segment_files(job_of([toy]), scan, tmp_path / output)


def test_a_folder_needs_a_folder_to_go_to(toy, tmp_path):
    folder = write_scans(tmp_path / "in", 1)
    (tmp_path / "file").write_text("mine")
    for output in ("mask.nii.gz", "mask.nii", "file"):
        with pytest.raises(FileError, match=r"output .* must be a folder, since the input is a folder"):
            segment_files(job_of([toy]), folder, tmp_path / output)
    assert (tmp_path / "file").read_text() == "mine"


def test_images_and_foreign_masks_are_never_overwritten(toy, tmp_path):
    dataset = write_msd(tmp_path / "ds", 2)
    before = {path: path.read_bytes() for path in dataset.rglob("*") if path.is_file()}
    scan = dataset / "imagesTr" / "case_000.nii.gz"
    (tmp_path / "link.nii.gz").symlink_to(scan)
    for output in (scan, tmp_path / "link.nii.gz"):
        with pytest.raises(FileError, match="is the input image itself; name another file"):
            segment_files(job_of([toy]), scan, output)
    for source, folder in (("", "imagesTr"), ("", "labelsTr"), ("imagesTr", "imagesTr")):
        with pytest.raises(FileError, match=r"already holds case_000.nii.gz, case_001.nii.gz, not written by"):
            segment_files(job_of([toy]), dataset / source, dataset / folder)
    (dataset / "imagesTr" / "summary.csv").write_text("case\n")
    with pytest.raises(FileError, match="so that nothing is overwritten"):
        segment_files(job_of([toy]), dataset, dataset / "imagesTr")
    (dataset / "imagesTr" / "summary.csv").unlink()
    assert {path: path.read_bytes() for path in dataset.rglob("*") if path.is_file()} == before


def test_masks_do_not_go_where_the_scans_lie(toy, tmp_path):
    folder = write_scans(tmp_path / "in", 1)
    (folder / "scan0.nii.gz").rename(folder / "scan0_0000.nii.gz")
    with pytest.raises(FileError, match="is where the scans lie, and the next call would take masks for scans"):
        segment_files(job_of([toy]), folder, folder)
    assert [path.name for path in folder.iterdir()] == ["scan0_0000.nii.gz"]
    (result,) = segment_files(job_of([toy]), folder, folder / "masks")
    assert result.case_id == "scan0"


def test_a_single_mask_replaces_only_one_of_its_kind(toy, tmp_path):
    scan = write_scans(tmp_path / "in", 1) / "scan0.nii.gz"
    mine = tmp_path / "truth.nii.gz"
    mine.write_bytes(scan.read_bytes())
    with pytest.raises(FileError, match=r"truth\.nii\.gz is there already, without a manifest of `tokenseg segment`"):
        segment_files(job_of([toy]), scan, mine)
    assert mine.read_bytes() == scan.read_bytes()
    for _ in range(2):
        (result,) = segment_files(job_of([toy]), scan, tmp_path / "mask.nii.gz")
        assert result.error == ""
        (tmp_path / "mask_manifest.json").unlink()  # as if killed before it was written


@pytest.mark.parametrize("single", [True, False])
def test_an_output_that_cannot_be_written_is_found_before_any_work(tmp_path, single):
    source = write_scans(tmp_path / "in", 1)
    (tmp_path / "file").write_text("mine")
    network = nearest_level(3)
    output = tmp_path / "file" / ("mask.nii.gz" if single else "masks")
    with pytest.raises(FileError, match=f"output {output} cannot be written: .*; name another place"):
        segment_files(job_of([toy_model(network, toy_plan())]), source / "scan0.nii.gz" if single else source, output)
    assert network.seen == []


def test_a_full_disk_stops_the_run_and_leaves_nothing_half_written(toy, tmp_path, monkeypatch):
    folder = write_scans(tmp_path / "in", 1)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match=r"cannot write .*summary.csv: No space left on device; nothing was changed"):
        segment_files(job_of([toy]), folder, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_models_must_be_of_one_plan_before_anything_is_written(toy, tmp_path):
    other = toy_model(nearest_level(3), toy_plan(spacing_mm=(2, 2, 2)))
    with pytest.raises(ConfigError, match="different plans"):
        segment_files(job_of([toy, other]), write_scans(tmp_path / "in"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_case_that_does_not_fit_in_memory_does_not_stop_the_others(toy, tmp_path, error):
    folder = write_scans(tmp_path / "in", 2)

    def first_fails(images: torch.Tensor, calls=[]) -> torch.Tensor:  # noqa: B006
        calls.append(images)
        # Memory of a GPU is tried again, and then the CPU.
        if len(calls) <= (3 if isinstance(error, torch.OutOfMemoryError) else 1):
            raise error
        return toy.network(images).logits

    results = segment_files(job_of([toy_model(Toy(first_fails), toy.facts.plan)]), folder, tmp_path / "out")
    assert results[0].error.startswith("scan0 needs more memory than there is; check the spacing in its header")
    assert results[1].mask == tmp_path / "out" / "scan1.nii.gz"


def test_what_goes_wrong_outside_a_case_is_not_hidden(toy, tmp_path, monkeypatch):
    """Only a TokenSegError is a broken case; a bug is not recorded as one."""

    def bug(*_: object, **__: object) -> None:
        raise RuntimeError("bug")

    monkeypatch.setattr(tokenseg.inference.predict, "choose_route", bug)
    with pytest.raises(RuntimeError, match="bug"):
        segment_files(job_of([toy]), write_scans(tmp_path / "in", 1), tmp_path / "out")


# ---- real scans


@pytest.mark.parametrize(
    ("name", "count", "spacing_mm", "window_vox"),
    [("Task04_Hippocampus", 5, (1.0, 1.0, 1.0), (48, 64, 48)), ("LeftAtrium", 1, (2.0, 2.0, 1.5), (40, 48, 32))],
)
def test_masks_of_real_scans_lie_where_the_scans_do(real_data, tmp_path, name, count, spacing_mm, window_vox):
    scans = sorted((real_data / name / "imagesTr").glob("*.nii.gz"))[:count]
    (tmp_path / "in").mkdir()
    for scan in scans:
        (tmp_path / "in" / scan.name).symlink_to(scan)
    plan = make_plan(labels=2, spacing_mm=spacing_mm, window_vox=window_vox)
    results = segment_files(job_of([untrained(plan)]), tmp_path / "in", tmp_path / "out")
    assert [result.error for result in results] == [""] * count
    for scan, result in zip(scans, results, strict=True):
        source, written = nib.load(scan), nib.load(result.mask)
        assert written.shape == source.shape
        assert written.affine.tobytes() == source.affine.tobytes()
        assert written.header.get_sform().tobytes() == source.header.get_sform().tobytes()
        assert written.header.get_qform().tobytes() == source.header.get_qform().tobytes()
        for field in ("sform_code", "qform_code"):
            assert written.header[field] == source.header[field]
        assert set(np.unique(written.dataobj)) <= {0, 1, 2}


def test_reading_segmenting_and_listing_agree_on_a_real_case(real_data):
    """The library's short way gives what the command writes."""
    scan = min((real_data / "Task04_Hippocampus" / "imagesTr").glob("*.nii.gz"))
    model = untrained(make_plan(window_vox=(48, 64, 48)))
    mask = segment_volume(model, read_volume(scan, ("c0",)))
    assert mask.shape == nib.load(scan).shape
    (case,) = list_inputs(scan, model.facts.plan)
    assert case.case_id == scan.name.removesuffix(".nii.gz")
    with pytest.raises(TokenSegError, match="c0 is missing"):
        segment_volume(model, read_volume(scan, ("MRI",)))


def test_a_case_that_fails_leaves_no_mask_of_an_earlier_call(tmp_path):
    source = write_scans(tmp_path / "in", 2)
    toy = toy_model(nearest_level(3), toy_plan())
    segment_files(job_of([toy]), source, tmp_path / "out")
    (source / "scan1.nii.gz").write_bytes(b"broken")
    assert [result.mask is None for result in segment_files(job_of([toy]), source, tmp_path / "out")] == [False, True]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("manifest.json", "scan0.nii.gz", "scan0_qc.json", "status.jsonl", "summary.csv")
    ]


@pytest.mark.parametrize("show_names", [True, False])
def test_masks_of_every_earlier_call_are_known(toy, tmp_path, show_names):
    """The summary names the cases of the last call alone."""
    one, other = write_scans(tmp_path / "one", 2), tmp_path / "other"
    other.mkdir()
    (one / "scan1.nii.gz").rename(other / "scan1.nii.gz")
    for source in (one, other, one):
        segment_files(job_of([toy], options=SegmentOptions(show_names=show_names)), source, tmp_path / "out")
    assert [row["case"] for row in summary(tmp_path / "out")] == ["scan0"]
    (one / "mine.nii.gz").write_bytes((one / "scan0.nii.gz").read_bytes())
    (tmp_path / "out" / "mine.nii.gz").write_text("mine")
    with pytest.raises(FileError, match=r"already holds mine\.nii\.gz, not written by"):
        segment_files(job_of([toy]), one, tmp_path / "out")


def test_no_image_of_a_folder_is_left_out_in_silence(toy, tmp_path):
    source = write_scans(tmp_path / "in", 2)
    (source / "scan1.nii.gz").rename(source / "SCAN1.NII.GZ")
    (source / "b.nii.gz").symlink_to(tmp_path / "away.nii.gz")
    capitals, away, plain = segment_files(job_of([toy]), source, tmp_path / "out")
    assert capitals.mask == tmp_path / "out" / "SCAN1.nii.gz"
    assert away.error.startswith(f"{source / 'b.nii.gz'} is a link, and what it points to is not there; mend the link")
    assert plain.mask == tmp_path / "out" / "scan0.nii.gz"
    (alone,) = segment_files(job_of([toy]), source / "SCAN1.NII.GZ", tmp_path / "mask.nii.gz")
    assert alone.volumes_ml == capitals.volumes_ml


def test_each_stage_is_timed(tmp_path, capsys):
    scans = write_scans(tmp_path / "in", 2)
    (scans / "scan1.nii.gz").write_bytes(b"broken")
    model = save_untrained(tmp_path / "model")
    assert main(["segment", str(scans), str(tmp_path / "out"), "--model", str(model), "--profile"]) == 1
    lines = capsys.readouterr().out.splitlines()
    table = lines[lines.index(f"{'stage':<16}{'mean s':>9}{'share':>8}") + 1 : -1]
    assert [line[:16].strip() for line in table] == ["load", "resample", "network", "resample back", "quality", "save"]
    assert sum(int(line.split()[-1].rstrip("%")) for line in table) == pytest.approx(100, abs=3)
