"""The work of `tokenseg train`: from a dataset folder to a run folder with a model and its validation.

RUN/
  config.toml        plan, network and training settings; edit and pass back with --config
  run.json           how the run was asked for, and the number of steps
  fingerprint.json   the dataset in numbers
  splits.json        the folds
  cache/             prepared cases; may be deleted
  log.csv            one row a step
  tensorboard/       the same as curves, where the extra `tensorboard` is installed
  state.safetensors  what a resumed run starts from
  model/             all that `tokenseg segment` needs
  validation/        masks of the fold's validation cases, their quality, how they were made, and their scores
  report.html        all of it to look at, in a browser
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import TypeAdapter
from torch import nn

from tokenseg import __version__
from tokenseg.checking.findings import compare_cases
from tokenseg.config import (
    PRESETS,
    PositiveInt,
    RunConfig,
    SegmentOptions,
    TrainOptions,
    build_run_config,
    read_overrides,
    read_run_config,
    write_run_config,
)
from tokenseg.datasets.cases import Case, Dataset, Split, first_few
from tokenseg.datasets.layouts import open_dataset
from tokenseg.datasets.splits import split_folds
from tokenseg.device import choose_device
from tokenseg.errors import ConfigError, DataError
from tokenseg.evaluation.evaluate import Evaluation, evaluate_folders, write_csv, write_json
from tokenseg.files import check_writable, remove_leftovers, write_atomically
from tokenseg.inference.temperature import calibrate
from tokenseg.model.network import TokenSeg
from tokenseg.planning.fingerprint import (
    CaseFingerprint,
    Fingerprint,
    check_same_scans,
    label_volumes_ml,
    read_fingerprint,
    take_fingerprint,
)
from tokenseg.planning.planner import make_plan
from tokenseg.planning.suitability import InputFacts, summarise_inputs
from tokenseg.progress import Progress, Silent
from tokenseg.report.reports import tokens_of_selected, train_report
from tokenseg.saved_model.checkpoint import MakeNetwork, Model, ModelFacts, QualityFacts, save_model
from tokenseg.segmentation.segment import segment_cases
from tokenseg.training.augment import build_augmentation, leave_unchanged
from tokenseg.training.batches import TrainingBatches
from tokenseg.training.cache import PreparedCase, prepare_cases
from tokenseg.training.csv_log import read_log
from tokenseg.training.launch import check_divides, first_then_others, open_fabric
from tokenseg.training.loop import LOG_NAME, STATE_NAME, Fit, fit, measure_step_seconds

REPORT_NAME = "report.html"


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    run: Path
    """The run folder."""
    steps: int
    """Training steps in all."""
    evaluation: Evaluation
    """Scores of the fold's validation cases, on their own grids."""


@dataclass(frozen=True)
class _Setup:
    """What is settled before the first step, and the same after a resume and in each process."""

    dataset: Dataset
    config: RunConfig
    split: Split
    options: TrainOptions
    total_steps: int | None
    """None until the timed warm-up, or the plan, has settled it."""
    inputs: InputFacts | None = None
    """What the training scans are like."""


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
    progress = progress or Silent()
    options.check()
    device = choose_device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    fabric = open_fabric(device)
    progress = progress if fabric.is_global_zero else Silent()

    def prepare() -> tuple[_Setup, dict[str, PreparedCase]]:
        # The first process writes the run folder and the cache; others read what it wrote.
        resumed = not fabric.is_global_zero or _may_resume(run_path, options, progress)
        setup = (
            _extended(_load_setup(dataset_path, run_path, progress), run_path, options.max_steps, progress)
            if resumed
            else _new_setup(dataset_path, run_path, options, progress)
        )
        chosen = {*setup.split.train, *setup.split.val}
        cases = tuple(case for case in setup.dataset.cases if case.case_id in chosen)
        prepared = prepare_cases(setup.dataset, cases, setup.config.plan, run_path / "cache", progress)
        return replace(setup, inputs=_inputs(setup, run_path)), prepared

    setup, prepared = first_then_others(fabric, prepare)
    plan = setup.config.plan
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setup.options.seed)
        network = make_network(setup.config.network, plan)
    run = Fit(
        fabric=fabric,
        plan=plan,
        config=setup.config.train,
        batches=TrainingBatches(
            [prepared[case_id] for case_id in setup.split.train],
            plan,
            setup.config.train.foreground_fraction,
            build_augmentation(plan) if setup.config.train.augment else leave_unchanged,
            # The zero keeps the batches those of earlier versions.
            (setup.options.seed, 0),
            part=(fabric.global_rank, fabric.world_size),
        ),
        validation=[prepared[case_id] for case_id in setup.split.val],
        folder=run_path,
        progress=progress,
        save_weights=lambda trained: save_model(run_path / "model", trained, _facts(setup)),
    )
    total_steps = setup.total_steps or _settle_steps(run, network, setup, run_path)
    fit(run, network, total_steps)

    def finish() -> Evaluation | None:
        if not fabric.is_global_zero:
            return None
        model = Model(network.eval(), _facts(setup), fabric.device)
        quality = _quality(model, setup, run_path, progress)
        model = replace(model, facts=model.facts.model_copy(update={"quality": quality}))
        evaluation = _validate(model, setup, run_path, progress)
        facts = _facts(setup, total_steps, evaluation).model_copy(update={"quality": quality})
        save_model(run_path / "model", network, facts)
        _report(Model(network.eval(), facts, fabric.device), setup, run_path, evaluation, progress)
        return evaluation

    evaluation = first_then_others(fabric, finish)
    return TrainResult(run_path, total_steps, cast("Evaluation", fabric.broadcast(evaluation)))


def _may_resume(run_path: Path, options: TrainOptions, progress: Progress) -> bool:
    exists = any((run_path / name).exists() for name in ("run.json", STATE_NAME))
    if exists and not options.resume:
        raise ConfigError(
            f"run folder {run_path} holds a run already; add --resume to go on with it, or name another folder"
        )
    if not exists:
        _refuse_foreign(run_path)
    remove_leftovers(run_path)
    if exists:
        progress.message(f"resuming {run_path}; settings are those of its config.toml")
    if options.resume and not exists:
        progress.message(f"nothing to resume in {run_path}; starting a new run")
    return exists


def _refuse_foreign(run_path: Path) -> None:
    """A new run may start where an earlier one died early, but not in a folder of the user's."""
    early = {"config.toml", "fingerprint.json", "splits.json", "cache"}
    names = {path.name for path in run_path.iterdir()} if run_path.is_dir() else set()
    foreign = sorted(name for name in names - early if not name.startswith("."))
    if foreign:
        raise ConfigError(
            f"run folder {run_path} holds files that are not a run's: {first_few(foreign)}; name a new or empty folder"
        )


def _new_setup(dataset_path: Path, run_path: Path, options: TrainOptions, progress: Progress) -> _Setup:
    overrides = read_overrides(options.config) if options.config else {}
    dataset = open_dataset(dataset_path)
    progress.message(dataset.reason)
    splits = split_folds(dataset)
    split = _choose_split(splits, options.fold)
    if options.fold == "all":
        progress.message("note: --fold all: the validation cases are the training cases; their scores flatter")
    check_writable(run_path, run_path)
    fingerprint = _fingerprint(dataset, run_path, progress)
    config = build_run_config(make_plan(dataset, fingerprint), PRESETS[options.preset], overrides)
    check_divides(config.plan)
    for field, reason in config.plan.reasons.items():
        progress.message(f"plan: {field}: {reason}")
    write_run_config(run_path / "config.toml", config)
    _write_json(run_path / "splits.json", [{"train": split.train, "val": split.val} for split in splits])
    setup = _Setup(dataset, config, split, options, options.max_steps)
    _write_run(run_path, setup)
    return setup


def _choose_split(splits: Sequence[Split], fold: int | Literal["all"]) -> Split:
    if fold == "all":
        every = tuple(sorted({case_id for split in splits for case_id in (*split.train, *split.val)}))
        return Split(every, every)
    if fold >= len(splits):
        raise ConfigError(f"--fold {fold}: the dataset has folds 0 to {len(splits) - 1}, or all")
    return splits[fold]


def _fingerprint(dataset: Dataset, run_path: Path, progress: Progress) -> Fingerprint:
    progress.stage("reading", len(dataset.cases))
    fingerprint = take_fingerprint(dataset, lambda done, _: progress.advance(dataset.cases[done - 1].case_id))
    write_atomically(run_path / "fingerprint.json", fingerprint.model_dump_json(indent=1).encode())
    for finding in compare_cases(fingerprint.cases):
        progress.message(f"{finding.severity}: {finding.case_id}: {finding.text}; {finding.mend}")
    return fingerprint


def _inputs(setup: _Setup, run_path: Path) -> InputFacts | None:
    """What the training scans are like; None where the fingerprint that an earlier version left does not tell."""
    training = _training_cases(setup, run_path)
    return summarise_inputs(training, setup.dataset.source_channels) if training else None


def _training_cases(setup: _Setup, run_path: Path) -> list[CaseFingerprint]:
    """Fingerprints of the training cases; none where there is no file, or one of an earlier version."""
    known = read_fingerprint(run_path / "fingerprint.json")
    return [case for case in known if case.case_id in setup.split.train]


def _load_setup(dataset_path: Path, run_path: Path, progress: Progress) -> _Setup:
    try:
        facts = json.loads((run_path / "run.json").read_text(encoding="utf-8"))
        splits = json.loads((run_path / "splits.json").read_text(encoding="utf-8"))
        given = {key: facts[key] for key in ("preset", "fold", "seed", "max_minutes")}
        options = TypeAdapter(TrainOptions).validate_python(given)
        options.check()
        threads = facts["threads"]
        split = _choose_split([Split(tuple(fold["train"]), tuple(fold["val"])) for fold in splits], options.fold)
        total_steps = TypeAdapter(PositiveInt | None).validate_python(facts["total_steps"])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"run folder {run_path} cannot be resumed: {reason}; start again in a new folder") from error
    dataset = open_dataset(dataset_path)
    absent = sorted({*split.train, *split.val} - {case.case_id for case in dataset.cases})
    if absent:
        raise DataError(
            f"run {run_path} was started on other cases: {first_few(absent)} not in {dataset_path}; "
            "give the dataset it was started with"
        )
    check_same_scans(dataset, read_fingerprint(run_path / "fingerprint.json"))
    if threads != torch.get_num_threads():
        progress.message(f"note: {threads} threads before, {torch.get_num_threads()} now: not bit-identical")
    config = read_run_config(run_path / "config.toml")
    check_divides(config.plan)
    return _Setup(dataset, config, split, options, total_steps)


def _extended(setup: _Setup, run_path: Path, max_steps: int | None, progress: Progress) -> _Setup:
    """Give a resumed run more steps where `--max-steps` asks for more."""
    before = setup.total_steps
    if max_steps is None or before is None or max_steps == before:
        return setup
    if max_steps < before:
        raise ConfigError(f"--max-steps {max_steps}: run {run_path} has {before}; a run can be extended, not shortened")
    progress.message(f"extended from {before} to {max_steps} steps; the learning rate follows the longer schedule")
    extended = replace(setup, total_steps=max_steps)
    _write_run(run_path, extended)
    return extended


def _settle_steps(run: Fit, network: nn.Module, setup: _Setup, run_path: Path) -> int:
    """Fix the number of steps, from a timed warm-up or as planned, and save it with the run."""
    options, total_steps = setup.options, setup.config.plan.steps
    if options.max_minutes is not None:
        seconds = measure_step_seconds(run, network)
        total_steps = max(1, int(options.max_minutes * 60 / seconds))
        run.progress.message(f"{seconds:.3f} s a step: {total_steps} steps in {options.max_minutes:g} minutes")
    total_steps = int(run.fabric.broadcast(total_steps))
    if run.fabric.is_global_zero:
        _write_run(run_path, _Setup(setup.dataset, setup.config, setup.split, options, total_steps))
    return total_steps


def _write_run(run_path: Path, setup: _Setup) -> None:
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
    _write_json(run_path / "run.json", facts)


def _write_json(path: Path, values: object) -> None:
    write_atomically(path, (json.dumps(values, indent=1) + "\n").encode())


def _facts(setup: _Setup, steps: int | None = None, evaluation: Evaluation | None = None) -> ModelFacts:
    training: dict[str, Any] = {
        "tokenseg_version": __version__,
        "training_cases": len(setup.split.train),
        "validation_cases": len(setup.split.val),
        "fold": setup.options.fold,
        "seed": setup.options.seed,
    }
    if evaluation is not None:
        training["steps"] = steps
        for summary in evaluation.summaries:
            dice = summary.intervals["dice"]
            training[f"validation_dice_{summary.label.name}"] = f"{dice.mean:.4f} ({dice.low:.4f} to {dice.high:.4f})"
    return ModelFacts(
        name=setup.dataset.root.resolve().name,
        plan=setup.config.plan,
        network=setup.config.network,
        training=training,
        inputs=setup.inputs,
    )


def _validate(model: Model, setup: _Setup, run_path: Path, progress: Progress) -> Evaluation:
    """Segment the validation cases from their files and score them on their own grids."""
    folder = run_path / "validation"
    options = SegmentOptions(show_names=True)  # of a dataset, as in everything else that a training writes
    segment_cases([model], _validation_cases(setup), folder, progress, options=options)
    evaluation = evaluate_folders(folder, setup.dataset.root, labels=setup.config.plan.labels)
    write_json(folder / "scores.json", evaluation)
    write_csv(folder / "scores.csv", evaluation)
    return evaluation


def _quality(model: Model, setup: _Setup, run_path: Path, progress: Progress) -> QualityFacts:
    # Cases that a network was trained on would make it look surer than it may be of others.
    held_out = [] if setup.options.fold == "all" else _validation_cases(setup)
    known = calibrate(model, held_out, setup.dataset, progress) if held_out else QualityFacts()
    volumes_ml = label_volumes_ml(_training_cases(setup, run_path), setup.config.plan.labels)
    return known.model_copy(update={"volumes_ml": volumes_ml})


def _validation_cases(setup: _Setup) -> list[Case]:
    held_out = set(setup.split.val)
    return [case for case in setup.dataset.cases if case.case_id in held_out]


def _report(model: Model, setup: _Setup, run_path: Path, evaluation: Evaluation, progress: Progress) -> None:
    progress.message(f"writing {run_path / REPORT_NAME}")
    tokens = tokens_of_selected(model, evaluation, setup.dataset) if isinstance(model.network, TokenSeg) else []
    facts = {
        "dataset": f"{model.facts.name}: {setup.dataset.reason}",
        "cases": f"{len(setup.split.train)} to train on, {len(setup.split.val)} to validate on",
        "fold": str(setup.options.fold),
        "seed": str(setup.options.seed),
        "steps": str(model.facts.training["steps"]),
        "parameters": f"{sum(parameter.numel() for parameter in model.network.parameters()) / 1e6:.2f} M",
        "computed on": str(model.device),
    }
    log = read_log(run_path / LOG_NAME)
    made = date.today().isoformat()
    train_report(run_path / REPORT_NAME, evaluation, setup.dataset, log, facts, made, tokens=tokens)
