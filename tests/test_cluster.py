"""A cohort on a Ray cluster of this machine: workers die, and every case is done exactly once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from phantoms import phantom, write_nifti
from test_docs import commands
from tokenseg.cli import main
from tokenseg.cluster import on_cluster
from tokenseg.engine import EngineChoice
from tokenseg.errors import TokenSegError
from tokenseg.privacy import shown_name
from toy_models import save_untrained

pytest.importorskip("ray")
pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")

CASES, SHAPE = 8, (80, 80, 80)
THREADS = str(max(1, (os.cpu_count() or 1) // 2))
"""Of two workers."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("mine")
    for number in range(CASES):
        write_nifti(place / "scans" / f"scan{number}.nii.gz", phantom(number, shape=SHAPE)[0][0])
    write_nifti(place / "one" / "scan.nii.gz", phantom(0, shape=SHAPE)[0][0])
    save_untrained(place / "model")
    return place


def segmenting(place: Path, scans: str, out: str, engine: str) -> subprocess.Popen[str]:
    """The command of the page, with other names."""
    (documented,) = [command for command in commands("distributed.md") if "--engine ray" in command]
    names = {"tokenseg": f"{sys.executable} -m tokenseg", "SCANS": scans, "masks": out, "run": "model", "8": THREADS}
    command = " ".join(names.get(word, word) for word in documented.split()).replace("ray", engine).split()
    command += ["--device", "cpu"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(command, cwd=place, env=environment, text=True, stdout=-1, stderr=-1)


def busy_workers(command: subprocess.Popen[str]) -> list[int]:
    """Processes of the command's cluster that have a case in hand."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title, parents = (folder / "cmdline").read_bytes(), ancestors(int(folder.name))
        except (OSError, IndexError):
            continue  # it ended
        if title.startswith(b"ray::_Worker.segment") and command.pid in parents:
            found.append(int(folder.name))
    return found


def ancestors(pid: int) -> list[int]:
    found = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        found.append(pid)
    return found


def done(out: Path) -> list[dict[str, object]]:
    path = out / "status.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def masks(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.nii.gz"))}


@pytest.mark.long
def test_every_case_once_though_a_worker_is_killed(place):
    command = segmenting(place, "scans", "ray", "ray")
    try:
        killed = 0
        while command.poll() is None and not killed:
            if len(done(place / "ray")) >= 2:  # midway
                for pid in busy_workers(command)[:1]:
                    os.kill(pid, signal.SIGKILL)
                    killed = pid
            time.sleep(0.02)
        printed, said = command.communicate(timeout=300)
    finally:
        command.kill()
    assert command.returncode == 0, said
    assert killed
    assert said.count("its worker died; once more") == 1
    assert "workers: 2, machines: 1" in said
    assert printed.count("scan") == CASES
    counts = Counter(line["case"] for line in done(place / "ray"))
    assert counts == {shown_name(f"scan{number}", show_names=False): 1 for number in range(CASES)}
    assert {line["state"] for line in done(place / "ray")} == {"done"}

    # The same masks as without a cluster, and then nothing is left to do for one.
    for engine in ("auto", "ray"):
        here = segmenting(place, "scans", "here", engine)
        _, said = here.communicate(timeout=300)
        assert here.returncode == 0, said
    assert "workers:" not in said
    assert len(done(place / "here")) == CASES
    assert masks(place / "ray") == masks(place / "here")


@pytest.mark.long
def test_a_case_that_kills_every_worker_fails_and_says_so(place):
    command = segmenting(place, "one", "deadly", "ray")
    try:
        deaths = set()
        while command.poll() is None:
            for pid in set(busy_workers(command)) - deaths:
                os.kill(pid, signal.SIGKILL)
                deaths.add(pid)
            time.sleep(0.02)
        _, said = command.communicate(timeout=300)
    finally:
        command.kill()
    assert command.returncode == 1, said
    assert len(deaths) == 3
    assert "3 of the workers that computed it died" in said
    (line,) = done(place / "deadly")
    assert line["state"] == "failed"
    assert not masks(place / "deadly")


@pytest.mark.long
def test_workers_that_cannot_start_end_the_command(place):
    script = """
from pathlib import Path
from tokenseg.checkpoint import load_model
from tokenseg.cluster import on_cluster
from tokenseg.engine import choose_engine
from tokenseg.errors import TokenSegError
from tokenseg.segment import segment_files
chosen = choose_engine([load_model("model")], "torch")
try:
    segment_files(chosen.models, Path("scans"), Path("none"), compute=on_cluster([Path("gone")], chosen, None))
except TokenSegError as error:
    print(error)
"""
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=place, capture_output=True, text=True, timeout=300, check=True
    )
    assert "3 workers of the cluster died before they were ready" in ran.stdout
    assert "model gone does not exist" in ran.stdout
    assert not masks(place / "none")


def test_one_scan_needs_no_cluster(place, capsys):
    scan = str(place / "scans" / "scan0.nii.gz")
    code = main(["segment", scan, str(place / "mask.nii.gz"), "--model", str(place / "model"), "--engine", "ray"])
    assert code == 2
    assert "a single scan needs no cluster" in capsys.readouterr().err


def test_without_the_extra_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("tokenseg.cluster.find_spec", lambda name: None)
    with pytest.raises(TokenSegError, match=r"pip install 'tokenseg\[cluster\]'"):
        on_cluster([], EngineChoice([], "torch", "fp32", ""), None)
