"""The temperature of a model: by what its logits are to be divided so that its probabilities are true, on average.

One number, fitted on validation cases by the likelihood of their reference labels [Guo et al., On calibration of modern
neural networks, 2017]. It changes no mask. How far probabilities are from true is told by the expected calibration
error: voxels are put into ten bins by the probability of what is predicted, and the difference between that and the
share which is right is averaged, bins weighted by their voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from scipy.optimize import minimize_scalar
from torch import Tensor

from tokenseg.datasets.cases import Case, Dataset
from tokenseg.datasets.layouts import load_case
from tokenseg.inference.steering import predict_steered
from tokenseg.outputs import Outputs, outputs_of
from tokenseg.plan_grid.preprocess import prepare_image, prepare_labels
from tokenseg.progress import Progress
from tokenseg.saved_model.checkpoint import Model, QualityFacts

MAX_CASES = 20
"""Validation cases that a temperature is fitted on, evenly taken; each is run once more."""
NUM_BINS = 10
SAMPLES_A_CASE = 20_000
"""Voxels taken of a case, evenly, of those that may be foreground or are."""
_RANGE = (0.1, 10.0)

Voxels: TypeAlias = tuple[Tensor, Tensor]
"""Logits (n, L) and labels (n, R) of voxels of one case."""


def calibrate(model: Model, cases: Sequence[Case], dataset: Dataset, progress: Progress) -> QualityFacts:
    """Fit the temperature of a model on validation cases.

    Args:
        model: Trained on others.
        cases: With reference masks.
        dataset: That they are of.
        progress: Told about each case.

    Raises:
        TokenSegError: A case cannot be read.
    """
    places = np.linspace(0, len(cases) - 1, min(len(cases), MAX_CASES)).round().astype(int)
    chosen = [cases[place] for place in places]
    plan, samples = model.facts.plan, []
    outputs = outputs_of(plan)
    progress.stage("calibrating", len(chosen))
    for case in chosen:
        loaded = load_case(dataset, case)
        prepared = prepare_image(loaded.volume, plan, covering=loaded.mask)
        logits = predict_steered(model, prepared.image).logits
        labels = torch.from_numpy(prepare_labels(loaded.mask, prepared.record, plan))
        samples.append(sample_voxels(logits, labels, outputs))
        progress.advance(case.case_id)
    told = [sample for sample in samples if len(sample[0])]  # of a case without any suspicion there is nothing
    if not told or not all(torch.isfinite(logits).all() for logits, _ in told):
        return QualityFacts()
    temperature = fit_temperature(*joined(told), outputs)
    errors = cross_fitted_error(told, outputs) if len(told) > 1 else None
    return QualityFacts(temperature=round(temperature, 4), num_cases=len(told), calibration_error=errors)


def sample_voxels(
    logits: Float[Tensor, "L X Y Z"], labels: Integer[Tensor, "R X Y Z"], outputs: Outputs
) -> tuple[Float[Tensor, "n L"], Integer[Tensor, "n R"]]:
    """Logits and labels of some voxels that may be foreground or are; all else is sure and would drown them.

    Args:
        logits: Of a case, on the plan's grid.
        labels: Label indices in one map, or a 0/1 map a region.
        outputs: Which of them.
    """
    wanted: Bool[Tensor, "X Y Z"] = (outputs.foreground(logits) > 0.01) | (labels != 0).any(dim=0)
    places = wanted.flatten().nonzero()[:, 0]
    last = max(0, len(places) - 1)
    # Float32 would count beyond the last of many.
    evenly = torch.linspace(0, last, min(len(places), SAMPLES_A_CASE), dtype=torch.float64).long().clamp(max=last)
    places = places[evenly]
    return logits.flatten(1)[:, places].T, labels.flatten(1)[:, places].T.long()


def fit_temperature(logits: Float[Tensor, "n L"], labels: Integer[Tensor, "n R"], outputs: Outputs) -> float:
    """The temperature under which labels are most likely, between 0.1 and 10."""

    def loss(log_temperature: float) -> float:
        return outputs.likelihood_loss(logits / np.exp(log_temperature), labels)

    found = minimize_scalar(loss, bounds=np.log(_RANGE), method="bounded")
    return float(np.exp(found.x))


def calibration_error(
    logits: Float[Tensor, "n L"], labels: Integer[Tensor, "n R"], temperature: float, outputs: Outputs
) -> float:
    """Expected calibration error, 0 to 1; over regions, of all of them."""
    confidence, right = outputs.confidence(logits / temperature, labels)
    bins = (confidence * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    counts = torch.bincount(bins, minlength=NUM_BINS).double()
    sums = [
        torch.bincount(bins, weights=values.double(), minlength=NUM_BINS) for values in (confidence, right.double())
    ]
    return float((sums[0] - sums[1]).abs().sum() / counts.sum())


def cross_fitted_error(cases: Sequence[Voxels], outputs: Outputs) -> tuple[float, float]:
    """Calibration error without temperature, and with one: fitted on every other case, taken on the rest, both ways."""
    halves = [cases[::2], cases[1::2]]
    before, after = [], []
    for fitted, taken in (halves, halves[::-1]):
        if not fitted or not taken:
            continue
        logits, labels = joined(taken)
        temperature = fit_temperature(*joined(fitted), outputs)
        before.append(calibration_error(logits, labels, 1.0, outputs))
        after.append(calibration_error(logits, labels, temperature, outputs))
    return float(np.mean(before)), float(np.mean(after))


def joined(
    cases: Sequence[Voxels],
) -> tuple[Float[Tensor, "n L"], Integer[Tensor, "n R"]]:
    """Voxels of several cases in one list."""
    return torch.cat([logits for logits, _ in cases]), torch.cat([labels for _, labels in cases])
