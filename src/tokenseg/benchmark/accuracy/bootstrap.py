"""Differences between networks that were scored on the same cases, with intervals over cases.

Two networks fail on the same hard cases; their intervals may overlap widely while one is better on nearly every case.
So the difference is taken case by case first, and its mean resampled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from tokenseg.evaluation.metrics import Interval, bootstrap_interval

RESAMPLES = 10_000


class CaseScore(NamedTuple):
    """Dice of one label of one case after one training."""

    seed: int
    case: str
    label: str
    dice: float
    """[0, 1]; NaN where reference and prediction are both empty."""


def case_means(scores: Iterable[CaseScore]) -> dict[str, float]:
    """Mean Dice of each case, over its labels and then over seeds.

    Labels that are NaN are left out; a case of which nothing is left is left out.
    """
    labels: dict[tuple[str, int], list[float]] = {}
    for score in scores:
        if not math.isnan(score.dice):
            labels.setdefault((score.case, score.seed), []).append(score.dice)
    seeds: dict[str, list[float]] = {}
    for (case, _), values in labels.items():
        seeds.setdefault(case, []).append(math.fsum(values) / len(values))
    return {case: math.fsum(values) / len(values) for case, values in sorted(seeds.items())}


def mean_interval(means: Mapping[str, float]) -> Interval:
    """Mean over cases and its 95 % bootstrap interval; NaNs without cases. The order of the cases does not matter."""
    return _interval([means[case] for case in sorted(means)])


def paired_difference(means: Mapping[str, float], reference: Mapping[str, float]) -> Interval:
    """Mean of a network's Dice less the reference's over the cases that both have, with its 95 % bootstrap interval.

    Args:
        means: Dice of the network by case.
        reference: Dice of the reference network by case.

    Returns:
        In points, hundredths of Dice; above 0 where the network is better. NaNs without a common case.
    """
    common = sorted(means.keys() & reference.keys())
    return _interval([100 * (means[case] - reference[case]) for case in common])


def _interval(values: list[float]) -> Interval:
    return bootstrap_interval(np.array(values, dtype=np.float64), resamples=RESAMPLES)
