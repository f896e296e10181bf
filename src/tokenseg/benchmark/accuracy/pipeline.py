"""The part that all networks of a benchmark share: dataset, plan, prepared cases, and the training of one of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch
from torch import nn

from tokenseg.benchmark.accuracy.budget import AccuracyOptions
from tokenseg.benchmark.accuracy.calibration import Build
from tokenseg.benchmark.accuracy.variants import VARIANTS, count_parameters
from tokenseg.benchmark.peers import PEERS, make_peer
from tokenseg.config import NetworkConfig, Plan, RunConfig, read_overrides, read_run_config, write_run_config
from tokenseg.datasets.cases import Dataset, Split
from tokenseg.datasets.layouts import open_dataset
from tokenseg.datasets.splits import split_folds
from tokenseg.device import bfloat16_helps, choose_device
from tokenseg.errors import ConfigError, FileError
from tokenseg.files import check_writable, write_atomically
from tokenseg.messages import first_few
from tokenseg.options import TrainOptions
from tokenseg.progress import Progress, Silent
from tokenseg.saved_model.checkpoint import MakeNetwork
from tokenseg.saved_model.run_folder import RunFolder
from tokenseg.training.csv_log import read_log
from tokenseg.training.fold import prepare_fold
from tokenseg.training.launch import open_fabric
from tokenseg.training.loop import Fit
from tokenseg.training.setup import plan_dataset
from tokenseg.training.train import TrainResult, train

_SETTINGS_NAME = "benchmark.json"


@dataclass(frozen=True)
class Pipeline:
    """Everything that does not depend on the network."""

    dataset: Dataset
    folder: Path
    """OUT, which holds the settings, the prepared cases and the runs."""
    overrides: dict[str, dict[str, Any]]
    """The user's settings, for all networks alike."""
    config: RunConfig
    """Plan, training, and the settings of the reference network."""
    splits: tuple[Split, ...]
    threads: int
    device: torch.device


@dataclass(frozen=True)
class Training:
    """Which training of a network is asked for."""

    network: str
    fold: int
    seed: int
    steps: int
    learning_rate: float


@dataclass(frozen=True)
class Trained:
    """A finished training."""

    result: TrainResult
    num_parameters: int
    seconds: float
    """Time of all training steps, those before an interruption included."""


class _Muffled(Silent):
    """Passes on how far a training is and its warnings; what it says of the plan is the same for each."""

    def __init__(self, progress: Progress) -> None:
        self.stage, self.advance = progress.stage, progress.advance  # type: ignore[method-assign]
        self._progress = progress

    def message(self, text: str) -> None:
        """Pass on a warning."""
        if text.startswith("warning"):
            self._progress.message(text)


def open_pipeline(dataset_path: Path, folder: Path, options: AccuracyOptions, progress: Progress) -> Pipeline:
    """Plan the dataset, or go on with what an earlier call planned in `folder`.

    Raises:
        TokenSegError: Dataset or settings cannot be used, a network or fold does not exist, or `folder` holds a
            benchmark with other settings, or something else.
    """
    for name in options.networks:
        if name not in VARIANTS and name not in PEERS:
            raise ConfigError(f"--networks {name}: no such network; choose from {', '.join((*VARIANTS, *PEERS))}")
    dataset = open_dataset(dataset_path)
    splits = split_folds(dataset)
    for option, fold in (("fold", options.fold), ("choosing-fold", options.choosing_fold)):
        if fold >= len(splits):
            raise ConfigError(f"--{option} {fold}: the dataset has folds 0 to {len(splits) - 1}")
    overrides = read_overrides(options.config) if options.config else {}
    _check_same(folder, dataset, overrides, options)
    path = RunFolder(folder).config
    if not path.exists():
        write_run_config(path, plan_dataset(dataset, "small", overrides, progress)[0])
    torch.set_num_threads(options.threads)
    device = choose_device("auto")
    return Pipeline(dataset, folder, overrides, read_run_config(path), splits, options.threads, device)


def prepare(pipeline: Pipeline, fold: int, progress: Progress) -> Fit:
    """Prepare the cases of a fold, once for all networks, and give what a training step on it needs."""
    split, config, run = pipeline.splits[fold], pipeline.config, RunFolder(pipeline.folder)
    prepared = prepare_fold(pipeline.dataset, split, config, run.cache, progress)
    return Fit(
        fabric=open_fabric(pipeline.device),
        plan=config.plan,
        config=config.train,
        batches=prepared.batches(config, seed=0),
        validation=[],
        run=run,
        progress=progress,
        save_weights=lambda _: None,
    )


def builder(pipeline: Pipeline, name: str) -> Build:
    """What builds a network as a training on this dataset would."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _maker(name)(_settings(pipeline, name), pipeline.config.plan)

    return build


def train_network(pipeline: Pipeline, training: Training, run: Path, progress: Progress) -> Trained:
    """Train and validate in the run folder `run`, going on where an earlier call was interrupted.

    Raises:
        TokenSegError: Training broke down.
        ImportError: The network's package is not installed.
        RuntimeError: The network does not fit into memory, or cannot take the window.
    """
    num_parameters: list[int] = []

    def make(config: NetworkConfig, plan: Plan) -> nn.Module:
        network = _maker(training.network)(config, plan)
        num_parameters.append(count_parameters(network))
        return network

    _share_cache(pipeline, run)
    options = TrainOptions(
        fold=training.fold,
        max_steps=training.steps,
        config=_write_overrides(pipeline, training, run),
        threads=pipeline.threads,
        seed=training.seed,
        resume=True,
    )
    result = train(pipeline.dataset.root, run, options, _Muffled(progress), make)
    seconds = sum(float(row["seconds"]) for row in read_log(RunFolder(run).log))
    return Trained(result, num_parameters[0], seconds)


def precision(device: torch.device) -> str:
    """Precision of training and validation on a device, as it stands in rows."""
    return "bf16" if bfloat16_helps(device) else "fp32"


def device_name(device: torch.device) -> str:
    """Name of a device, as it stands in rows."""
    if device.type == "cuda":  # pragma: no cover - cuda
        return torch.cuda.get_device_name(device)
    return device.type


def _check_same(folder: Path, dataset: Dataset, overrides: dict[str, dict[str, Any]], options: AccuracyOptions) -> None:
    """Refuse to mix results that do not belong together."""
    asked = {
        "dataset": dataset.root.resolve().name,
        "cases": len(dataset.cases),
        "threads": options.threads,
        "choosing_fold": options.choosing_fold,
        "config": overrides,
    }
    path = folder / _SETTINGS_NAME
    if not path.exists():
        ours = {_SETTINGS_NAME, RunFolder(folder).cache.name}
        foreign = sorted(each.name for each in folder.glob("[!.]*") if each.name not in ours)
        if foreign:
            raise ConfigError(
                f"{folder} holds files that are not of a benchmark: {first_few(foreign)}; name a new or empty folder"
            )
        check_writable(folder, folder)
        write_atomically(path, (json.dumps(asked, indent=1) + "\n").encode())
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        different = [name for name, value in asked.items() if json.loads(json.dumps(value)) != found[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(f"{path} is damaged: {error!r}; start again in a new folder") from error
    if different:
        name = different[0]
        raise ConfigError(
            f"{folder} holds a benchmark with {name} {found[name]}, now {name} is {asked[name]}; "
            "give the same, or name another folder"
        )


def _maker(name: str) -> MakeNetwork:
    # Settings of a variant are in the run's configuration, so that its model folder tells the truth.
    return VARIANTS[name].make if name in VARIANTS else make_peer(name)


def _settings(pipeline: Pipeline, name: str) -> NetworkConfig:
    config = pipeline.config.network
    return VARIANTS[name].settings(config) if name in VARIANTS else config


def _write_overrides(pipeline: Pipeline, training: Training, run: Path) -> Path:
    overrides = pipeline.overrides | {
        "train": pipeline.overrides.get("train", {}) | {"learning_rate": training.learning_rate},
        "network": _settings(pipeline, training.network).model_dump(mode="json"),
    }
    path = pipeline.folder / "settings" / f"{run.name}.toml"
    write_atomically(path, tomli_w.dumps(overrides).encode())
    return path


def _share_cache(pipeline: Pipeline, run: Path) -> None:
    """Let a run use the cases that are prepared already; where links are not allowed it prepares its own."""
    link = RunFolder(run).cache
    run.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        try:
            link.symlink_to(RunFolder(pipeline.folder).cache.resolve(), target_is_directory=True)
        except OSError:  # pragma: no cover - windows
            return
