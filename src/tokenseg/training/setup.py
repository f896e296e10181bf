"""The setup of a run: what is settled before the first step, new or read from the run folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter

from tokenseg.about import __version__
from tokenseg.checking.findings import compare_cases
from tokenseg.config import (
    PRESETS,
    PositiveInt,
    PresetName,
    RunConfig,
    build_run_config,
    read_overrides,
    read_run_config,
    write_run_config,
)
from tokenseg.datasets.cases import Case, Dataset, Split
from tokenseg.datasets.layouts import open_dataset
from tokenseg.datasets.splits import split_folds
from tokenseg.errors import ConfigError, DataError
from tokenseg.files import check_writable, remove_leftovers, write_atomically
from tokenseg.messages import first_few
from tokenseg.options import TrainOptions
from tokenseg.planning.fingerprint import (
    CaseFingerprint,
    Fingerprint,
    check_same_scans,
    read_fingerprint,
    take_fingerprint,
)
from tokenseg.planning.planner import make_plan
from tokenseg.planning.suitability import InputFacts, summarise_inputs
from tokenseg.progress import Progress
from tokenseg.saved_model.run_folder import RunFolder
from tokenseg.training.launch import check_divides


@dataclass(frozen=True)
class Setup:
    """What is settled before the first step, and the same after a resume and in each process."""

    dataset: Dataset
    config: RunConfig
    split: Split
    options: TrainOptions
    total_steps: int | None
    """None until the timed warm-up, or the plan, has settled it."""

    @property
    def validation_cases(self) -> list[Case]:
        """Cases of the fold that are validated on, in the dataset's order."""
        held_out = set(self.split.val)
        return [case for case in self.dataset.cases if case.case_id in held_out]


def make_setup(dataset_path: Path, run: RunFolder, options: TrainOptions, progress: Progress) -> Setup:
    """Plan a new run, and write down what was settled.

    Raises:
        TokenSegError: Dataset, settings or run folder cannot be used.
    """
    overrides = read_overrides(options.config) if options.config else {}
    dataset = open_dataset(dataset_path)
    progress.message(dataset.reason)
    splits = split_folds(dataset)
    split = _choose_split(splits, options.fold)
    if options.fold == "all":
        progress.message("note: --fold all: the validation cases are the training cases; their scores flatter")
    check_writable(run.path, run.path)
    config, fingerprint = plan_dataset(dataset, options.preset, overrides, progress)
    write_atomically(run.fingerprint, fingerprint.model_dump_json(indent=1).encode())
    for finding in compare_cases(fingerprint.cases):
        progress.message(f"{finding.severity}: {finding.case_id}: {finding.text}; {finding.mend}")
    check_divides(config.plan)
    for field, reason in config.plan.reasons.items():
        progress.message(f"plan: {field}: {reason}")
    write_run_config(run.config, config)
    _write_json(run.splits, [{"train": split.train, "val": split.val} for split in splits])
    setup = Setup(dataset, config, split, options, options.max_steps)
    write_facts(run, setup)
    return setup


def plan_dataset(
    dataset: Dataset, preset: PresetName, overrides: dict[str, dict[str, Any]], progress: Progress
) -> tuple[RunConfig, Fingerprint]:
    """Read a dataset into numbers, and plan by them and the user's own settings."""
    progress.stage("reading", len(dataset.cases))
    fingerprint = take_fingerprint(dataset, lambda done, _: progress.advance(dataset.cases[done - 1].case_id))
    return build_run_config(make_plan(dataset, fingerprint), PRESETS[preset], overrides), fingerprint


def read_setup(dataset_path: Path, run: RunFolder, progress: Progress) -> Setup:
    """Read what was settled of a run.

    Raises:
        ConfigError: The run folder is damaged.
        DataError: The dataset is not the one that the run was started with.
    """
    try:
        facts = json.loads(run.facts.read_text(encoding="utf-8"))
        splits = json.loads(run.splits.read_text(encoding="utf-8"))
        given = {key: facts[key] for key in ("preset", "fold", "seed", "max_minutes")}
        options = TypeAdapter(TrainOptions).validate_python(given)
        options.check()
        threads = facts["threads"]
        split = _choose_split([Split(tuple(fold["train"]), tuple(fold["val"])) for fold in splits], options.fold)
        total_steps = TypeAdapter(PositiveInt | None).validate_python(facts["total_steps"])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"run folder {run.path} cannot be resumed: {reason}; start again in a new folder") from error
    dataset = open_dataset(dataset_path)
    absent = sorted({*split.train, *split.val} - {case.case_id for case in dataset.cases})
    if absent:
        raise DataError(
            f"run {run.path} was started on other cases: {first_few(absent)} not in {dataset_path}; "
            "give the dataset it was started with"
        )
    check_same_scans(dataset, read_fingerprint(run.fingerprint))
    if threads != torch.get_num_threads():
        progress.message(f"note: {threads} threads before, {torch.get_num_threads()} now: not bit-identical")
    config = read_run_config(run.config)
    check_divides(config.plan)
    return Setup(dataset, config, split, options, total_steps)


def may_resume(run: RunFolder, options: TrainOptions, progress: Progress) -> bool:
    """Whether there is a run to go on with.

    Raises:
        ConfigError: There is one and it was not asked for, or the folder is somebody else's.
    """
    if run.is_begun and not options.resume:
        raise ConfigError(
            f"run folder {run.path} holds a run already; add --resume to go on with it, or name another folder"
        )
    if not run.is_begun:
        run.refuse_foreign()
    remove_leftovers(run.path)
    if run.is_begun:
        progress.message(f"resuming {run.path}; settings are those of its config.toml")
    elif options.resume:
        progress.message(f"nothing to resume in {run.path}; starting a new run")
    return run.is_begun


def extended(setup: Setup, run: RunFolder, max_steps: int | None, progress: Progress) -> Setup:
    """Give a resumed run more steps where `--max-steps` asks for more.

    Raises:
        ConfigError: It asks for fewer.
    """
    before = setup.total_steps
    if max_steps is None or before is None or max_steps == before:
        return setup
    if max_steps < before:
        raise ConfigError(f"--max-steps {max_steps}: run {run.path} has {before}; a run can be extended, not shortened")
    progress.message(f"extended from {before} to {max_steps} steps; the learning rate follows the longer schedule")
    longer = replace(setup, total_steps=max_steps)
    write_facts(run, longer)
    return longer


def write_facts(run: RunFolder, setup: Setup) -> None:
    """Write how a run was asked for, and its number of steps."""
    facts = {
        "tokenseg": __version__,
        "torch": torch.__version__,
        "dataset": setup.dataset.root.resolve().name,
        "layout": setup.dataset.layout,
        "preset": setup.options.preset,
        "fold": setup.options.fold,
        "seed": setup.options.seed,
        "max_minutes": setup.options.max_minutes,
        "threads": torch.get_num_threads(),
        "total_steps": setup.total_steps,
    }
    _write_json(run.facts, facts)


def training_fingerprints(setup: Setup, run: RunFolder) -> list[CaseFingerprint]:
    """Fingerprints of the training cases; none where there is no file, or one of an earlier version."""
    return [case for case in read_fingerprint(run.fingerprint) if case.case_id in setup.split.train]


def training_inputs(setup: Setup, run: RunFolder) -> InputFacts | None:
    """What the training scans are like; None where the fingerprint that an earlier version left does not tell."""
    training = training_fingerprints(setup, run)
    return summarise_inputs(training, setup.dataset.source_channels) if training else None


def _choose_split(splits: Sequence[Split], fold: int | Literal["all"]) -> Split:
    if fold == "all":
        every = tuple(sorted({case_id for split in splits for case_id in (*split.train, *split.val)}))
        return Split(every, every)
    if fold >= len(splits):
        raise ConfigError(f"--fold {fold}: the dataset has folds 0 to {len(splits) - 1}, or all")
    return splits[fold]


def _write_json(path: Path, values: object) -> None:
    write_atomically(path, (json.dumps(values, indent=1) + "\n").encode())
