"""Tables of speed rows, for people to read."""

from __future__ import annotations

from collections.abc import Sequence

from tokenseg.benchmark.rows import Row
from tokenseg.benchmark.speed.rows import FORWARD

_TITLES = ("network", "M par.", "GFLOP", "ms (min to max)", "s/Mvox", "ratio", "MiB")
_TRAINING_TITLES = ("step ms (min to max)", "ratio", "step MiB")


def table_text(rows: Sequence[Row]) -> str:
    """Tables in plain text: one for each size, precision, engine and device, and one for a whole scan.

    `ratio` is the time over that of the reference, measured in turn; `s/Mvox` seconds for a million voxels.
    """
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        kind = row["stage"] == FORWARD
        groups.setdefault((str(kind), *(row[n] for n in ("size", "precision", "engine", "device"))), []).append(row)
    return "\n\n".join(_group(group) for group in groups.values()) + "\n"


def _group(rows: Sequence[Row]) -> str:
    first = rows[0]
    conditions = f"{first['precision']}, {first['engine']} on {first['device']}, {first['threads']} thread(s)"
    if first["stage"] != FORWARD:
        cells = [[row["stage"], _range(row, "") or row["note"]] for row in rows]
        return f"{first['network']} from file to file, {first['size']} at 0.7 mm, {conditions}\n" + _aligned(
            [["stage", "ms (min to max)"], *cells]
        )
    training = any(row["training_median_ms"] for row in rows)
    titles = [*_TITLES, *(_TRAINING_TITLES if training else ()), ""]
    cells = [_cells(row, training=training) for row in rows]
    reference = next((row["reference"] for row in rows if row["reference"]), "")
    beside = f", ratio to {reference}" if reference else ""
    return f"{first['size']} cubed, {conditions}{beside}\n" + _aligned([titles, *cells])


def _cells(row: Row, *, training: bool) -> list[str]:
    per_mvox = f"{float(row['median_ms']) / 1000 / (int(row['size']) ** 3 / 1e6):.3f}" if row["median_ms"] else ""
    cells = [row["network"], row["parameters_m"], row["gflop"], _range(row, ""), per_mvox, _ratio(row["ratio"])]
    cells.append(row["peak_mib"])
    if training:
        cells += [_range(row, "training_"), _ratio(row["training_ratio"]), row["training_peak_mib"]]
    return [*cells, row["note"]]


def _range(row: Row, prefix: str) -> str:
    median, low, high = (row[f"{prefix}{name}_ms"] for name in ("median", "min", "max"))
    return f"{median} ({low} to {high})" if median else ""


def _ratio(text: str) -> str:
    return f"{float(text):.2f}x" if text else ""


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in (0, len(widths) - 1) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
