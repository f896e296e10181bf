"""The rows of `tokenseg benchmark speed`."""

from __future__ import annotations

from collections.abc import Sequence

from tokenseg.benchmark.rows import Row

FORWARD = "forward"
"""Stage of a row that is about one network on one cube; the others are stages from file to file."""

COLUMNS = (
    *("date", "commit", "stage", "network", "parameters_m", "gflop", "device", "engine", "precision", "size"),
    *("threads", "rounds", "median_ms", "min_ms", "max_ms", "reference", "ratio", "peak_mib"),
    *("training_rounds", "training_median_ms", "training_min_ms", "training_max_ms", "training_ratio"),
    *("training_peak_mib", "note", "tokenseg", "torch", "cpu", "gpu", "os"),
)
CONDITIONS = ("stage", "device", "engine", "precision", "size", "threads", "cpu", "gpu")
"""Columns in which rows agree that may be compared."""


def like(rows: Sequence[Row], others: Sequence[Row]) -> list[Row]:
    """Those of the others that were measured under conditions that one of the rows has."""
    wanted = {tuple(row[name] for name in CONDITIONS) for row in rows}
    return [row for row in others if tuple(row[name] for name in CONDITIONS) in wanted]


def newest(rows: Sequence[Row]) -> list[Row]:
    """Of rows of the same network under the same conditions the last one; the order is that of the first ones."""
    return list({tuple(row[name] for name in ("network", *CONDITIONS)): row for row in rows}.values())
