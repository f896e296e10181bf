"""Two processes against one: the same losses and weights, one run folder, and an end in which all take part."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from phantoms import write_msd
from plans import make_plan
from tokenseg.cli import main
from tokenseg.config import Plan
from tokenseg.errors import ConfigError
from tokenseg.saved_model.checkpoint import load_model
from tokenseg.training import launch
from tokenseg.training.csv_log import read_log

ROOT = Path(__file__).parents[1]
# Blocks that are skipped at random, coarse views with their own loss, and a codebook that restarts dead codes. The rate
# is low, so that rounding stays below the tolerance.
CONFIG = """
[plan]
window_vox = [16, 16, 16]
batch_size = {batch_size}
coarse_factor = [2, 2, 2]
[network]
widths = [8, 12, 16, 24]
blocks = [1, 2, 2, 1]
stochastic_depth = 0.5
token_width = 32
codebook_size = 64
mixer_layers = 1
[train]
learning_rate = 5e-4
"""
# Command lines one after the other, in full precision on every machine; what each process says goes to files.
SEVERAL_COMMANDS = """
import contextlib, json, os, sys
from pathlib import Path
import tokenseg.training.launch
from tokenseg.cli import main

tokenseg.training.launch.bfloat16_helps = lambda device: False
folder = Path(sys.argv[1])
for number, command in enumerate(json.loads(sys.argv[2])):
    name = f"{number}-{os.environ['RANK']}"
    with (folder / f"out-{name}").open("w") as out, (folder / f"said-{name}").open("w") as said:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
            code = main(command)
    (folder / f"code-{name}").write_text(str(code))
"""
NUM_STEPS, LONGER = 20, 24
PARTS = ("loss", "segmentation", "deep", "commitment", "score")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_msd(tmp_path_factory.mktemp("dataset") / "Phantom", 5, shape=(20, 20, 16))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for batch_size in (3, 4):
        (folder / f"{batch_size}.toml").write_text(CONFIG.format(batch_size=batch_size))
    return folder


@pytest.fixture
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def arguments(dataset: Path, run: Path, *rest: object) -> list[str]:
    return ["train", str(dataset), str(run), "--device", "cpu", "--threads", "1", *map(str, rest)]


class Told(NamedTuple):
    """Exit code of a command in one process, and what it printed."""

    code: int
    out: str
    said: str

    @classmethod
    def of(cls, folder: Path, number: int, process: int) -> Told:
        texts = [(folder / f"{kind}-{number}-{process}").read_text() for kind in ("code", "out", "said")]
        return cls(int(texts[0]), *texts[1:])


def by_torchrun(*program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


def by_srun(*program: str) -> list[Told]:
    """What two tasks told, with the variables that srun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    step = {
        "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "training", "SLURM_NODELIST": "127.0.0.1", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "1", "SLURM_NNODES": "1", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NODEID": "0", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    tasks = [
        subprocess.Popen(
            [sys.executable, *program],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | step | {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)},
        )
        for number in range(2)
    ]
    try:
        said = [task.communicate(timeout=120) for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    return [Told(task.returncode, *each) for task, each in zip(tasks, said, strict=True)]


def losses(run: Path) -> np.ndarray:
    """All parts of the loss (steps, parts)."""
    rows = read_log(run / "log.csv")
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    return np.array([[float(row[part]) for part in PARTS] for row in rows])


def assert_one_training(run: Path, other: Path, steps: int) -> None:
    ours, theirs = losses(run), losses(other)
    assert len(ours) == len(theirs) == steps
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    weights, expected = (load_file(each / "model" / "weights.safetensors") for each in (run, other))
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4, msg=name)
    assert load_model(run).facts.training["steps"] == steps
    dice = [float(read_log(each / "log.csv")[-1]["val_dice"]) for each in (run, other)]
    assert dice[0] == pytest.approx(dice[1], abs=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("_threads_as_before")
@pytest.mark.filterwarnings("ignore::FutureWarning:monai")
def test_two_processes_train_like_one_and_go_on_like_one(
    dataset: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First they refuse a batch that does not divide, in the same run folder."""
    monkeypatch.setattr(launch, "bfloat16_helps", lambda _: False)
    one, two, script = folder / "one", folder / "two", folder / "several.py"
    script.write_text(SEVERAL_COMMANDS)
    first = ["--max-steps", NUM_STEPS, "--config", folder / "4.toml"]
    further = ["--max-steps", LONGER, "--resume"]
    commands = [
        arguments(dataset, two, *first[:2], "--config", folder / "3.toml"),
        arguments(dataset, two, *first),
        arguments(dataset, two, *further),
    ]

    assert main(arguments(dataset, one, *first)) == 0
    assert main(arguments(dataset, one, *further)) == 0
    done = by_torchrun(str(script), str(folder), json.dumps(commands))
    assert done.returncode == 0, done.stderr
    refused, trained, resumed = ([Told.of(folder, number, process) for process in range(2)] for number in range(3))
    assert [told.code for told in refused] == [2, 2]
    assert refused[0].said.splitlines()[-1] == (
        "error: a batch of 3 windows does not divide among 2 processes; start 1 or 3 of them, "
        "or a new run with, say, batch_size = 4 under [plan] in a --config file"
    )
    assert refused[1].said.splitlines() == ["error: process 1: the first process failed; its message says why"]
    # Only the first process speaks.
    for told in (trained, resumed):
        assert [each.code for each in told] == [0, 0], told
        assert told[0].out.count("model: ") == 1
        assert (told[1].out, told[1].said) == ("", "")
    assert "resuming" in resumed[0].said
    assert_one_training(two, one, LONGER)


BREAKS_DOWN = """
import os, sys, time
import torch
from tokenseg.cli import main
from tokenseg.training import loop

original = loop.training_loss

def breaks_down(*arguments, **keywords):
    parts = original(*arguments, **keywords)
    breaks_down.calls += 1
    is_bad = breaks_down.calls == 3 and os.environ["SLURM_PROCID"] == "1"
    return parts._replace(total=parts.total * torch.nan) if is_bad else parts

def slowly(run, network, facts):
    time.sleep(1)
    save_model(run, network, facts)

import tokenseg.training.validate
save_model, tokenseg.training.validate.save_model = tokenseg.training.validate.save_model, slowly
breaks_down.calls = 0
loop.training_loss = breaks_down
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_loss_that_is_nan_in_one_process_ends_both_with_the_last_good_weights_saved(
    dataset: Path, folder: Path
) -> None:
    run, script = folder / "broken", folder / "broken.py"
    script.write_text(BREAKS_DOWN)
    tasks = by_srun(str(script), *arguments(dataset, run, "--max-steps", 9, "--config", folder / "4.toml"))
    assert [told.code for told in tasks] == [2, 2], tasks
    # Both know the cases of the whole batch.
    first, second = (told.said.splitlines()[-1] for told in tasks)
    assert first.startswith("error: the loss became nan on a window of case_0")
    assert second == first.replace("error: ", "error: process 1: ")
    assert len(losses(run)) == 2
    for path in (run / "state.safetensors", run / "model" / "weights.safetensors"):
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(path).values())


# What was started


SRUN = {"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NUM_NODES": "3", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NTASKS": "6"}
TORCHRUN = {"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
BATCH_SCRIPT = {"SLURM_NTASKS": "4", "SLURM_NNODES": "1", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("given", "environment", "per_node", "nodes"),
    [
        ({}, "LightningEnvironment", 1, 1),
        (TORCHRUN, "TorchElasticEnvironment", 2, 3),
        (TORCHRUN | {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, "LightningEnvironment", 1, 1),
        (SRUN, "SLURMEnvironment", 2, 3),
        # One torchrun on each node, started by srun.
        (SRUN | TORCHRUN, "TorchElasticEnvironment", 2, 3),
        # A batch script that starts one process, without srun or with.
        (BATCH_SCRIPT, "LightningEnvironment", 1, 1),
        (BATCH_SCRIPT | {"SLURM_STEP_NUM_TASKS": "1"}, "LightningEnvironment", 1, 1),
    ],
)
def test_what_a_launcher_started_is_found_out(
    given: dict[str, str], environment: str, per_node: int, nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(given, monkeypatch)
    launched = launch._launched()
    assert (type(launched.environment).__name__, launched.per_node, launched.nodes) == (environment, per_node, nodes)


@pytest.mark.parametrize(("per_node", "told"), [(None, "not given"), ("4", "4")])
def test_tasks_that_are_not_spread_evenly_are_refused(
    per_node: str | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    only({key: value for key, value in SRUN.items() if key != "SLURM_NTASKS_PER_NODE"}, monkeypatch)
    if per_node:
        monkeypatch.setenv("SLURM_NTASKS_PER_NODE", per_node)
    text = rf"srun has started 6 tasks on 3 node\(s\), --ntasks-per-node is {told}; give srun --nodes and"
    with pytest.raises(ConfigError, match=text):
        launch.open_fabric(torch.device("cpu"))


def only(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the environment have no other variables of launchers than these."""
    for name in [name for name in os.environ if name.startswith("SLURM_")] + list(TORCHRUN):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(("count", "told"), [(1, ""), (2, ""), (4, "start 1 or 2 or 3 or 6 of them, .* = 8 under")])
def test_batches_that_divide_pass(count: int, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "num_processes", lambda: count)
    plan: Plan = make_plan().model_copy(update={"batch_size": 6})
    if not told:
        launch.check_divides(plan)
        return
    with pytest.raises(ConfigError, match=told):
        launch.check_divides(plan)


def test_the_commands_of_the_page_are_right() -> None:
    """Options that exist, and arguments that are those of `tokenseg train`."""
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    commands = [
        line for block in re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL) for line in block.splitlines() if line
    ]
    assert [command.split()[0] for command in commands] == ["torchrun", "srun", "torchrun", "tokenseg"]
    for command in commands[:3]:  # the last one is run in test_cluster.py
        words = shlex.split(command)
        assert words[words.index("-m") + 1 :][:4] == ["tokenseg", "train", "DATASET", "run"]
