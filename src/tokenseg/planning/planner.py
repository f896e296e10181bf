"""The plan that follows from a dataset's fingerprint, by rules that a person can read, each kept with its numbers."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from tokenseg.config import NUM_LEVELS, ChannelNormalisation, Plan, Spacing3, Stride3, Vox3, parse_settings
from tokenseg.datasets.cases import Dataset
from tokenseg.messages import times
from tokenseg.planning.fingerprint import Fingerprint

ANISOTROPY = 3.0
WINDOW_BUDGET_VOX = 900_000
WHOLE_BUDGET_VOX = 4_000_000
BATCH_BUDGET_VOX = 400_000
SMALL_WINDOW_VOX = 300_000
MIN_POOLED_VOX = 4
MIN_ROUNDED_VOX = 8
MIN_WINDOW_VOX = 16
MIN_BATCH, MAX_BATCH = 2, 8
STEPS_SMALL, STEPS_LARGE = 4000, 3000
_SPACING_DECIMALS = 6  # of mm: enough for microscopy, and hides float32 noise


class _Rule(NamedTuple):
    """A planned value's rule in words, by the plan's field."""

    field: str
    words: str


def make_plan(dataset: Dataset, fingerprint: Fingerprint) -> Plan:
    """Plan spacing, windows, strides, batch and steps of a dataset; `reasons` says for each field how it came about.

    Args:
        dataset: The dataset.
        fingerprint: Its numbers, from `take_fingerprint`.

    Raises:
        ConfigError: The dataset's labels or channels contradict each other (two labels of one name, say).

    Returns:
        A plan whose window fits 900 000 voxels and whose one-pass limit fits 4 000 000.
    """
    spacing, spacing_rule = _plan_spacing(fingerprint)
    shapes = _shapes_at(fingerprint, spacing)
    window, window_rule = _plan_window(shapes, spacing)
    strides, strides_rule = _plan_strides(window, spacing)
    whole, whole_rule = _plan_whole_limit(shapes, window)
    grid, grid_rule = _plan_grid(window, spacing)
    batch, steps, effort_rules = _plan_effort(window)
    normalisation, normalisation_rule = _plan_normalisation(dataset, fingerprint)
    rules = [normalisation_rule, spacing_rule, window_rule, strides_rule, whole_rule, grid_rule, *effort_rules]
    values = {
        "channels": dataset.channels,
        "source_channels": dataset.source_channels,
        "joint_zscore": dataset.joint_zscore,
        "normalisation": normalisation,
        "labels": dataset.labels,
        "regions": dataset.regions,
        "spacing_mm": spacing,
        "window_vox": window,
        "whole_limit_vox": whole,
        "strides": strides,
        "grid": grid,
        "batch_size": batch,
        "steps": steps,
        "reasons": dict([*_dataset_rules(dataset, fingerprint), *rules]),
    }
    return parse_settings(Plan, values, source=f"the plan of dataset {dataset.root}")


def _dataset_rules(dataset: Dataset, fingerprint: Fingerprint) -> list[_Rule]:
    present = {value for case in fingerprint.cases for value in case.label_voxels}
    absent = [label.name for label in dataset.labels if not present & set(label.values)]
    kind = "region(s) that may overlap" if dataset.regions else "exclusive label(s)"
    return [
        _Rule("channels", f"as the dataset's layout gives them ({dataset.layout})"),
        _Rule(
            "labels",
            f"{len(dataset.labels)} {kind}, as the dataset gives them"
            + (f"; no voxel of {', '.join(absent)} in {len(fingerprint.cases)} cases" if absent else ""),
        ),
    ]


def _plan_spacing(fingerprint: Fingerprint) -> tuple[Spacing3, _Rule]:
    spacings = np.array([case.spacing_mm for case in fingerprint.cases])
    target = np.median(spacings, axis=0)
    ratio = float(target.max() / target.min())
    words = f"median of {len(spacings)} cases; its coarsest axis is {ratio:.3g} times its finest"
    if ratio >= ANISOTROPY:
        coarsest = int(target.argmax())
        # Between the coarsest scans and the finest: few slices are invented, few of the fine ones lost.
        target[coarsest] = max(np.percentile(spacings[:, coarsest], 10), target.min())
        words += f", at least {ANISOTROPY:g}, so axis {coarsest} takes its 10th percentile"
    x, y, z = (round(float(value), _SPACING_DECIMALS) for value in target)
    return (x, y, z), _Rule("spacing_mm", words)


def _shapes_at(fingerprint: Fingerprint, spacing_mm: Spacing3) -> Float[np.ndarray, "n 3"]:
    shapes = np.array([case.shape_vox for case in fingerprint.cases])
    spacings = np.array([case.spacing_mm for case in fingerprint.cases])
    resampled: Float[np.ndarray, "n 3"] = np.maximum(np.round(shapes * spacings / np.array(spacing_mm)), 1.0)
    return resampled


def _plan_window(shapes: Float[np.ndarray, "n 3"], spacing_mm: Spacing3) -> tuple[Vox3, _Rule]:
    median = [float(size) for size in np.median(shapes, axis=0)]
    enlarged = [_enlarge(size) for size in median]
    fitted = _fit_budget(enlarged, spacing_mm)
    words = (
        f"median shape at that spacing, {times(median)}, plus 10 %, in multiples of 4 from {MIN_ROUNDED_VOX} voxels on"
    )
    if fitted != enlarged:
        words += (
            f": {times(enlarged)}; then the longest axis in mm shortened in steps of 8 "
            f"until {WINDOW_BUDGET_VOX} voxels suffice"
        )
    x, y, z = fitted
    return (x, y, z), _Rule("window_vox", words)


def _enlarge(median: float) -> int:
    enlarged = 11 * median / 10  # exact where 1.1 is not
    if median < MIN_ROUNDED_VOX:
        return max(1, round(enlarged), math.ceil(median))
    nearest = 4 * round(enlarged / 4)
    return nearest if nearest >= median else nearest + 4


def _fit_budget(sizes: list[int], spacing_mm: Spacing3) -> list[int]:
    """Shorten the longest axis in mm to the next lower multiple of 8, again and again, none below 16."""
    fitted = list(sizes)
    while math.prod(fitted) > WINDOW_BUDGET_VOX:
        shortenable = [axis for axis in range(3) if fitted[axis] > MIN_WINDOW_VOX]
        longest = max(shortenable, key=lambda axis: fitted[axis] * spacing_mm[axis])
        fitted[longest] = (fitted[longest] - 1) // 8 * 8
    return fitted


def _plan_strides(window_vox: Vox3, spacing_mm: Spacing3) -> tuple[tuple[Stride3, Stride3, Stride3, Stride3], _Rule]:
    sizes, spacings = list(window_vox), list(spacing_mm)
    levels: list[Stride3] = []
    for _ in range(NUM_LEVELS):
        pooled = _pooled_axes(sizes, spacings)
        if not pooled and not levels:
            pooled = {0, 1, 2}  # a window of 1 x 1 x 1; the network pads it
        levels.append((2 if 0 in pooled else 1, 2 if 1 in pooled else 1, 2 if 2 in pooled else 1))
        for axis in pooled:
            sizes[axis], spacings[axis] = -(-sizes[axis] // 2), 2 * spacings[axis]
    counts = [sum(level[axis] == 2 for level in levels) for axis in range(3)]
    words = (
        f"axes are halved {counts[0]}, {counts[1]} and {counts[2]} times in {NUM_LEVELS} levels; not where the spacing "
        f"is over twice that of the finest axis, or fewer than {MIN_POOLED_VOX} voxels are left"
    )
    return (levels[0], levels[1], levels[2], levels[3]), _Rule("strides", words)


def _pooled_axes(sizes: list[int], spacings: list[float]) -> set[int]:
    """Axes to halve: long enough ones and not coarse already; where all are short, any of two voxels or more."""
    long_enough = [axis for axis in range(3) if sizes[axis] >= MIN_POOLED_VOX] or [
        axis for axis in range(3) if sizes[axis] > 1
    ]
    finest = min((spacings[axis] for axis in long_enough), default=0.0)
    return {axis for axis in long_enough if spacings[axis] <= 2 * finest}


def _plan_whole_limit(shapes: Float[np.ndarray, "n 3"], window_vox: Vox3) -> tuple[Vox3, _Rule]:
    largest = shapes.max(axis=0)
    x, y, z = (max(math.ceil(1.5 * window_vox[axis]), math.ceil(11 * float(largest[axis]) / 10)) for axis in range(3))
    if x * y * z <= WHOLE_BUDGET_VOX:
        words = f"the larger of 1.5 windows and the largest case, {times(largest)}, plus 10 %"
        return (x, y, z), _Rule("whole_limit_vox", words)
    words = (
        f"the window, since 1.5 windows or the largest case, {times(largest)}, plus 10 % would be "
        f"{times((x, y, z))}, over {WHOLE_BUDGET_VOX} voxels"
    )
    return window_vox, _Rule("whole_limit_vox", words)


def _plan_grid(window_vox: Vox3, spacing_mm: Spacing3) -> tuple[Vox3, _Rule]:
    extents_mm = [size * spacing for size, spacing in zip(window_vox, spacing_mm, strict=True)]
    shortest = min((2, 1, 0), key=lambda axis: extents_mm[axis])
    x, y, z = (4 if axis == shortest else 5 for axis in range(3))
    return (x, y, z), _Rule("grid", f"4 cells along axis {shortest}: the window is {times(extents_mm)} mm")


def _plan_effort(window_vox: Vox3) -> tuple[int, int, list[_Rule]]:
    voxels = math.prod(window_vox)
    batch_size = min(max(round(BATCH_BUDGET_VOX / voxels), MIN_BATCH), MAX_BATCH)
    small = voxels < SMALL_WINDOW_VOX
    rules = [
        _Rule("batch_size", f"{BATCH_BUDGET_VOX} voxels over {voxels} of a window, {MIN_BATCH} to {MAX_BATCH}"),
        _Rule("steps", f"windows of {'under' if small else 'at least'} {SMALL_WINDOW_VOX} voxels"),
    ]
    return batch_size, STEPS_SMALL if small else STEPS_LARGE, rules


def _plan_normalisation(dataset: Dataset, fingerprint: Fingerprint) -> tuple[tuple[ChannelNormalisation, ...], _Rule]:
    entries, words = [], []
    for channel, ct in zip(dataset.channels, dataset.ct_channels, strict=True):
        if not ct:
            entries.append(ChannelNormalisation(kind="zscore"))
            words.append(f"{channel}: by each volume's own mean and deviation, not named as CT")
            continue
        stats = fingerprint.intensities[dataset.source_channels.index(channel)]
        entries.append(
            ChannelNormalisation(
                kind="window",
                low=stats.percentile_00_5,
                high=stats.percentile_99_5,
                mean=stats.mean,
                # A constant foreground has no deviation to divide by.
                std=stats.std or 1.0,
            )
        )
        words.append(f"{channel}: named as CT, clipped to the 0.5 and 99.5 percentiles of the dataset's foreground")
    if dataset.joint_zscore:
        words = ["by mean and deviation over all phases of an exam together"]
    return tuple(entries), _Rule("normalisation", "; ".join(words))
