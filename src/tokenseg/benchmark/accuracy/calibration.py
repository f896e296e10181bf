"""Times of a training step of each network, measured in turn, so that a drift of the machine meets all alike.

    calibration.json   seconds a step of the reference network, and of each network as a ratio to it; all rounds

Networks that are added later are measured beside the reference again, and only their ratio is added: what is in the
file never changes, so that a budget in minutes always gives the same number of steps.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from torch import nn

from tokenseg.benchmark.accuracy.budget import REFERENCE
from tokenseg.errors import FileError
from tokenseg.files import write_atomically
from tokenseg.training.loop import Fit, measure_step_seconds

Build: TypeAlias = Callable[[], nn.Module]

ROUNDS = 3
_UNSTEADY = 1.25
# FileError is a ValueError too, but a full disk is no fault of a network: `network_fault` lets it through.
FAULTS = (ImportError, MemoryError, RuntimeError, ValueError)


@dataclass(frozen=True)
class Calibration:
    """Step times, and networks that have none."""

    step_seconds: dict[str, float]
    errors: dict[str, str]
    """Why a network could not be made or trained, by name."""


def network_fault(error: Exception) -> str:
    """Say in one line what went wrong with a network: its package is absent, it does not fit into memory...

    Raises:
        FileError: That is what went wrong; no network is at fault.
    """
    if isinstance(error, FileError):
        raise error
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def calibrate(run: Fit, builders: Mapping[str, Build], path: Path) -> Calibration:
    """Give the step time of each network, measuring those that the file does not hold yet.

    Args:
        run: What a training step needs beside the network.
        builders: Of the networks asked for, and of the reference.
        path: The file; read, and written again with what was measured.

    Raises:
        FileError: The file is damaged or cannot be written.
    """
    reference_seconds, ratios, rounds = _load(path) if path.exists() else (None, {}, [])
    missing = {name: build for name, build in builders.items() if name not in ratios and name != REFERENCE}
    errors: dict[str, str] = {}
    if missing or reference_seconds is None:
        durations, errors = _measure(run, {REFERENCE: builders[REFERENCE]} | missing)
        _warn_of_drift(run, durations)
        seconds = {name: statistics.median(values) for name, values in durations.items()}
        reference_now = seconds.pop(REFERENCE)
        reference_seconds = reference_seconds or reference_now
        ratios |= {name: value / reference_now for name, value in seconds.items()}
        _save(path, reference_seconds, ratios, [*rounds, durations])
    step_seconds = {name: ratio * reference_seconds for name, ratio in ratios.items()}
    return Calibration({REFERENCE: reference_seconds} | step_seconds, errors)


def _measure(run: Fit, builders: Mapping[str, Build]) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Each network's step time in every round, and why others have none."""
    durations: dict[str, list[float]] = {name: [] for name in builders}
    errors: dict[str, str] = {}
    run.progress.stage("timing", ROUNDS * len(builders))
    for _ in range(ROUNDS):
        for name, build in builders.items():
            if name not in errors:
                try:
                    durations[name].append(measure_step_seconds(run, build()))
                except FAULTS as error:
                    if name == REFERENCE:
                        raise
                    errors[name] = network_fault(error)
            run.progress.advance(name)
    return {name: values for name, values in durations.items() if name not in errors}, errors


def _warn_of_drift(run: Fit, durations: Mapping[str, list[float]]) -> None:
    for name, values in durations.items():
        if max(values) > _UNSTEADY * min(values):
            run.progress.message(
                f"warning: a step of {name} took {min(values):.3f} to {max(values):.3f} s; other work on this machine "
                "makes budgets unequal: for figures to report, start again in a new folder when it is quiet"
            )


def _load(path: Path) -> tuple[float, dict[str, float], list[dict[str, list[float]]]]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        ratios = {str(name): float(ratio) for name, ratio in values["ratios"].items()}
        return float(values["reference_seconds"]), ratios, list(values["rounds"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{path} is damaged: {error!r}; start again in a new folder") from error


def _save(
    path: Path, reference_seconds: float, ratios: Mapping[str, float], rounds: list[dict[str, list[float]]]
) -> None:
    values = {
        "reference": REFERENCE,
        "reference_seconds": reference_seconds,
        "ratios": ratios,
        "rounds": rounds,
    }
    write_atomically(path, (json.dumps(values, indent=1) + "\n").encode())
