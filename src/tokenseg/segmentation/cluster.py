"""A cohort on the machines of a Ray cluster, or in several processes of this one (extra `cluster`).

Each worker loads the models once and takes a case whenever it is free, so no more cases are under way than there are
workers. Whatever becomes of workers, the cohort gets every result exactly once: the case of a worker that died goes
to another, which replaces what the first may have written.

Folders must be the same for all machines. Ray sends Python objects between processes of one user as pickles; nothing of
that is kept, and weights are read from safetensors here as elsewhere.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch

from tokenseg.config import EngineName
from tokenseg.errors import ConfigError, TokenSegError
from tokenseg.files import remove_leftovers_of
from tokenseg.inference.engine import EngineChoice, choose_engine
from tokenseg.progress import Progress, Silent
from tokenseg.saved_model.checkpoint import load_model
from tokenseg.saved_model.ensemble import Ensemble
from tokenseg.segmentation.cohort import Cohort
from tokenseg.segmentation.output_files import no_findings_file, probabilities_file, quality_file
from tokenseg.segmentation.segment import Compute
from tokenseg.segmentation.stages import (
    CaseToDo,
    FailedCase,
    WrittenCase,
    compute_mask,
    read_case,
    write_case,
)
from tokenseg.stopwatch import Stopwatch

MAX_DEATHS = 3
"""Workers that may die over a case, or before they are ready one after the other, until it is given up."""
_STORE_BYTES = 80 << 20
"""What Ray keeps for results, which are small here; its own choice would be a third of the machine."""
_ANSWER_S = 5.0
"""Within which a cluster must answer; Ray itself would try for minutes."""
_DIED = (
    f"{MAX_DEATHS} of the workers that computed it died, perhaps for want of memory: give --max-memory, or leave out "
    "--engine ray"
)

RayThing: TypeAlias = Any
"""The module, a worker's handle or a promised answer; Ray's types say no more."""


class Recipe(NamedTuple):
    """How a worker makes the models that the command has."""

    models: tuple[Path, ...]
    device: str
    engine: EngineName
    threads: int
    """CPU threads of a worker."""
    folder: Path
    """Where paths that are not absolute begin."""


def on_cluster(models: Sequence[Path], chosen: EngineChoice) -> Compute:
    """Give what does the cases of a cohort on Ray's cluster, for `segment_files`.

    The cluster is the one that `RAY_ADDRESS` names; without it, one of this machine's processes is made for the time.
    A worker has as many CPU threads as torch has here, and takes as many cores, or one GPU.

    Args:
        models: Folders or names that they were loaded from.
        chosen: How they compute here, and so on each worker.

    Raises:
        ConfigError: The extra `cluster` is not installed.
    """
    if find_spec("ray") is None:
        raise ConfigError("--engine ray needs the extra 'cluster': pip install 'tokenseg[cluster]'")
    device = chosen.models[0].device.type
    return partial(
        compute_on_cluster, recipe=Recipe(tuple(models), device, chosen.engine, torch.get_num_threads(), Path.cwd())
    )


def compute_on_cluster(cohort: Cohort, recipe: Recipe) -> None:
    """Do all cases that are left.

    Raises:
        ConfigError: The cluster cannot be used, or has no room for a worker.
        TokenSegError: No worker comes to be ready.
    """
    cases = cohort.left()
    first = next(cases, None)
    if first is None:
        return
    with _connected() as ray:
        hand_out(chain([first], cases), cohort, _Workers.started(ray, cohort, recipe))


def hand_out(cases: Iterator[tuple[int, CaseToDo]], cohort: Cohort, workers: _Workers) -> None:
    """Give each idle worker a case, and cases of workers that died to others."""
    deaths: Counter[int] = Counter()
    waiting = next(cases, None)
    while waiting is not None or workers.is_busy:
        while waiting is not None and workers.idle:
            workers.give(_Numbered(*waiting))
            waiting = next(cases, None)
        ended = workers.wait()
        if ended is None:
            continue
        case, result = ended
        if result is None:
            deaths[case.number] += 1
            for place in (no_findings_file, quality_file, probabilities_file, Path):
                remove_leftovers_of(place(case.to_do.target))
        if result is None and deaths[case.number] < MAX_DEATHS:
            cohort.job.progress.message(f"{case.to_do.shown}: its worker died; once more")
            cases = chain([case], cases)
            waiting = waiting or next(cases)
            continue
        if result is None:
            result = write_case(FailedCase(case.to_do, _DIED, Stopwatch()), cohort.job.ensemble)
        cohort.finish(case.number, *result)


class _Worker:
    """Lives in a process of its own, as a Ray actor."""

    def __init__(self, recipe: Recipe) -> None:
        os.chdir(recipe.folder)
        torch.set_num_threads(recipe.threads)
        models = [load_model(path, recipe.device) for path in recipe.models]
        self._ensemble = Ensemble.of(choose_engine(models, recipe.engine, threads=recipe.threads).models)

    def ready(self) -> None:
        """Answers once the models are loaded."""

    def segment(self, to_do: CaseToDo) -> WrittenCase:
        computed = compute_mask(read_case(to_do, self._ensemble, Silent()), self._ensemble, Silent())
        return write_case(computed, self._ensemble)


class _Numbered(NamedTuple):
    """A case with its number in the cohort."""

    number: int
    to_do: CaseToDo


class _Task(NamedTuple):
    """What a worker was told to do; no case for a worker that is getting ready."""

    worker: RayThing
    case: _Numbered | None = None


@dataclass(eq=False)
class _Workers:
    """The workers: idle, getting ready, or busy with a case."""

    ray: RayThing
    make: Callable[[], RayThing]
    """Starts a worker, which then waits for a machine that has room for it."""
    progress: Progress
    idle: list[RayThing] = field(default_factory=list)
    tasks: dict[RayThing, _Task] = field(default_factory=dict)
    """By the answer that is promised."""
    failed_starts: int = 0
    """One after the other."""

    @classmethod
    def started(cls, ray: RayThing, cohort: Cohort, recipe: Recipe) -> _Workers:
        """Start as many workers as all machines together have room for."""
        key, each = ("GPU", 1) if recipe.device == "cuda" else ("CPU", recipe.threads)
        has = [int(node["Resources"].get(key, 0)) for node in ray.nodes() if node["Alive"]]
        count = sum(there // each for there in has)
        if not count:
            raise ConfigError(f"a worker takes {each} {key}, the machines of the cluster have {sorted(has)}")
        needs = {"num_gpus": 1} if key == "GPU" else {"num_cpus": each}
        make = partial(ray.remote(_Worker).options(**needs).remote, recipe)
        workers = cls(ray, make, cohort.job.progress)
        workers.progress.message(f"workers: {count}, machines: {len(has)}")
        workers.start(count)
        return workers

    @property
    def is_busy(self) -> bool:
        """Whether a case is under way."""
        return any(task.case is not None for task in self.tasks.values())

    def start(self, count: int) -> None:
        for _ in range(count):
            worker = self.make()
            self.tasks[worker.ready.remote()] = _Task(worker)

    def give(self, case: _Numbered) -> None:
        worker = self.idle.pop()
        self.tasks[worker.segment.remote(case.to_do)] = _Task(worker, case)

    def wait(self) -> tuple[_Numbered, WrittenCase | None] | None:
        """Wait until a worker is done; with which case, and its result or None where the worker died over it."""
        (ended,), _ = self.ray.wait(list(self.tasks), num_returns=1)
        task = self.tasks.pop(ended)
        result = None
        try:
            result = self.ray.get(ended)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from None  # a worker says what is wrong; it did not die
        except self.ray.exceptions.RayError as error:
            self._replace(task, error)
        else:
            self.idle.append(task.worker)
            self.failed_starts = self.failed_starts if task.case else 0
        return None if task.case is None else (task.case, result)

    def _replace(self, task: _Task, error: Exception) -> None:
        self.ray.kill(task.worker)  # it may only be out of reach, and must not write any more
        if task.case is not None:
            # Those that are idle may have died with it, which would show only once they had a case.
            self.start(1 + len(self.idle))
            self.idle.clear()
            return
        self.failed_starts += 1
        if self.failed_starts < MAX_DEATHS:
            self.start(1)
            return
        reason = f"{MAX_DEATHS} workers died before they were ready: {str(error).strip().splitlines()[-1]}"
        if not self.tasks and not self.idle:
            raise TokenSegError(reason)
        self.progress.message(f"{reason}; going on with fewer")


@contextmanager
def _connected() -> Iterator[RayThing]:
    """Ray, without its usage statistics; a cluster that was made for this ends with it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    address = os.environ.get("RAY_ADDRESS", "local")
    connect = partial(ray.init, log_to_driver=False, configure_logging=False)
    if address == "local":
        # Ray would else take any cluster on this machine, that of another command too, and end with it.
        connect = partial(connect, address="local", include_dashboard=False, object_store_memory=_STORE_BYTES)
    else:
        _check_answers(address)
    try:
        connect()
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ConfigError(f"Ray's cluster cannot be used: {str(error).strip().splitlines()[0]}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"RAY_ADDRESS={address}: no cluster answers there ({error}); give HOST:PORT as `ray start` prints it, or "
            "auto for the one on this machine"
        ) from error
