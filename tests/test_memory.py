"""Memory: slabs change nothing in a mask, the estimate holds for a real process, and limits are kept or refused."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phantoms import write_nifti
from plans import make_plan
from tokenseg.config import PRESETS, Plan
from tokenseg.datasets.inputs import InputSize
from tokenseg.errors import ConfigError
from tokenseg.imaging.volume import Volume
from tokenseg.inference.memory import MAX_SLABS, parse_memory, plan_memory
from tokenseg.inference.predict import Manner, segment_scan, segment_volume
from tokenseg.options import SegmentOptions
from tokenseg.saved_model.ensemble import Ensemble
from tokenseg.segmentation.segment import segment_files
from toy_models import as_stored, job_of, mixing, save_untrained, toy_model, untrained

SMALL = PRESETS["small"]


def windows_plan(*, labels: int = 2, regions: bool = False, **changes: object) -> Plan:
    defaults = {"window_vox": (32, 32, 32), "whole_limit_vox": (32, 32, 32)}
    return as_stored(make_plan(labels=labels, regions=regions), **(defaults | changes))


def wavy(shape: tuple[int, int, int], seed: int) -> Volume:
    """Noise on an oblique grid with axes in another order and direction, and a border to crop."""
    array = np.zeros((1, *shape), np.float32)
    array[0, 1:-1, 1:, 2:-1] = np.random.default_rng(seed).normal(size=(shape[0] - 2, shape[1] - 1, shape[2] - 3))
    affine = np.array([[0, -0.1, 1.3, 5], [-0.9, 0, 0.1, 7], [0.1, 1.1, 0, 9], [0, 0, 0, 1.0]])
    return Volume(array, affine, ("c0",))


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(*[st.integers(6, 48)] * 3),
    spacing=st.tuples(*[st.floats(0.6, 2.0)] * 3),
    num_slabs=st.integers(2, 9),
    regions=st.booleans(),
    steered=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_mask_is_the_same_bit_for_bit_however_many_slabs(shape, spacing, num_slabs, regions, steered, seed):
    changes = {"spacing_mm": spacing, "window_vox": (16, 16, 16), "whole_limit_vox": (16, 16, 16)}
    if steered:
        changes["coarse_factor"] = (2, 2, 2)
    plan = windows_plan(regions=regions, **changes)
    volume = wavy(shape, seed)
    models = [toy_model(mixing(plan.num_outputs), plan)]
    masks = [segment_scan(Ensemble.of(models), volume, Manner(num_slabs=count)).mask for count in (1, num_slabs)]
    np.testing.assert_array_equal(*masks)


@pytest.mark.parametrize("num_models", [1, 3])
def test_real_networks_in_slabs(num_models):
    plan = windows_plan(spacing_mm=(1.1, 1.0, 0.9))
    models = [untrained(plan, seed) for seed in range(num_models)]
    volume = wavy((60, 41, 50), 0)
    whole = segment_volume(models, volume)
    assert len(np.unique(whole)) == 3
    for count in (2, 5):
        again = segment_scan(Ensemble.of(models), volume, Manner(num_slabs=count))
        np.testing.assert_array_equal(again.mask, whole)


def test_a_scan_that_runs_whole_runs_once_a_slab_and_gives_the_same():
    plan = windows_plan(whole_limit_vox=(64, 64, 64))
    model = toy_model(mixing(3), plan)
    volume = wavy((40, 30, 35), 1)
    whole = segment_volume(model, volume)
    np.testing.assert_array_equal(segment_scan(Ensemble.of([model]), volume, Manner(num_slabs=3)).mask, whole)


# ---- the estimate


def size_of(*shape: int, spacing_mm: float = 1.0, channels: int = 1) -> InputSize:
    return InputSize((shape[0], shape[1], shape[2]), np.diag([spacing_mm] * 3 + [1.0]), channels, 2)


def peak_of(size: InputSize, limit_mib: float | None = None, plan: Plan | None = None) -> tuple[int, float]:
    found = plan_memory(size, plan or windows_plan(), [SMALL], limit_mib=limit_mib, compiled=False)
    return found.num_slabs, found.peak_mib


def test_a_tighter_limit_takes_more_slabs_and_keeps_it():
    size = size_of(512, 512, 1000)
    plan = windows_plan(window_vox=(128, 128, 128))
    free_slabs, most = peak_of(size, plan=plan)
    assert free_slabs == 1
    slabs, peak = peak_of(size, most - 100, plan)
    assert slabs > 1
    assert peak <= most - 100
    tighter, least = peak_of(size, peak - 50, plan)
    assert tighter > slabs
    assert least <= peak - 50


def test_the_least_that_would_do_is_said_and_does():
    size, plan = size_of(512, 512, 1000), windows_plan(window_vox=(128, 128, 128))
    with pytest.raises(
        ConfigError, match=r"--max-memory 0.5 GB is too little for this scan: at least (\S+) GB"
    ) as error:
        peak_of(size, 500e6 / 2**20, plan)
    least_gb = float(str(error.value).split("at least ")[1].split(" GB")[0])
    slabs, peak = peak_of(size, least_gb * 1e9 / 2**20, plan)
    assert 1 <= slabs <= MAX_SLABS
    assert peak <= least_gb * 1e9 / 2**20


@pytest.mark.parametrize(
    ("text", "mib"),
    [("4GB", 4e9 / 2**20), ("4 gb", 4e9 / 2**20), ("1.5GiB", 1536), ("800MB", 8e8 / 2**20), ("2TiB", 2 * 2**20)],
)
def test_sizes_are_read(text, mib):
    assert parse_memory(text) == pytest.approx(mib)


@pytest.mark.parametrize("text", ["4", "GB", "-1GB", "0GB", "nanGB", "infGB", "4 apples"])
def test_what_is_no_size_is_refused(text, tmp_path):
    with pytest.raises(ConfigError, match="must be a size such as 4GB, 4GiB or 800MB"):
        parse_memory(text)
    write_nifti(tmp_path / "a.nii.gz", np.zeros((20, 20, 20), np.int16))
    model, options = toy_model(mixing(3), windows_plan()), SegmentOptions(max_memory=text)
    with pytest.raises(ConfigError, match="must be a size"):
        segment_files(job_of([model], options=options), tmp_path / "a.nii.gz", tmp_path / "b.nii.gz")


# ---- in a process of its own, seen from outside


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_limits_hold_in_a_real_process_and_change_nothing(tmp_path):
    """A scan of 40 megavoxels: the highest resident size is below each limit, and the masks are equal to the byte."""
    noise = np.random.default_rng(0).integers(-200, 200, (96, 96, 96)).astype(np.int16)
    scan = np.tile(noise, (4, 4, 3))[:320, :320, :288]
    write_nifti(tmp_path / "scan.nii.gz", scan)
    plan = windows_plan(window_vox=(96, 96, 96), whole_limit_vox=(96, 96, 96), spacing_mm=(2.0, 2.0, 2.0))
    model = save_untrained(tmp_path / "model", plan)
    masks = {}
    for limit in ("1.3GB", "0.85GB"):
        done = run_segment(tmp_path / "scan.nii.gz", tmp_path / f"{limit}.nii.gz", model, limit)
        assert done["code"] == 0, done["errors"]
        assert f"limit {limit}" in done["errors"]
        assert done["peak_gb"] < float(limit.removesuffix("GB"))
        masks[limit] = (tmp_path / f"{limit}.nii.gz").read_bytes()
    assert len(set(masks.values())) == 1
    done = run_segment(tmp_path / "scan.nii.gz", tmp_path / "more.nii.gz", model, "0.85GB", "--probabilities")
    assert done["code"] == 0, done["errors"]
    assert done["peak_gb"] < 0.85
    assert (tmp_path / "more_probabilities.npy").stat().st_size > 320 * 320 * 288 * 3 * 2
    refused = run_segment(tmp_path / "scan.nii.gz", tmp_path / "no.nii.gz", model, "0.4GB")
    assert refused["code"] == 2
    assert "is too little for this scan: at least" in refused["errors"]
    assert not (tmp_path / "no.nii.gz").exists()


def run_segment(scan, output, model, limit, *words) -> dict:
    """Segment in a child, and its highest resident size as the system counted it."""
    code = (
        "import resource, subprocess, sys, json\n"
        "done = subprocess.run(sys.argv[1:], capture_output=True, text=True)\n"
        "peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9\n"
        "print(json.dumps({'code': done.returncode, 'errors': done.stderr, 'peak_gb': peak}))\n"
    )
    command = [sys.executable, "-m", "tokenseg", "segment", scan, output, "--model", model, "--engine", "torch"]
    command += ["--max-memory", limit, *words]
    done = subprocess.run([sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)
