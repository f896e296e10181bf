"""Times of a whole segmentation: a scan from file to mask file, stage by stage."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from tokenseg.benchmark.speed.networks import TOKENSEG, make_plan
from tokenseg.errors import ConfigError
from tokenseg.imaging.volume import Volume, read_volume, write_mask, write_volume
from tokenseg.inference.predict import segment_scan
from tokenseg.model.network import TokenSeg
from tokenseg.saved_model.checkpoint import Model, ModelFacts
from tokenseg.saved_model.ensemble import Ensemble
from tokenseg.stopwatch import Stopwatch

SCAN_VOX = (256, 256, 160)
SPACING_MM = 0.7
STAGES = ("load", "resample", "network", "quality", "resample back", "save")


def stage_seconds(
    name: str, device: torch.device, rounds: int, scan_vox: tuple[int, int, int] = SCAN_VOX
) -> dict[str, list[float]]:
    """Time each stage of segmenting a synthetic scan at 0.7 mm by a network at 1 mm, as `segment` does it.

    The scan is a head-sized ellipsoid of noise in air, compressed. The mask that is saved is two nested ellipsoids: an
    untrained network gives noise, which takes far longer to compress than a segmentation.

    Args:
        name: A TokenSeg; others cannot be segmented with from the command line.
        device: Where to compute, in the precision that `segment` takes there.
        rounds: How often, after once to warm up.
        scan_vox: Size of the scan.

    Returns:
        For each of `STAGES` its seconds, round by round.

    Raises:
        ConfigError: The network is not a TokenSeg.
    """
    if name not in TOKENSEG:
        raise ConfigError(f"end to end is measured with TokenSeg, not with {name}; name one first")
    plan = make_plan(scan_vox)
    facts = ModelFacts(name=name, plan=plan, network=TOKENSEG[name])
    model = Model(TokenSeg(TOKENSEG[name], plan).eval().to(device), facts, device)
    seconds: dict[str, list[float]] = {stage: [] for stage in STAGES}
    with tempfile.TemporaryDirectory() as folder:
        scan, mask = Path(folder) / "scan.nii.gz", Path(folder) / "mask.nii.gz"
        radius = _radius(scan_vox)
        write_volume(scan, _scan(radius))
        mask_array = (radius < 0.5).astype(np.uint8) + (radius < 0.25).astype(np.uint8)
        for number in range(rounds + 1):
            watch = Stopwatch()
            with watch.stage("load"):
                volume = read_volume(scan, plan.source_channels)
            segment_scan(Ensemble.of(model), volume, watch=watch)
            with watch.stage("save"):
                write_mask(mask, mask_array, volume)
            if number:
                for stage in STAGES:
                    seconds[stage].append(watch.seconds[stage])
    return seconds


def _radius(size_vox: tuple[int, int, int]) -> Float[np.ndarray, "X Y Z"]:
    """Distance of each voxel from the middle, 1 on the ellipsoid that touches the faces."""
    axes = np.meshgrid(*(np.linspace(-1, 1, length, dtype=np.float32) for length in size_vox), indexing="ij")
    return np.sqrt(sum(axis**2 for axis in axes)).astype(np.float32)


def _scan(radius: Float[np.ndarray, "X Y Z"]) -> Volume:
    noise = np.random.default_rng(0).normal(500, 50, radius.shape).astype(np.float32)
    affine = np.diag([SPACING_MM, SPACING_MM, SPACING_MM, 1.0])
    return Volume(np.where(radius < 1, noise, 0)[None].astype(np.float32), affine, ("MRI",))
