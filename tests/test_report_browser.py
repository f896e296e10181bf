"""Pages in headless Chromium: what is drawn where, what the controls do, and that no page needs more than its file."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from browser import launched_chromium, opened
from test_report_page import EVIL
from tokenseg.config import Label
from tokenseg.datasets.layouts import open_dataset
from tokenseg.evaluation.evaluate import evaluate_folders
from tokenseg.imaging.orientation import to_canonical
from tokenseg.report.curves import curves_section
from tokenseg.report.markup import Html
from tokenseg.report.page import NOTICE, write_page
from tokenseg.report.reports import train_report
from tokenseg.report.scores import evaluation_lead, evaluation_section
from tokenseg.report.viewer import CaseView, viewer_section
from tokenseg.tokens.case import TokenBoxes

SHAPE = (20, 24, 10)
SPACING_MM = (1.0, 1.0, 2.5)
START, STOP = (4, 8, 3), (10, 18, 7)
BLUE, ORANGE = (86, 180, 233), (230, 159, 0)
# Axis across the screen, up the screen, into it.
PLANES = {"axial": (0, 1, 2), "coronal": (0, 2, 1), "sagittal": (1, 2, 0)}
LABELS = (Label(name="tumour", values=(1,), output_value=1), Label(name=EVIL, values=(2,), output_value=2))


def box(start: tuple[int, ...] = START, stop: tuple[int, ...] = STOP) -> np.ndarray:
    mask = np.zeros(SHAPE, dtype=bool)
    mask[tuple(slice(*edges) for edges in zip(start, stop, strict=True))] = True
    return mask


def view(case_id: str = "one", **changes: object) -> CaseView:
    """A ramp that is brightest anterior; the reference is a box, the prediction one with a voxel more at the right."""
    ramp = np.broadcast_to(np.arange(SHAPE[1], dtype=np.float32)[None, :, None], SHAPE).copy()
    values: dict[str, Any] = {
        "case_id": case_id,
        "caption": "worst",
        "channels": {"MRI": ramp, "other": -ramp},
        "spacing_mm": SPACING_MM,
        "labels": LABELS[:1],
        "reference": box()[None],
        "prediction": box(START, (STOP[0] + 1, *STOP[1:]))[None],
        "facts": {"tumour": "Dice 0.92"},
    }
    return CaseView(**(values | changes))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched_chromium() as launched:
        yield launched


@pytest.fixture
def page(browser, tmp_path):
    """A page with a viewer, opened; makes any number of them."""
    path = tmp_path / "report.html"

    def show(*views: CaseView, **how: Any) -> Any:
        write_page(path, "Title", Html("<p>Result</p>"), [viewer_section(views)], "2026-01-02")
        return opened(browser, path, **how)

    return show


def pixels(page: Any, plane: str) -> np.ndarray:
    """What the canvas of a plane holds: (rows, columns, 3)."""
    (columns, rows), text = page.evaluate(
        """plane => {
            const canvas = document.querySelector(`[data-plane=${plane}] canvas`);
            const { width, height } = canvas;
            const bytes = canvas.getContext("2d").getImageData(0, 0, width, height).data;
            let text = "";
            for (let start = 0; start < bytes.length; start += 4096) {
                text += String.fromCharCode(...bytes.subarray(start, start + 4096));
            }
            return [[width, height], btoa(text)];
        }""",
        plane,
    )
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(rows, columns, 4)[..., :3].astype(int)


def edges(image: np.ndarray, plane: str) -> tuple[Any, Any]:
    """Functions from a voxel edge to its column and to its row, reckoned anew from the size of the canvas."""
    u, v, _ = PLANES[plane]
    rows, columns, _ = image.shape
    wide_mm, high_mm = SHAPE[u] * SPACING_MM[u], SHAPE[v] * SPACING_MM[v]
    scale = min(columns / wide_mm, rows / high_mm)
    return (
        lambda edge: columns / 2 + (wide_mm / 2 - edge * SPACING_MM[u]) * scale,
        lambda edge: rows / 2 + (high_mm / 2 - edge * SPACING_MM[v]) * scale,
    )


def of_colour(image: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return np.abs(image - np.array(colour)).max(axis=2) < 12


def slice_of(page: Any, plane: str) -> int:
    return int(page.get_attribute(f"[data-plane={plane}] canvas", "data-slice"))


@pytest.mark.parametrize("plane", PLANES)
def test_contour_lies_on_the_voxel_edges_of_the_mask(page, plane):
    u, v, w = PLANES[plane]
    with page(view(prediction=None)) as shown:
        shown.uncheck("input.crosshair")
        image = pixels(shown, plane)
        assert slice_of(shown, plane) == START[w]
    rows, columns = np.nonzero(of_colour(image, BLUE))
    x, y = edges(image, plane)
    # The line is four pixels wide. Right and anterior are on the left of the screen, anterior or superior above.
    assert columns.min() == pytest.approx(x(STOP[u]) - 2, abs=1.5)
    assert columns.max() == pytest.approx(x(START[u]) + 2, abs=1.5)
    assert rows.min() == pytest.approx(y(STOP[v]) - 2, abs=1.5)
    assert rows.max() == pytest.approx(y(START[v]) + 2, abs=1.5)
    middle = int(y((START[v] + STOP[v]) / 2))
    inner = slice(int(x(STOP[u])) + 4, int(x(START[u])) - 4)
    assert not of_colour(image, BLUE)[middle, inner].any()


def test_image_has_anterior_up_in_axial_and_left_in_sagittal(page):
    with page(view(reference=None, prediction=None)) as shown:
        shown.uncheck("input.crosshair")
        axial, sagittal = pixels(shown, "axial"), pixels(shown, "sagittal")
    x, y = edges(axial, "axial")
    column = axial[:, axial.shape[1] // 2, 0]
    assert column[int(y(22))] > column[int(y(12))] + 50 > column[int(y(2))] + 100
    assert not axial[:, : int(x(SHAPE[0])) - 2].any()  # beside the scan it is black
    x, _ = edges(sagittal, "sagittal")
    row = sagittal[sagittal.shape[0] // 2, :, 0]
    assert row[int(x(22))] > row[int(x(12))] + 50 > row[int(x(2))] + 100


def test_stored_axes_do_not_matter(page):
    """A scan stored left-posterior-superior and one stored right-anterior-superior look the same."""
    with page(view()) as shown:
        expected = pixels(shown, "coronal")
    affine = np.diag([-1.0, -1.0, 2.5, 1.0])
    turned = {name: to_canonical(image[::-1, ::-1], affine)[0] for name, image in view().channels.items()}
    masks = [to_canonical(mask[0, ::-1, ::-1], affine)[0][None] for mask in (view().reference, view().prediction)]
    with page(view(channels=turned, reference=masks[0], prediction=masks[1])) as shown:
        np.testing.assert_array_equal(pixels(shown, "coronal"), expected)


def test_wheel_keys_and_slider_change_the_slice(page):
    with page(view()) as shown:
        canvas = shown.locator("[data-plane=axial] canvas")
        first = slice_of(shown, "axial")
        canvas.hover()
        shown.mouse.wheel(0, -100)
        shown.wait_for_function(f"document.querySelector('canvas').dataset.slice == {first + 1}")
        assert shown.evaluate("window.scrollY") == 0
        shown.mouse.wheel(0, 100)
        shown.wait_for_function(f"document.querySelector('canvas').dataset.slice == {first}")
        canvas.focus()
        for key, expected in (
            ("ArrowUp", 4),
            ("ArrowDown", 3),
            ("End", 9),
            ("ArrowUp", 9),
            ("PageDown", 4),
            ("Home", 0),
        ):
            shown.keyboard.press(key)
            assert slice_of(shown, "axial") == expected
        shown.locator("[data-plane=axial] .slice").fill("7")
        assert slice_of(shown, "axial") == 7
        assert shown.inner_text("[data-plane=axial] output") == "8 / 10"
        assert slice_of(shown, "coronal") == START[1]


def test_slices_beyond_the_mask_have_no_contour(page):
    with page(view()) as shown:
        assert of_colour(pixels(shown, "axial"), BLUE).any()
        for outside in ("0", "9"):
            shown.locator("[data-plane=axial] .slice").fill(outside)
            assert not of_colour(pixels(shown, "axial"), BLUE).any()


def test_click_moves_the_other_planes(page):
    with page(view()) as shown:
        image = pixels(shown, "axial")
        x, y = edges(image, "axial")
        zoom = shown.evaluate("Number(document.querySelector('input.zoom').value)")
        assert zoom == 1  # the box is not small
        shown.click("[data-plane=axial] canvas", position={"x": x(5.5), "y": y(16.5)})
        assert (slice_of(shown, "sagittal"), slice_of(shown, "coronal"), slice_of(shown, "axial")) == (5, 16, START[2])
        assert shown.inner_text(".readout") == "voxel 5, 16, 3 · MRI 16 · reference: tumour · prediction: tumour"
        shown.click("[data-plane=axial] canvas", position={"x": x(10.5), "y": y(16.5)})
        assert shown.inner_text(".readout").endswith("reference: background · prediction: tumour")


def test_small_finding_is_enlarged_and_reset_goes_back(page):
    small = box((9, 11, 4), (11, 13, 6))[None]
    with page(view(reference=small, prediction=small)) as shown:
        first = shown.evaluate("Number(document.querySelector('input.zoom').value)")
        assert first == pytest.approx(0.35 * min(20 / 2, 24 / 2, 10 / 2))
        columns = np.nonzero(of_colour(pixels(shown, "axial"), BLUE))[1]
        assert np.mean(columns) == pytest.approx(pixels(shown, "axial").shape[1] / 2, abs=3)
        shown.locator("input.zoom").fill("6")
        assert np.ptp(np.nonzero(of_colour(pixels(shown, "axial"), BLUE))[1]) > 2 * np.ptp(columns)
        # The picture follows the crosshair where it would leave it.
        shown.locator("[data-plane=sagittal] .slice").fill("0")
        assert not of_colour(pixels(shown, "axial"), BLUE).any()
        shown.click(".reset")
        assert np.ptp(np.nonzero(of_colour(pixels(shown, "axial"), BLUE))[1]) == np.ptp(columns)


def test_switches(page):
    with page(view()) as shown:
        before = pixels(shown, "axial")
        assert of_colour(before, BLUE).any()
        assert of_colour(before, ORANGE).any()
        shown.uncheck("input.reference")
        assert not of_colour(pixels(shown, "axial"), BLUE).any()
        shown.uncheck("input.prediction")
        plain = pixels(shown, "axial")
        assert not of_colour(plain, ORANGE).any()
        shown.uncheck("input.crosshair")
        assert (pixels(shown, "axial") != plain).any()
        shown.check("input.prediction")
        shown.check("input.reference")
        without = pixels(shown, "axial")
        shown.check("input.fill")
        x, y = edges(without, "axial")
        changed = (pixels(shown, "axial") != without).any(axis=2)
        row = int(y(13))
        assert changed[row, int(x(10.5))]  # only in the prediction
        assert not changed[row, int(x(7))]  # in both
        assert not changed[row, int(x(15))]  # in neither


def test_level_and_window_darken_and_widen(page):
    with page(view(reference=None, prediction=None)) as shown:
        before = pixels(shown, "axial").mean()
        canvas = shown.locator("[data-plane=axial] canvas").bounding_box()
        shown.mouse.move(canvas["x"] + 100, canvas["y"] + 150)
        shown.mouse.down(button="right")
        shown.mouse.move(canvas["x"] + 100, canvas["y"] + 90)
        shown.mouse.up(button="right")
        assert shown.input_value("input.level") == str(128 + 60)
        assert pixels(shown, "axial").mean() < before - 20
        shown.click(".reset")
        assert pixels(shown, "axial").mean() == before
        shown.locator("input.window").fill("20")
        grey = pixels(shown, "axial")[..., 0]
        assert np.isin(grey, (0, 255)).mean() > 0.8


def test_channels_and_labels_of_a_case(page):
    both = np.stack([box(), box((12, 8, 3), (16, 18, 7))])
    with page(view(labels=LABELS, reference=both, prediction=None)) as shown:
        before = pixels(shown, "axial")
        shown.select_option("select.channel", label="other")
        assert pixels(shown, "axial")[..., 0].argmax() != before[..., 0].argmax()
        assert EVIL in shown.inner_text(".labels")
        columns = np.nonzero(of_colour(before, BLUE))[1]
        shown.uncheck(".labels label:nth-child(2) input")
        assert np.nonzero(of_colour(pixels(shown, "axial"), BLUE))[1].min() > columns.min() + 20


def test_tokens_are_drawn_in_quarters_by_level(page):
    cells = np.array([[[0, 0, 0], [10, 12, 5]], [[0, 0, 0], [10, 12, 5]], [[10, 12, 5], [20, 24, 10]]], dtype=float)
    tokens = TokenBoxes("model", cells, np.array([0, 1, 3]), np.array([0.2, 0.4, 0.9]), np.array([True, True, True]))
    with page(view(reference=None, prediction=None, tokens=(tokens,))) as shown:
        shown.uncheck("input.crosshair")
        shown.locator("[data-plane=axial] .slice").fill("2")
        before = pixels(shown, "axial")
        shown.select_option("select.tokens", "level")
        image = pixels(shown, "axial")
        x, y = edges(image, "axial")
        changed = (image != before).any(axis=2)
        quarters = {level: (int(x(7.5 - 5 * (level % 2))), int(y(9 - 6 * (level // 2)))) for level in range(4)}
        assert [changed[row, column] for column, row in quarters.values()] == [True, True, False, False]
        assert not changed[int(y(18)), int(x(15))]  # a cell of other slices
        assert image[quarters[0][1], quarters[0][0]].argmin() == 2  # yellow
        assert "3 of 3 kept" in shown.inner_text(".key")
        shown.select_option("select.tokens", "score")
        assert "0.20" in shown.inner_text(".key")
        assert (pixels(shown, "axial") != image).any()


def test_tokens_of_each_model_can_be_chosen(page):
    box = np.array([[[0.0, 0, 0], [10, 12, 5]]])

    def of(name: str, score: float) -> TokenBoxes:
        return TokenBoxes(name, box, np.array([0]), np.array([score]), np.array([True]))

    with page(view(tokens=(of("fold 0", 0.25), of("fold 1", 0.75)))) as shown:
        shown.select_option("select.tokens", "score")
        assert "0.25" in shown.inner_text(".key")
        shown.select_option("select.token-model", label="fold 1")
        assert "0.75" in shown.inner_text(".key")
    with page(view(tokens=(of("alone", 0.5),))) as shown:
        assert shown.locator("select.token-model").count() == 0


def test_picker_changes_the_case(page):
    other = view("two", facts={"tumour": EVIL}, prediction=None)
    with page(view(), other, view(EVIL)) as shown:
        assert shown.get_attribute(".viewer", "data-shown") == "one"
        shown.click(".picker button:nth-child(2)")
        shown.wait_for_selector(".viewer[data-shown=two]")
        assert shown.inner_text(".facts dd") == EVIL
        assert [button.get_attribute("aria-pressed") for button in shown.query_selector_all(".picker button")] == [
            "false",
            "true",
            "false",
        ]
        assert not of_colour(pixels(shown, "axial"), ORANGE).any()
        assert shown.query_selector("img") is None


def test_case_without_image_or_finding_is_shown_all_the_same(page):
    nothing = np.zeros((1, *SHAPE), dtype=bool)
    with page(view(channels={}, reference=nothing, prediction=nothing)) as shown:
        assert shown.inner_text(".note") == "No image was given: contours stand alone."
        assert shown.inner_text(".readout") == "voxel 10, 12, 5 · reference: background · prediction: background"
    with page(view(prediction=None)) as shown:
        assert shown.query_selector("input.prediction") is None


def test_label_colours_tell_labels_apart_where_there_is_no_reference(page):
    both = np.stack([box(), box((12, 8, 3), (16, 18, 7))])
    with page(view(labels=LABELS, reference=None, prediction=both)) as shown:
        image = pixels(shown, "axial")
    assert of_colour(image, ORANGE).any()
    assert of_colour(image, BLUE).any()


def test_averaged_image_lies_under_its_contour(page):
    """163 voxels are averaged in pairs; the last pair reaches over the border."""
    shape = (163, 24, 10)
    mask = np.zeros(shape, dtype=bool)
    mask[100:140, 4:20, 2:8] = True
    bright = {"MRI": mask.astype(np.float32)}
    with page(view(channels=bright, spacing_mm=(0.2, 1.0, 1.0), reference=mask[None], prediction=None)) as shown:
        shown.uncheck("input.crosshair")
        contour = np.nonzero(of_colour(pixels(shown, "axial"), BLUE))[1]
        shown.uncheck("input.reference")
        inside = np.nonzero(pixels(shown, "axial")[..., 0] > 127)[1]
    assert inside.min() == pytest.approx(contour.min(), abs=5)
    assert inside.max() == pytest.approx(contour.max(), abs=5)


def test_ninth_label_is_drawn_where_it_is(page):
    labels = tuple(Label(name=f"part {value}", values=(value,), output_value=value) for value in range(1, 10))
    masks = np.zeros((9, *SHAPE), dtype=bool)
    masks[0], masks[8] = box((1, 1, 3), (4, 4, 7)), box()
    with page(view(labels=labels, reference=masks, prediction=None)) as shown:
        shown.uncheck(".labels label:nth-child(1) input")
        shown.locator("input.zoom").fill("1")
        image = pixels(shown, "axial")
        shown.click(".reset")
    x, _ = edges(image, "axial")
    columns = np.nonzero(of_colour(image, BLUE))[1]
    assert (columns.min(), columns.max()) == pytest.approx((x(STOP[0]) - 2, x(START[0]) + 2), abs=1.5)


@pytest.fixture
def evaluated(tmp_path) -> Path:
    """A page with scores and curves: case a is right, b is wrong, c is missed."""
    from phantoms import write_nifti

    for number, (name, shift) in enumerate({"a": 0, "b<i>": 2, "c": 99}.items()):
        mask = box().astype(np.uint8)
        predicted = np.roll(mask, shift, axis=0) if shift < 99 else 0 * mask
        write_nifti(tmp_path / "references" / f"{name}.nii.gz", np.roll(mask, number, axis=1))
        write_nifti(tmp_path / "predictions" / f"{name}.nii.gz", np.roll(predicted, number, axis=1))
    evaluation = evaluate_folders(tmp_path / "predictions", tmp_path / "references", labels=LABELS[:1])
    rows = [{"step": str(step), "loss": f"{3 / step:.4f}"} for step in range(1, 50)]
    path = tmp_path / "report.html"
    sections = [viewer_section([view()]), evaluation_section(evaluation), curves_section(rows)]
    write_page(path, "A title of a report that is long enough to wrap", evaluation_lead(evaluation), sections, "today")
    return path


def test_table_sorts_by_number_and_keeps_empty_cells_last(browser, evaluated):
    with opened(browser, evaluated) as shown:
        cases = "[...document.querySelectorAll('table.sortable tbody th')].map(cell => cell.textContent)"
        dice = shown.locator("table.sortable thead button", has_text="Dice")
        dice.click()
        assert shown.evaluate(cases) == ["c", "b<i>", "a"]
        dice.click()
        assert shown.evaluate(cases) == ["a", "b<i>", "c"]
        assert shown.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"
        shown.locator("table.sortable thead button", has_text="Case").click()
        assert shown.evaluate(cases) == ["a", "b<i>", "c"]
        assert shown.locator("th[aria-sort]").count() == 1


def test_charts_read_out_dots_and_lines(browser, evaluated):
    with opened(browser, evaluated) as shown:
        shown.hover("[data-tip^='b<i>: Dice']")
        assert shown.inner_text(".tip").startswith("b<i>: Dice 0.")
        curve = shown.locator("#curves svg").first
        curve.scroll_into_view_if_needed()
        place = curve.bounding_box()
        shown.mouse.move(place["x"] + place["width"] - 20, place["y"] + 50)
        assert shown.inner_text(".tip").split("\n")[0] == "step 49"
        shown.mouse.move(place["x"] + place["width"] - 20, place["y"] - 20)
        assert not shown.is_visible(".tip")


def luminance(colour: str) -> float:
    channels = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_scheme_with_enough_contrast(browser, evaluated, scheme):
    with opened(browser, evaluated, scheme=scheme) as shown:
        for selector, behind in (
            (".notice", "body"),
            (".result", "body"),
            (".tile small", ".tile"),
            ("#scores h2", "section"),
            (".help", "section"),
            ("nav a", "body"),
            ("tr.bad td", "tr.bad td"),
            (".tile.bad strong", ".tile"),
        ):
            ink = shown.eval_on_selector(selector, "node => getComputedStyle(node).color")
            ground = shown.eval_on_selector(behind, "node => getComputedStyle(node).backgroundColor")
            dark, bright = sorted((luminance(ink), luminance(ground)))
            assert (bright + 0.05) / (dark + 0.05) >= 4.5, (selector, ink, ground)
        ground = shown.eval_on_selector("body", "node => getComputedStyle(node).backgroundColor")
        assert (luminance(ground) < 0.5) == (scheme == "dark")


@pytest.mark.parametrize("width", [320, 390, 768, 1440])
def test_no_width_makes_the_page_scroll_sideways(browser, evaluated, width):
    with opened(browser, evaluated, width=width) as shown:
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        panes = [pane.bounding_box() for pane in shown.query_selector_all(".pane")]
        assert panes[0]["width"] > (250 if width < 760 else 200)
        assert (panes[0]["y"] == panes[1]["y"]) == (width > 760)  # side by side, or axial above the others


def test_print_shows_the_notice_and_whole_tables(browser, evaluated):
    with opened(browser, evaluated, width=760, scheme="dark") as shown:
        shown.emulate_media(media="print")
        assert shown.is_visible("header .notice")
        assert shown.inner_text("header .notice") == NOTICE
        assert not shown.is_visible(".reset")
        assert shown.inner_text(".controls").split() == ["Reference", "Prediction"]  # the key to the colours
        assert shown.inner_text(".picker").split() == ["Worst", "one"]
        assert shown.evaluate("document.documentElement.scrollWidth") <= 760
        assert shown.eval_on_selector(".scroll.tall", "node => node.scrollHeight <= node.clientHeight")
        # Dark ink on white paper, whatever the screen.
        assert luminance(shown.eval_on_selector("tr.bad td", "node => getComputedStyle(node).color")) < 0.2


def test_policy_refuses_what_is_not_ours(browser, tmp_path):
    """Were text ever taken for HTML, its script would still not run."""
    path = tmp_path / "report.html"
    write_page(path, "t", Html("<script>document.title = 'run'</script><p>shown</p>"), [], "today")
    page = browser.new_page()
    page.goto(path.as_uri())
    assert page.inner_text(".lead p") == "shown"
    assert page.title() == "t"
    page.close()


def test_report_of_real_scans(browser, real_data, tmp_path):
    """Predictions are the references of real scans, moved by a voxel."""
    import nibabel

    from phantoms import write_nifti

    dataset = open_dataset(real_data / "Task04_Hippocampus")
    for case in dataset.cases[:5]:
        mask = nibabel.load(case.label)
        moved = np.roll(np.asarray(mask.dataobj).astype(np.uint8), 1, axis=0)
        write_nifti(tmp_path / "predictions" / case.label.name, moved, affine=mask.affine)
    listed = "".join(f"{case.case_id}\n" for case in dataset.cases[:5])
    (tmp_path / "predictions" / "summary.csv").write_text(f"case\n{listed}")
    evaluation = evaluate_folders(tmp_path / "predictions", dataset.root, labels=dataset.labels)
    path = tmp_path / "report.html"
    train_report(path, evaluation, dataset, [{"step": "1", "loss": "1"}], {"seed": "0"}, "today")
    assert path.stat().st_size < 1_500_000
    with opened(browser, path) as shown:
        assert [button.inner_text().split(":")[0] for button in shown.query_selector_all(".picker button b")] == [
            "Median",
            "Best",
            "2nd worst",
            "Worst",
        ]
        image = pixels(shown, "sagittal")
        assert of_colour(image, BLUE).sum() > 200
        assert 40 < image.mean() < 200
