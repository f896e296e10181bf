"""The models that come with the package: complete, loadable, what their card says, and wary of other scans."""

from __future__ import annotations

import json
import re
import socket

import numpy as np
import pytest
import torch
from safetensors import safe_open

from phantoms import write_nifti
from tokenseg.cli import main
from tokenseg.evaluation.metrics import dice
from tokenseg.imaging.volume import read_mask, read_volume
from tokenseg.inference.predict import segment_volume
from tokenseg.saved_model.builtin import MODELS_FOLDER, builtin_names
from tokenseg.saved_model.checkpoint import describe_model, load_model

HIPPOCAMPUS = MODELS_FOLDER / "hippocampus"


def test_there_is_a_hippocampus_model():
    assert builtin_names() == ("hippocampus",)
    files = {path.name for path in HIPPOCAMPUS.iterdir()}
    assert files == {"weights.safetensors", "model.json", "README.md", "LICENSE"}
    assert (HIPPOCAMPUS / "weights.safetensors").stat().st_size < 12_000_000
    assert "Creative Commons Attribution-ShareAlike 4.0" in (HIPPOCAMPUS / "LICENSE").read_text()


def test_its_weights_are_of_half_precision():
    with safe_open(HIPPOCAMPUS / "weights.safetensors", "pt") as weights:
        kinds = {weights.get_tensor(name).dtype for name in weights.keys() if weights.get_tensor(name).ndim > 1}  # noqa: SIM118
    assert kinds == {torch.float16}


def test_its_card_is_that_of_its_facts():
    model = load_model("hippocampus")
    card = (HIPPOCAMPUS / "README.md").read_text(encoding="utf-8")
    assert describe_model(model) == card
    for section in ("Data", "Figures", "Failure cases", "Limits", "Licence"):
        assert f"## {section}\n" in card
    publication = model.facts.publication
    assert publication is not None
    assert publication.figures.cases == model.facts.training["training_cases"] == 200
    assert publication.figures.mean_dice.mean >= 0.88
    assert [label.name for label in model.facts.plan.labels] == ["Anterior", "Posterior"]


def test_it_works_without_any_network(tmp_path, monkeypatch, capsys):
    tried: list[object] = []

    def refuse(_: object, address: object) -> None:
        tried.append(address)
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    write_nifti(tmp_path / "scan.nii.gz", np.random.default_rng(0).normal(300, 50, (35, 50, 35)).astype(np.float32))
    scan, mask = str(tmp_path / "scan.nii.gz"), tmp_path / "mask.nii.gz"
    assert main(["segment", scan, str(mask), "--model", "hippocampus", "--threads", "1", "--engine", "torch"]) == 0
    captured = capsys.readouterr()
    assert re.search(r"^scan: Anterior \d+\.\d\d ml, Posterior \d+\.\d\d ml$", captured.out, flags=re.MULTILINE)
    assert "warning" not in captured.err
    assert tried == []
    assert read_mask(mask).array.shape == (35, 50, 35)


@pytest.mark.parametrize(
    ("shape", "values", "warning"),
    [
        ((90, 120, 95), (300, 50), r"field of view 90 x 120 x 95 mm; trained on .* crops around the hippocampus"),
        ((35, 50, 35), (-1000, 30), r"values look like CT \(Hounsfield units\)"),
    ],
)
def test_other_scans_get_a_warning_that_says_why(tmp_path, capsys, shape, values, warning):
    write_nifti(tmp_path / "scan.nii.gz", np.random.default_rng(0).normal(*values, shape).astype(np.float32))
    scan, mask = str(tmp_path / "scan.nii.gz"), str(tmp_path / "mask.nii.gz")
    assert main(["segment", scan, mask, "--model", "hippocampus", "--engine", "torch"]) == 0
    assert re.search(warning, capsys.readouterr().err)


def test_it_segments_real_scans(real_data):
    """Cases it was trained on: no figure of quality, but a fault of packing or of orientation would show."""
    dataset = real_data / "Task04_Hippocampus"
    listed = json.loads((dataset / "dataset.json").read_text())["training"][::40]
    model = load_model("hippocampus")
    for pair in listed:
        volume = read_volume(dataset / pair["image"], ("MRI",))
        mask, reference = segment_volume(model, volume), read_mask(dataset / pair["label"]).array
        for value in (1, 2):
            assert dice(reference == value, mask == value) > 0.8
