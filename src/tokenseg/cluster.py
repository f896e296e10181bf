"""A cohort on the machines of a Ray cluster, or in several processes of this one (extra `cluster`).

Each worker loads the models once and takes a case whenever it is free, so no more cases are under way than there are
workers. Whatever becomes of workers, every case ends up in the ledger exactly once: the case of a worker that died goes
to another, which replaces what the first may have written.

Folders must be the same for all machines. Ray sends Python objects between processes of one user as pickles; nothing of
that is kept, and weights are read from safetensors here as elsewhere.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch

from tokenseg.case_work import Work, compute_mask, read_case, write_case
from tokenseg.checkpoint import load_model
from tokenseg.config import EngineName
from tokenseg.engine import EngineChoice, choose_engine
from tokenseg.errors import ConfigError, TokenSegError
from tokenseg.ledger import Ledger
from tokenseg.outputs import CaseResult
from tokenseg.progress import Silent
from tokenseg.segment import Compute
from tokenseg.status import CaseStatus

MAX_DEATHS = 3
"""Workers that may die over a case, or before they are ready one after the other, until it is given up."""
_STORE_BYTES = 80 << 20
"""Ray keeps this much memory for results, which are small here; its own choice would be a third of the machine."""
_DIED = (
    "{} of the workers that computed it died, perhaps for want of memory; see Ray's logs, or do it without a cluster"
)

Ray: TypeAlias = Any
"""The module."""
Actor: TypeAlias = Any
Ref: TypeAlias = Any
Written: TypeAlias = tuple[CaseResult, CaseStatus]


class Recipe(NamedTuple):
    """How a worker makes the models that the command has."""

    models: tuple[Path, ...]
    device: str
    engine: EngineName
    threads: int | None
    """CPU threads a worker; None takes all of the smallest machine's cores."""
    folder: Path
    """Where paths that are not absolute begin."""


def on_cluster(models: Sequence[Path], chosen: EngineChoice, threads: int | None) -> Compute:
    """Give what does the cases of a cohort on Ray's cluster, for `segment_files`.

    The cluster is the one that `RAY_ADDRESS` names or that runs on this machine; where there is none, one of this
    machine's processes is made for the time.

    Args:
        models: Folders or names that they were loaded from.
        chosen: How they compute here, and so on each worker.
        threads: CPU threads of a worker, which takes as many cores; on a GPU one worker takes one GPU.

    Raises:
        ConfigError: The extra `cluster` is not installed.
    """
    if find_spec("ray") is None:
        raise ConfigError("--engine ray needs the extra 'cluster': pip install 'tokenseg[cluster]'")
    device = chosen.models[0].device.type
    return partial(_compute, recipe=Recipe(tuple(models), device, chosen.engine, threads, Path.cwd()))


def _compute(ledger: Ledger, recipe: Recipe) -> None:
    left = _Left(ledger.left())
    if left.is_empty():
        return
    deaths: Counter[int] = Counter()
    with _connected() as ray:
        staff = _Staff.hire(ray, ledger, recipe)
        while staff.is_busy or not left.is_empty():
            while staff.idle and not left.is_empty():
                staff.give(left.take())
            ended = staff.wait()
            if ended is None:
                continue
            job, result = ended
            deaths[job.number] += result is None
            if result is None and deaths[job.number] < MAX_DEATHS:
                ledger.progress.message(f"{job.work.shown}: its worker died; once more")
                left.put_back(job)
                continue
            if result is None:
                job.work.error = _DIED.format(MAX_DEATHS)
                result = write_case(job.work, ledger.models)
            ledger.finish(job.number, *result)


class _Job(NamedTuple):
    """A case with its number in the ledger."""

    number: int
    work: Work


class _Left:
    """Cases to do, asked for one at a time: whether each was done before takes reading it."""

    def __init__(self, cases: Iterator[tuple[int, Work]]) -> None:
        self._cases = cases
        self._held: list[_Job] = []

    def is_empty(self) -> bool:
        if not self._held and (following := next(self._cases, None)) is not None:
            self._held.append(_Job(*following))
        return not self._held

    def take(self) -> _Job:
        return self._held.pop()

    def put_back(self, job: _Job) -> None:
        self._held.append(job)


class _Worker:
    """Lives in a process of its own, as a Ray actor."""

    def __init__(self, recipe: Recipe, settings: Sequence[str]) -> None:
        os.chdir(recipe.folder)
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        models = [load_model(path, recipe.device) for path in recipe.models]
        self._models = choose_engine(models, recipe.engine, threads=recipe.threads).models
        self._settings = settings

    def ready(self) -> None:
        """Answers once the models are loaded."""

    def segment(self, work: Work) -> Written:
        read_case(work, self._models, self._settings, Silent())
        compute_mask(work, self._models, Silent())
        return write_case(work, self._models)


class _Task(NamedTuple):
    """What a worker was told to do; no job for a worker that is getting ready."""

    worker: Actor
    job: _Job | None = None


@dataclass(eq=False)
class _Staff:
    """The workers: idle, getting ready, or busy with a case."""

    ray: Ray
    make: Callable[[], Actor]
    """Starts a worker, which then waits for a machine that has room for it."""
    idle: list[Actor] = field(default_factory=list)
    tasks: dict[Ref, _Task] = field(default_factory=dict)
    failed_starts: int = 0
    """One after the other."""

    @classmethod
    def hire(cls, ray: Ray, ledger: Ledger, recipe: Recipe) -> _Staff:
        """Start as many workers as all machines together have room for."""
        key = "GPU" if recipe.device == "cuda" else "CPU"
        has = [int(node["Resources"].get(key, 0)) for node in ray.nodes() if node["Alive"]]
        each = 1 if key == "GPU" else recipe.threads or min((count for count in has if count), default=1)
        count = sum(there // each for there in has)
        if not count:
            raise ConfigError(f"a worker takes {each} {key}, the machines of the cluster have {sorted(has)}")
        needs = {"num_gpus": 1} if key == "GPU" else {"num_cpus": each}
        recipe = recipe if key == "GPU" else recipe._replace(threads=each)
        make = partial(ray.remote(_Worker).options(**needs).remote, recipe, ledger.settings)
        staff = cls(ray, make)
        for _ in range(count):
            staff.start()
        ledger.progress.message(f"workers: {count}, machines: {len(has)}")
        return staff

    @property
    def is_busy(self) -> bool:
        """Whether a case is under way."""
        return any(task.job is not None for task in self.tasks.values())

    def start(self) -> None:
        worker = self.make()
        self.tasks[worker.ready.remote()] = _Task(worker)

    def give(self, job: _Job) -> None:
        worker = self.idle.pop()
        self.tasks[worker.segment.remote(job.work)] = _Task(worker, job)

    def wait(self) -> tuple[_Job, Written | None] | None:
        """Wait until a worker is done; with which case, and its result or None where the worker died over it."""
        (ended,), _ = self.ray.wait(list(self.tasks), num_returns=1)
        task = self.tasks.pop(ended)
        result = None
        try:
            result = self.ray.get(ended)
        except self.ray.exceptions.RayTaskError:
            raise  # a bug, not a death
        except self.ray.exceptions.RayError as error:
            self._replace(task, error)
        else:
            self.idle.append(task.worker)
            self.failed_starts = 0
        return None if task.job is None else (task.job, result)

    def _replace(self, task: _Task, error: Exception) -> None:
        self.failed_starts += task.job is None
        if self.failed_starts >= MAX_DEATHS:
            reason = str(error).strip().splitlines()[-1]
            raise TokenSegError(f"{MAX_DEATHS} workers of the cluster died before they were ready: {reason}")
        self.start()


@contextmanager
def _connected() -> Iterator[Ray]:
    """Ray, without its usage statistics; a cluster that was made for this ends with it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    connect = partial(ray.init, log_to_driver=False, configure_logging=False)
    try:
        try:
            connect(address="auto")
        except ConnectionError:
            connect(address="local", include_dashboard=False, object_store_memory=_STORE_BYTES)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ConfigError(f"Ray's cluster cannot be used: {str(error).strip().splitlines()[0]}") from error
    try:
        yield ray
    finally:
        ray.shutdown()
