"""What the viewer is given: packing that comes back exactly, averaging, the first slice, and reading of cases."""

from __future__ import annotations

import base64
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phantoms import write_msd, write_nifti
from plans import make_plan
from tokenseg.config import Label
from tokenseg.datasets.cases import Case
from tokenseg.datasets.layouts import open_dataset
from tokenseg.evaluation.evaluate import evaluate_folders
from tokenseg.evaluation.results import Evaluation
from tokenseg.imaging.orientation import to_canonical
from tokenseg.inference.quality import CaseQuality
from tokenseg.plan_grid.preprocess import GridRecord
from tokenseg.report.cases import evaluation_views, segmentation_views, select_cases
from tokenseg.report.viewer import CaseView, pack_case, viewer_section
from tokenseg.segmentation.results import CaseResult
from tokenseg.tokens.case import CaseTokens, TokenBoxes, token_boxes
from toy_models import case_named

ONE = Label(name="tumour", values=(1,), output_value=1)
SHAPE = (12, 10, 8)


def unpacked(text: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.uint8)


def view_of(image: np.ndarray | None, reference: np.ndarray | None = None, **changes) -> CaseView:
    values = {
        "case_id": "a",
        "caption": "worst",
        "channels": {} if image is None else {"MRI": image},
        "spacing_mm": (1.0, 1.0, 1.0),
        "labels": (ONE,) if reference is None else tuple(ONE for _ in reference),
        "reference": reference,
        "prediction": None,
    }
    return CaseView(**(values | changes))


def cube(*start: int, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(first, first + 3) for first in start)] = True
    return mask


def test_image_is_windowed_to_eight_bits_in_order():
    image = np.arange(1000.0).reshape(10, 10, 10)
    channel = pack_case(view_of(image))["channels"][0]
    assert (channel["low"], channel["high"]) == (pytest.approx(4.995), pytest.approx(994.005))
    grey = unpacked(channel["data"]).reshape(10, 10, 10)
    assert (grey[0, 0, 0], grey[9, 9, 9]) == (0, 255)
    assert np.abs(grey - 255 * image / 999).max() < 3
    assert (np.diff(grey.ravel().astype(int)) >= 0).all()


def test_constant_image_is_black():
    assert not unpacked(pack_case(view_of(np.full((3, 3, 3), 7.0)))["channels"][0]["data"]).any()


def test_long_axes_are_averaged_and_it_is_said():
    image = np.random.default_rng(0).random((3, 170, 321)).astype(np.float32)
    packed = pack_case(view_of(image))
    assert packed["factors"] == [1, 2, 3]
    channel = packed["channels"][0]
    grey = unpacked(channel["data"]).reshape(3, 85, 107)
    blocks = image.reshape(3, 85, 2, 107, 3).mean(axis=(2, 4))
    expected = np.clip((blocks - channel["low"]) / (channel["high"] - channel["low"]), 0, 1) * 255
    assert np.abs(grey - expected).max() <= 0.5 + 1e-3
    assert packed["note"] == (
        "The image is averaged over blocks of 1 x 2 x 3 voxels to keep this file small; contours are exact."
    )


def test_last_block_is_the_mean_of_what_is_there():
    image = np.zeros((161, 1, 1), dtype=np.float32)
    image[-1] = 1
    grey = unpacked(pack_case(view_of(image))["channels"][0]["data"])
    assert len(grey) == 81
    assert grey[-1] == 255


@settings(max_examples=25)
@given(st.integers(1, 10), st.integers(0, 2**32 - 1))
def test_masks_come_back_exactly(labels, seed):
    rng = np.random.default_rng(seed)
    first, last = rng.random((labels, 5, 6, 7)) < 0.05, rng.random((labels, 5, 6, 7)) < 0.05
    masks = pack_case(view_of(None, first, prediction=last))["masks"]
    box = tuple(slice(begin, begin + size) for begin, size in zip(masks["first"], masks["shape"], strict=True))
    for name, mask in (("reference", first), ("prediction", last)):
        stored = unpacked(masks[name]).reshape(-1, *masks["shape"])
        back = np.zeros_like(mask)
        for label in range(labels):
            back[label][box] = stored[label // 8] >> (label % 8) & 1
        np.testing.assert_array_equal(back, mask)


def test_only_the_box_of_the_masks_is_stored():
    masks = pack_case(view_of(None, cube(1, 2, 3)[None]))["masks"]
    assert (masks["first"], masks["shape"]) == ([1, 2, 3], [3, 3, 3])
    assert masks["prediction"] is None


def test_starts_where_the_reference_is_largest_else_the_prediction_else_in_the_middle():
    wide = cube(1, 2, 3)
    wide[2, 1:9, 1:7] = True
    assert pack_case(view_of(None, wide[None]))["start"][0] == 2
    empty = np.zeros((1, *SHAPE), dtype=bool)
    assert pack_case(view_of(None, empty, prediction=wide[None]))["start"][0] == 2
    assert pack_case(view_of(None, empty))["start"] == [6, 5, 4]


def test_only_kept_tokens_are_stored():
    boxes = np.arange(12.0).reshape(2, 2, 3)
    tokens = TokenBoxes("model", boxes, np.array([0, 3]), np.array([0.1, 0.9]), np.array([False, True]))
    packed = pack_case(view_of(None, cube(1, 1, 1)[None], tokens=(tokens,)))["tokens"][0]
    assert packed == {"model": "model", "total": 2, "boxes": [[6, 7, 8, 9, 10, 11]], "level": [3], "score": [0.9]}


def test_section_holds_a_block_a_case_and_says_when_there_is_none():
    views = [view_of(None, cube(1, 1, 1)[None], case_id=name) for name in ("a", "</script>")]
    blocks = re.findall(r'<script type="application/json" class="case">(.*?)</script>', viewer_section(views).body)
    assert [json.loads(block)["id"] for block in blocks] == ["a", "</script>"]
    assert "There is no case to show." in viewer_section([]).body


@pytest.fixture
def dataset(tmp_path) -> Path:
    return write_msd(tmp_path / "data", 7, shape=(16, 14, 12), spacing_mm=(1.0, 2.0, 3.0))


def evaluate(dataset: Path, tmp_path: Path, shifts: dict[int, int]) -> Evaluation:
    """Predictions are the references, shifted along the first axis."""
    import nibabel

    for number, shift in shifts.items():
        image = nibabel.load(dataset / "labelsTr" / f"case_{number:03d}.nii.gz")
        mask = np.roll(np.asarray(image.dataobj), shift, axis=0) if shift < 9 else np.zeros(image.shape, np.uint8)
        write_nifti(tmp_path / "predictions" / f"case_{number:03d}.nii.gz", mask.astype(np.uint8), affine=image.affine)
    (tmp_path / "predictions" / "summary.csv").write_text("case\n" + "".join(f"case_{n:03d}\n" for n in shifts))
    return evaluate_folders(tmp_path / "predictions", dataset)


def test_selects_median_best_and_worst(dataset, tmp_path):
    evaluation = evaluate(dataset, tmp_path, {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 9})
    chosen = {selected.caption.split(":")[0]: selected.case_id for selected in select_cases(evaluation)}
    assert chosen["best"] == "case_000"
    assert chosen["worst"] == "case_006"  # missed
    assert list(chosen) == ["median", "best", "3rd worst", "2nd worst", "worst"]
    assert len(set(chosen.values())) == 5
    assert select_cases(evaluation)[-1].caption == "worst: Dice 0.00"


@pytest.mark.parametrize(
    ("shifts", "captions"),
    [
        ({3: 1}, ["only case"]),
        ({3: 1, 4: 0}, ["best", "worst"]),
        ({3: 1, 4: 0, 5: 3}, ["median", "best", "worst"]),
        ({3: 1, 4: 0, 5: 3, 6: 4}, ["median", "best", "worst"]),
    ],
)
def test_selects_of_few_cases(dataset, tmp_path, shifts, captions):
    chosen = select_cases(evaluate(dataset, tmp_path, shifts))
    assert [selected.caption.split(":")[0] for selected in chosen] == captions


def test_ties_go_by_case_id(dataset, tmp_path):
    chosen = select_cases(evaluate(dataset, tmp_path, {4: 0, 2: 0, 3: 0}))
    assert [selected.case_id for selected in chosen] == ["case_003", "case_004", "case_002"]


def test_views_bring_images_masks_and_facts(dataset, tmp_path):
    evaluation = evaluate(dataset, tmp_path, {0: 0, 1: 9})
    best, worst = evaluation_views(evaluation, open_dataset(dataset))
    assert (best.case_id, worst.case_id) == ("case_000", "case_001")
    assert best.spacing_mm == pytest.approx((1, 2, 3))
    assert list(best.channels) == ["MRI"]
    np.testing.assert_array_equal(best.reference, best.prediction)
    inside = best.channels["MRI"][best.reference[0]].mean()
    assert inside > best.channels["MRI"][~best.reference[0]].mean() + 30
    assert best.facts["sphere"].startswith("Dice 1.000, HD95 0.0 mm, ")
    assert worst.facts["sphere"].startswith("missed, 0.00 ml (reference ")
    assert not worst.prediction.any()


def test_views_without_a_dataset_have_contours_only(dataset, tmp_path):
    (view,) = evaluation_views(evaluate(dataset, tmp_path, {0: 0}), None)
    assert view.channels == {}
    assert pack_case(view)["note"] == "No image was given: contours stand alone."


def test_unreadable_image_is_left_out_with_a_note(dataset, tmp_path):
    evaluation, opened = evaluate(dataset, tmp_path, {0: 0}), open_dataset(dataset)
    (dataset / "imagesTr" / "case_000.nii.gz").write_bytes(b"broken")
    (view,) = evaluation_views(evaluation, opened)
    assert view.channels == {}
    assert view.notes[0].startswith("The image cannot be shown: ")


def test_image_on_another_grid_is_left_out_with_a_note(dataset, tmp_path):
    evaluation = evaluate(dataset, tmp_path, {0: 0})
    write_nifti(dataset / "imagesTr" / "case_000.nii.gz", np.zeros((16, 14, 12), np.float32), (1.0, 2.0, 4.0))
    (view,) = evaluation_views(evaluation, open_dataset(dataset))
    assert view.channels == {}
    assert view.notes[0].startswith("The image cannot be shown: image of case_000 and its mask are not on one grid")


def test_stored_axes_are_turned_to_ras():
    """Stored as inferior, right, posterior; the marked voxel lies 2 from left, 3 from back, 1 from top."""
    affine = np.zeros((4, 4))
    affine[2, 0], affine[0, 1], affine[1, 2], affine[3, 3] = -3.0, 1.0, -2.0, 1
    stored = np.zeros((4, 6, 5))
    stored[1, 2, 1] = 1
    turned, spacing_mm = to_canonical(stored, affine)
    assert turned.shape == (6, 5, 4)
    assert spacing_mm == (1, 2, 3)
    assert np.argwhere(turned).tolist() == [[2, 3, 2]]


def test_oblique_scan_is_noted(tmp_path):
    turn = np.radians(20)
    affine = np.eye(4)
    affine[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    for folder in ("references", "predictions"):
        write_nifti(tmp_path / folder / "a.nii.gz", cube(2, 2, 2).astype(np.uint8), affine=affine)
    evaluation = evaluate_folders(tmp_path / "predictions", tmp_path / "references")
    (view,) = evaluation_views(evaluation, None)
    assert view.notes == ("The scan is oblique by 20 degrees; letters name the nearest directions.",)


def unsure(entropy: float) -> CaseQuality:
    nothing = {"near_boundary": None, "expected_dice": None, "cell_entropy": (), "labels": {}, "temperature": 1}
    return CaseQuality(case="hidden", entropy=entropy, flags=(), calibrated=False, **nothing)


def test_segmented_cases_come_least_sure_first(tmp_path):
    results = []
    for number in range(14):
        path = write_nifti(tmp_path / f"c{number:02d}.nii.gz", np.random.default_rng(number).random(SHAPE, np.float32))
        mask = write_nifti(tmp_path / "masks" / path.name, cube(1, 1, 1).astype(np.uint8))
        results.append(
            CaseResult(case_named(f"c{number:02d}", path), mask, {"l0": float(number)}, quality=unsure(number / 20))
        )
    results[13] = CaseResult(case_named("c13"), None, {}, "broken")
    views = [*segmentation_views(results, make_plan())]
    assert [view.case_id for view in views] == [f"c{number:02d}" for number in range(12, 0, -1)]
    assert views[0].caption == "l0 12.00 ml"
    assert views[0].reference is None
    assert views[0].prediction.sum() == 27


def test_differences_of_channels_come_first(tmp_path):
    images = tuple(
        write_nifti(tmp_path / f"p_{phase:04d}.nii.gz", np.full(SHAPE, 1.0 + 2 * phase, dtype=np.float32))
        for phase in range(2)
    )
    plan = make_plan(channels=2)
    plan = plan.model_copy(update={"channels": ("c0", "c1 - c0")})
    mask = write_nifti(tmp_path / "mask.nii.gz", cube(1, 1, 1).astype(np.uint8))
    case = Case("p", "p", images, channels=("c0", "c1"))
    (view,) = segmentation_views([CaseResult(case, mask, {"l0": 1.0})], plan)
    assert [(name, image.mean()) for name, image in view.channels.items()] == [("c1 - c0", 2), ("c0", 1)]


def test_token_boxes_join_passes_and_leave_padding_out():
    cells = np.zeros((2, 3, 2, 3))
    cells[:, :, 1] = [[[1, 1, 1], [2, 2, 2], [3, 3, 3]], [[4, 4, 4], [5, 5, 5], [6, 6, 0]]]
    boxes = cells.copy()
    boxes[0, 1, 1] = 0  # wholly in padding
    scores = np.arange(6.0).reshape(2, 3)
    record = GridRecord(SHAPE, (0, 1, 2), (False,) * 3, (1.0,) * 3, (0, 0, 0), SHAPE, SHAPE)
    tokens = token_boxes(
        "model",
        CaseTokens(
            boxes_vox=boxes,
            cells_vox=cells,
            level=np.array([0, 1, 2]),
            kept=np.array([[True, True, False], [False, True, True]]),
            boundary=scores,
            semantic=scores,
            diversity=scores,
            score=scores,
            code=np.zeros((2, 3), dtype=int),
            num_codes=0,
            prediction=cube(1, 1, 1),
            record=record,
        ),
    )
    assert tokens.boxes_vox[:, 1, 0].tolist() == [1, 3, 4, 5]
    assert tokens.level.tolist() == [0, 2, 0, 1]
    assert tokens.kept.tolist() == [True, False, False, True]
    assert tokens.score.tolist() == [0, 2, 3, 4]
