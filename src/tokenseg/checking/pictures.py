"""Pictures of cases to look at: three planes of the first channel, and the mask where its own header puts it.

matplotlib is imported when a picture is drawn, through its object interface alone, so that no backend or setting of the
caller is touched.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from tokenseg.checking.findings import Finding
from tokenseg.datasets.cases import Case, Dataset
from tokenseg.errors import TokenSegError
from tokenseg.files import write_atomically
from tokenseg.imaging.formats import read_values
from tokenseg.imaging.grids import resample
from tokenseg.imaging.orientation import to_canonical
from tokenseg.imaging.volume import Grid, read_grid
from tokenseg.progress import Progress

_PLANES = (("axial", 2), ("coronal", 1), ("sagittal", 0))
_SHOWN = ("error", "warning")
_DOTS_PER_INCH = 100


def draw_cases(dataset: Dataset, findings: Sequence[Finding], folder: Path, progress: Progress) -> None:
    """Draw each case with an error or a warning as `folder/CASE.png`; one that cannot be read has no picture.

    Raises:
        FileError: The folder cannot be written.
    """
    texts: dict[str, list[str]] = {}
    for finding in findings:
        if finding.severity in _SHOWN:
            texts.setdefault(finding.case_id, []).append(finding.text)
    progress.stage("drawing", len(texts))
    for case in dataset.cases:
        if case.case_id not in texts:
            continue
        content = b""
        with suppress(TokenSegError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # matplotlib on letters that its font lacks
            content = _draw(case, texts[case.case_id])
        if content:
            write_atomically(folder / f"{case.case_id}.png", content)
        progress.advance(case.case_id)


def _draw(case: Case, texts: Sequence[str]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    grid = read_grid(case.images[0])
    _, values = read_values(case.images[0])
    channel = values if values.ndim == 3 else values[..., 0]
    first = np.nan_to_num(channel.astype(np.float32), posinf=0.0, neginf=0.0)
    image, spacing_mm = to_canonical(first, grid.affine)
    mask = to_canonical(_mask_on(case, grid), grid.affine)[0]
    figure = Figure(figsize=(12, 4.6), dpi=_DOTS_PER_INCH)
    FigureCanvasAgg(figure)
    low, high = np.percentile(image, (1, 99))
    for number, (name, normal) in enumerate(_PLANES):
        axes = figure.add_subplot(1, 3, number + 1)
        index = _slice_of(mask, normal)
        across, up = (axis for axis in range(3) if axis != normal)
        aspect = spacing_mm[up] / spacing_mm[across]
        axes.imshow(image.take(index, normal).T, cmap="gray", vmin=low, vmax=high, origin="lower", aspect=aspect)
        if mask.take(index, normal).any() and min(mask.take(index, normal).shape) > 1:
            axes.contour(mask.take(index, normal).T, levels=[0.5], colors="#FFF23D", linewidths=1)
        axes.set_title(f"{name} {index}", fontsize=9)
        axes.set_axis_off()
    figure.suptitle(case.case_id + "\n" + "\n".join(texts[:3]), fontsize=9, x=0.02, ha="left", parse_math=False)
    content = io.BytesIO()
    figure.savefig(content, format="png", facecolor="white", metadata={"Software": "tokenseg"})
    return content.getvalue()


def _mask_on(case: Case, grid: Grid) -> Bool[np.ndarray, "X Y Z"]:
    """Foreground of the case's mask at the voxels of a grid; none where it has no usable mask."""
    if case.label is None:
        return np.zeros(grid.shape, dtype=bool)
    try:
        own = read_grid(case.label)
        _, values = read_values(case.label)
    except TokenSegError:
        return np.zeros(grid.shape, dtype=bool)
    if values.ndim != 3:
        return np.zeros(grid.shape, dtype=bool)
    foreground: Bool[np.ndarray, "X Y Z"] = np.nan_to_num(values) != 0
    moved: Bool[np.ndarray, "X Y Z"] = resample(foreground.astype(np.uint8), own, grid, order=0) != 0
    return moved


def _slice_of(mask: Bool[np.ndarray, "X Y Z"], normal: int) -> int:
    """The slice with most of the mask; the middle one where there is none."""
    areas: Float[np.ndarray, " n"] = mask.sum(axis=tuple(axis for axis in range(3) if axis != normal))
    return int(areas.argmax()) if areas.any() else mask.shape[normal] // 2
