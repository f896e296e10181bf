"""A picture of networks: the time of each against its parameters, or against its Dice."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tokenseg.benchmark.rows import Row
from tokenseg.benchmark.speed.rows import CONDITIONS, FORWARD, newest
from tokenseg.errors import ConfigError, FileError
from tokenseg.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OURS, _OTHERS, _LINE = "#D55E00", "#0072B2", "#999999"
_PANEL_INCH = (6.2, 5.0)
_DOTS_PER_INCH = 110


class Point(NamedTuple):
    """A network in the picture."""

    network: str
    ms: float
    """Median time of a forward pass."""
    value: float
    """Dice, or parameters in millions."""


def read_dice(path: Path) -> dict[str, float]:
    """Mean Dice of each network, over the rows that `benchmark accuracy` wrote; failed trainings do not count.

    The names of the accuracy benchmark are turned into those of the speed benchmark.

    Raises:
        FileError: The file cannot be read.
        ConfigError: It has no columns `network` and `dice`, or is about more than one dataset, fold or budget.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path} cannot be read: {error}; name the CSV of `benchmark accuracy`") from error
    if not rows or not {"network", "dice"} <= rows[0].keys():
        raise ConfigError(f"{path} has no rows with columns network and dice; name the CSV of `benchmark accuracy`")
    experiments = {tuple(row.get(name) or "" for name in ("dataset", "fold", "budget")) for row in rows}
    if len(experiments) > 1:
        raise ConfigError(
            f"{path} has rows of {len(experiments)} different datasets, folds or budgets, whose Dice cannot be "
            "compared; keep those of one in a file"
        )
    values: dict[str, list[float]] = {}
    for row in rows:
        if row["dice"]:
            values.setdefault(speed_name(row["network"]), []).append(float(row["dice"]))
    return {name: sum(found) / len(found) for name, found in values.items()}


def speed_name(accuracy_name: str) -> str:
    """Name in the speed benchmark of a network of the accuracy benchmark, whose `tokenseg` is the preset small."""
    if accuracy_name == "tokenseg" or accuracy_name.startswith("tokenseg-no-"):
        return accuracy_name.replace("tokenseg", "tokenseg-small", 1)
    return accuracy_name


def frontier(points: Sequence[Point], *, more_is_better: bool) -> list[Point]:
    """Points that no other one beats in both time and value, from the fastest on."""
    kept: list[Point] = []
    sign = 1 if more_is_better else -1
    for point in sorted(points, key=lambda point: (point.ms, -sign * point.value)):
        if not kept or sign * point.value > sign * kept[-1].value:
            kept.append(point)
    return kept


def write_frontier(path: Path, rows: Sequence[Row], dice: dict[str, float] | None = None) -> None:
    """Draw a panel for each set of conditions in the rows, the networks' newest rows in each.

    Args:
        path: PNG file.
        rows: Of `benchmark speed`; those without a time are left out.
        dice: Of each network; None draws parameters instead.

    Raises:
        ConfigError: There is nothing to draw.
        FileError: The file cannot be written.
    """
    panels: dict[tuple[str, ...], list[Point]] = {}
    for row in newest([row for row in rows if row["stage"] == FORWARD and row["median_ms"]]):
        value = float(row["parameters_m"]) if dice is None else dice.get(row["network"])
        if value is not None:
            key = tuple(row[name] for name in CONDITIONS)
            panels.setdefault(key, []).append(Point(row["network"], float(row["median_ms"]), value))
    if not panels:
        raise ConfigError(f"--plot {path}: no network has both a time and a value; compare the names in the rows")
    write_atomically(path, _drawn(panels, accuracy=dice is not None))


def _drawn(panels: dict[tuple[str, ...], list[Point]], *, accuracy: bool) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_PANEL_INCH[0] * len(panels), _PANEL_INCH[1]), dpi=_DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (key, points) in zip(all_axes, panels.items(), strict=True):
        condition = dict(zip(CONDITIONS, key, strict=True))
        machine = condition["gpu"] or f"{condition['device']}, {condition['threads']} thread(s)"
        axes.set_title(f"{condition['size']}³, {condition['precision']}, {condition['engine']} on {machine}", size=10)
        _draw_panel(axes, points, accuracy=accuracy)
    content = io.BytesIO()
    figure.savefig(content, format="png", facecolor="white", metadata={"Software": "tokenseg"})
    return content.getvalue()


def _draw_panel(axes: Axes, points: Sequence[Point], *, accuracy: bool) -> None:
    line = frontier(points, more_is_better=accuracy)
    axes.plot([point.ms for point in line], [point.value for point in line], color=_LINE, zorder=1)
    for point in points:
        colour = _OURS if point.network.startswith("tokenseg") else _OTHERS
        axes.scatter(point.ms, point.value, color=colour, zorder=2)
        axes.annotate(
            point.network, (point.ms, point.value), xytext=(4, 4), textcoords="offset points", size=7, color=colour
        )
    axes.set_xscale("log")
    axes.set_xlabel("forward pass, ms")
    if accuracy:
        axes.set_ylabel("mean Dice")
    else:
        axes.set_yscale("log")
        axes.set_ylabel("parameters, millions")
    axes.margins(0.15)
    axes.grid(alpha=0.3)
