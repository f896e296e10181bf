"""Tokens of one scan in places of the scan itself, from what was told of the passes while it was segmented.

Each pass, one over all or windows, has its own candidates and keeps its own K. Everything is in voxels of the scan
turned to RAS+ axes at its own spacing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer, Shaped

from tokenseg.config import NetworkConfig, Plan
from tokenseg.errors import ConfigError
from tokenseg.imaging.orientation import shape3, turn_to_ras
from tokenseg.inference.token_passes import TokenPasses
from tokenseg.inference.windows import Corner, window_corners
from tokenseg.model.quantizer import FiniteScalarQuantizer
from tokenseg.plan_grid.preprocess import GridRecord
from tokenseg.saved_model.checkpoint import Model
from tokenseg.shapes import BoolMask, MaskArray


@dataclass(frozen=True, eq=False)
class CaseTokens:
    """The N candidate tokens of each of T passes of the network over one scan.

    Boxes are corners in voxel edges of the scan in RAS+ axes (voxel i spans i to i + 1), at its own spacing.

    Attributes:
        boxes_vox: Where the features of each token were pooled, clipped to what the network saw of the scan; empty
            for a cell wholly in padding.
        cells_vox: The even share of the scan that stands for each token in a picture: the same for all levels, trimmed
            where windows overlap, so that no two places overlap; empty where nothing is left. Steered windows lie where
            they are needed, and are not trimmed.
        level: Pyramid level of each candidate, 0 = 1/2.
        kept: Whether each candidate was kept.
        boundary: First term of the score, the gradient of the image; 0..1 within a pass.
        semantic: Second term, the predicted chance of a boundary; 0..1 within a pass.
        diversity: Third term, how rare the code is; 0..1 within a pass, 0 without a codebook.
        score: The joined score, 0..1.
        code: Entry of the codebook; -1 without one.
        num_codes: Entries of the codebook; 0 without one.
        prediction: Foreground of the mask, in RAS+ axes.
        record: The way from the scan as stored.
    """

    boxes_vox: Float[np.ndarray, "T N 2 3"]
    cells_vox: Float[np.ndarray, "T N 2 3"]
    level: Integer[np.ndarray, " N"]
    kept: Bool[np.ndarray, "T N"]
    boundary: Float[np.ndarray, "T N"]
    semantic: Float[np.ndarray, "T N"]
    diversity: Float[np.ndarray, "T N"]
    score: Float[np.ndarray, "T N"]
    code: Integer[np.ndarray, "T N"]
    num_codes: int
    prediction: BoolMask
    record: GridRecord

    @property
    def in_scan(self) -> Bool[np.ndarray, "T N"]:
        """Whether each cell holds any of the scan; False is a cell wholly in padding."""
        real: Bool[np.ndarray, "T N"] = np.all(self.boxes_vox[:, :, 1] > self.boxes_vox[:, :, 0], axis=2)
        return real


def case_tokens(model: Model, passes: TokenPasses, record: GridRecord, mask: MaskArray) -> CaseTokens:
    """Put what was told of the passes over a scan into places of the scan.

    Args:
        model: That made the passes.
        passes: Told while the scan was segmented.
        record: Of the scan.
        mask: That came of it, as stored.
    """
    places = _find_places(passes.corners, record, model.facts.plan)
    boxes = [passes.boxes_vox + np.array(place.corner) for place in places]
    cells = [np.tile(place.cells, (len(passes.level) // len(place.cells), 1, 1)) for place in places]
    return CaseTokens(
        boxes_vox=_to_scan(boxes, record),
        cells_vox=_to_scan(cells, record),
        level=passes.level,
        kept=passes.kept,
        boundary=passes.boundary,
        semantic=passes.semantic,
        diversity=passes.diversity,
        score=passes.score,
        code=passes.codes,
        num_codes=_num_codes(model.facts.network),
        prediction=turn_to_ras(mask != 0, record.axes, record.flipped),
        record=record,
    )


@dataclass(frozen=True, eq=False)
class TokenBoxes:
    """The candidate tokens of a case, and which of them one network kept."""

    model_name: str
    boxes_vox: Float[np.ndarray, "N 2 3"]
    """First and last edge of each cell, in voxel edges of the image in RAS+ axes: voxel i lies between i and i + 1."""
    level: Integer[np.ndarray, " N"]
    """0 to 3, from fine to coarse."""
    score: Float[np.ndarray, " N"]
    """Importance, by which they were kept."""
    kept: Bool[np.ndarray, " N"]


def token_boxes(model_name: str, tokens: CaseTokens) -> TokenBoxes:
    """Cells of all passes in one list, for drawing; those without a voxel of the scan are left out."""
    boxes = tokens.cells_vox.reshape(-1, 2, 3)
    passes = len(tokens.kept)
    real = tokens.in_scan.ravel() & (boxes[:, 1] > boxes[:, 0]).all(axis=1)
    level, score, kept = np.tile(tokens.level, passes), tokens.score.ravel(), tokens.kept.ravel()
    return TokenBoxes(model_name, boxes[real], level[real], score[real], kept[real])


def check_has_tokens(model: Model) -> None:
    """Refuse a model without a token path.

    Raises:
        ConfigError: With the name of the model.
    """
    if not model.facts.network.tokens:
        raise ConfigError(
            f"model {model.facts.name!r} was trained without tokens (tokens = false), so there are none to show; "
            "use a model trained with them"
        )


class _Place(NamedTuple):
    """Where one pass of the network lies, in voxels of the prepared image."""

    corner: tuple[int, int, int]
    """First voxel of its input; negative where that is padding."""
    cells: Float[np.ndarray, "n 2 3"]
    """Its even shares, trimmed to the part of the image that is nearer to its centre than to another's."""


def _find_places(corners: Sequence[Corner], record: GridRecord, plan: Plan) -> list[_Place]:
    """Where passes lie in the prepared image; their corners count from its padding on."""
    padded = shape3(np.maximum(record.grid_shape, plan.window_vox))
    start = [(size - length) // 2 for size, length in zip(padded, record.grid_shape, strict=True)]
    length = padded if window_corners(padded, plan) is None else plan.window_vox
    firsts = [sorted({corner[axis] for corner in corners}) for axis in range(3)]
    if math.prod(map(len, firsts)) != len(corners):  # steered: no window has a neighbour on each side
        firsts = [[] for _ in range(3)]
    places = []
    for corner in corners:
        edges = [_edges(corner[i], firsts[i], length[i], plan.grid[i]) - start[i] for i in range(3)]
        low, high = (
            np.stack(np.meshgrid(*ends, indexing="ij"), axis=-1).reshape(-1, 3)
            for ends in ([each[:-1] for each in edges], [each[1:] for each in edges])
        )
        x, y, z = (first - padding for first, padding in zip(corner, start, strict=True))
        places.append(_Place((x, y, z), np.stack([low, high], axis=1)))
    return places


def _edges(first: int, firsts: Sequence[int], length: int, count: int) -> Float[np.ndarray, " n"]:
    """Ends of the even shares of a window along an axis, trimmed half-way to where its neighbours begin or end."""
    if not firsts:
        return np.linspace(first, first + length, count + 1)
    place = firsts.index(first)
    low = first if place == 0 else (firsts[place - 1] + length + first) / 2
    high = first + length if place == len(firsts) - 1 else (first + length + firsts[place + 1]) / 2
    return np.linspace(first, first + length, count + 1).clip(low, high)


def _to_scan(boxes: list[Shaped[np.ndarray, "N 2 3"]], record: GridRecord) -> Float[np.ndarray, "T N 2 3"]:
    """Boxes in voxels of the prepared image as boxes in the scan, clipped to what the network saw of it."""
    scale = np.array(record.crop_shape) / np.array(record.grid_shape)
    in_scan = np.stack(boxes) * scale + np.array(record.crop_start)
    clipped: Float[np.ndarray, "T N 2 3"] = np.clip(in_scan, record.crop_start, record.crop_stop)
    return clipped


def _num_codes(config: NetworkConfig) -> int:
    return {"vq": config.codebook_size, "fsq": math.prod(FiniteScalarQuantizer.levels), "none": 0}[config.quantizer]
