"""The work of `tokenseg train`: from a dataset folder to a run folder with a model and its validation.

What a run folder holds stands in `saved_model/run_folder.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from lightning_fabric import Fabric
from torch import nn

from tokenseg.device import choose_device
from tokenseg.evaluation.results import Evaluation
from tokenseg.model.network import TokenSeg
from tokenseg.options import TrainOptions
from tokenseg.progress import Progress, Silent
from tokenseg.saved_model.checkpoint import MakeNetwork
from tokenseg.saved_model.run_folder import RunFolder
from tokenseg.training.fold import PreparedFold, prepare_fold
from tokenseg.training.launch import first_then_others, open_fabric
from tokenseg.training.loop import Fit, fit, measure_step_seconds
from tokenseg.training.setup import Setup, extended, make_setup, may_resume, read_setup, write_facts
from tokenseg.training.validate import finish, save_trained


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    run: Path
    """The run folder."""
    steps: int
    """Training steps in all."""
    evaluation: Evaluation
    """Scores of the fold's validation cases, on their own grids."""


def train(
    dataset_path: Path,
    run_path: Path,
    options: TrainOptions,
    progress: Progress | None = None,
    make_network: MakeNetwork = TokenSeg,
) -> TrainResult:
    """Train on one fold of a dataset and validate on the rest of it.

    Args:
        dataset_path: Dataset folder in a known layout.
        run_path: Run folder; must be new, unless resuming.
        options: As on the command line.
        progress: Told about the work; of several processes only the first one tells.
        make_network: Makes the network; a benchmark gives another one, which must return a `TokenSegOutput`.

    Raises:
        TokenSegError: Dataset, settings or run folder cannot be used, or training broke down.
    """
    options.check()
    run, fabric = RunFolder(run_path), _open_fabric(options)
    progress = (progress or Silent()) if fabric.is_global_zero else Silent()
    # The first process writes the run folder and the cache; others read what it wrote.
    setup = first_then_others(fabric, lambda: _settle(dataset_path, run, options, fabric, progress))
    fold = first_then_others(fabric, lambda: _prepare(setup, run, progress))
    network = _new_network(setup, make_network)
    work = _fit_of(fold, setup, run, fabric, progress)
    setup = _settle_steps(work, network, setup, run)
    fit(work, network, cast("int", setup.total_steps))
    evaluation = first_then_others(
        fabric, lambda: finish(network, fabric.device, setup, run, progress) if fabric.is_global_zero else None
    )
    return TrainResult(run_path, cast("int", setup.total_steps), cast("Evaluation", fabric.broadcast(evaluation)))


def _open_fabric(options: TrainOptions) -> Fabric:
    device = choose_device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return open_fabric(device)


def _settle(dataset_path: Path, run: RunFolder, options: TrainOptions, fabric: Fabric, progress: Progress) -> Setup:
    if fabric.is_global_zero and not may_resume(run, options, progress):
        return make_setup(dataset_path, run, options, progress)
    return extended(read_setup(dataset_path, run, progress), run, options.max_steps, progress)


def _prepare(setup: Setup, run: RunFolder, progress: Progress) -> PreparedFold:
    return prepare_fold(setup.dataset, setup.split, setup.config, run.cache, progress)


def _new_network(setup: Setup, make_network: MakeNetwork) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setup.options.seed)
        return make_network(setup.config.network, setup.config.plan)


def _fit_of(fold: PreparedFold, setup: Setup, run: RunFolder, fabric: Fabric, progress: Progress) -> Fit:
    return Fit(
        fabric=fabric,
        plan=setup.config.plan,
        config=setup.config.train,
        batches=fold.batches(setup.config, setup.options.seed, (fabric.global_rank, fabric.world_size)),
        validation=fold.val,
        run=run,
        progress=progress,
        save_weights=lambda trained: save_trained(trained, setup, run),
    )


def _settle_steps(work: Fit, network: nn.Module, setup: Setup, run: RunFolder) -> Setup:
    """Fix the number of steps, from a timed warm-up or as planned, and save it with the run."""
    if setup.total_steps is not None:
        return setup
    minutes, total_steps = setup.options.max_minutes, setup.config.plan.steps
    if minutes is not None:
        seconds = measure_step_seconds(work, network)
        total_steps = max(1, int(minutes * 60 / seconds))
        work.progress.message(f"{seconds:.3f} s a step: {total_steps} steps in {minutes:g} minutes")
    setup = replace(setup, total_steps=int(work.fabric.broadcast(total_steps)))
    if work.fabric.is_global_zero:
        write_facts(run, setup)
    return setup
