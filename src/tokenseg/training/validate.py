"""The end of a training: probabilities calibrated, validation cases segmented and scored, model and report written."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from typing import Any

import torch
from torch import nn

from tokenseg.about import __version__
from tokenseg.evaluation.evaluate import evaluate_folders
from tokenseg.evaluation.results import Evaluation, write_csv, write_json
from tokenseg.inference.temperature import calibrate
from tokenseg.options import SegmentOptions
from tokenseg.planning.fingerprint import label_volumes_ml
from tokenseg.progress import Progress
from tokenseg.report.reports import tokens_of_selected, train_report
from tokenseg.saved_model.checkpoint import Model, ModelFacts, QualityFacts, save_model
from tokenseg.saved_model.ensemble import Ensemble
from tokenseg.saved_model.run_folder import RunFolder
from tokenseg.segmentation.job import SegmentJob
from tokenseg.segmentation.results import CaseResult
from tokenseg.segmentation.segment import segment_cases
from tokenseg.training.csv_log import read_log
from tokenseg.training.setup import Setup, training_fingerprints, training_inputs


def save_trained(network: nn.Module, setup: Setup, run: RunFolder) -> None:
    """Write the model folder of a training on its way."""
    save_model(run.model, network, _facts(setup, run))


def finish(network: nn.Module, device: torch.device, setup: Setup, run: RunFolder, progress: Progress) -> Evaluation:
    """Calibrate, validate, and write what a finished run has.

    Args:
        network: Trained, on `device`.
        device: Where it computes.
        setup: Of the run, with its number of steps.
        run: Where everything goes.
        progress: Told of each case.

    Returns:
        Scores of the fold's validation cases, on their own grids.
    """
    model = Model(network.eval(), _facts(setup, run), device)
    quality = _quality(model, setup, run, progress)
    model = replace(model, facts=model.facts.model_copy(update={"quality": quality}))
    job = SegmentJob(
        Ensemble.of(model),
        SegmentOptions(show_names=True),  # of a dataset, as in everything else that a training writes
        progress,
        tokens_of=len(setup.split.val),
    )
    results = segment_cases(job, setup.validation_cases, run.validation)
    evaluation = evaluate_folders(run.validation, setup.dataset.root, labels=setup.config.plan.labels)
    write_json(run.scores_json, evaluation)
    write_csv(run.scores_csv, evaluation)
    facts = _facts(setup, run, evaluation).model_copy(update={"quality": quality})
    save_model(run.model, network, facts)
    progress.message(f"writing {run.report}")
    _report(job, results, evaluation, replace(model, facts=facts), setup, run)
    return evaluation


def _facts(setup: Setup, run: RunFolder, evaluation: Evaluation | None = None) -> ModelFacts:
    training: dict[str, Any] = {
        "tokenseg_version": __version__,
        "training_cases": len(setup.split.train),
        "validation_cases": len(setup.split.val),
        "fold": setup.options.fold,
        "seed": setup.options.seed,
    }
    if evaluation is not None:
        training["steps"] = setup.total_steps
        for summary in evaluation.summaries:
            dice = summary.intervals["dice"]
            training[f"validation_dice_{summary.label.name}"] = f"{dice.mean:.4f} ({dice.low:.4f} to {dice.high:.4f})"
    return ModelFacts(
        name=setup.dataset.root.resolve().name,
        plan=setup.config.plan,
        network=setup.config.network,
        training=training,
        inputs=training_inputs(setup, run),
    )


def _quality(model: Model, setup: Setup, run: RunFolder, progress: Progress) -> QualityFacts:
    # Cases that a network was trained on would make it look surer than it may be of others.
    held_out = [] if setup.options.fold == "all" else setup.validation_cases
    known = calibrate(model, held_out, setup.dataset, progress) if held_out else QualityFacts()
    volumes_ml = label_volumes_ml(training_fingerprints(setup, run), setup.config.plan.labels)
    return known.model_copy(update={"volumes_ml": volumes_ml})


def _report(
    job: SegmentJob,
    results: list[CaseResult],
    evaluation: Evaluation,
    model: Model,
    setup: Setup,
    run: RunFolder,
) -> None:
    facts = {
        "dataset": f"{model.facts.name}: {setup.dataset.reason}",
        "cases": f"{len(setup.split.train)} to train on, {len(setup.split.val)} to validate on",
        "fold": str(setup.options.fold),
        "seed": str(setup.options.seed),
        "steps": str(model.facts.training["steps"]),
        "parameters": f"{sum(parameter.numel() for parameter in model.network.parameters()) / 1e6:.2f} M",
        "computed on": str(model.device),
    }
    tokens = tokens_of_selected(job, results, evaluation)
    log, made = read_log(run.log), date.today().isoformat()
    train_report(run.report, evaluation, setup.dataset, log, facts, made, tokens=tokens)
