from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import tokenseg.saved_model.builtin
from phantoms import phantom, write_nifti
from plans import make_plan
from tokenseg.cli import main
from tokenseg.errors import ModelError
from tokenseg.imaging.volume import read_mask
from tokenseg.saved_model.builtin import builtin_names, find_model
from tokenseg.saved_model.checkpoint import load_model
from toy_models import as_stored, save_untrained


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two built-in models, a folder that is none, and a working folder without models."""
    folder = tmp_path / "package"
    for name in ("organ", "bone"):
        plan = as_stored(make_plan(), channels=("MRI",), source_channels=("MRI",))
        save_untrained(folder / name, plan)
    (folder / "__pycache__").mkdir()
    monkeypatch.setattr(tokenseg.saved_model.builtin, "MODELS_FOLDER", folder)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


# ---- names


def test_names_are_those_of_the_model_folders(models):
    assert builtin_names() == ("bone", "organ")


def test_a_plain_name_is_a_built_in_model(models):
    assert find_model("organ") == find_model(Path("organ")) == models / "organ"


def test_a_path_that_exists_wins(models):
    save_untrained(Path("organ"), seed=1)
    assert find_model("organ") == Path("organ")
    assert load_model("organ").facts.weights_sha256 != load_model(models / "organ").facts.weights_sha256
    shutil.rmtree("organ")
    assert load_model("organ").facts.weights_sha256 == load_model(models / "organ").facts.weights_sha256


def test_an_unknown_name_lists_those_there_are(models):
    with pytest.raises(ModelError) as caught:
        load_model("heart")
    assert str(caught.value) == (
        "model heart does not exist here, and is no built-in model (there is bone, organ); "
        "name a built-in model, a run folder of `tokenseg train`, or a model folder"
    )


def test_a_name_never_leads_out_of_the_folder(models):
    for name in ("__pycache__", "..", "organ/model.json"):
        with pytest.raises(ModelError):
            load_model(name)


@pytest.mark.parametrize("path", ["runs/organ", "./nowhere/organ", "/organ"])
def test_a_path_is_not_a_name(models, path):
    with pytest.raises(ModelError, match=r"model .*organ does not exist; check the path"):
        load_model(path)


def test_without_built_in_models(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenseg.saved_model.builtin, "MODELS_FOLDER", tmp_path / "none")
    with pytest.raises(ModelError, match=r"no built-in model \(there is none\); name"):
        find_model("organ")


# ---- commands


def test_commands_take_a_name(models, capsys):
    write_nifti(Path("scan.nii.gz"), phantom(0)[0][0])
    assert main(["segment", "scan.nii.gz", "mask.nii.gz", "--model", "organ", "--threads", "1"]) == 0
    assert capsys.readouterr().out.startswith("scan: l0 ")
    assert read_mask(Path("mask.nii.gz")).array.shape == (24, 24, 24)
    assert main(["tokens", "scan.nii.gz", "--model", "bone"]) == 0
    assert main(["info", "organ"]) == 0
    assert capsys.readouterr().out.endswith((models / "organ" / "README.md").read_text())


def test_commands_name_the_models_there_are(models, capsys):
    assert main(["info", "heart"]) == 2
    assert "no built-in model (there is bone, organ)" in capsys.readouterr().err
