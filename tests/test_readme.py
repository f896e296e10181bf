"""The README's commands run, and its figures are those of the committed rows."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from phantoms import write_msd
from tokenseg.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """Every `tokenseg` command in a shell block, without its comment."""
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("tokenseg ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def test_first_command_stands_early() -> None:
    assert next(number for number, line in enumerate(README.splitlines(), 1) if line.startswith("make ")) <= 25
    assert len(README.splitlines()) <= 90


def test_every_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verbs = [command[0] for command in commands()]
    assert verbs == ["train", "segment", "evaluate", "tokens", "info"]
    write_msd(tmp_path / "DATASET", 5)
    shutil.copytree(tmp_path / "DATASET" / "imagesTr", tmp_path / "SCANS")
    monkeypatch.chdir(tmp_path)
    places = {"REFERENCES": "DATASET", "60": "0.02", "SCAN.nii.gz": "SCANS/case_000.nii.gz"}
    for command in commands():
        tiny = ["--preset", "tiny", "--threads", "1"] if command[0] == "train" else []
        assert main([places.get(word, word) for word in command] + tiny) == 0
    assert len(list((tmp_path / "masks").glob("*.nii.gz"))) == 5
    assert all((tmp_path / name).is_file() for name in ("scores.json", "scores.html", "tokens.png"))


def test_tables_come_from_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import tables

    monkeypatch.delitem(sys.modules, "tables")
    assert tables.fill(README) == README
    assert tables.speed_table() in README
    assert tables.accuracy_table() in README
    assert tables.demo_table() in README
