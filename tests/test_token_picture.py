from __future__ import annotations

import importlib.util

import matplotlib as mpl
import numpy as np
import pytest
import torch

from fake_tokens import box_sums_model
from plans import make_plan
from tokenseg.errors import ConfigError, FileError
from tokenseg.imaging.volume import Mask, Volume
from tokenseg.tokens.find import report_tokens
from tokenseg.tokens.picture import _draw, check_can_draw, draw_tokens, write_picture
from tokenseg.tokens.report import TokenReport
from toy_models import as_stored, untrained

ORANGE, BLUE, GREEN, PINK = "1/2", "1/4", "1/8", "1/16"


def bright(images: torch.Tensor) -> torch.Tensor:
    """Foreground where the image is above 50."""
    return torch.cat([torch.zeros_like(images[:, :1]), images[:, :1] - 50], dim=1)


def cube_report(affine: np.ndarray | None = None, **changes: object) -> TokenReport:
    """A cube of 100 in the cell at (right, anterior, lower) of 2 x 2 x 2 cells of 8 voxels, in noise below 20."""
    array = np.random.default_rng(0).uniform(1, 20, (1, 16, 16, 16)).astype(np.float32)
    array[0, 10:14, 10:14, 2:6] = 100
    plan = as_stored(make_plan(window_vox=(16, 16, 16), grid=(2, 2, 2)), **changes)
    affine = np.eye(4) if affine is None else affine
    return report_tokens(box_sums_model(plan, bright), Volume(array, affine, ("c0",)), "cube")


def pixels(report: TokenReport) -> tuple[np.ndarray, list[np.ndarray]]:
    """The picture, origin at the top left, and its six panels: axial by level, axial by score, coronal..."""
    figure = _draw(report)
    figure.canvas.draw()
    picture = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)
    panels = []
    for axes in figure.axes[:6]:
        box = axes.get_window_extent()
        rows = slice(round(len(picture) - box.y1), round(len(picture) - box.y0))
        panels.append(picture[rows, round(box.x0) : round(box.x1)])
    return picture, panels


def at(panel: np.ndarray, across: float, down: float) -> np.ndarray:
    """Mean colour of a few pixels at a fraction of a panel from its left and upper edge."""
    row, column = int(down * len(panel)), int(across * panel.shape[1])
    return panel[row - 3 : row + 4, column - 3 : column + 4].reshape(-1, 3).mean(axis=0)


def hue(colour: np.ndarray) -> str:
    red, green, blue = colour
    if max(colour) - min(colour) < 12:
        return "grey"
    if red > green > blue:
        return ORANGE
    if red > blue > green:
        return PINK
    return BLUE if blue > green else GREEN


def test_the_patient_is_seen_as_in_radiology_and_each_level_has_its_quarter():
    """The bright cell is right, anterior, lower: at the left and up in the axial panel, left and down in the others."""
    report = cube_report()
    assert report.summary.kept_per_level == (2, 1, 1, 1)
    _, panels = pixels(report)
    for name, (column, row) in {"axial": (0, 0), "coronal": (0, 1), "sagittal": (0, 1)}.items():
        panel = panels[2 * ("axial", "coronal", "sagittal").index(name)]
        corner = 0.5 * column, 0.5 * row
        # In the outer corner of each tile, clear of the contour in the middle of the cell.
        places = [(x, y) for y in (0.04, 0.44) for x in (0.05, 0.44)]
        found = [hue(at(panel, corner[0] + x, corner[1] + y)) for x, y in places]
        assert found == [ORANGE, BLUE, GREEN, PINK], name
        # In the opposite cell there may be the fifth token, of level 1/2, at its upper left; else nothing.
        opposite = 0.5 - corner[0], 0.5 - corner[1]
        assert {hue(at(panel, opposite[0] + x, opposite[1] + y)) for x, y in places[1:]} == {"grey"}, name


def test_orientation_follows_the_header_and_not_the_file():
    """The same scan stored with its axes permuted and flipped gives the same picture."""
    report = cube_report()
    stored = np.ascontiguousarray(report.image.transpose(2, 0, 1)[::-1, :, ::-1])
    affine = np.array([[0, 1.0, 0, 0], [0, 0, -1, 15], [-1, 0, 0, 15], [0, 0, 0, 1]])
    plan = as_stored(make_plan(window_vox=(16, 16, 16), grid=(2, 2, 2)))
    again = report_tokens(box_sums_model(plan, bright), Volume(stored[None], affine, ("c0",)), "cube")
    np.testing.assert_array_equal(again.image, report.image)
    assert draw_tokens(again) == draw_tokens(report)


def test_spacing_sets_the_shape_of_the_panels():
    report = cube_report(np.diag([1.0, 1, 2, 1]), spacing_mm=(1, 1, 2))
    _, (axial, _, coronal, _, sagittal, _) = pixels(report)
    assert axial.shape[0] / axial.shape[1] == pytest.approx(1, abs=0.02)
    assert coronal.shape[0] / coronal.shape[1] == pytest.approx(2, abs=0.02)
    assert sagittal.shape[0] / sagittal.shape[1] == pytest.approx(2, abs=0.02)


def test_tiles_without_the_boundary_are_hollow():
    """The fifth token, of level 1/2 elsewhere, is drawn as an outline only."""
    report = cube_report()
    index = next(i for i in np.flatnonzero(report.tokens.kept[0]) if report.distance_mm[0, i] > 0)
    assert report.tokens.level[index] == 0
    low, high = report.tokens.cells_vox[0, index]
    assert low[2] <= 2.5 < high[2], "the axial slice must cut the hollow tile"
    _, panels = pixels(report)
    left, top = 1 - high[0] / 16, 1 - high[1] / 16
    assert hue(at(panels[0], left + 0.125, top + 0.125)) == "grey"
    assert hue(at(panels[0], 0.05, 0.04)) == ORANGE


def test_contours_show_reference_and_prediction():
    volume = Volume(cube_report().image[None].copy(), np.eye(4), ("c0",))
    plan = as_stored(make_plan(window_vox=(16, 16, 16), grid=(2, 2, 2)))
    reference = np.zeros((16, 16, 16), np.uint8)
    reference[2:6, 2:6, 2:6] = 1
    model = box_sums_model(plan, bright)
    with_reference = report_tokens(model, volume, "cube", Mask(reference, np.eye(4)))
    _, panels = pixels(with_reference)
    white, yellow = (panels[1] == 255).all(axis=2), (panels[1] == (255, 242, 61)).all(axis=2)
    height, width = white.shape
    # The reference is left of the patient and posterior: at the right and down; the prediction opposite.
    assert white[height // 2 :, width // 2 :].sum() > 50
    assert yellow[: height // 2, : width // 2].sum() > 50
    assert yellow[height // 2 :].sum() == yellow[:, width // 2 :].sum() == 0


def test_the_same_report_gives_the_same_bytes_without_a_date(tmp_path):
    report = cube_report()
    before = dict(mpl.rcParams)
    for name in ("one.png", "two.PNG"):
        write_picture(tmp_path / name, report)
    content = (tmp_path / "one.png").read_bytes()
    assert content == (tmp_path / "two.PNG").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.endswith(b"IEND\xaeB`\x82")
    for chunk in (b"tIME", b"Creation Time", b"Matplotlib"):
        assert chunk not in content
    assert dict(mpl.rcParams) == before


def texts(report: TokenReport) -> str:
    figure = _draw(report)
    return "\n".join(text.get_text() for text in [*figure.texts, *(axes.title for axes in figure.axes)])


def test_the_words_say_case_numbers_slices_and_limits():
    found = texts(cube_report())
    assert "cube: 5 of 32 tokens kept" in found
    assert "passes through the boxes of 80% of the kept tokens (of all: 12%), and within 2 mm of" in found
    assert "axial, slice 3 of 16" in found
    assert "coronal, slice 11 of 16" in found
    assert "Research software: not a medical device" in found
    assert "model: boxes" in found


def test_nothing_segmented_is_drawn_and_said():
    volume = Volume(np.random.default_rng(0).uniform(1, 20, (1, 16, 16, 20)).astype(np.float32), np.eye(4), ("c0",))
    plan = as_stored(make_plan(window_vox=(16, 16, 16), grid=(2, 2, 2)))
    report = report_tokens(box_sums_model(plan, bright), volume, "empty")
    found = texts(report)
    assert "empty: 10 of 64 tokens kept in 2 windows" in found
    assert "The prediction is empty or fills the scan: there is no boundary to be near." in found
    assert "axial, slice 11 of 20" in found
    assert len(draw_tokens(report)) > 10_000


@pytest.mark.parametrize("shape", [(4, 5, 90), (70, 50, 3)])
def test_extreme_shapes_are_drawn(shape):
    volume = Volume(np.random.default_rng(0).uniform(1, 20, (1, *shape)).astype(np.float32), np.eye(4), ("c0",))
    picture, _ = pixels(report_tokens(untrained(), volume, "odd"))
    assert picture.shape[1] == round(13.7 * 110)
    assert 600 < picture.shape[0] < 1600


def test_what_is_missing_is_said_before_any_work(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"picture .*a\.jpg must end in \.png; name it so"):
        check_can_draw(tmp_path / "a.jpg")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileError, match="cannot write"):
        write_picture(tmp_path / "file" / "a.png", cube_report())
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    with pytest.raises(ConfigError, match=r"a picture needs the extra 'plot': pip install 'tokenseg\[plot\]'"):
        write_picture(tmp_path / "a.png", cube_report())
    assert not (tmp_path / "a.png").exists()
