from __future__ import annotations

import json
import math
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_erosion, distance_transform_edt

from fake_tokens import NUM_CODES, box_sums_model
from phantoms import phantom, write_nifti
from plans import make_plan
from tokenseg.config import PRESETS, Plan
from tokenseg.device import autocast
from tokenseg.errors import ConfigError, DataError, FileError, GeometryError, ModelError
from tokenseg.imaging.orientation import turn_to_ras
from tokenseg.imaging.volume import Mask, Volume, read_mask, read_volume
from tokenseg.inference.predict import Manner, segment_scan, segment_volume
from tokenseg.inference.windows import pad_rows
from tokenseg.plan_grid.preprocess import prepare_image, prepare_labels, rows_of, whole_image
from tokenseg.report.reports import tokens_of_worst
from tokenseg.saved_model.checkpoint import Model
from tokenseg.saved_model.ensemble import Ensemble
from tokenseg.segmentation.segment import segment_files
from tokenseg.tokens.boundary import boundary_distances_mm
from tokenseg.tokens.case import CaseTokens
from tokenseg.tokens.find import report_tokens, tokens_of_case
from tokenseg.tokens.report import RADII_MM, describe_tokens, write_json
from tokenseg.training.losses import cell_foreground
from toy_models import Toy, as_stored, job_of, toy_model, untrained

ROTATIONS = {
    "RAS": np.diag([1.0, 1, 1, 1]),
    "LPS": np.array([[-1.0, 0, 0, 9], [0, -1, 0, 5], [0, 0, 1, 0], [0, 0, 0, 1]]),
    "SLA": np.array([[0, -1.0, 0, 9], [0, 0, 1, 5], [1, 0, 0, 0], [0, 0, 0, 1]]),
}


def bright(images: torch.Tensor) -> torch.Tensor:
    """Foreground where the image is above 50."""
    return torch.cat([torch.zeros_like(images[:, :1]), images[:, :1] - 50], dim=1)


def nothing(images: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.ones_like(images[:, :1]), torch.zeros_like(images[:, :1])], dim=1)


def everything(images: torch.Tensor) -> torch.Tensor:
    return nothing(images).flip(1)


def plan_of(window: tuple[int, int, int], limit: tuple[int, int, int] | None = None, **changes: object) -> Plan:
    plan = as_stored(make_plan(window_vox=window, grid=(2, 3, 4)), **changes)
    return plan.model_copy(update={"whole_limit_vox": limit or window})


def scan(shape: tuple[int, int, int], affine: np.ndarray = ROTATIONS["RAS"], seed: int = 0) -> Volume:
    array = np.random.default_rng(seed).uniform(1, 9, (1, *shape)).astype(np.float32)
    return Volume(array, affine, ("c0",))


def ball(shape: tuple[int, int, int], centre: tuple[float, ...], radius: float) -> np.ndarray:
    axes = [np.arange(size) - middle for size, middle in zip(shape, centre, strict=True)]
    return np.sqrt(sum(axis**2 for axis in np.meshgrid(*axes, indexing="ij"))) < radius


def tokens_in(model: Model, volume: Volume) -> CaseTokens:
    return report_tokens(model, volume, "case").tokens


# ---- where tokens lie


@pytest.mark.parametrize("affine", ROTATIONS.values(), ids=ROTATIONS)
@pytest.mark.parametrize(
    ("shape", "limit", "passes"),
    [((24, 24, 24), (24, 24, 24), 1), ((9, 20, 13), (24, 24, 24), 1), ((30, 24, 50), (24, 24, 24), None)],
)
@pytest.mark.parametrize("border", [0, 3])
def test_boxes_hold_in_the_scan_what_the_network_saw_in_them(affine, shape, limit, passes, border):
    """The sum over each box, taken by the network on its padded input and by us on the scan, is the same."""
    volume = scan(shape, affine)
    if border:
        array = np.zeros_like(volume.array)
        inner = tuple(slice(border, -border) for _ in range(3))
        array[(0, *inner)] = volume.array[(0, *inner)]
        volume = Volume(array, affine, ("c0",))
    tokens = tokens_in(box_sums_model(plan_of((24, 24, 24), limit), nothing), volume)
    assert len(tokens.kept) == passes or len(tokens.kept) > 1
    image = nib.as_closest_canonical(nib.Nifti1Image(volume.array[0], affine)).get_fdata()
    assert tokens.boxes_vox.min() >= border
    assert (tokens.boxes_vox.max(axis=(0, 1, 2)) <= np.array(image.shape) - border).all()
    for boxes, scores in zip(tokens.boxes_vox, tokens.score, strict=True):
        for (low, high), score in zip(np.round(boxes, 6).astype(int), scores, strict=True):
            assert image[tuple(slice(a, b) for a, b in zip(low, high, strict=True))].sum() == pytest.approx(
                score, rel=1e-4, abs=1e-3
            )
    np.testing.assert_array_equal(turn_to_ras(volume.array[0], tokens.record.axes, tokens.record.flipped), image)


@settings(max_examples=25, deadline=None)
@given(
    blob=st.tuples(*[st.integers(2, 10)] * 3),
    spacing_mm=st.tuples(*[st.sampled_from([0.5, 1.0, 1.7, 3.0])] * 3),
    rotation=st.sampled_from(sorted(ROTATIONS)),
    window=st.integers(8, 40),
)
def test_the_best_boxes_hold_the_bright_spot_after_resampling(blob, spacing_mm, rotation, window):
    affine = ROTATIONS[rotation] @ np.diag([*spacing_mm, 1.0])
    array = np.zeros((1, 13, 14, 15), np.float32)
    place = tuple(slice(index - 1, index + 2) for index in blob)
    array[(0, *place)] = 100
    # A faint rim keeps the border from being cropped.
    array[0, ::12, ::13, ::14] = 1
    plan = plan_of((window,) * 3, (window,) * 3)
    tokens = tokens_in(box_sums_model(plan, nothing), Volume(array, affine, ("c0",)))
    bright_place = turn_to_ras(array[0], tokens.record.axes, tokens.record.flipped) == 100
    centre = np.argwhere(bright_place).mean(axis=0) + 0.5
    number = tokens.score.max(axis=1).argmax()
    low, high = tokens.boxes_vox[number, tokens.score[number].argmax()]
    # The blob may straddle boxes; the best one comes within its half width of the centre.
    assert (low - 1.5 <= centre).all()
    assert (centre <= high + 1.5).all()


@settings(max_examples=25, deadline=None)
@given(shape=st.tuples(*[st.integers(3, 30)] * 3), window=st.integers(10, 20))
def test_drawn_cells_tile_the_scan(shape, window):
    tokens = tokens_in(box_sums_model(plan_of((window,) * 3), nothing), scan(shape))
    cells = tokens.cells_vox[:, tokens.level == 2].reshape(-1, 2, 3)
    count = np.zeros(shape, int)
    # Just off the voxel centres, where no cell ends.
    centres = [np.arange(size) + 0.5 + 1e-4 for size in shape]
    for low, high in cells:
        inside = [(low[axis] <= centres[axis]) & (centres[axis] < high[axis]) for axis in range(3)]
        count += inside[0][:, None, None] & inside[1][None, :, None] & inside[2][None, None, :]
    assert (count == 1).all()
    assert np.prod(cells[:, 1] - cells[:, 0], axis=1).sum() == pytest.approx(math.prod(shape))
    for level in range(4):
        np.testing.assert_array_equal(tokens.cells_vox[:, tokens.level == level].reshape(-1, 2, 3), cells)


def test_cells_in_padding_have_empty_boxes_and_are_marked():
    """8 voxels centred in a window of 32: two cells along x hold 4 of them each; of four along z, two hold none."""
    report = report_tokens(box_sums_model(plan_of((32, 32, 32)), bright), scan((8, 32, 8)), "thin")
    assert report.summary.num_candidates == 4 * 2 * 3 * 4
    assert report.summary.num_in_padding == 4 * 2 * 3 * 2
    assert {tuple(box[1] - box[0]) for box in report.tokens.boxes_vox[report.tokens.in_scan]} >= {(4, 10, 4)}
    entries = report.to_json()["tokens"]
    assert [entry["in_padding"] for entry in entries] == (~report.tokens.in_scan).flatten().tolist()
    assert "48 cells lie outside the scan, in padding" in describe_tokens(report)


def test_terms_codes_and_passes_stay_with_their_tokens():
    tokens = tokens_in(box_sums_model(plan_of((16, 16, 16)), nothing), scan((16, 16, 30)))
    assert tokens.kept.shape == (3, 96)
    np.testing.assert_array_equal(tokens.level, np.repeat(np.arange(4), 24))
    np.testing.assert_array_equal(tokens.boundary, np.broadcast_to(tokens.level, (3, 96)))
    np.testing.assert_array_equal(tokens.semantic, np.repeat([0, 1, 2], 96).reshape(3, 96))
    np.testing.assert_array_equal(tokens.code, np.broadcast_to(np.arange(96) % NUM_CODES, (3, 96)))
    assert (tokens.kept.sum(axis=1) == 5).all()
    assert tokens.boxes_vox[0].min() == 0
    assert tokens.boxes_vox[2, :, 1, 2].max() == 30


@pytest.mark.parametrize("shape", [(20, 24, 22), (40, 33, 50)])
@pytest.mark.parametrize("affine", ROTATIONS.values(), ids=ROTATIONS)
def test_the_prediction_is_what_segment_gives(shape, affine):
    volume = Volume(phantom(0, shape=shape)[0], affine, ("c0",))
    model = untrained()
    tokens = tokens_in(model, volume)
    np.testing.assert_array_equal(
        tokens.prediction, turn_to_ras(segment_volume(model, volume) != 0, tokens.record.axes, tokens.record.flipped)
    )
    assert 0 < tokens.prediction.mean() < 1
    assert (tokens.kept.sum(axis=1) == 100).all()
    assert ((tokens.score > 0) & (tokens.score < 1)).all()
    assert tokens.num_codes == PRESETS["tiny"].codebook_size > tokens.code.max()


def test_tokens_do_not_depend_on_slabs():
    """A window that runs in two slabs is told of once, and the order is that of the windows."""
    volume, ensemble = scan((40, 33, 50)), Ensemble.of(untrained())
    whole, cut = (segment_scan(ensemble, volume, Manner(num_slabs=n, tokens=True)) for n in (1, 4))
    np.testing.assert_array_equal(whole.mask, cut.mask)
    assert len(whole.tokens.passes[0].corners) == whole.windows_run > 1
    for one, other in zip(whole.tokens.passes[0], cut.tokens.passes[0], strict=True):
        np.testing.assert_array_equal(one, other)


def test_each_model_of_an_ensemble_is_told_of():
    models = [untrained(seed=1), untrained(config=PRESETS["tiny"].model_copy(update={"tokens": False})), untrained()]
    volume = scan((20, 24, 22))
    together = segment_scan(Ensemble.of(models), volume, Manner(tokens=True)).tokens
    assert [passes is None for passes in together.passes] == [False, True, False]
    for model, passes in zip(models, together.passes, strict=True):
        alone = segment_scan(Ensemble.of(model), volume, Manner(tokens=True)).tokens.passes[0]
        if passes is not None:
            np.testing.assert_array_equal(passes.score, alone.score)
    assert not np.array_equal(together.passes[0].score, together.passes[2].score)


def test_nobody_listens_where_nobody_asks():
    assert segment_scan(Ensemble.of(untrained()), scan((20, 24, 22))).tokens is None


def test_steered_windows_are_told_of_and_no_others():
    plan = plan_of((16, 16, 16), coarse_factor=(2, 2, 2))
    volume = scan((64, 60, 62))
    volume.array[0, 30:36, 30:36, 30:36] = 100
    model = box_sums_model(plan, bright)
    found = segment_scan(Ensemble.of(model), volume, Manner(tokens=True))
    assert 0 < found.windows_run < found.windows_full
    assert len(found.tokens.passes[0].corners) == found.windows_run
    with pytest.raises(DataError, match="calls for no window at full spacing"):
        report_tokens(box_sums_model(plan, nothing), volume, "case")


def test_a_report_costs_no_pass(tmp_path):
    """The tokens of a report come from the passes that segment anyway, of every model and in windows too."""
    path = write_nifti(tmp_path / "scan.nii.gz", phantom(0, shape=(40, 33, 50))[0][0])
    models = [box_sums_model(plan_of((32, 32, 32)), bright, name=name) for name in ("boxes", "boxes")]
    job = job_of(models, tokens_of=1)
    (result,) = segment_files(job, path, tmp_path / "mask.nii.gz")
    passes = [model.network.passes for model in models]
    assert sum(passes) == result.windows_run == 24
    reports = tokens_of_worst(job, [result])
    assert [report.model_name for report in reports] == ["boxes 1 of 2", "boxes 2 of 2"]
    assert [model.network.passes for model in models] == passes
    # Of a case that an earlier call did nothing was kept: it runs again, by the same way.
    again = tokens_of_worst(job, [replace(result, tokens=None)])
    np.testing.assert_array_equal(again[0].boxes.boxes_vox, reports[0].boxes.boxes_vox)
    assert [model.network.passes for model in models] == [2 * count for count in passes]


def test_nan_is_refused():
    broken = box_sums_model(plan_of((16, 16, 16)), lambda images: bright(images) * float("nan"))
    with pytest.raises(ModelError, match="'boxes' gives NaN or infinity here; train it again"):
        tokens_in(broken, scan((16, 16, 16)))


# ---- numbers


def test_summary_by_hand():
    """A scan of 2 x 3 x 4 cells, 8 voxels wide; the brightest cell holds a cube of 6 voxels."""
    array = np.ones((1, 16, 24, 32), np.float32)
    array[0, 9:15, 9:15, 9:15] = 100
    array[0, 0, 0, 0] = 0
    plan = as_stored(make_plan(window_vox=(16, 24, 32), grid=(2, 3, 4)))
    report = report_tokens(box_sums_model(plan, bright), Volume(array, ROTATIONS["RAS"], ("c0",)), "cube")
    summary = report.summary
    # The bright cell is kept on all four levels, which are alike; the fifth is the first of the others.
    assert summary.boundary_of == "prediction"
    assert (summary.num_passes, summary.num_candidates, summary.num_in_padding, summary.num_kept) == (1, 96, 0, 5)
    assert summary.kept_per_level == (2, 1, 1, 1)
    crossed, close, around = summary.near
    assert (crossed.radius_mm, crossed.share, crossed.base_rate, crossed.ceiling) == (0, 4 / 5, 4 / 96, 4 / 5)
    assert crossed.enrichment == pytest.approx(0.8 * 24)
    # From the cube's surface to the next cell it is 2 mm, diagonally more; along x there is one neighbour.
    assert close.base_rate == pytest.approx(4 * (1 + 1 + 2 + 2) / 96)
    assert around.base_rate == pytest.approx(4 * 2 * 3 * 3 / 96)
    # Kept: the bright cell of levels 0 to 3, and one more of level 0.
    assert summary.terms["boundary"] == (pytest.approx(6 / 5), pytest.approx(1.5))
    assert summary.terms["score"].kept > summary.terms["score"].all
    assert summary.codebook is not None
    assert summary.codebook.entries == summary.codebook.used == NUM_CODES
    counts = np.bincount(np.arange(96) % NUM_CODES)
    share = counts / 96
    assert summary.codebook.perplexity == pytest.approx(np.prod(share**-share))
    text = describe_tokens(report)
    assert text.startswith("cube: 5 of 96 tokens kept (1/2: 2, 1/4: 1, 1/8: 1, 1/16: 1)\n")
    assert "crossed by it          80.0%    4.2%       19.20    80.0%" in text
    assert f"codebook: {NUM_CODES} of {NUM_CODES} entries used, perplexity 60" in text


def test_windows_are_counted_and_told():
    report = report_tokens(box_sums_model(plan_of((16, 16, 16)), bright), scan((16, 16, 30)), "long")
    assert (report.summary.num_passes, report.summary.num_kept) == (3, 15)
    assert describe_tokens(report).startswith("long: 15 of 288 tokens kept in 3 windows (")


@pytest.mark.parametrize("logits", [nothing, everything])
def test_without_a_boundary_nothing_is_near(logits):
    report = report_tokens(box_sums_model(plan_of((16, 16, 16)), logits), scan((16, 16, 16)), "plain")
    assert report.distance_mm is None
    assert report.summary.near == ()
    assert report.to_json()["near_boundary"] == [
        {"radius_mm": radius_mm, "share": None, "base_rate": None, "enrichment": None, "ceiling": None}
        for radius_mm in RADII_MM
    ]
    assert {entry["distance_mm"] for entry in report.to_json()["tokens"]} == {None}
    assert "the prediction is empty or fills the scan: there is no boundary to be near" in describe_tokens(report)


def test_a_reference_comes_before_the_prediction():
    affine = ROTATIONS["SLA"]
    volume = scan((16, 16, 16), affine)
    reference = ball((16, 16, 16), (4, 5, 6), 3.2)
    model = box_sums_model(plan_of((16, 16, 16)), bright)
    report = report_tokens(model, volume, "case", Mask(reference.astype(np.uint8), affine))
    assert report.summary.boundary_of == "reference"
    assert report.reference is not None
    np.testing.assert_array_equal(
        report.reference, turn_to_ras(reference, report.tokens.record.axes, report.tokens.record.flipped)
    )
    expected = boundary_distances_mm(report.tokens.boxes_vox, report.reference, (1.0, 1.0, 1.0), 5.0)
    np.testing.assert_array_equal(report.distance_mm, expected)
    assert "near reference" in describe_tokens(report)
    empty = report_tokens(model, volume, "case", Mask(np.zeros((16, 16, 16), np.uint8), affine))
    assert (empty.summary.boundary_of, empty.summary.near) == ("reference", ())


def test_a_codebook_free_model_says_so():
    config = PRESETS["tiny"].model_copy(update={"quantizer": "none"})
    report = report_tokens(untrained(config=config), scan((20, 20, 20)), "case")
    assert report.summary.codebook is None
    assert report.to_json()["codebook"] is None
    assert {entry["code"] for entry in report.to_json()["tokens"]} == {None}
    assert "codebook: none in this model" in describe_tokens(report)
    scalar = PRESETS["tiny"].model_copy(update={"quantizer": "fsq"})
    tokens = tokens_in(untrained(config=scalar), scan((20, 20, 20)))
    assert tokens.num_codes == 8**4


def test_near_equals_a_second_way_on_a_real_case(real_data):
    """As on the network's own padded grid: count voxels of the dilated surface in each cell by a summed-area table."""
    root = real_data / "Task04_Hippocampus"
    path = min((root / "imagesTr").glob("*.nii.gz"))
    model = untrained(make_plan(labels=2, window_vox=(40, 56, 40)))
    volume, mask = read_volume(path, ("c0",)), read_mask(root / "labelsTr" / path.name)
    report = report_tokens(model, volume, "case", mask)
    plan = model.facts.plan
    prepared = prepare_image(volume, plan, covering=mask)
    maps = prepare_labels(mask, prepared.record, plan).astype(np.float32)
    image, labels = (whole_image(pad_rows(rows_of(each), plan.window_vox).rows) for each in (prepared.image, maps))
    foreground = labels[0] > 0
    with torch.inference_mode(), autocast(model.device):
        tokens = model.network(torch.from_numpy(image)[None]).tokens
    kept = tokens.kept[0].numpy()
    np.testing.assert_array_equal(report.tokens.kept[0], kept)
    surface = foreground & ~binary_erosion(foreground, border_value=1)
    for near in report.summary.near:
        within = torch.from_numpy(distance_transform_edt(~surface) <= near.radius_mm)
        hit = cell_foreground(within[None], tokens.boxes_vox)[0][0].numpy() > 0
        assert near.share == pytest.approx(hit[kept].mean())
        assert near.base_rate == pytest.approx(hit.mean())
        assert near.ceiling == pytest.approx(min(1, hit.sum() / 100))
    assert report.summary.near[0].base_rate < report.summary.near[2].base_rate


# ---- files


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b"):
        write_nifti(tmp_path / "two" / f"{name}.nii.gz", phantom(0)[0][0])
    image, mask = phantom(3, num_channels=2)
    for number in range(2):
        write_nifti(tmp_path / "patient" / f"p1_000{number}.nii.gz", image[number])
    write_nifti(tmp_path / "p1.nii.gz", mask)
    return tmp_path


def test_a_case_is_a_file_or_a_folder_with_one(folder):
    report = tokens_of_case(untrained(), folder / "two" / "a.nii.gz")
    assert (report.case_id, report.model_name, report.summary.boundary_of) == ("a", "phantom", "prediction")
    report = tokens_of_case(untrained(make_plan(channels=2)), folder / "patient", folder / "p1.nii.gz")
    assert (report.case_id, report.summary.boundary_of) == ("p1", "reference")
    np.testing.assert_array_equal(report.image, nib.load(folder / "patient" / "p1_0000.nii.gz").get_fdata())


def test_a_difference_of_channels_is_what_is_shown(folder):
    plan = make_plan(channels=2).model_copy(update={"channels": ("c0", "c1 - c0")})
    report = tokens_of_case(untrained(plan), folder / "patient")
    first, second = (nib.load(folder / "patient" / f"p1_000{number}.nii.gz").get_fdata() for number in range(2))
    np.testing.assert_allclose(report.image, second - first, rtol=1e-5, atol=1e-3)


def test_wrong_requests_are_named(folder):
    with pytest.raises(ConfigError, match=r"two holds 2 cases \(a, b\); give one image file, or a folder with the"):
        tokens_of_case(untrained(), folder / "two")
    with pytest.raises(FileError, match="absent does not exist"):
        tokens_of_case(untrained(), folder / "absent")
    plain = toy_model(Toy(bright), make_plan())
    plain = type(plain)(
        plain.network,
        plain.facts.model_copy(update={"network": PRESETS["tiny"].model_copy(update={"tokens": False})}),
        plain.device,
    )
    with pytest.raises(ConfigError, match=r"'toy' was trained without tokens \(tokens = false\)"):
        tokens_of_case(plain, folder / "two" / "a.nii.gz")
    with pytest.raises(ConfigError, match="trained without tokens"):
        tokens_in(plain, scan((8, 8, 8)))


def test_a_reference_that_does_not_fit_is_refused(folder):
    case = folder / "two" / "a.nii.gz"
    shifted = write_nifti(folder / "shifted.nii.gz", phantom(0)[1], affine=np.diag([1, 1, 2.0, 1]))
    with pytest.raises(GeometryError, match="image of a and its reference are not on one grid"):
        tokens_of_case(untrained(), case, shifted)
    other = write_nifti(folder / "other.nii.gz", phantom(0)[1] * np.uint8(255))
    with pytest.raises(DataError, match=r"reference of a holds the values 255; the model knows 1 \(l0\)"):
        tokens_of_case(untrained(), case, other)


def test_json_is_strict_complete_and_repeatable(folder):
    report = tokens_of_case(untrained(), folder / "two" / "a.nii.gz")
    for name in ("one.json", "two.json"):
        write_json(folder / name, report)
    text = (folder / "one.json").read_text()
    assert text == (folder / "two.json").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    values = json.loads(text, parse_constant=refuse)
    assert values == report.to_json()
    assert values["case"] == "a"
    assert values["shape_vox"] == [24, 24, 24]
    assert values["codebook"]["used_fraction"] == values["codebook"]["used"] / 64
    assert len(values["tokens"]) == values["candidates"] == 400
    assert sum(entry["kept"] for entry in values["tokens"]) == values["kept"] == 100
    assert sum(values["kept_per_level"].values()) == 100
    near = [entry["distance_mm"] == 0 for entry in values["tokens"] if entry["kept"]]
    assert values["near_boundary"][0]["share"] == pytest.approx(sum(near) / 100)
    kept = [entry["score"] for entry in values["tokens"] if entry["kept"]]
    assert values["terms"]["score"]["kept"] == pytest.approx(np.mean(kept), abs=1e-5)
