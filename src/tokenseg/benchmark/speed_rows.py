"""The rows of `tokenseg benchmark speed`, and their file."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenseg.benchmark.rows import Row
from tokenseg.errors import ConfigError, FileError
from tokenseg.files import write_atomically

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


def read_rows(path: Path) -> list[Row]:
    """Rows of a file, oldest first; none where there is no file.

    Raises:
        ConfigError: The file has other columns.
        FileError: The file cannot be read.
    """
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path} cannot be read as text: {error}; name another file") from error
    reader = csv.DictReader(io.StringIO(text))
    rows = list(reader)
    whole = all(None not in row and None not in row.values() for row in rows)
    if text and (tuple(reader.fieldnames or ()) != COLUMNS or not whole):
        raise ConfigError(f"{path} has other columns than `benchmark speed` writes; name another file")
    return rows


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Add rows at the end of a file; it is written whole, so that it is never half of one.

    Raises:
        ConfigError: The file has other columns.
        FileError: The file cannot be read or written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows([*read_rows(path), *rows])
    write_atomically(path, text.getvalue().encode())


def like(rows: Sequence[Row], others: Sequence[Row]) -> list[Row]:
    """Those of the others that were measured under conditions that one of the rows has."""
    wanted = {tuple(row[name] for name in CONDITIONS) for row in rows}
    return [row for row in others if tuple(row[name] for name in CONDITIONS) in wanted]


def newest(rows: Sequence[Row]) -> list[Row]:
    """Of rows of the same network under the same conditions the last one; the order is that of the first ones."""
    return list({tuple(row[name] for name in ("network", *CONDITIONS)): row for row in rows}.values())
