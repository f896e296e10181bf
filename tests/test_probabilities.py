"""Probabilities on disk: right by a second way of computing them, the same in slabs, never those of another mask."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

from phantoms import phantom, write_nifti
from plans import make_plan
from tokenseg.cli import main
from tokenseg.config import Plan
from tokenseg.imaging.volume import Volume, read_mask
from tokenseg.inference.predict import Manner, segment_scan
from tokenseg.plan_grid.preprocess import prepare_image
from tokenseg.saved_model.checkpoint import QualityFacts
from tokenseg.saved_model.ensemble import Ensemble
from toy_models import above_level, as_stored, mixing, nearest_level, save_untrained, toy_model, untrained

ROUNDING = 6e-4
"""Of float16 below 1, and of the interpolation's last digits."""


def scan(shape: tuple[int, int, int], seed: int, axes: tuple[int, int, int], flips: tuple[bool, bool, bool]) -> Volume:
    """Noise within a border that is cropped, stored along any axes."""
    rng = np.random.default_rng(seed)
    array = np.zeros((1, *shape), np.float32)
    array[0, 1:-1, 1:-2, 2:-1] = rng.uniform(0.1, 2.4, size=(shape[0] - 2, shape[1] - 3, shape[2] - 3))
    affine = np.eye(4)
    affine[:3, :3] = 0
    for stored, axis in enumerate(axes):
        affine[axis, stored] = -1.2 if flips[stored] else 1.2
    affine[:3, 3] = (4, -30, 11)
    return Volume(array, affine, ("c0",))


def plan_of(*, regions: bool, window: int) -> Plan:
    size = (window, window, window)
    plan = make_plan(labels=2, regions=regions, spacing_mm=(1.5, 1.2, 0.9))
    return as_stored(plan, window_vox=size, whole_limit_vox=size)


def written(models, volume: Volume, path, num_slabs: int) -> tuple[np.ndarray, np.ndarray]:
    segmented = segment_scan(Ensemble.of(models), volume, Manner(num_slabs=num_slabs, probabilities=path / "p.npy"))
    segmented.probabilities.place()
    return segmented.mask, np.load(path / "p.npy")


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(*[st.integers(6, 24)] * 3),
    axes=st.permutations((0, 1, 2)),
    flips=st.tuples(*[st.booleans()] * 3),
    regions=st.booleans(),
    num_slabs=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_they_are_those_of_logits_interpolated_to_the_scan(
    shape, axes, flips, regions, num_slabs, seed, tmp_path_factory
):
    volume, plan = scan(shape, seed, axes, flips), plan_of(regions=regions, window=64)
    network = above_level(2) if regions else nearest_level(3)
    mask, found = written([toy_model(network, plan)], volume, tmp_path_factory.mktemp("p"), num_slabs)

    prepared = prepare_image(volume, plan)
    record, logits = prepared.record, network.function(torch.as_tensor(prepared.image)[None])
    logits = torch.nn.functional.interpolate(logits.double(), record.crop_shape, mode="trilinear")[0]
    canonical = np.zeros((2 if regions else 3, *record.canonical_shape))
    if not regions:
        canonical[0] = 1
    canonical[:, *record.kept_box] = (logits.sigmoid() if regions else logits.softmax(dim=0)).numpy()
    back = ornt_transform(axcodes2ornt("RAS"), io_orientation(volume.affine))
    expected = np.stack([apply_orientation(each, back) for each in canonical])

    assert found.dtype == np.float16
    assert found.shape == (len(canonical), *shape)
    np.testing.assert_allclose(found.astype(float), expected, atol=ROUNDING)
    # And they agree with the mask, but where two are as good as equal.
    ordered = np.sort(expected, axis=0)
    sure = np.all(abs(expected - 0.5) > 1e-6, axis=0) if regions else ordered[-1] - ordered[-2] > 1e-6
    of_mask = (expected > 0.5).sum(axis=0) if regions else expected.argmax(axis=0)
    np.testing.assert_array_equal(mask[sure], of_mask[sure])


@pytest.mark.parametrize("shape", [(60, 41, 50), (41, 60, 50), (41, 50, 60)])
def test_slabs_and_orders_in_memory_change_nothing(shape, tmp_path):
    """Windows that overlap, rows across each of the axes. The last bit may differ by how torch vectorises a softmax."""
    plan = plan_of(regions=False, window=32)
    volume = scan(shape, 3, (0, 1, 2), (True, False, True))
    models = [toy_model(mixing(3), plan)]
    _, whole = written(models, volume, tmp_path, 1)
    _, again = written(models, volume, tmp_path, 5)
    np.testing.assert_allclose(whole.astype(float), again.astype(float), atol=ROUNDING)
    np.testing.assert_allclose(whole.astype(float).sum(axis=0), 1, atol=2e-3)


def test_a_temperature_makes_them_less_sure_and_the_mask_no_other(tmp_path):
    model = untrained(plan_of(regions=False, window=64))
    volume = scan((30, 30, 30), 1, (0, 1, 2), (False, False, False))
    mask, sharp = written([model], volume, tmp_path, 1)
    known = model.facts.model_copy(update={"quality": QualityFacts(temperature=3.0, num_cases=4)})
    same, soft = written([replace(model, facts=known)], volume, tmp_path, 1)
    np.testing.assert_array_equal(mask, same)
    logs = np.log(np.maximum(sharp.astype(float), 1e-4)) / 3
    expected = np.exp(logs) / np.exp(logs).sum(axis=0)
    clear = sharp.min(axis=0) > 0.01
    assert clear.any()
    np.testing.assert_allclose(soft[:, clear].astype(float), expected[:, clear], atol=3e-3)


# ---- the command


def segment(*words: object) -> int:
    return main(["segment", *map(str, words), "--engine", "torch", "--device", "cpu"])


def test_a_cohort_with_and_without(tmp_path):
    model = save_untrained(tmp_path / "model")
    for number in range(2):
        write_nifti(tmp_path / "in" / f"s{number}.nii.gz", phantom(number)[0][0])
    place = (tmp_path / "in", tmp_path / "out", "--model", model)
    numbers = [tmp_path / "out" / f"s{number}_probabilities.npy" for number in range(2)]

    def lines() -> list[str]:
        return (tmp_path / "out" / "status.jsonl").read_text().splitlines()

    assert segment(*place) == 0
    assert not any(path.exists() for path in numbers)
    assert segment(*place, "--probabilities") == 0
    agrees_with_masks(tmp_path / "out", numbers)
    assert len(lines()) == 4

    # Nothing is left to do, with them or without, until a file is gone.
    for words in (["--probabilities"], []):
        assert segment(*place, *words) == 0
        assert len(lines()) == 4
        assert all(path.exists() for path in numbers)
    numbers[0].unlink()
    assert segment(*place, "--probabilities") == 0
    assert len(lines()) == 5
    assert numbers[0].exists()
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["options"]["probabilities"] is True

    # Masks of other weights, without probabilities: the earlier ones would pass for theirs.
    other = save_untrained(tmp_path / "other", seed=1)
    assert segment(tmp_path / "in", tmp_path / "out", "--model", other) == 0
    assert not any(path.exists() for path in numbers)


def agrees_with_masks(out, numbers) -> None:
    for number, path in enumerate(numbers):
        values, mask = np.load(path, mmap_mode="r"), read_mask(out / f"s{number}.nii.gz")
        assert values.shape == (2, *mask.array.shape)
        assert (values.argmax(axis=0) == mask.array).mean() > 0.999


def test_interrupted_between_computing_and_writing_they_stay_with_their_mask(tmp_path, monkeypatch):
    one, other = (save_untrained(tmp_path / f"model{seed}", seed=seed) for seed in (0, 1))
    for number in range(2):
        write_nifti(tmp_path / "in" / f"s{number}.nii.gz", phantom(number)[0][0])
    out = tmp_path / "out"
    numbers = [out / f"s{number}_probabilities.npy" for number in range(2)]
    assert segment(tmp_path / "in", out, "--model", one, "--probabilities") == 0

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("tokenseg.segmentation.segment.write_case", killed)
        assert segment(tmp_path / "in", out, "--model", other, "--probabilities") == 130
    agrees_with_masks(out, numbers)
    assert segment(tmp_path / "in", out, "--model", one, "--probabilities") == 0
    agrees_with_masks(out, numbers)
    assert segment(tmp_path / "in", out, "--model", other, "--probabilities") == 0
    agrees_with_masks(out, numbers)
    assert not list(out.glob(".*"))


@pytest.mark.parametrize("content", ["text", "array"])
def test_files_of_others_stay(tmp_path, capsys, content):
    """A name that earlier versions did not write, in their folder and beside their mask."""
    model = save_untrained(tmp_path / "model")
    write_nifti(tmp_path / "in" / "s.nii.gz", phantom(0)[0][0])
    alone = (tmp_path / "in" / "s.nii.gz", tmp_path / "mask.nii.gz", "--model", model)
    cohort = (tmp_path / "in", tmp_path / "out", "--model", model)
    for arguments, foreign in (
        (alone, tmp_path / "mask_probabilities.npy"),
        (cohort, tmp_path / "out" / "s_probabilities.npy"),
    ):
        if content == "text":
            assert segment(*arguments) == 0
            foreign.write_bytes(b"mine")
        else:
            foreign.parent.mkdir(exist_ok=True)
            np.save(foreign, np.zeros((2, 3, 4, 5), np.float16))
        before = foreign.read_bytes()
        assert segment(*arguments, "--probabilities") == 2
        assert foreign.name in capsys.readouterr().err
        assert segment(*arguments) == (0 if content == "text" else 2)
        assert foreign.read_bytes() == before


def test_one_scan(tmp_path):
    model = save_untrained(tmp_path / "model")
    write_nifti(tmp_path / "s.nii.gz", phantom(0)[0][0])
    arguments = (tmp_path / "s.nii.gz", tmp_path / "mask.nii.gz", "--model", model, "--probabilities")
    for _ in range(2):
        assert segment(*arguments) == 0
    assert np.load(tmp_path / "mask_probabilities.npy").shape[0] == 2
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_failed_case_leaves_none(tmp_path, monkeypatch):
    model = save_untrained(tmp_path / "model")
    write_nifti(tmp_path / "in" / "s.nii.gz", phantom(0)[0][0])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.lib.format.write_array_header_1_0", full)
    assert segment(tmp_path / "in", tmp_path / "out", "--model", model, "--probabilities") == 1
    assert "No space left" in (tmp_path / "out" / "summary.csv").read_text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "status.jsonl",
        "summary.csv",
    ]
