"""The training loop: batches in, weights, state and log rows out."""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader

from tokenseg.config import Plan, TrainConfig
from tokenseg.errors import TrainingError
from tokenseg.inference.windows import num_windows, predict_logits, torch_forward
from tokenseg.model.network import TokenSeg
from tokenseg.outputs import outputs_of
from tokenseg.processes import mean_over_processes
from tokenseg.progress import Progress
from tokenseg.saved_model.run_folder import RunFolder
from tokenseg.training.batches import Batch, TrainingBatches
from tokenseg.training.cache import PreparedCase
from tokenseg.training.csv_log import CsvLog
from tokenseg.training.losses import LossParts, training_loss
from tokenseg.training.state import SavedStep, load_state, save_state
from tokenseg.training.tensorboard_log import open_tensorboard, write_row

QUICK_CASES, QUICK_WINDOWS = 8, 200
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
    run: RunFolder
    progress: Progress
    save_weights: Callable[[nn.Module], None]
    """Called after each validation with the current weights."""


def fit(run: Fit, network: nn.Module, total_steps: int) -> None:
    """Train `network` in place to `total_steps`, going on from a saved state if the run folder holds one.

    Raises:
        TrainingError: Loss or gradient is no longer finite; state and weights before that step are saved.
        FileError: The saved state is damaged, or the run folder cannot be written.
    """
    optimizer = build_optimizer(network, run.config)
    module, wrapped = run.fabric.setup(network, optimizer)
    state = run.run.state
    saved = load_state(state, network, optimizer) if state.exists() else SavedStep(0, 0.0)
    run.progress.stage("training", total_steps, saved.step)
    network.train()
    interval = max(50, total_steps // 10)
    with closing(_Keeper(run, network, optimizer, saved.step)) as keeper:
        for step, batch in _steps(run, saved.step, total_steps):
            started = time.monotonic()
            rate = _set_rates(optimizer, run.config, step, total_steps)
            try:
                with _draws_of(run, step):
                    parts = train_step(run, module, wrapped, batch)
            except TrainingError:
                keeper.save(saved, weights=True)
                # The launcher ends all processes once one has failed: none may before the first has saved.
                run.fabric.barrier()
                raise
            done, best = step + 1, saved.best_dice
            row, note = _row(done, parts, rate, time.monotonic() - started), ""
            validated = done % interval == 0 or done == total_steps
            if validated:
                dice = _quick_dice_by_first(run, network)
                _warn_of_collapse(run.progress, dice, best, done / total_steps)
                row |= {"val_dice": dice, **_code_statistics(network)}
                best, note = max(best, dice), f", Dice {dice:.3f}"
            saved = SavedStep(done, best)
            keeper.keep(row, saved, weights=validated)
            run.progress.advance(f"loss {row['loss']:.3f}{note}")


class _Keeper:
    """Writes log, state and weights of a run; of several processes only the first one does."""

    def __init__(self, run: Fit, network: nn.Module, optimizer: Optimizer, first_step: int) -> None:
        self._run, self._network, self._optimizer = run, network, optimizer
        self._csv_log = CsvLog(run.run.log, first_step) if run.fabric.is_global_zero else None
        self._tensorboard = open_tensorboard(run.run.tensorboard, first_step) if run.fabric.is_global_zero else None
        self._last_save = time.monotonic()

    def keep(self, row: dict[str, float | int | str], saved: SavedStep, *, weights: bool) -> None:
        """Log a step; save the state when it is due, and with the weights."""
        if self._csv_log is not None:
            self._csv_log.write(row)
        if self._tensorboard is not None:
            write_row(self._tensorboard, row)
        if weights or time.monotonic() - self._last_save > SAVE_SECONDS:
            self.save(saved, weights=weights)

    def save(self, saved: SavedStep, *, weights: bool) -> None:
        """Save the state, and the weights if asked."""
        if self._csv_log is not None:
            save_state(self._run.run.state, self._network, self._optimizer, saved)
            if weights:
                self._run.save_weights(self._network)
        self._last_save = time.monotonic()

    def close(self) -> None:
        """Close the log."""
        if self._csv_log is not None:
            self._csv_log.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def train_step(run: Fit, module: nn.Module, optimizer: Optimizer, batch: Batch) -> LossParts:
    """One forward, backward and optimizer step; returns the loss of the whole batch, the same in each process.

    Raises:
        TrainingError: Loss or gradient is not finite; nothing was changed.
    """
    batch = run.fabric.to_device(batch)
    # The forward pass moves the codebook, which is in the buffers.
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    own = training_loss(module(batch.images), batch.labels, plan=run.plan, config=run.config, coarse_view=batch.coarse)
    parts = LossParts(*mean_over_processes(torch.stack(own)))
    optimizer.zero_grad()
    if bool(torch.isfinite(parts.total)):
        run.fabric.backward(own.total)
        norm = run.fabric.clip_gradients(module, optimizer, max_norm=run.config.clip_norm, error_if_nonfinite=False)
        if norm is not None and bool(torch.isfinite(norm)):
            optimizer.step()
            return parts
    for buffer, before in buffers:
        buffer.copy_(before)
    loss = float(parts.total.detach())
    what = f"the gradient of a loss of {loss:.3g}" if math.isfinite(loss) else "the loss"
    raise TrainingError(
        f"{what} became {'infinite or NaN' if math.isfinite(loss) else loss} "
        f"on a window of {' or '.join(sorted(set(batch.case_ids)))}; "
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
        # The first process decides: one that stopped alone would leave the others waiting for its gradients.
        if run.fabric.broadcast(len(durations) > 2 and sum(durations) > TIMED_SECONDS):
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
    outputs, scores = outputs_of(plan), []
    for case in _quick_cases(cases, plan):
        logits = predict_logits(torch_forward(network, device), np.array(case.image), plan)
        for number, predicted in enumerate(outputs.found(logits).numpy()):
            reference = outputs.label_place(case.labels, number)
            total = int(reference.sum()) + int(predicted.sum())
            if total:
                scores.append(2 * int((reference & predicted).sum()) / total)
    network.train()
    return float(np.mean(scores)) if scores else 0.0


def _quick_dice_by_first(run: Fit, network: nn.Module) -> float:
    """`quick_dice` of the first process; the others wait for it."""
    is_first = run.fabric.is_global_zero
    dice = quick_dice(network, run.validation, run.plan, run.fabric.device) if is_first else 0.0
    return float(run.fabric.broadcast(dice))


def _quick_cases(cases: Sequence[PreparedCase], plan: Plan) -> Sequence[PreparedCase]:
    """Up to eight cases from all over the list, fewer where they take over 200 windows, but one in any case.

    Eight large scans may take longer than the steps between two validations. Where they are fewer, cases without
    foreground are left out if there are others: one of them alone would look like a collapse.
    """
    windows = sum(num_windows(case.image, plan) for case in cases)
    wanted = min(QUICK_CASES, max(1, QUICK_WINDOWS * len(cases) // max(1, windows)))
    if wanted < QUICK_CASES:
        cases = [case for case in cases if len(case.points)] or cases
    count = min(wanted, len(cases))
    return [cases[number * len(cases) // count] for number in range(count)]


def _steps(run: Fit, first: int, total: int) -> Iterator[tuple[int, Batch]]:
    # Worker processes only where a GPU would wait for the CPU, and only forked ones: these share the memory-mapped
    # cases, others would copy them.
    wanted = run.fabric.device.type == "cuda" and "fork" in multiprocessing.get_all_start_methods()
    workers = min(4, os.cpu_count() or 1) if wanted else 0
    loader = DataLoader(
        run.batches,
        batch_size=None,
        sampler=range(first, total),
        num_workers=workers,
        collate_fn=lambda batch: batch,
        generator=torch.Generator(),
        multiprocessing_context="fork" if workers else None,
    )
    return enumerate(loader, start=first)


@contextmanager
def _draws_of(run: Fit, step: int) -> Iterator[None]:
    """Make what a network draws at random (skipped blocks) follow from seed and step, in each process the same."""
    device = run.fabric.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence([*run.batches.seed, step]).generate_state(1)[0]))
        yield


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
            "the network predicts background only. "
            "Raise foreground_fraction or lower learning_rate under [train] in a --config file"
        )
