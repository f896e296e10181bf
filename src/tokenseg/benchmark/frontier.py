"""A picture of networks: the time of each against its parameters, or against its Dice."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tokenseg.benchmark.rows import Row
from tokenseg.benchmark.speed.rows import CONDITIONS, FORWARD, newest
from tokenseg.errors import ConfigError, FileError
from tokenseg.files import write_atomically

if TYPE_CHECKING:
    from typing import Any

    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox
    from numpy.typing import NDArray

_LOOKS = {"tokenseg": ("#D55E00", "o"), "nnu": ("#007A5A", "D"), "": ("#0072B2", "s")}
"""Colour and marker by how a network's name begins."""
_LINE = "#999999"
_PANEL_INCH = (6.2, 5.0)
_DOTS_PER_INCH = 110
_AROUND: tuple[tuple[float, int], ...] = ((1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1), (-1, 0), (0, 1), (0, -1))
_AROUND += ((0.2, 1), (0.2, -1), (-0.2, 1), (-0.2, -1))
"""Where a label may stand, seen from its point; the first that is free is taken."""
_LABEL_SIZE = 8.5
_PIECES = 30
_SHORT = 12
"""A label so near, in points, needs no line to its point."""
_AWAY_POINTS = (7, 14, 24, 36, 50, 66, 84)


class Point(NamedTuple):
    """A network in the picture."""

    network: str
    ms: float
    """Time of a forward pass."""
    value: float
    """Dice, or parameters in millions."""
    interval: tuple[float, float] | None = None
    """Of the value, drawn as a bar."""
    label: str = ""
    """Drawn in place of the name."""


class Panel(NamedTuple):
    """Networks that may be compared."""

    title: str
    points: Sequence[Point]
    more_is_better: bool = True
    width: float = 1
    """Beside the others."""
    floor: float | None = None
    """Points below are not drawn, but named at the lower edge."""


class Look(NamedTuple):
    """What all panels of a picture have in common."""

    time: str
    """Label of the time axis."""
    value: str
    """Label of the other axis."""
    log_value: bool = False
    one_scale: bool = False
    """The panels have the same range of values."""
    makers: tuple[str, ...] = ()
    """Beginnings of names for which the first panel has a legend."""
    panel_inch: tuple[float, float] = _PANEL_INCH
    dots_per_inch: int = _DOTS_PER_INCH


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
    accuracy = dice is not None
    look = Look("forward pass, ms", "mean Dice" if accuracy else "parameters, millions", log_value=not accuracy)
    titled = [Panel(_title(key), points, more_is_better=accuracy) for key, points in panels.items()]
    write_atomically(path, drawn(titled, look))


def _title(key: tuple[str, ...]) -> str:
    condition = dict(zip(CONDITIONS, key, strict=True))
    machine = condition["gpu"] or f"{condition['device']}, {condition['threads']} thread(s)"
    return f"{condition['size']}³, {condition['precision']}, {condition['engine']} on {machine}"


def drawn(panels: Sequence[Panel], look: Look, notes: dict[str, str] | None = None) -> bytes:
    """Draw panels side by side.

    Args:
        panels: One or more.
        look: Axes and size.
        notes: Texts that go into the file, by name.

    Returns:
        A PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = look.panel_inch
    figure = Figure(figsize=(width * len(panels), height), dpi=look.dots_per_inch, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    widths = [panel.width for panel in panels]
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=look.one_scale, width_ratios=widths)[0]
    labels = [_draw_panel(axes, panel, look) for axes, panel in zip(all_axes, panels, strict=True)]
    for axes in all_axes[1:] if look.one_scale else ():
        axes.set_ylabel("")
    for maker in look.makers:
        colour, marker = _colour_and_marker(maker)
        all_axes[0].scatter([], [], color=colour, marker=marker, s=26, label=maker)
    if look.makers:
        all_axes[0].legend(loc="lower left", fontsize=_LABEL_SIZE)
    # Where the axes lie is known once they have been laid out.
    figure.draw_without_rendering()
    for axes, panel, own in zip(all_axes, panels, labels, strict=True):
        _spread(axes, panel, own, canvas.get_renderer())  # type: ignore[no-untyped-call]
    content = io.BytesIO()
    figure.savefig(content, format="png", facecolor="white", metadata={"Software": "tokenseg"} | (notes or {}))
    return content.getvalue()


def _seen(panel: Panel) -> tuple[list[Point], list[Point]]:
    """Points that are drawn, and those of them on the line."""
    seen = [point for point in panel.points if panel.floor is None or point.value >= panel.floor]
    return seen, frontier(seen, more_is_better=panel.more_is_better)


def _colour_and_marker(network: str) -> tuple[str, str]:
    return next(found for start, found in _LOOKS.items() if network.lower().startswith(start))


def _draw_panel(axes: Axes, panel: Panel, look: Look) -> list[Annotation]:
    from matplotlib.ticker import LogLocator, NullFormatter

    seen, line = _seen(panel)
    axes.plot([point.ms for point in line], [point.value for point in line], color=_LINE, linewidth=1, zorder=1)
    labels = []
    for point in seen:
        colour, marker = _colour_and_marker(point.network)
        if point.interval is not None:
            axes.vlines(point.ms, *point.interval, color=colour, alpha=0.4, linewidth=1.2, zorder=1)
        axes.scatter(point.ms, point.value, color=colour, marker=marker, s=26, zorder=3)
        where = (point.ms, point.value)
        label = axes.annotate(
            point.label or point.network,
            where,
            xytext=(4, 4),
            textcoords="offset points",
            size=_LABEL_SIZE,
            color=colour,
        )
        label.set_in_layout(False)
        labels.append(label)
    below = [f"{point.network}, {point.value:.3f}" for point in panel.points if point not in seen]
    if below:
        text = f"below: {'; '.join(below)}"
        axes.text(0.98, 0.02, text, transform=axes.transAxes, size=7, color="#555555", ha="right")
    axes.set_title(panel.title, size=9)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(look.time)
    axes.set_ylabel(look.value)
    if look.log_value:
        axes.set_yscale("log")
    axes.margins(x=0.2, y=0.15)
    axes.grid(alpha=0.3)
    return labels


def _spread(axes: Axes, panel: Panel, labels: Sequence[Annotation], renderer: RendererAgg) -> None:
    """Move each label to the nearest place where it and its leader are clear of what else is drawn."""
    from matplotlib.lines import Line2D
    from matplotlib.transforms import Bbox, IdentityTransform

    dot = renderer.points_to_pixels(1)  # type: ignore[no-untyped-call]
    to_dots = axes.transData.transform
    points, front = _seen(panel)
    centres = [to_dots((point.ms, point.value)) for point in points]
    taken, texts = [Bbox([centre - 4 * dot, centre + 4 * dot]) for centre in centres], list[Bbox]()
    # Markers may touch each other, so a leader keeps clear of the middle of others.
    middles = [Bbox([centre - dot, centre + dot]) for centre in centres]
    for point in points:
        low, high = (to_dots((point.ms, value)) for value in point.interval or (point.value, point.value))
        taken.append(Bbox([low - dot, high + dot]))
    for start, end in itertools.pairwise(to_dots((point.ms, point.value)) for point in front):
        taken += _along(start, end, dot, 5 * _PIECES)
    for centre, own, label in zip(centres, middles, labels, strict=True):
        others = [*texts, *(middle for middle in middles if middle is not own)]
        for box in _places(label, renderer):
            end = np.clip(centre, box.min, box.max)
            leader = _along(centre, end, dot, _PIECES)
            inside = axes.bbox.count_contains([box.min, box.max]) == 2
            crossed = any(piece.overlaps(other) for piece in leader for other in others)
            if inside and not crossed and not any(box.overlaps(other) for other in taken):
                break
        texts.append(box)
        taken += [box, *leader]
        if np.hypot(*(end - centre)) > _SHORT * dot:
            ends = np.transpose([centre, end])
            axes.add_artist(Line2D(*ends, transform=IdentityTransform(), linewidth=0.6, color=label.get_color()))


def _along(start: NDArray[Any], end: NDArray[Any], dot: float, pieces: int) -> list[Bbox]:
    """Small boxes along a line."""
    from matplotlib.transforms import Bbox

    return [Bbox([at - dot, at + dot]) for at in np.linspace(start, end, pieces)]


def _places(label: Annotation, renderer: RendererAgg) -> Iterator[Bbox]:
    """Put a label to one place after the other, the nearest first: the box of its text in each."""
    for away, (across, up) in itertools.product(_AWAY_POINTS, _AROUND):
        label.set_position((away * across, away * up))
        label.set_horizontalalignment(("center", "left", "right")[int(np.sign(across))])
        label.set_verticalalignment(("center", "bottom", "top")[up])
        yield label.get_window_extent(renderer)
