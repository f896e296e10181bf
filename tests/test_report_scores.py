"""Sentence, key figures and tables of an evaluation, and the reports that are made of them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from phantoms import write_msd, write_nifti
from plans import make_plan
from test_report_page import EVIL, Outline
from tokenseg.config import PRESETS, Label
from tokenseg.datasets.layouts import open_dataset
from tokenseg.evaluation.evaluate import evaluate_folders
from tokenseg.evaluation.results import Evaluation
from tokenseg.inference.quality import CaseQuality
from tokenseg.report.reports import (
    evaluation_report,
    segmentation_report,
    tokens_of_selected,
    tokens_of_worst,
    train_report,
)
from tokenseg.report.scores import case_table, evaluation_lead, evaluation_section, summary_table
from tokenseg.segmentation.results import CaseResult
from tokenseg.segmentation.segment import segment_cases
from toy_models import case_named, job_of, untrained

SHAPE = (12, 10, 8)
AFFINE = np.diag([0.5, 1.0, 2.0, 1.0])  # one voxel is one mm3
TUMOUR = Label(name="tumour", values=(1,), output_value=1)
OTHERS = tuple(Label(name=f"part {value}", values=(value,), output_value=value) for value in (2, 3, 4))


def cube(value: int, start: int) -> np.ndarray:
    mask = np.zeros(SHAPE, dtype=np.uint8)
    mask[start : start + 3, 2:5, 2:5] = value
    return mask


def evaluation_of(folder: Path, pairs: dict[str, tuple[np.ndarray, np.ndarray | None]], *labels: Label) -> Evaluation:
    """Cases by id: reference and prediction, None for a case that was never segmented."""
    for case_id, (reference, prediction) in pairs.items():
        write_nifti(folder / "references" / f"{case_id}.nii.gz", reference, affine=AFFINE)
        if prediction is not None:
            write_nifti(folder / "predictions" / f"{case_id}.nii.gz", prediction, affine=AFFINE)
    return evaluate_folders(folder / "predictions", folder / "references", labels=labels or (TUMOUR,))


@pytest.fixture
def mixed(tmp_path) -> Evaluation:
    """Right, half right, missed, without a prediction, invented, and empty in both."""
    nothing = cube(0, 0)
    pairs = {
        "a": (cube(1, 1), cube(1, 1)),
        "b": (cube(1, 1), cube(1, 2)),
        "c": (cube(1, 1), nothing),
        "d": (cube(1, 1), None),
        "e": (nothing, cube(1, 1)),
        "f": (nothing, nothing),
    }
    return evaluation_of(tmp_path, pairs)


def texts(html: str) -> list[str]:
    return [text for text in Outline(html).texts if text.strip()]


def table_rows(html: str) -> list[list[str]]:
    """Cells of the body of a table, tags taken out, parts joined by a space."""
    body = html[html.index("<tbody>") :]
    rows = re.findall(r"<tr.*?</tr>", body)
    return [[" ".join(texts(cell)) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]


def test_lead_says_what_came_out_and_counts_failures(mixed):
    lead = texts(evaluation_lead(mixed))
    dice = mixed.summaries[0].intervals["dice"]
    assert dice.mean == pytest.approx((1 + 2 / 3) / 5)
    assert lead[0] == (
        f"Over 6 cases, the mean Dice is 0.333 (95 % interval {dice.low:.3f} to {dice.high:.3f}) for tumour. "
        "1 case had no prediction and counts as missed."
    )
    tiles = dict(zip(lead[1::3], lead[2::3], strict=True))
    assert tiles == {"Dice, tumour": "0.333", "Missed": "2", "Invented": "1"}
    assert lead[lead.index("Missed") + 2] == "of 4 cases with something to find"
    assert lead[lead.index("Invented") + 2] == "of 2 cases with nothing to find"


def test_lead_without_lesion_free_cases_has_no_count_of_inventions(tmp_path):
    lead = texts(evaluation_lead(evaluation_of(tmp_path, {"a": (cube(1, 1), cube(1, 1))})))
    assert lead[0] == "Over 1 case, the mean Dice is 1.000 (95 % interval 1.000 to 1.000) for tumour."
    assert "Invented" not in lead


def test_lead_of_two_and_of_many_labels(tmp_path):
    reference = sum(cube(value, 3 * (value - 1)) for value in (1, 2, 3, 4))
    prediction = np.where(reference == 2, 0, reference).astype(np.uint8)
    two = evaluation_of(tmp_path, {"a": (reference, prediction)}, TUMOUR, OTHERS[0])
    assert texts(evaluation_lead(two))[0] == "Over 1 case, the mean Dice is 1.000 for tumour and 0.000 for part 2."
    four = evaluate_folders(tmp_path / "predictions", tmp_path / "references", labels=(TUMOUR, *OTHERS))
    lead = texts(evaluation_lead(four))
    assert lead[0] == "Over 1 case, the mean Dice is 0.750 (mean over 4 labels)."
    assert "Dice, part 2 (worst label)" in lead
    assert lead[lead.index("Missed") + 2] == "of 4 masks with something to find"


def test_lead_where_all_is_empty(tmp_path):
    evaluation = evaluation_of(tmp_path, {"a": (cube(0, 0), cube(0, 0)), "b": (cube(0, 0), cube(0, 0))})
    lead = texts(evaluation_lead(evaluation))
    assert lead[0] == "Nothing could be scored: in all 2 cases reference and prediction are empty."
    assert lead[2] == "n/a"
    assert "no case scored" in evaluation_section(evaluation).body


def test_summary_table_has_means_intervals_and_counts(mixed):
    (row,) = table_rows(summary_table(mixed))
    summary = mixed.summaries[0]
    assert row[0] == "tumour"
    error = summary.intervals["volume_error_ml"]
    for cell, name, digits in (
        (row[1], "dice", 3),
        (row[2], "iou", 3),
        (row[3], "hd95_mm", 2),
        (row[6], "lesion_f1", 3),
    ):
        mean, low, high = summary.intervals[name]
        assert cell == f"{mean:.{digits}f} {low:.{digits}f} to {high:.{digits}f}"
    assert row[5].split()[0] == f"{error.mean:.2f}".replace("-", "\u2212")
    assert row[7:] == ["5", "2", "1", "1"]


def test_case_table_has_every_case_and_leaves_out_what_is_not_defined(mixed):
    rows = {row[0]: row for row in table_rows(case_table(mixed))}
    assert {name: row[2] for name, row in rows.items()} == {
        "a": "",
        "b": "",
        "c": "missed",
        "d": "no prediction",
        "e": "invented",
        "f": "both empty",
    }
    assert rows["b"][3:5] == ["0.667", "0.500"]
    assert rows["b"][7:10] == ["0.03", "0.03", "0.00"]
    assert rows["a"][10:] == ["1", "0", "0"]
    assert rows["c"][9:] == ["\u22120.03", "0", "1", "0"]
    assert rows["e"][9:] == ["+0.03", "0", "0", "1"]
    assert rows["f"][3:7] == [""] * 4
    assert re.findall(r'<tr class="bad">.*?<th[^>]*>(.)', case_table(mixed)) == ["c", "d", "e"]


def test_sorting_goes_by_exact_values(mixed):
    cells = Outline(case_table(mixed)).attributes("td")
    assert repr(2 / 3) in [cell.get("data-value") for cell in cells]


def test_strips_show_failures_as_such(mixed):
    outline = Outline(evaluation_section(mixed).body)
    failed = [each["data-tip"] for each in outline.attributes("path") if each["class"] == "dot failed"]
    assert not any("HD95" in tip for tip in failed)  # a penalty is no distance
    assert "b: HD95 0.50 mm" in [each.get("data-tip") for each in outline.attributes("circle")]
    assert [tip for tip in failed if "Dice" in tip] == [f"{case_id}: Dice 0.000" for case_id in "cde"]
    assert "b: Dice 0.667" in [each.get("data-tip") for each in outline.attributes("circle")]
    assert "f: Dice" not in evaluation_section(mixed).body


@pytest.fixture
def dataset(tmp_path) -> Path:
    return write_msd(tmp_path / "data", 3, shape=(16, 14, 12), labels={1: EVIL}, channels=("c0",))


def test_train_report_has_all_sections(dataset, tmp_path):
    opened = open_dataset(dataset)
    evaluation = evaluate_folders(dataset / "labelsTr", dataset, labels=opened.labels)
    model = untrained(make_plan(window_vox=(16, 16, 16), grid=(2, 2, 2)))
    job = job_of(model, tokens_of=3)
    tokens = tokens_of_selected(job, segment_cases(job, opened.cases, tmp_path / "masks"), evaluation)
    assert [report.case_id for report in tokens] == ["case_001", "case_002", "case_000"]
    log = [{"step": "1", "loss": "2.5"}, {"step": "2", "loss": "1.5"}]
    path = tmp_path / "report.html"
    train_report(path, evaluation, opened, log, {"seed": EVIL}, "2026-01-02", tokens=tokens)
    outline = Outline(path.read_text(encoding="utf-8"))
    assert [each.get("id") for each in outline.attributes("section")] == ["cases", "scores", "tokens", "curves", "run"]
    assert "Training on data" in outline.texts
    assert outline.attributes("img") == []
    assert EVIL in outline.texts
    kept = table_rows(path.read_text(encoding="utf-8").split('id="tokens"')[1])[0]
    assert kept[:2] == ["case_001", "reference"]
    assert sum(map(int, kept[6:10])) == tokens[0].summary.num_kept


def test_tokens_of_a_model_without_tokens_are_none(dataset, tmp_path):
    opened = open_dataset(dataset)
    evaluation = evaluate_folders(dataset / "labelsTr", dataset, labels=opened.labels)
    config = PRESETS["tiny"].model_copy(update={"tokens": False})
    model = untrained(make_plan(window_vox=(16, 16, 16), grid=(2, 2, 2)), config=config)
    job = job_of(model, tokens_of=3)
    assert tokens_of_selected(job, segment_cases(job, opened.cases, tmp_path / "masks"), evaluation) == []


def test_evaluation_report_without_images(mixed, tmp_path):
    path = tmp_path / "report.html"
    evaluation_report(path, mixed, None, "2026-01-02", title="External centre")
    outline = Outline(path.read_text(encoding="utf-8"))
    assert [each.get("id") for each in outline.attributes("section")] == ["cases", "scores"]
    assert "External centre" in outline.texts


def quality(entropy: float, *flags: str) -> CaseQuality:
    nothing = {"near_boundary": None, "expected_dice": None, "cell_entropy": (), "labels": {}, "temperature": 1}
    return CaseQuality(case="hidden", entropy=entropy, flags=flags, calibrated=False, **nothing)


def test_segmentation_report_has_volumes_and_reasons_of_failures(tmp_path):
    image = write_nifti(tmp_path / "a.nii.gz", np.random.default_rng(0).random(SHAPE, np.float32))
    mask = write_nifti(tmp_path / "masks" / "a.nii.gz", cube(1, 1))
    results = [
        CaseResult(case_named("a", image), mask, {"l0": 1.234}, quality=quality(0.912, "small")),
        CaseResult(case_named("b", image), None, {}, EVIL, EVIL),
    ]
    path = tmp_path / "report.html"
    segmentation_report(path, results, make_plan(), "2026-01-02", show_names=True)
    text = path.read_text(encoding="utf-8")
    assert table_rows(text.split('id="volumes"')[1]) == [["b", "", "", EVIL], ["a", "0.912", "1.23", "small"]]
    lead = texts(text)
    assert "1 of 2 cases segmented; 1 failed, the reasons are in the table." in lead
    assert lead[lead.index("l0, median") + 1 :][:2] == ["1.23 ml", "1.23 to 1.23 ml, found in 1 of 1"]


def test_tokens_of_the_least_sure_are_shown(tmp_path):
    results = []
    for number in range(5):
        path = write_nifti(tmp_path / f"c{number}.nii.gz", np.random.default_rng(number).random(SHAPE, np.float32))
        mask = write_nifti(tmp_path / "masks" / path.name, cube(1, 1))
        results.append(CaseResult(case_named(f"c{number}", path), mask, {"l0": 1.0}, quality=quality(number / 10)))
    plan = make_plan(window_vox=(16, 16, 16), grid=(2, 2, 2))
    tokens = tokens_of_worst(job_of(untrained(plan), tokens_of=3), results)
    assert [report.case_id for report in tokens] == ["c4", "c3", "c2"]
    path = tmp_path / "report.html"
    segmentation_report(path, results, plan, "2026-01-02", tokens=tokens, show_names=True)
    rows = table_rows(path.read_text(encoding="utf-8").split('id="tokens"')[1])
    assert [row[:2] for row in rows] == [["c4", "prediction"], ["c3", "prediction"], ["c2", "prediction"]]
    config = PRESETS["tiny"].model_copy(update={"tokens": False})
    assert tokens_of_worst(job_of(untrained(plan, config=config), tokens_of=3), results) == []


def test_segmentation_report_where_all_failed(tmp_path):
    path = tmp_path / "report.html"
    segmentation_report(path, [CaseResult(case_named("b"), None, {}, "broken")], make_plan(), "2026-01-02")
    lead = texts(path.read_text(encoding="utf-8"))
    assert "0 of 1 case segmented; 1 failed, the reasons are in the table." in lead
    assert "There is no case to show." in lead
    assert "l0, median" not in lead
