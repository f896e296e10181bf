from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import tokenseg.demo
from tokenseg.cli import main
from tokenseg.demo import NAMES, PARTS, DemoResult, DemoSize, demo
from tokenseg.errors import TrainingError
from tokenseg.options import SyntheticOptions
from tokenseg.training.csv_log import read_log

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:monai")

TINY = DemoSize(exams=SyntheticOptions(train=5, test=2, external=2), preset="tiny", steps=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "out"


@pytest.fixture(scope="module")
def result(folder: Path) -> DemoResult:
    return demo(folder, size=TINY)


def dice(one: Path, other: Path) -> float:
    a, b = (np.asarray(nib.load(path).dataobj) > 0 for path in (one, other))
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


def test_each_network_is_scored_on_each_part(result: DemoResult, folder: Path) -> None:
    assert [(row.network, row.part) for row in result.rows] == [
        (network, part) for part in ("test", "external") for network in ("tokenseg", "monai-unet")
    ]
    for row in result.rows:
        masks, root = folder / "masks" / row.network / row.part, folder / "cohort" / row.part
        facts = json.loads((root / "lesions.json").read_text())
        diseased = [exam["id"] for exam in facts["exams"] if exam["lesions"]]
        expected = [dice(masks / f"{i}.nii.gz", root / "segmentations" / "expert" / f"{i}.nii.gz") for i in diseased]
        assert row.dice.mean == pytest.approx(np.mean(expected), abs=1e-6)
        assert (row.num_exams, row.num_lesion_free) == (len(diseased), len(facts["exams"]) - len(diseased))
        assert row.train_minutes > 0
    assert [len(read_log(folder / network / "log.csv")) for network in NAMES] == [3, 3]


def test_unless_steps_are_given_both_networks_get_the_same_minutes(folder: Path, result: DemoResult) -> None:
    for network in NAMES:
        options = tokenseg.demo._options(folder / network, DemoSize())
        options.check()
        assert (options.max_minutes, options.max_steps, options.threads, options.resume) == (7.0, None, 1, True)
    assert not tokenseg.demo._options(folder / "new", DemoSize()).resume


def test_the_report_holds_both_networks_and_says_that_all_is_synthetic(result: DemoResult) -> None:
    text = result.report.read_text()
    for said in (*NAMES.values(), *PARTS.values(), "synthetic", "not a medical device"):
        assert said in text


def test_again_nothing_is_trained_and_the_figures_are_the_same(result: DemoResult, folder: Path) -> None:
    logs = {network: (folder / network / "log.csv").stat().st_mtime_ns for network in NAMES}
    assert demo(folder, size=TINY).rows == result.rows
    assert logs == {network: (folder / network / "log.csv").stat().st_mtime_ns for network in NAMES}


def test_the_command_prints_table_report_and_what_to_do_next(
    result: DemoResult, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tokenseg.demo, "FULL", TINY)
    assert main(["demo", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["network", "exams"]
    assert [line.split()[0] for line in lines[1:5]] == ["TokenSeg", "MONAI", "TokenSeg", "MONAI"]
    assert f"{result.rows[0].dice.mean:.3f}" in lines[1]
    assert "Research software: not a medical device." in lines
    assert any(line.startswith(f"report: {result.report}") for line in lines)
    assert lines[-2].startswith("  tokenseg train YOUR_DATASET")


SCRIPT = """
import sys
from pathlib import Path
from test_demo import TINY
from tokenseg.demo import demo
if __name__ == "__main__":
    print(demo(Path(sys.argv[1]), size=TINY).rows)
"""


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="signals are of POSIX systems")
def test_interrupted_in_training_it_goes_on_to_the_same_figures(result: DemoResult, tmp_path: Path) -> None:
    script, folder = tmp_path / "script.py", tmp_path / "out"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen([sys.executable, script, folder], env=environment, stderr=subprocess.DEVNULL) as process:
        while not (folder / "tokenseg" / "log.csv").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert [row.dice for row in demo(folder, size=TINY).rows] == [row.dice for row in result.rows]


def test_a_broken_peer_ends_the_demo(result: DemoResult, folder: Path) -> None:
    scores = folder / "monai-unet" / "validation" / "scores.json"
    kept, config = scores.read_bytes(), folder / "monai-unet" / "config.toml"
    text = config.read_text()
    scores.unlink()
    config.write_text("nonsense")
    try:
        with pytest.raises(TrainingError, match=r"MONAI UNet in .*monai-unet broke down: .* is not valid TOML: "):
            demo(folder, size=TINY)
    finally:
        config.write_text(text)
        scores.write_bytes(kept)
    assert not multiprocessing.active_children()
