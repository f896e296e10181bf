"""The slice viewer: what it shows of a case, packed small enough to lie inside the page, and its controls.

The image is stored in 8 bits, on a coarser grid where it has more than 160 voxels along an axis; masks are stored as
they are, cut to the box that holds them. The script of the page draws both.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt8

from tokenseg.config import Label
from tokenseg.report.markup import Html, data_block, element, join
from tokenseg.report.page import Section
from tokenseg.tokens.case import TokenBoxes

MAX_IMAGE_VOX = 160
"""Longest axis of an image in the page; a longer one is averaged over whole blocks of voxels."""

WINDOW_PERCENTILES = (0.5, 99.5)
"""Intensities below and above are shown black and white at the widest window."""

# Axis across the screen, axis up the screen, axis into it; right and anterior run leftwards, as radiologists look.
_PLANES = {"axial": ("R", "L", "A", "P"), "coronal": ("R", "L", "S", "I"), "sagittal": ("A", "P", "S", "I")}
_AVERAGED_PLANES = 16
_LEVELS = ("1/2", "1/4", "1/8", "1/16")


@dataclass(frozen=True, eq=False)
class CaseView:
    """One case as the viewer shows it; arrays have axes along right, anterior, superior, at the scan's own spacing."""

    case_id: str
    caption: str
    """Why it is shown, such as "worst of 12"."""
    channels: dict[str, Float[np.ndarray, "X Y Z"]]
    """Images by name, the first one is shown at first; none where there is no image, then contours stand alone."""
    spacing_mm: tuple[float, float, float]
    labels: tuple[Label, ...]
    reference: Bool[np.ndarray, "R X Y Z"] | None
    """One mask a label; labels may overlap."""
    prediction: Bool[np.ndarray, "R X Y Z"] | None
    tokens: tuple[TokenBoxes, ...] = ()
    """One set a model."""
    facts: dict[str, str] = field(default_factory=dict)
    """What to say of each label, by its name."""
    notes: tuple[str, ...] = ()
    """Remarks on how it is shown, in whole sentences."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels of the scan along right, anterior, superior."""
        arrays = [*self.channels.values(), self.reference, self.prediction]
        x, y, z = next(array.shape[-3:] for array in arrays if array is not None)
        return x, y, z


class _Head(NamedTuple):
    """What the controls need of a case; small, so that one case after the other can be packed and let go."""

    case_id: str
    caption: str
    has_reference: bool
    has_prediction: bool
    token_models: tuple[str, ...]


def viewer_section(views: Iterable[CaseView], anchor: str = "cases", title: str = "Cases in three planes") -> Section:
    """One viewer with a picker of cases; the first is shown at first.

    Args:
        views: In the order of the picker, each taken once and not held; each has an image or a mask.
        anchor: `id` of the section.
        title: Its heading.
    """
    heads, blocks = list[_Head](), list[Html]()
    for view in views:
        blocks.append(data_block(pack_case(view), "case"))
        models = tuple(tokens.model_name for tokens in view.tokens)
        heads.append(_Head(view.case_id, view.caption, view.reference is not None, view.prediction is not None, models))
        del view  # with its images, before the next one is read
    if not heads:
        return Section(anchor, title, element("p", "There is no case to show."))
    buttons = (
        element("button", element("b", head.caption), " ", head.case_id, type="button", aria_pressed="false")
        for head in heads
    )
    viewer = element(
        "div",
        element("div", *buttons, class_="picker", role="group", aria_label="Case"),
        element("noscript", element("p", "The pictures need JavaScript, which runs inside this file only.")),
        _controls(heads),
        element("div", *map(_plane, _PLANES), class_="planes"),
        element("p", class_="readout", role="status"),
        element("div", element("dl", class_="facts"), element("p", class_="note"), class_="about"),
        *blocks,
        class_="viewer",
    )
    return Section(anchor, title, join((viewer, _HELP)))


def pack_case(view: CaseView) -> dict[str, Any]:
    """Everything that the script needs of a case, as plain values for JSON; arrays are deflated, then base64."""
    factors = [-(-size // MAX_IMAGE_VOX) for size in view.shape]
    images = [_packed_channel(name, _averaged(image, factors)) for name, image in view.channels.items()]
    return {
        "id": view.case_id,
        "facts": list(view.facts.items()),
        "note": " ".join((*view.notes, *_reduction(factors, has_image=bool(view.channels)))),
        "shape": view.shape,
        "spacing": view.spacing_mm,
        "start": _start(view),
        "factors": factors,
        "channels": images,
        "labels": [label.name for label in view.labels],
        "masks": _packed_masks(view),
        "tokens": [_packed_tokens(tokens) for tokens in view.tokens],
    }


def _averaged(image: Float[np.ndarray, "X Y Z"], factors: Sequence[int]) -> Float[np.ndarray, "X2 Y2 Z2"]:
    """Mean over blocks of voxels; a last block that is cut by the border is the mean of what is there."""
    if max(factors) == 1:
        return image
    # A few planes at a time: sums of a whole scan would take twice its memory.
    step = _AVERAGED_PLANES * factors[2]
    return np.concatenate(
        [_averaged_part(image[:, :, at : at + step], factors) for at in range(0, image.shape[2], step)], axis=2
    )


def _averaged_part(image: Float[np.ndarray, "X Y Z"], factors: Sequence[int]) -> Float[np.ndarray, "X2 Y2 Z2"]:
    for axis, factor in enumerate(factors):
        if factor > 1:
            starts = np.arange(0, image.shape[axis], factor)
            counts = np.diff(starts, append=image.shape[axis])
            sums = np.add.reduceat(image, starts, axis=axis, dtype=np.float64)
            image = sums / counts.reshape([-1 if each == axis else 1 for each in range(3)])
    return image


def _packed_channel(name: str, image: Float[np.ndarray, "X Y Z"]) -> dict[str, Any]:
    low, high = (float(value) for value in np.percentile(image, WINDOW_PERCENTILES))
    # A constant image is shown black.
    share = (image - low) / (high - low if high > low else 1.0)
    grey = np.rint(np.clip(share, 0, 1) * 255).astype(np.uint8)
    return {"name": name, "low": low, "high": high, "data": _deflated(grey)}


def _reduction(factors: Sequence[int], *, has_image: bool) -> list[str]:
    if not has_image:
        return ["No image was given: contours stand alone."]
    if max(factors) == 1:
        return []
    blocks = " x ".join(map(str, factors))
    return [f"The image is averaged over blocks of {blocks} voxels to keep this file small; contours are exact."]


def _start(view: CaseView) -> list[int]:
    """Along each axis, the slice with the largest area of the reference; without one, of the prediction."""
    for mask in (view.reference, view.prediction):
        if mask is not None and mask.any():
            inside = mask.any(axis=0)
            return [int(inside.sum(axis=axes).argmax()) for axes in ((1, 2), (0, 2), (0, 1))]
    return [size // 2 for size in view.shape]


def _packed_masks(view: CaseView) -> dict[str, Any]:
    given = [mask for mask in (view.reference, view.prediction) if mask is not None]
    inside = np.zeros(view.shape, dtype=bool)
    for mask in given:
        inside |= mask.any(axis=0)
    first, stop = _box(inside)
    box = (slice(None), *(slice(*edges) for edges in zip(first, stop, strict=True)))
    return {
        "first": first,
        "shape": [end - begin for begin, end in zip(first, stop, strict=True)],
        "reference": None if view.reference is None else _bits(view.reference[box]),
        "prediction": None if view.prediction is None else _bits(view.prediction[box]),
    }


def _box(inside: Bool[np.ndarray, "X Y Z"]) -> tuple[list[int], list[int]]:
    hits = [np.flatnonzero(inside.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
    if not hits[0].size:
        return [0, 0, 0], [0, 0, 0]
    return [int(hit[0]) for hit in hits], [int(hit[-1]) + 1 for hit in hits]


def _bits(masks: Bool[np.ndarray, "R X Y Z"]) -> str:
    """Label r is bit r % 8 of volume r // 8."""
    return _deflated(np.packbits(masks, axis=0, bitorder="little"))


def _packed_tokens(tokens: TokenBoxes) -> dict[str, Any]:
    kept = tokens.kept
    return {
        "model": tokens.model_name,
        "total": len(kept),
        "boxes": tokens.boxes_vox[kept].round(2).reshape(-1, 6).tolist(),
        "level": tokens.level[kept].tolist(),
        "score": tokens.score[kept].astype(np.float64).round(4).tolist(),
    }


def _deflated(array: UInt8[np.ndarray, "*shape"] | Shaped[np.ndarray, "*shape"]) -> str:
    # At the usual level noisy masks take four times as long, and images no less room.
    return base64.b64encode(zlib.compress(np.ascontiguousarray(array).tobytes(), level=4)).decode()


def _plane(plane: str) -> Html:
    letters = zip(_PLANES[plane], ("left", "right", "top", "bottom"), strict=True)
    return element(
        "figure",
        element("figcaption", plane.capitalize(), " ", element("output")),
        element(
            "div",
            element("canvas", tabindex="0", role="img", aria_label=f"{plane} slice"),
            *(element("span", letter, class_=f"side {side}", aria_hidden="true") for letter, side in letters),
            class_="pane",
        ),
        element("input", type="range", min="0", value="0", class_="slice", aria_label=f"{plane} slice"),
        class_="plane",
        data_plane=plane,
    )


def _controls(heads: Sequence[_Head]) -> Html:
    both = any(head.has_reference and head.has_prediction for head in heads)
    switches = [
        _switch("reference", "Reference", on=True, shown=any(head.has_reference for head in heads)),
        _switch("prediction", "Prediction", on=True, shown=any(head.has_prediction for head in heads)),
        _switch("fill", "Fill differences" if both else "Fill", on=False, shown=True),
        _switch("crosshair", "Crosshair", on=True, shown=True),
    ]
    tokens = _choice("tokens", "Tokens", {"": "hidden", "level": "by level", "score": "by score"})
    names = max((head.token_models for head in heads), key=len)
    options = (element("option", name, value=str(at)) for at, name in enumerate(names))
    models = element("label", "of ", element("select", *options, class_="token-model"), class_="choice")
    return element(
        "div",
        element("div", *switches, class_="switches"),
        element("div", class_="switches labels"),
        element("label", "Channel ", element("select", class_="channel"), class_="choice"),
        element("label", "Zoom ", element("input", type="range", class_="zoom", min="1", max="8", step="any")),
        element("label", "Level ", element("input", type="range", class_="level", min="0", max="255", step="1")),
        element("label", "Window ", element("input", type="range", class_="window", min="2", max="510", step="1")),
        element("button", "Reset", type="button", class_="reset"),
        tokens if names else "",
        models if len(names) > 1 else "",
        class_="controls",
    )


def _switch(name: str, title: str, *, on: bool, shown: bool) -> Html:
    box = element("input", type="checkbox", class_=name, checked=on)
    return element("label", box, element("i", class_=f"swatch {name}"), f" {title}") if shown else Html("")


def _choice(class_: str, title: str, options: dict[str, str]) -> Html:
    entries = (element("option", text, value=value) for value, text in options.items())
    key = element("span", class_="key")
    return element(
        "label", f"{title} ", element("select", *entries, class_=class_), key, class_=f"choice {class_}-choice"
    )


_HELP = element(
    "p",
    "Wheel, arrow keys or the slider change the slice; a click moves the crosshair; dragging with the right button "
    "changes level (up and down) and window (left and right). The patient's right is on the left of the picture.",
    class_="help",
)
