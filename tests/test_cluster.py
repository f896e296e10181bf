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
from types import SimpleNamespace

import pytest

from phantoms import phantom, write_nifti
from test_docs import commands
from tokenseg.cli import main
from tokenseg.datasets.cases import Case
from tokenseg.errors import TokenSegError
from tokenseg.inference.engine import EngineChoice
from tokenseg.options import SegmentOptions
from tokenseg.progress import Silent
from tokenseg.segmentation.cluster import _Workers, hand_out, on_cluster
from tokenseg.segmentation.cohort import Cohort
from tokenseg.segmentation.privacy import shown_name
from tokenseg.segmentation.results import CaseResult
from tokenseg.segmentation.stages import WrittenCase
from tokenseg.segmentation.status import CaseStatus
from toy_models import job_of, save_untrained, untrained

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
            time.sleep(0.1)  # looking at all processes takes time too
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
            time.sleep(0.1)  # looking at all processes takes time too
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
from tokenseg.saved_model.checkpoint import load_model
from tokenseg.segmentation.cluster import _Workers, hand_out, on_cluster
from tokenseg.inference.engine import choose_engine
from tokenseg.errors import TokenSegError
from tokenseg.saved_model.ensemble import Ensemble
from tokenseg.segmentation.job import SegmentJob
from tokenseg.segmentation.segment import segment_files
chosen = choose_engine([load_model("model")], "torch")
try:
    job = SegmentJob(Ensemble.of(chosen.models))
    segment_files(job, Path("scans"), Path("none"), on_cluster([Path("gone")], chosen))
except TokenSegError as error:
    print(error)
"""
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=place, capture_output=True, text=True, timeout=300, check=True
    )
    assert "3 workers died before they were ready" in ran.stdout
    assert "model gone does not exist" in ran.stdout
    assert not masks(place / "none")


# ---- who gets which case, with workers that do as told


class Worker:
    """A worker's handle; what it promises is kept when `FakeRay.wait` comes to it."""

    def __init__(self, *, starts: bool = True) -> None:
        self.alive = starts
        self.ready = SimpleNamespace(remote=lambda: Promise(self, None))
        self.segment = SimpleNamespace(remote=lambda work: Promise(self, work))


class Promise:
    def __init__(self, worker: Worker, work: object) -> None:
        self.worker, self.work = worker, work


class FakeRay:
    """Promises are kept in turn; `before(promise)` may kill workers first."""

    class exceptions:  # noqa: N801 - the module's name
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            cause = OSError("no such folder")

    def __init__(self, before=lambda promise: None) -> None:
        self.before = before

    def wait(self, promises, num_returns):
        return promises[:num_returns], promises[num_returns:]

    def get(self, promise):
        self.before(promise)
        if not promise.worker.alive:
            raise self.exceptions.RayError("it died")
        if promise.work is None:
            return None
        name = promise.work.case.case_id
        if name == "bug":
            raise self.exceptions.RayTaskError
        result = CaseResult(promise.work.case, Path(name), {"l0": 1.0})
        return WrittenCase(result, CaseStatus(case=name, state="done", key=""))

    def kill(self, worker):
        worker.alive = False


class Told(Silent):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def handed_out(ray: FakeRay, names: list[str], starts: list[bool], folder: Path) -> tuple[list[str], list[str]]:
    """Cases as they stand in the status, and messages; workers start as told, and well after that."""
    cases = [Case(name, name, (folder / f"{name}.nii.gz",)) for name in names]
    told, coming, ray.workers = Told(), iter(starts), []

    def make() -> Worker:
        ray.workers.append(Worker(starts=next(coming, True)))
        return ray.workers[-1]

    cohort = Cohort(job_of(untrained(), progress=told, options=SegmentOptions(show_names=True)), cases, folder)
    workers = _Workers(ray, make, told)
    workers.start(4)
    hand_out(cohort.left(), cohort, workers)
    assert [result.case_id for result in cohort.results if result.mask is not None] == names
    return sorted(str(line["case"]) for line in done(folder)), told.messages


NAMES = [f"c{number}" for number in range(9)]


def test_cases_go_to_whoever_is_free(tmp_path):
    assert handed_out(FakeRay(), NAMES, [], tmp_path) == (NAMES, [])


def test_a_machine_that_goes_with_idle_workers_costs_its_case_one_death(tmp_path):
    deaths = []

    def before(promise: Promise) -> None:
        if promise.work is not None and not deaths:
            deaths.append(promise)
            for worker in ray.workers:
                worker.alive = False

    ray = FakeRay(before)
    assert handed_out(ray, ["last"], [], tmp_path) == (["last"], ["last: its worker died; once more"])
    assert len(ray.workers) == 8


def test_a_machine_where_nothing_starts_is_given_up_and_the_others_go_on(tmp_path):
    finished, said = handed_out(FakeRay(), NAMES, [True, True, True, False, False, False], tmp_path)
    assert finished == NAMES
    assert said == ["3 workers died before they were ready: it died; going on with fewer"]


def test_where_no_worker_starts_at_all_it_ends(tmp_path):
    with pytest.raises(TokenSegError, match="3 workers died before they were ready: it died"):
        handed_out(FakeRay(), NAMES, [False] * 20, tmp_path)
    assert "not segmented yet" in (tmp_path / "summary.csv").read_text()


def test_what_a_worker_says_is_wrong_is_raised_as_it_is(tmp_path):
    with pytest.raises(OSError, match="no such folder"):
        handed_out(FakeRay(), ["bug"], [], tmp_path)


# ---- what is refused


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:10001", "nonsense", "127.0.0.1:999999"])
def test_an_address_where_no_cluster_answers(place, address, monkeypatch, capsys):
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    words = ["segment", str(place / "scans"), str(place / "nowhere"), "--model", str(place / "model")]
    assert main([*words, "--engine", "ray"]) == 2
    assert f"RAY_ADDRESS={address}: no cluster answers there" in capsys.readouterr().err


def test_one_scan_needs_no_cluster(place, capsys):
    scan = str(place / "scans" / "scan0.nii.gz")
    code = main(["segment", scan, str(place / "mask.nii.gz"), "--model", str(place / "model"), "--engine", "ray"])
    assert code == 2
    assert "a single scan needs no cluster" in capsys.readouterr().err


def test_without_the_extra_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("tokenseg.segmentation.cluster.find_spec", lambda name: None)
    with pytest.raises(TokenSegError, match=r"pip install 'tokenseg\[cluster\]'"):
        on_cluster([], EngineChoice([], "torch", "fp32", ""))
