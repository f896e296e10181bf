"""The training loop: batches in, weights, state and log rows out."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader

from tokenseg.config import Plan, TrainConfig
from tokenseg.errors import TrainingError
from tokenseg.losses import LossParts, training_loss
from tokenseg.model.network import TokenSeg
from tokenseg.progress import Progress
from tokenseg.segment import predict_logits
from tokenseg.training.batches import Batch, TrainingBatches
from tokenseg.training.cache import PreparedCase
from tokenseg.training.journal import Journal
from tokenseg.training.state import SavedStep, load_state, save_state

STATE_NAME, LOG_NAME = "state.safetensors", "log.csv"
QUICK_CASES = 8
SAVE_SECONDS = 30.0
TIMED_STEPS, TIMED_SECONDS = 12, 20.0


@dataclass(frozen=True)
class Fit:
    """Everything that one training needs beside the network."""

    fabric: Fabric
    plan: Plan
    config: TrainConfig
    batches: TrainingBatches
    validation: Sequence[PreparedCase]
    folder: Path
    progress: Progress
    save_weights: Callable[[nn.Module], None]
    """Called after each validation with the current weights."""


def fit(run: Fit, network: nn.Module, total_steps: int) -> None:
    """Train `network` in place to `total_steps`, going on from a saved state if the run folder holds one.

    Raises:
        TrainingError: The loss is no longer finite; the weights before that step are saved.
    """
    optimizer = build_optimizer(network, run.config)
    module, wrapped = run.fabric.setup(network, optimizer)
    state = run.folder / STATE_NAME
    saved = load_state(state, network, optimizer) if state.exists() else SavedStep(0, 0.0)
    journal = Journal(run.folder / LOG_NAME, saved.step) if run.fabric.is_global_zero else None
    run.progress.stage("training", total_steps, saved.step)
    network.train()
    interval, last_save = max(50, total_steps // 10), time.monotonic()
    for step, batch in _steps(run, saved.step, total_steps):
        started = time.monotonic()
        rate = _set_rates(optimizer, run.config, step, total_steps)
        parts = train_step(run, module, wrapped, batch)
        done, row = step + 1, _row(step + 1, parts, rate, time.monotonic() - started)
        validated = done % interval == 0 or done == total_steps
        if validated:
            dice = quick_dice(network, run.validation, run.plan, run.fabric.device)
            row |= {"val_dice": dice, **_code_statistics(network)}
            _warn_of_collapse(run.progress, dice, saved.best_dice, done / total_steps)
            saved = SavedStep(done, max(saved.best_dice, dice))
        if journal is not None:
            journal.write(row)
            if validated or time.monotonic() - last_save > SAVE_SECONDS:
                save_state(state, network, optimizer, SavedStep(done, saved.best_dice))
                last_save = time.monotonic()
            if validated:
                run.save_weights(network)
        run.progress.advance(f"loss {float(parts.total.detach()):.3f}" + (f", Dice {dice:.3f}" if validated else ""))
    if journal is not None:
        journal.close()


def train_step(run: Fit, module: nn.Module, optimizer: Optimizer, batch: Batch) -> LossParts:
    """One forward, backward and optimizer step.

    Raises:
        TrainingError: Loss or gradient is not finite; nothing was changed.
    """
    batch = run.fabric.to_device(batch)
    parts = training_loss(module(batch.images), batch.labels, regions=run.plan.regions, config=run.config)
    optimizer.zero_grad()
    if bool(torch.isfinite(parts.total)):
        run.fabric.backward(parts.total)
        norm = run.fabric.clip_gradients(module, optimizer, max_norm=run.config.clip_norm, error_if_nonfinite=False)
        if norm is not None and bool(torch.isfinite(norm)):
            optimizer.step()
            return parts
    raise TrainingError(
        f"the loss became {float(parts.total)} on a window of {' or '.join(sorted(set(batch.case_ids)))}; "
        "the last good weights are kept. Look at these cases; if they are sound, lower learning_rate under [train] "
        "in a --config file and start a new run"
    )


def measure_step_seconds(run: Fit, network: nn.Module) -> float:
    """Median time of a training step, on a copy of the network that is thrown away."""
    trial = copy.deepcopy(network).train()
    module, optimizer = run.fabric.setup(trial, build_optimizer(trial, run.config))
    begun, durations = time.monotonic(), list[float]()
    for _, batch in _steps(run, 0, TIMED_STEPS):
        durations.append(time.monotonic() - begun - sum(durations))
        if sum(durations) > TIMED_SECONDS and len(durations) > 2:
            break
        train_step(run, module, optimizer, batch)
    # Each duration runs from one batch in hand to the next; the first only fetches.
    return float(statistics.median(durations[2:] or durations[1:]))


def build_optimizer(network: nn.Module, config: TrainConfig) -> AdamW:
    """AdamW; the token path has its own, lower rate, and only weights with two axes or more decay."""
    tokenizer = network.tokenizer if isinstance(network, TokenSeg) else None
    token_names = {id(parameter) for parameter in tokenizer.parameters()} if tokenizer is not None else set()
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in network.parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) in token_names, parameter.ndim > 1), []).append(parameter)
    return AdamW(
        [
            {
                "params": parameters,
                "factor": config.token_learning_rate_factor if is_token else 1.0,
                "weight_decay": config.weight_decay if decays else 0.0,
            }
            for (is_token, decays), parameters in groups.items()
        ],
        lr=config.learning_rate,
    )


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Linear warm-up, then a cosine to zero; the rate of step 0 is already above zero."""
    warmup = config.warmup_fraction * total_steps
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    along = (step - warmup) / max(1.0, total_steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * along))


def quick_dice(network: nn.Module, cases: Sequence[PreparedCase], plan: Plan, device: torch.device) -> float:
    """Mean foreground Dice over a few whole validation cases on the plan's grid.

    A missed label counts 0; a label that is absent from reference and prediction is left out; nothing left gives 0.
    """
    network.eval()
    scores = []
    for case in cases[:: max(1, len(cases) // QUICK_CASES)][:QUICK_CASES]:
        logits = predict_logits(network, np.array(case.image), plan, device)
        for number in range(len(plan.labels)):
            reference = case.labels[number] > 0 if plan.regions else case.labels[0] == number + 1
            predicted = (logits[number] > 0 if plan.regions else logits.argmax(dim=0) == number + 1).numpy()
            total = int(reference.sum()) + int(predicted.sum())
            if total:
                scores.append(2 * int((reference & predicted).sum()) / total)
    network.train()
    return float(np.mean(scores)) if scores else 0.0


def _steps(run: Fit, first: int, total: int) -> Iterator[tuple[int, Batch]]:
    # Worker processes only where a GPU would wait for the CPU.
    workers = 4 if run.fabric.device.type == "cuda" else 0
    loader = DataLoader(
        run.batches, batch_size=None, sampler=range(first, total), num_workers=workers, generator=torch.Generator()
    )
    return enumerate(loader, start=first)


def _set_rates(optimizer: Optimizer, config: TrainConfig, step: int, total_steps: int) -> float:
    rate = learning_rate(config, step, total_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
    return rate


def _row(step: int, parts: LossParts, rate: float, seconds: float) -> dict[str, float | int | str]:
    values = {name: float(value.detach()) for name, value in parts._asdict().items()}
    return {"step": step, "loss": values.pop("total"), **values, "learning_rate": rate, "seconds": seconds}


def _code_statistics(network: nn.Module) -> dict[str, float | int | str]:
    quantizer = network.tokenizer.quantizer if isinstance(network, TokenSeg) and network.tokenizer is not None else None
    if quantizer is None:
        return {}
    return {"code_perplexity": quantizer.usage.perplexity(), "code_used_fraction": quantizer.usage.used_fraction()}


def _warn_of_collapse(progress: Progress, dice: float, best: float, done_fraction: float) -> None:
    if dice < 0.01 and (best > 0.1 or done_fraction >= 0.5):
        progress.message(
            f"warning: foreground Dice on validation cases is {dice:.3f} (best so far {best:.3f}): "
            "the network predicts background only. Raise foreground_fraction or lower learning_rate under [train] in a --config file"
        )
