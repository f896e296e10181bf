"""What outputs tell: where they come from, and nothing of who it is."""

from __future__ import annotations

import hashlib
import json
import socket
from pathlib import Path

import numpy as np
import pytest

import tokenseg
from dicom_phantoms import write_series
from phantoms import phantom, write_nifti
from tokenseg.about import NOTICE
from tokenseg.cli import main
from tokenseg.datasets.cases import Case
from tokenseg.imaging.volume import read_mask
from tokenseg.options import SegmentOptions
from tokenseg.saved_model.checkpoint import load_model
from tokenseg.segmentation.privacy import shown_name, without_names
from tokenseg.segmentation.segment import segment_files
from toy_models import job_of, save_untrained

NAME = "DOE_JANE"


def all_text(folder) -> dict[str, str]:
    """Every file that was written, but masks and the summary that pairs names with volumes, and `summary`'s name."""
    return {
        path.name: path.read_text(errors="replace")
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in (".json", ".jsonl", ".html") and "model" not in path.parts
    }


@pytest.mark.parametrize("form", ["nifti", "dicom"])
def test_no_name_and_no_path_is_told(tmp_path, form, capsys):
    source, out = tmp_path / NAME, tmp_path / "out"
    if form == "nifti":
        write_nifti(source / f"{NAME}_1.nii.gz", phantom(0)[0][0])
        (source / f"{NAME}_2.nii.gz").write_bytes(b"broken")
    else:
        write_series(source / f"{NAME}_1")
        (paths := write_series(source / f"{NAME}_2"))[3].unlink()
        assert paths
    model = save_untrained(tmp_path / "model")
    words = ["segment", str(source), str(out), "--model", str(model), "--report", str(tmp_path / "report.html")]
    assert main(words) == 1
    printed = capsys.readouterr()
    told = all_text(out) | {"report": (tmp_path / "report.html").read_text()}
    assert {"manifest.json", "status.jsonl", "report"} <= set(told)
    for name, text in (*told.items(), ("stderr", printed.err)):
        assert NAME not in text.replace(f"report: {tmp_path / 'report.html'}", ""), name
        assert str(tmp_path) not in text.replace(f"report: {tmp_path / 'report.html'}", ""), name
    assert shown_name(f"{NAME}_1", show_names=False) in told["status.jsonl"]
    # The user's own table, and results on stdout, call cases by their names.
    assert NAME in (out / "summary.csv").read_text()
    assert NAME in printed.out


def test_the_manifest_says_how_a_mask_came_about(tmp_path):
    scan = write_nifti(tmp_path / "a.nii.gz", phantom(0)[0][0])
    folder = save_untrained(tmp_path / "model")
    assert main(["segment", str(scan), str(tmp_path / "m.nii.gz"), "--model", str(folder), "--threads", "1"]) == 0
    manifest = json.loads((tmp_path / "m_manifest.json").read_text())
    assert manifest["notice"] == NOTICE
    assert manifest["tokenseg"] == tokenseg.__version__
    assert (manifest["device"], manifest["threads"], manifest["deterministic"]) == ("cpu", 1, True)
    (model,) = manifest["models"]
    assert model["weights_sha256"] == hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    (case,) = manifest["cases"]
    assert case["mask_sha256"] == hashlib.sha256((tmp_path / "m.nii.gz").read_bytes()).hexdigest()
    assert case["input_sha256"] == hashlib.sha256(scan.read_bytes()).hexdigest()
    assert case["shape_vox"] == [24, 24, 24]
    assert np.shape(case["affine"]) == (4, 4)
    assert case["peak_mib"] > 100
    assert manifest["command"].startswith("tokenseg segment INPUT OUTPUT --model MODEL")


def test_the_same_input_gives_the_same_mask_bit_for_bit_and_no_socket_is_opened(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    write_nifti(tmp_path / "in" / "a.nii.gz", phantom(0)[0][0])
    model = load_model(save_untrained(tmp_path / "model"))
    masks = []
    for number in range(3):
        (result,) = segment_files(job_of([model]), tmp_path / "in", tmp_path / f"out{number}")
        masks.append(result.mask.read_bytes())
    assert len(set(masks)) == 1
    assert read_mask(result.mask).array.any()


def test_names_where_they_are_asked_for(tmp_path):
    write_nifti(tmp_path / "in" / f"{NAME}.nii.gz", phantom(0)[0][0])
    model = load_model(save_untrained(tmp_path / "model"))
    segment_files(job_of([model], options=SegmentOptions(show_names=True)), tmp_path / "in", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "status.jsonl").read_text())["case"] == NAME
    # A folder that was begun with names goes on without, and does nothing anew.
    before = (tmp_path / "out" / "status.jsonl").read_text()
    segment_files(job_of([model]), tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out" / "status.jsonl").read_text() == before


def test_an_empty_case_with_a_short_name_hides_nothing():
    assert without_names("12 has no image", Case("12", "12", ()), show_names=False) == "12 has no image"


@pytest.mark.parametrize(
    ("case_id", "text", "told"),
    [
        ("1", "1 of 12 files: data/1.nii.gz is truncated", "1 of 12 files: {}.nii.gz is truncated"),
        ("Lee", "Lee: Leeds is not Lee_0001.nii.gz", "{0}: Leeds is not {0}_0001.nii.gz"),
        ("Lee", "data/Lee.nii.gz, in data, has 2 channels", "{}.nii.gz, in data, has 2 channels"),
    ],
)
def test_names_are_hidden_and_other_words_are_not(case_id, text, told):
    case = Case(case_id, case_id, (Path("data") / f"{case_id}.nii.gz",))
    assert without_names(text, case, show_names=False) == told.format(shown_name(case_id, show_names=False))
    assert without_names(text, case, show_names=True) == text
