"""Packing: real tiny runs of every fold, and figures worked out by hand."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from phantoms import change_json, write_msd
from tokenseg.datasets.inputs import list_inputs, read_input
from tokenseg.errors import ModelError
from tokenseg.evaluation.metrics import bootstrap_interval
from tokenseg.inference.predict import segment_volume
from tokenseg.options import TrainOptions
from tokenseg.saved_model.builtin import MODELS_FOLDER
from tokenseg.saved_model.checkpoint import describe_model, load_model
from tokenseg.training.train import train

SCRIPT = Path(__file__).parents[1] / "scripts" / "pack_builtin.py"

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:monai")


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("pack_builtin", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pack_builtin"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["pack_builtin"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_msd(
        tmp_path_factory.mktemp("data") / "Task00_Phantom", 5, shape=(20, 20, 16), labels={1: "outer", 2: "inner"}
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """Runs `all`, trained a little, and `0` to `4`, hardly."""
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("runs")
    config = folder / "config.toml"
    config.write_text("[plan]\nwindow_vox = [16, 16, 16]\nbatch_size = 2\n")
    for fold, steps in (("all", 400), (0, 2), (1, 2), (2, 3), (3, 2), (4, 2)):
        options = TrainOptions(preset="tiny", max_steps=steps, device="cpu", threads=1, config=config, fold=fold)  # type: ignore[arg-type]
        train(dataset, folder / str(fold), options)
    torch.set_num_threads(threads)
    return folder


def folds(runs: Path) -> list[Path]:
    return [runs / str(fold) for fold in range(5)]


@pytest.fixture
def changed(runs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs, tmp_path / "runs"))


def set_scores(run: Path, **measures: list[float | None]) -> str:
    """Give the only case of a fold these measures, one a label; returns its name."""
    path = run / "validation" / "scores.json"
    values = json.loads(path.read_text())
    (case,) = values["metric_per_case"]
    for row, label in enumerate(case["metrics"].values()):
        label |= {name: of_labels[row] for name, of_labels in measures.items()}
        label["status"] = "both_empty" if label["dice"] is None else "both_present"
    path.write_text(json.dumps(values))
    return str(case["case"])


def test_the_packed_model_is_the_run_of_all_cases(runs, script, tmp_path):
    folder = script.pack(runs / "all", folds(runs), "hippocampus", tmp_path)
    assert {path.name for path in folder.iterdir()} == {"weights.safetensors", "model.json", "README.md", "LICENSE"}
    packed, run = load_model(folder), load_model(runs / "all")
    # The plan is that of the run, and the labels say what they are.
    bare = [label.model_copy(update={"coding": None}) for label in packed.facts.plan.labels]
    assert packed.facts.plan.model_copy(update={"labels": tuple(bare)}) == run.facts.plan
    assert {label.coding.type.meaning for label in packed.facts.plan.labels if label.coding} == {"Hippocampus"}
    for name, tensor in packed.network.state_dict().items():
        torch.testing.assert_close(tensor, run.network.state_dict()[name], rtol=2**-10, atol=2**-24)
    assert packed.facts.training == {
        "tokenseg_version": run.facts.training["tokenseg_version"],
        "dataset": "Task00_Phantom",
        "training_cases": 5,
        "steps": 400,
        "seed": 0,
        "precision": "weights stored with 16 bits a number",
    }
    assert packed.facts.inputs is not None
    assert packed.facts.inputs.content == "crops around the hippocampus"
    assert packed.facts.inputs.extent_mm == ((20, 20), (20, 20), (16, 16))
    assert (folder / "README.md").read_text() == describe_model(packed)
    assert (folder / "LICENSE").read_text() == (SCRIPT.parent / "builtin" / "hippocampus.LICENSE").read_text()


def test_its_temperature_is_that_of_the_folds(changed, runs, script, tmp_path):
    temperatures = [1.5, None, 3.0, 2.0, None]
    for fold, temperature in enumerate(temperatures):
        quality = None if temperature is None else {"temperature": temperature, "num_cases": 1}
        quality = quality and quality | {"calibration_error": [0.1 * temperature, 0.01]}
        change_json(changed / str(fold) / "model" / "model.json", quality=quality)
    quality = load_model(script.pack(changed / "all", folds(changed), "hippocampus", tmp_path)).facts.quality
    assert (quality.temperature, quality.num_cases) == (2.0, 3)
    assert quality.calibration_error == pytest.approx((0.65 / 3, 0.01))
    assert quality.volumes_ml == load_model(runs / "all").facts.quality.volumes_ml != {}
    for fold in range(5):
        change_json(changed / str(fold) / "model" / "model.json", quality=None)
    quality = load_model(script.pack(changed / "all", folds(changed), "hippocampus", tmp_path)).facts.quality
    assert (quality.temperature, quality.num_cases) == (1.0, 0)


def test_the_same_runs_give_the_same_bytes(runs, script, tmp_path):
    digests = []
    for order in (folds(runs), folds(runs)[::-1]):
        folder = script.pack(runs / "all", order, "hippocampus", tmp_path)
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())])
    assert digests[0] == digests[1]


def test_half_precision_changes_nearly_no_voxel(runs, dataset, script, tmp_path):
    packed = load_model(script.pack(runs / "all", folds(runs), "hippocampus", tmp_path))
    full = load_model(runs / "all")
    foreground = different = 0
    for case in list_inputs(dataset, full.facts.plan):
        volume = read_input(case, full.facts.plan)
        masks = [segment_volume(model, volume) for model in (full, packed)]
        foreground += np.count_nonzero(masks[0])
        different += np.count_nonzero(masks[0] != masks[1])
    assert foreground > 1000
    # A tiny network after few steps is unsure of many voxels.
    assert different < 0.01 * foreground


def test_figures_are_over_all_cases_of_all_folds(changed, script, tmp_path):
    outer, inner = [0.9, 0.5, 0.8, 0.7, 0.6], [0.7, 0.1, None, 0.9, 0.8]
    names = [
        set_scores(run, dice=[outer[fold], inner[fold]], hd95_mm=[fold, None], nsd=[fold / 4, fold / 8])
        for fold, run in enumerate(folds(changed))
    ]
    card = (script.pack(changed / "all", folds(changed), "hippocampus", tmp_path) / "README.md").read_text()
    publication = load_model(tmp_path / "hippocampus").facts.publication
    assert publication is not None
    figures = publication.figures
    assert (figures.cases, figures.fold_steps, figures.tolerance_mm) == (5, (2, 2, 3, 2, 2), 1)
    assert figures.fold_dice == pytest.approx((0.8, 0.3, 0.8, 0.8, 0.7))
    assert figures.mean_dice.mean == pytest.approx(0.68)
    first, second = figures.labels
    assert (first.label, first.cases, second.label, second.cases) == ("outer", 5, "inner", 4)
    assert first.dice.mean == pytest.approx(0.7)
    assert second.dice.mean == pytest.approx(0.625)
    assert first.hd95_mm.mean == 2
    assert first.nsd.mean == 0.5
    # Intervals are those of the evaluation, over cases in the order of their names.
    of_case = dict(zip(names, outer, strict=True))
    expected = bootstrap_interval(np.array([of_case[name] for name in sorted(names)]))
    assert (first.dice.low, first.dice.high) == (expected.low, expected.high)
    worst = [case.case for case in figures.worst]
    assert worst[:2] == [names[1], names[4]]
    assert figures.worst[0].dice == {"outer": 0.5, "inner": 0.1}
    assert next(case.dice for case in figures.worst if case.case == names[2]) == {"outer": 0.8}
    assert f"| outer | 5 | 0.7000 ({expected.low:.4f} to {expected.high:.4f}) | 2.00 (" in card
    assert f"| {names[1]} | 0.5000 | 0.1000 |" in card
    assert f"| {names[2]} | 0.8000 |  |" in card
    assert "of the folds 0.8000, 0.3000, 0.8000, 0.8000, 0.7000." in card
    assert "each of 5 cases segmented by a network that was trained on the other folds (2 to 3 steps)" in card
    assert "## Limits\n\n- It expects a crop around one hippocampus" in card
    assert "validation_dice" not in card


def test_measures_of_each_case_are_written_as_rows(changed, script):
    name = set_scores(changed / "1", dice=[0.5, None], hd95_mm=[1.25, None], nsd=[0.75, None])
    header, *lines = script.case_rows(folds(changed)).decode().splitlines()
    assert header == "fold,case,label,dice,hd95_mm,nsd_1mm"
    assert len(lines) == 10
    assert [line.split(",")[1] for line in lines] == sorted(line.split(",")[1] for line in lines)
    assert f"1,{name},outer,0.5000,1.2500,0.7500" in lines
    assert f"1,{name},inner,,," in lines


def test_only_runs_that_belong_together_are_packed(changed, script, tmp_path):
    def refused(run_all: str, given: list[Path]) -> str:
        with pytest.raises(ModelError) as caught:
            script.pack(changed / run_all, given, "hippocampus", tmp_path)
        assert not (tmp_path / "hippocampus").exists()
        return str(caught.value)

    every = folds(changed)
    assert refused("0", every) == f"{changed / '0'} was trained on fold 0; pack a run with --fold all"
    assert (
        refused("all", every[:4])
        == "--folds are runs of the folds [0, 1, 2, 3]; give one run of each of [0, 1, 2, 3, 4]"
    )
    assert "runs of the folds [0, 0, 1, 2, 3]" in refused("all", [every[0], *every[:4]])
    assert "runs of the folds ['all', 1, 2, 3, 4]" in refused("all", [changed / "all", *every[1:]])
    description = changed / "3" / "model" / "model.json"
    before = description.read_bytes()
    change_json(description, plan=json.loads(before)["plan"] | {"batch_size": 7})
    assert refused("all", every) == f"{every[3]} was trained with another plan or network than {changed / 'all'}"
    description.write_bytes(before)
    scores = changed / "2" / "validation" / "scores.json"
    before = scores.read_bytes()
    change_json(scores, tolerance_mm=2)
    assert f"{every[2]} was scored with another tolerance" in refused("all", every)
    scores.write_bytes((changed / "1" / "validation" / "scores.json").read_bytes())
    assert f"{every[2]} did not score the cases that its fold holds out" in refused("all", every)
    scores.unlink()
    assert refused("all", every) == f"{scores} is missing or damaged; train the run to its end"
    scores.write_bytes(before)
    change_json(changed / "all" / "model" / "model.json", inputs=None)
    assert "does not tell what its training scans were like" in refused("all", every)


def test_weights_too_large_to_ship(runs, script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "MAX_BYTES", 100_000)
    with pytest.raises(ModelError, match=r"MB of weights, at most 0 MB are shipped"):
        script.pack(runs / "all", folds(runs), "hippocampus", tmp_path)
    assert not (tmp_path / "hippocampus").exists()


def test_the_script_says_in_a_line_what_is_wrong(tmp_path):
    before = sorted(MODELS_FOLDER.glob("**/*"))
    command = [
        sys.executable,
        str(SCRIPT),
        str(tmp_path / "no"),
        "--folds",
        str(tmp_path / "no"),
        "--name",
        "hippocampus",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (1, f"error: model {tmp_path / 'no'} does not exist; check the path\n")
    assert sorted(MODELS_FOLDER.glob("**/*")) == before
