"""Quality signals: known by hand for known probabilities, the same however a scan is cut, and true about failures."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch

from phantoms import write_nifti
from plans import make_plan
from tokenseg.config import PRESETS
from tokenseg.imaging.volume import Volume
from tokenseg.inference.predict import Manner, segment_scan
from tokenseg.inference.quality import CaseQuality, QualityMeter
from tokenseg.inference.temperature import calibration_error, cross_fitted_error, fit_temperature, joined, sample_voxels
from tokenseg.options import SegmentOptions
from tokenseg.outputs import EXCLUSIVE, REGIONS
from tokenseg.plan_grid.preprocess import prepare_image
from tokenseg.plan_grid.restore import slabs_of
from tokenseg.saved_model.checkpoint import ModelFacts, QualityFacts
from tokenseg.saved_model.ensemble import Ensemble
from tokenseg.segmentation.segment import segment_files
from toy_models import Toy, as_stored, job_of, mixing, toy_model

SHAPE = (8, 10, 12)


def record_of(plan, shape=SHAPE):
    array = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    return prepare_image(Volume(array, np.eye(4), ("c0",)), plan).record


def measured(logits: torch.Tensor, plan, facts: QualityFacts | None = None, mask=None) -> CaseQuality:
    """All rows of an image whose rows lie across its last axis (12), then its second (10), then its first (8)."""
    record = record_of(plan)
    assert record.order == (2, 1, 0)
    meter = QualityMeter(plan, record, facts)
    for number in range(SHAPE[2]):
        meter.add(number, logits[:, :, :, number].transpose(1, 2), 0)
    mask = np.zeros(SHAPE, np.uint8) if mask is None else mask
    model = ModelFacts(name="toy", plan=plan, network=PRESETS["tiny"], quality=facts)
    volumes = {label.name: float((mask == label.output_value).sum()) / 1000 for label in plan.labels}
    return meter.quality("case", mask, model, volumes, ())


def logits_of(*probabilities: torch.Tensor) -> torch.Tensor:
    return torch.log(torch.stack([1 - sum(probabilities), *probabilities]).clamp(min=1e-9))


def test_expected_dice_by_hand():
    """Two voxels of 0.75 and one of 0.25: mask of two, so 2 * 1.5 / (1.75 + 2)."""
    probability = torch.zeros(SHAPE)
    probability[1, 2, 3] = probability[1, 2, 4] = 0.75
    probability[5, 5, 5] = 0.25
    quality = measured(logits_of(probability), make_plan(labels=1))
    assert quality.expected_dice == pytest.approx(2 * 1.5 / 3.75, abs=1e-4)
    assert quality.near_boundary == 1.0
    expected = -np.mean([0.75 * np.log(0.75) + 0.25 * np.log(0.25)])
    assert quality.entropy == pytest.approx(expected, abs=1e-4)
    cells = np.array(quality.cell_entropy)
    assert cells.shape == (4, 5, 5)
    assert np.argwhere(cells > 0).tolist() == [[0, 1, 1], [2, 2, 2]]
    assert cells.max() == pytest.approx(expected, abs=1e-4)


def test_sure_answers_are_expected_to_be_right():
    probability = torch.zeros(SHAPE)
    probability[2:6, 2:6, 2:6] = 1 - 1e-6
    quality = measured(logits_of(probability), make_plan(labels=1))
    assert quality.expected_dice == pytest.approx(1, abs=1e-3)
    assert quality.near_boundary == 0


def test_regions_are_counted_each_by_itself():
    logits = torch.full((2, *SHAPE), -12.0)
    logits[0, 2:6, 2:6, 2:6] = 12.0
    logits[1, 3:5, 3:5, 3:5] = float(torch.logit(torch.tensor(0.6)))
    quality = measured(logits, make_plan(labels=2, regions=True))
    dice = [label.expected_dice for label in quality.labels.values()]
    assert dice[0] == pytest.approx(1, abs=1e-3)
    assert dice[1] == pytest.approx(2 * 0.6 / 1.6, abs=1e-3)


def test_nothing_found_and_nothing_suspected():
    quality = measured(logits_of(torch.full(SHAPE, 1e-6)), make_plan(labels=1))
    assert (quality.expected_dice, quality.near_boundary, quality.entropy) == (None, None, None)
    assert not np.any(quality.cell_entropy)


def test_pieces_and_unusual_volumes_are_told():
    mask = np.zeros(SHAPE, np.uint8)
    mask[1, 1, 1] = mask[2, 2, 2] = mask[6, 6, 6] = 1  # the first two touch at a corner
    facts = QualityFacts(temperature=2.0, num_cases=3, volumes_ml={"label1": (0.01, 0.02)})
    plan = make_plan(labels=1)
    (name,) = (label.name for label in plan.labels)
    facts = facts.model_copy(update={"volumes_ml": {name: (0.01, 0.02)}})
    quality = measured(logits_of((torch.from_numpy(mask) * 0.9).float()), plan, facts, mask)
    assert quality.labels[name].components == 2
    assert quality.flags == (f"{name}: 0.003 ml, below all training cases (0.01 to 0.02 ml)",)
    assert (quality.temperature, quality.calibrated) == (2.0, True)


def test_a_temperature_flattens_probabilities_and_changes_no_mask():
    probability = torch.zeros(SHAPE)
    probability[2:6, 2:6, 2:6] = 0.9
    plan = make_plan(labels=1)
    sure, flat = (measured(logits_of(probability), plan, QualityFacts(temperature=t)) for t in (1.0, 2.0))
    assert flat.expected_dice < sure.expected_dice


@pytest.mark.parametrize("num_slabs", [2, 5])
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("spacing_mm", [1, 4])
def test_quality_is_the_same_in_slabs(num_slabs, regions, spacing_mm):
    """Also where the scan is much coarser than the plan, and its voxels need few of the plan's."""
    plan = as_stored(
        make_plan(labels=2, regions=regions),
        window_vox=(16, 16, 16),
        whole_limit_vox=(16, 16, 16),
        spacing_mm=(1, 1, 2),
    )
    affine = np.diag([spacing_mm] * 3 + [1.0])
    shape = (1, 40, 33, 21) if spacing_mm == 1 else (1, 12, 11, 7)
    volume = Volume(np.random.default_rng(0).normal(size=shape).astype(np.float32), affine, ("c0",))
    found = []
    for count in (1, num_slabs):
        done = segment_scan(Ensemble.of([toy_model(mixing(plan.num_outputs), plan)]), volume, Manner(num_slabs=count))
        facts = ModelFacts(name="toy", plan=plan, network=PRESETS["tiny"])
        found.append(done.meter.quality("a", done.mask, facts, {label.name: 1.0 for label in plan.labels}, ()))
    assert found[0] == found[1]
    assert found[0].expected_dice is not None


def test_a_file_beside_each_mask(tmp_path):
    write_nifti(
        tmp_path / "in" / "anna.nii.gz", np.random.default_rng(0).normal(100, 20, (24, 24, 24)).astype(np.int16)
    )
    plan = as_stored(make_plan(labels=1))
    model = toy_model(Toy(lambda images: torch.cat([0 * images, (images - 120) / 10], dim=1)), plan)
    (result,) = segment_files(job_of([model]), tmp_path / "in", tmp_path / "out")
    content = json.loads((tmp_path / "out" / "anna_qc.json").read_text())
    assert content == json.loads(result.quality.model_dump_json())
    assert "anna" not in json.dumps(content)
    assert not content["calibrated"]
    segment_files(
        job_of([model], options=SegmentOptions(show_names=True)),
        tmp_path / "in" / "anna.nii.gz",
        tmp_path / "one.nii.gz",
    )
    assert json.loads((tmp_path / "one_qc.json").read_text())["case"] == "anna"


# ---- temperature


def overconfident(count: int, factor: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are `factor` times those by which the labels were drawn."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, 3, generator=generator) * 2
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)
    return logits * factor, labels


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_the_temperature_is_found_and_mends_the_error(factor):
    logits, labels = overconfident(60_000, factor)
    temperature = fit_temperature(logits, labels, EXCLUSIVE)
    assert temperature == pytest.approx(factor, rel=0.05)
    assert calibration_error(logits, labels, temperature, EXCLUSIVE) < 0.01
    if factor == 3.0:
        assert calibration_error(logits, labels, 1.0, EXCLUSIVE) > 0.1
    before, after = cross_fitted_error([overconfident(20_000, factor, seed) for seed in range(4)], EXCLUSIVE)
    assert after < 0.015
    assert after <= before + 0.005


def test_regions_have_a_temperature_too():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(60_000, 2, generator=generator) * 2
    labels = torch.bernoulli(logits.sigmoid(), generator=generator).long()
    assert fit_temperature(2 * logits, labels, REGIONS) == pytest.approx(2, rel=0.05)
    assert calibration_error(logits, labels, 1.0, REGIONS) < 0.01


def test_the_calibration_error_by_hand():
    """Four voxels at 0.8 of which two are right: 0.3 off; four at 0.9 of which all are right: 0.1 off."""
    probability = torch.tensor([0.8] * 4 + [0.9] * 4)
    logits = torch.stack([1 - probability, probability], dim=1).log()
    labels = torch.tensor([1, 1, 0, 0, 1, 1, 1, 1])[:, None]
    assert calibration_error(logits, labels, 1.0, EXCLUSIVE) == pytest.approx((4 * 0.3 + 4 * 0.1) / 8, abs=1e-5)


def test_every_voxel_of_the_plan_is_in_a_slab():
    record = record_of(as_stored(make_plan(labels=1), spacing_mm=(0.25, 0.25, 0.25)))
    for count in (1, 3, 8):
        slabs = slabs_of(record, count)
        assert slabs[0].grid.start == 0
        assert slabs[-1].grid.stop == record.grid_shape[record.order[1]]
        assert all(second.grid.start <= first.grid.stop for first, second in itertools.pairwise(slabs))


def test_cases_without_any_suspicion_do_not_spoil_a_calibration():
    empty = torch.zeros(0, 3), torch.zeros(0, 1, dtype=torch.long)
    sure = torch.tensor([9.0, -9.0])[:, None, None, None].expand(2, 3, 3, 3)
    sampled = sample_voxels(sure, torch.zeros(1, 3, 3, 3, dtype=torch.uint8), EXCLUSIVE)
    assert [len(part) for part in sampled] == [0, 0]
    assert len(joined([empty, overconfident(100, 1.0)])[0]) == 100


def test_samples_of_many_voxels_stay_among_them():
    """In float32 the last of 2^24 + 4 would be counted one too far."""
    logits = torch.zeros(2, 2**24 + 4, 1, 1)
    labels = torch.zeros(1, 2**24 + 4, 1, 1, dtype=torch.uint8)
    labels[0, -1] = 1
    _, sampled = sample_voxels(logits, labels, EXCLUSIVE)
    assert sampled[-1] == 1
