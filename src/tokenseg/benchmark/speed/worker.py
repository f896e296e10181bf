"""The process in which one network is measured: `python -m tokenseg.benchmark.speed.worker JOB.json RESULT.json`.

A process of its own, because memory can only be told apart in a fresh one, and because one network that needs too much
must not take the others with it. On a GPU neither is so, and the jobs are done by the command itself.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

from tokenseg.benchmark.speed.end_to_end import stage_seconds
from tokenseg.benchmark.speed.latency import interleave
from tokenseg.benchmark.speed.memory import peak_mib
from tokenseg.benchmark.speed.passes import Setting, count, forward_pass, load_training_libraries, training_step

_NO_MEMORY = ("can't allocate memory", "out of memory", "not enough memory")


@dataclass(frozen=True)
class Job:
    """What one process is to do."""

    task: Literal["latency", "memory", "end-to-end"]
    networks: tuple[str, ...]
    """For `latency` in turn, the first is the one of the row; else one."""
    setting: Setting
    rounds: int = 1
    training: bool = False
    """Training steps instead of forward passes."""


@dataclass(frozen=True)
class Result:
    """What came of a job."""

    fault: str = ""
    """Why there is no figure, in one line; empty if there is one."""
    seconds: list[list[float]] = field(default_factory=list)
    """`latency`: for each network, `end-to-end`: for each stage, round by round."""
    parameters_m: float | None = None
    gflop: float | None = None
    peak_mib: float | None = None


def to_json(job: Job) -> str:
    """A job as text."""
    return json.dumps(asdict(job) | {"setting": job.setting._asdict()})


def from_json(text: str) -> Job:
    """A job from its text."""
    values = json.loads(text)
    return Job(**values | {"setting": Setting(**values["setting"]), "networks": tuple(values["networks"])})


def do(job: Job) -> Result:
    """Do a job; what a network cannot do is in the result, not raised."""
    torch.set_num_threads(job.setting.threads)
    try:
        return {"latency": _latency, "memory": _memory, "end-to-end": _end_to_end}[job.task](job)
    except (ImportError, MemoryError, RuntimeError, ValueError) as error:
        return Result(fault=fault_text(error))


def fault_text(error: Exception) -> str:
    """What went wrong with a network, in one line."""
    if isinstance(error, MemoryError) or any(text in str(error).lower() for text in _NO_MEMORY):
        return "does not fit into memory"
    lines = str(error).strip().splitlines()
    return f"not possible: {lines[0]}" if lines else f"not possible: {type(error).__name__}"


def _latency(job: Job) -> Result:
    make = training_step if job.training else forward_pass
    timed = [make(name, job.setting) for name in job.networks]
    counted = None if job.training else count(timed[0].network, job.setting)
    for each in timed:
        each.run()
    seconds = interleave([each.run for each in timed], job.rounds)
    return Result(
        seconds=seconds,
        parameters_m=counted and counted.parameters_m,
        gflop=counted and counted.gflop,
    )


def _memory(job: Job) -> Result:
    if job.training:
        load_training_libraries()
    timed = (training_step if job.training else forward_pass)(job.networks[0], job.setting)
    if job.setting.device == "cuda":  # pragma: no cover - cuda
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        timed.run()
        return Result(peak_mib=(torch.cuda.max_memory_allocated() - before) / 2**20)
    if job.setting.engine == "torch-compile":
        # The compiler's own memory is none of the network's.
        timed.run()
    return Result(peak_mib=peak_mib(timed.run))


def _end_to_end(job: Job) -> Result:
    device = torch.device(job.setting.device)
    seconds = stage_seconds(job.networks[0], device, job.rounds)
    return Result(seconds=list(seconds.values()))


def main(arguments: Sequence[str]) -> None:
    """Read the job, do it, write the result."""
    job_path, result_path = map(Path, arguments)
    result = do(from_json(job_path.read_text(encoding="utf-8")))
    result_path.write_text(json.dumps(asdict(result)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
