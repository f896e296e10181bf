"""One picture of what the tokenizer kept: three slices through the foreground, cells by level and by score.

Every cell of the grid has one token a level, so a cell is drawn as a mosaic of four tiles, one a level. A tile is there
where the token was kept, and filled where the boundary passes through the box that the token was pooled from; boxes of
coarse levels reach beyond their tile. matplotlib is imported when a picture is drawn, through its object interface
alone, so that no backend or setting of the caller is touched.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from tokenseg.about import NOTICE
from tokenseg.errors import ConfigError
from tokenseg.files import write_atomically
from tokenseg.tokens.boundary import NearBoundary
from tokenseg.tokens.report import LEVEL_NAMES, TokenReport, TokenSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEVEL_COLOURS = ("#E69F00", "#56B4E9", "#00C08B", "#E377C2")
"""Of the levels 1/2 to 1/16; with a colour-vision deficiency, the place in the mosaic says the level too."""

_REFERENCE_COLOUR, _PREDICTION_COLOUR = "#FFFFFF", "#FFF23D"
_SCORE_COLOURS = "viridis"
_DOTS_PER_INCH = 110
_WIDTH_INCH = 13.7
_PLANES_INCH = 10.6
_ROW_INCH = (2.2, 5.6)
_MANY_TILES = 100


class _Plane(NamedTuple):
    """A plane of a RAS+ volume as a radiologist looks at it: both in-plane axes as numbers, horizontal reversed."""

    name: str
    normal: int
    horizontal: int
    vertical: int
    letters: str
    """At the left, right, upper and lower edge."""


_PLANES = (
    _Plane("axial", normal=2, horizontal=0, vertical=1, letters="RLAP"),
    _Plane("coronal", normal=1, horizontal=0, vertical=2, letters="RLSI"),
    _Plane("sagittal", normal=0, horizontal=1, vertical=2, letters="APSI"),
)


class _Tile(NamedTuple):
    """A kept token in a slice, in voxel edges of the scan."""

    left: float
    bottom: float
    width: float
    height: float
    level: int
    score: float
    crossed: bool
    """Whether the boundary passes through the box behind it."""


def check_can_draw(path: Path) -> None:
    """Refuse a picture that could not be made, before the work and not after.

    Raises:
        ConfigError: The name does not end in .png, or matplotlib is not installed.
    """
    if path.suffix.lower() != ".png":
        raise ConfigError(f"picture {path} must end in .png; name it so")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("a picture needs the extra 'plot': pip install 'tokenseg[plot]'")


def write_picture(path: Path, report: TokenReport) -> None:
    """Draw a report into a PNG file.

    Raises:
        ConfigError: The name does not end in .png, or matplotlib is not installed.
        FileError: The file cannot be written.
    """
    check_can_draw(path)
    write_atomically(path, draw_tokens(report))


def draw_tokens(report: TokenReport) -> bytes:
    """Draw a report as a PNG; the same report gives the same bytes.

    The slices are those with the largest area of reference or prediction, the middle ones where both are empty. They
    are shown as in radiology (patient's right at the left; anterior at the left in the sagittal plane), in the scan's
    RAS+ axes, at the aspect ratio of its spacing; a constant border that the network does not see is left out.
    """
    content = io.BytesIO()
    _draw(report).savefig(content, format="png", facecolor="white", metadata={"Software": "tokenseg"})
    return content.getvalue()


def _draw(report: TokenReport) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    record = report.tokens.record
    size_mm = [count * mm for count, mm in zip(record.crop_shape, record.spacing_mm, strict=True)]
    row_inch = float(np.clip(_PLANES_INCH * max(size_mm[1:]) / (2 * size_mm[0] + size_mm[1]), *_ROW_INCH))
    height = 2 * row_inch + 2.1
    figure = Figure(figsize=(_WIDTH_INCH, height), dpi=_DOTS_PER_INCH)
    FigureCanvasAgg(figure)
    _draw_rows(figure, report, [size_mm[0], size_mm[0], size_mm[1]])
    title, subtitle = _title(report)
    figure.text(0.03, 1 - 0.32 / height, title, fontsize=15, weight="bold", va="center")
    figure.text(0.03, 1 - 0.62 / height, subtitle, fontsize=11, va="center", color="#333333")
    figure.text(0.03, 0.2 / height, NOTICE, fontsize=9, va="center", color="#555555")
    figure.text(0.97, 0.2 / height, f"model: {report.model_name}", fontsize=9, va="center", ha="right", color="#555555")
    return figure


def _draw_rows(figure: Figure, report: TokenReport, widths_mm: list[float]) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize, to_rgba

    height = figure.get_figheight()
    grid = figure.add_gridspec(
        nrows=2,
        ncols=4,
        width_ratios=[*widths_mm, 0.13 * sum(widths_mm)],
        left=0.05,
        right=0.97,
        top=1 - 1.15 / height,
        bottom=0.45 / height,
        wspace=0.06,
        hspace=0.12,
    )
    scores = report.tokens.score[report.tokens.kept]
    scale, shade = Normalize(float(scores.min()), float(scores.max())), colormaps[_SCORE_COLOURS]
    for column, plane in enumerate(_PLANES):
        tiles, cells = list(_tiles(report, plane)), _cells(report, plane)
        for row in range(2):
            axes = figure.add_subplot(grid[row, column])
            _draw_slice(axes, report, plane)
            _outline(axes, cells)
            if row == 0:
                _fill(axes, tiles, [to_rgba(LEVEL_COLOURS[tile.level]) for tile in tiles])
                number, total = _slice_index(report, plane) + 1, report.image.shape[plane.normal]
                axes.set_title(f"{plane.name}, slice {number} of {total}", fontsize=11)
            else:
                _fill(axes, tiles, [shade(scale(tile.score)) for tile in tiles])
            _draw_contours(axes, report, plane)
            if column == 0:
                axes.set_ylabel(("by level", "by score")[row], fontsize=12, weight="bold", labelpad=8)
    _draw_key(figure.add_subplot(grid[0, 3]), report)
    side = figure.add_subplot(grid[1, 3])
    side.set_axis_off()
    bar = figure.colorbar(ScalarMappable(scale, shade), cax=side.inset_axes((0.15, 0.1, 0.2, 0.75)))
    bar.set_label("importance score of the kept", fontsize=10)
    bar.ax.tick_params(labelsize=9)


def _title(report: TokenReport) -> tuple[str, str]:
    summary = report.summary
    windows = f" in {summary.num_passes} windows" if summary.num_passes > 1 else ""
    title = f"{report.case_id}: {summary.num_kept} of {summary.num_candidates} tokens kept{windows}"
    return title, _nearness(summary)


def _nearness(summary: TokenSummary) -> str:
    if not summary.near:
        return f"The {summary.boundary_of} is empty or fills the scan: there is no boundary to be near."
    crossed, close = (_of_radius(summary, radius_mm) for radius_mm in (0.0, 2.0))
    return (
        f"The {summary.boundary_of} boundary passes through the boxes of {crossed.share:.0%} of the kept tokens "
        f"(of all: {crossed.base_rate:.0%}), and within 2 mm of {close.share:.0%} (of all: {close.base_rate:.0%})"
    )


def _of_radius(summary: TokenSummary, radius_mm: float) -> NearBoundary:
    return next(near for near in summary.near if near.radius_mm == radius_mm)


def _slice_index(report: TokenReport, plane: _Plane) -> int:
    shown = report.tokens.prediction if report.reference is None else report.tokens.prediction | report.reference
    area = shown.sum(axis=(plane.horizontal, plane.vertical))
    return int(area.argmax()) if area.any() else len(area) // 2


def _in_slice(report: TokenReport, plane: _Plane) -> Bool[np.ndarray, "T N"]:
    cells, middle = report.tokens.cells_vox, _slice_index(report, plane) + 0.5
    low, high = cells[:, :, 0], cells[:, :, 1]
    inside = [np.all(high > low, axis=2), low[:, :, plane.normal] <= middle, middle < high[:, :, plane.normal]]
    cut: Bool[np.ndarray, "T N"] = np.logical_and.reduce(inside)
    return cut


def _tiles(report: TokenReport, plane: _Plane) -> Iterator[_Tile]:
    tokens = report.tokens
    for place in np.argwhere(_in_slice(report, plane) & tokens.kept):
        number, index = (int(part) for part in place)
        level = int(tokens.level[index])
        low, high = tokens.cells_vox[number, index][:, [plane.horizontal, plane.vertical]]
        # The horizontal axis is shown reversed: the half with the higher voxels is at the left.
        half = (high - low) / 2
        corner = low + half * np.array([level % 2 == 0, level < 2])
        gap = 0.06 * half
        left, bottom = corner + gap
        width, height = half - 2 * gap
        score = float(tokens.score[number, index])
        crossed = report.distance_mm is not None and bool(report.distance_mm[number, index] == 0)
        yield _Tile(float(left), float(bottom), float(width), float(height), level, score, crossed)


def _cells(report: TokenReport, plane: _Plane) -> Float[np.ndarray, "n 2 2"]:
    """Corners of the places in a slice, each once."""
    chosen = _in_slice(report, plane) & (report.tokens.level == 0)
    cells: Float[np.ndarray, "n 2 2"] = report.tokens.cells_vox[chosen][:, :, [plane.horizontal, plane.vertical]]
    return cells


def _outline(axes: Axes, cells: Float[np.ndarray, "n 2 2"]) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    patches = [Rectangle((float(low[0]), float(low[1])), *(high - low).tolist()) for low, high in cells]
    axes.add_collection(PatchCollection(patches, facecolor="none", edgecolor=(1, 1, 1, 0.28), linewidth=0.6))


def _fill(axes: Axes, tiles: list[_Tile], colours: list[tuple[float, float, float, float]]) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    patches = [Rectangle((tile.left, tile.bottom), tile.width, tile.height) for tile in tiles]
    faces = [(*colour[:3], 0.55 if tile.crossed else 0.0) for tile, colour in zip(tiles, colours, strict=True)]
    linewidth = 1.1 if len(tiles) < _MANY_TILES else 0.7
    axes.add_collection(PatchCollection(patches, facecolor=faces, edgecolor=colours, linewidth=linewidth))


def _draw_slice(axes: Axes, report: TokenReport, plane: _Plane) -> None:
    from matplotlib.patheffects import withStroke

    image = np.take(report.image, _slice_index(report, plane), axis=plane.normal)
    record = report.tokens.record
    across, up = image.shape
    low, high = np.percentile(report.image, (1, 99.5))
    axes.imshow(
        image.T,
        cmap="gray",
        vmin=float(low),
        vmax=float(high),
        origin="lower",
        extent=(0, across, 0, up),
        aspect=record.spacing_mm[plane.vertical] / record.spacing_mm[plane.horizontal],
        interpolation="nearest",
    )
    axes.set_xlim(record.crop_stop[plane.horizontal], record.crop_start[plane.horizontal])
    axes.set_ylim(record.crop_start[plane.vertical], record.crop_stop[plane.vertical])
    axes.set(xticks=[], yticks=[], anchor="N")
    places = ((0.025, 0.5, "left"), (0.975, 0.5, "right"), (0.5, 0.95, "center"), (0.5, 0.05, "center"))
    for letter, (x, y, side) in zip(plane.letters, places, strict=True):
        axes.text(
            x,
            y,
            letter,
            transform=axes.transAxes,
            ha=side,
            va="center",
            fontsize=10,
            weight="bold",
            color="white",
            path_effects=[withStroke(linewidth=2.4, foreground="black")],
            zorder=5,
        )


def _draw_contours(axes: Axes, report: TokenReport, plane: _Plane) -> None:
    index = _slice_index(report, plane)
    if report.reference is not None:
        _draw_contour(axes, np.take(report.reference, index, axis=plane.normal), _REFERENCE_COLOUR, "solid")
    _draw_contour(axes, np.take(report.tokens.prediction, index, axis=plane.normal), _PREDICTION_COLOUR, "dashed")


def _draw_contour(axes: Axes, mask: Bool[np.ndarray, "_ _"], colour: str, style: str) -> None:
    from matplotlib.patheffects import withStroke

    if not mask.any():
        return
    # A border of background closes contours at the edge of the scan.
    padded = np.pad(mask, 1).astype(float)
    x, y = (np.arange(size) - 0.5 for size in padded.shape)
    lines = axes.contour(x, y, padded.T, levels=[0.5], colors=[colour], linestyles=style, linewidths=1.4)
    lines.set_path_effects([withStroke(linewidth=2.6, foreground="black")])


def _draw_key(axes: Axes, report: TokenReport) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch, Rectangle

    axes.set_axis_off()
    key = axes.inset_axes((0.07, 0.52, 0.8, 0.36))
    key.set(xlim=(0, 2), ylim=(0, 2), xticks=[], yticks=[], aspect="equal", facecolor="#444444", anchor="NW")
    key.set_title("a cell: tile and\nbox width a level", fontsize=10, loc="left")
    for level, (name, colour) in enumerate(zip(LEVEL_NAMES, LEVEL_COLOURS, strict=True)):
        x, y = level % 2, 1 - level // 2
        key.add_patch(Rectangle((x + 0.04, y + 0.04), 0.92, 0.92, facecolor=colour))
        text = f"{name}\n{_box_width_mm(report, level):.0f} mm"
        key.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=9, color="black")
    lines = [Line2D([], [], color=_PREDICTION_COLOUR, linestyle="dashed", linewidth=1.6, label="prediction")]
    if report.reference is not None:
        lines.insert(0, Line2D([], [], color=_REFERENCE_COLOUR, linewidth=1.6, label="reference"))
    filled = Patch(facecolor="#BBBBBB", edgecolor="white", label="boundary in box")
    hollow = Patch(facecolor="none", edgecolor="white", label="not in box")
    axes.legend(
        handles=[*lines, filled, hollow],
        loc="upper left",
        bbox_to_anchor=(0.0, 0.5),
        fontsize=9,
        facecolor="#444444",
        labelcolor="white",
    )


def _box_width_mm(report: TokenReport, level: int) -> float:
    """Typical side of the boxes of a level: median of the cube roots of their volumes; NaN where none is."""
    tokens = report.tokens
    chosen = tokens.in_scan & (tokens.level == level)
    sides_mm = np.diff(tokens.boxes_vox[chosen], axis=1)[:, 0] * np.array(tokens.record.spacing_mm)
    return float(np.median(np.cbrt(sides_mm.prod(axis=1)))) if chosen.any() else float("nan")
