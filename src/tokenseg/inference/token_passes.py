"""Tokens of the passes over a scan, as they were told while it was segmented."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer

from tokenseg.config import Plan
from tokenseg.inference.windows import Corner, in_order
from tokenseg.model.passes import TokenChoice
from tokenseg.plan_grid.preprocess import GridRecord


class TokenPasses(NamedTuple):
    """What one model made of the N candidates of each of T passes at full spacing over a scan, by their first rows."""

    corners: tuple[Corner, ...]
    """First voxel of each pass, in the image as it is padded to a window at least."""
    boxes_vox: Integer[np.ndarray, "N 2 3"]
    """Corners of each cell, in voxels of a pass."""
    level: Integer[np.ndarray, " N"]
    kept: Bool[np.ndarray, "T N"]
    boundary: Float[np.ndarray, "T N"]
    semantic: Float[np.ndarray, "T N"]
    diversity: Float[np.ndarray, "T N"]
    score: Float[np.ndarray, "T N"]
    codes: Integer[np.ndarray, "T N"]


class ScanTokens(NamedTuple):
    """Tokens that the models of an ensemble chose in one scan."""

    record: GridRecord
    passes: tuple[TokenPasses | None, ...]
    """One a model; None of a model that has no tokens, or where no pass ran at full spacing."""


class TokenListener:
    """Keeps what it is told of each pass; a window that runs in two slabs counts once.

    Room is made before the first pass. What is kept of each would else lie between the large blocks that the next ones
    need, and the process would take up to a third more memory.

    Args:
        num_passes: How many there will be at most.
        plan: Of the model; gives N.
    """

    def __init__(self, num_passes: int, plan: Plan) -> None:
        size = (num_passes, len(plan.strides) * math.prod(plan.grid))
        self._numbers: dict[Corner, int] = {}
        self._boxes_vox, self._level = np.zeros((size[1], 2, 3), np.int64), np.zeros(size[1], np.int64)
        self._kept, self._codes = np.zeros(size, np.bool_), np.zeros(size, np.int64)
        self._terms = np.zeros((4, *size), np.float32)

    def __call__(self, corner: Corner, tokens: TokenChoice) -> None:
        """Copy the tokens of a pass: the next one may write over them."""
        number = self._numbers.setdefault(corner, len(self._numbers))
        boxes_vox, level, kept, *terms, codes = (values.cpu().numpy() for values in tokens)
        self._boxes_vox[:], self._level[:] = boxes_vox, level  # all passes are of one size
        self._kept[number], self._codes[number] = kept[0], codes[0]
        for row, term in zip(self._terms, terms, strict=True):
            row[number] = term[0]

    def heard(self, record: GridRecord) -> TokenPasses | None:
        """All passes, in an order that no slabs change."""
        if not self._numbers:
            return None
        corners = tuple(in_order(list(self._numbers), record.order))
        numbers = [self._numbers[corner] for corner in corners]
        terms = (term[numbers] for term in self._terms)
        return TokenPasses(corners, self._boxes_vox, self._level, self._kept[numbers], *terms, self._codes[numbers])  # type: ignore[call-arg]
