"""Tokens of the passes over a scan, as they were told while it was segmented."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

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
    """Keeps what it is told of each pass; a window that runs in two slabs counts once."""

    def __init__(self) -> None:
        self._cells: tuple[Tensor, Tensor] | None = None
        self._terms: dict[Corner, tuple[Tensor, ...]] = {}

    def __call__(self, corner: Corner, tokens: TokenChoice) -> None:
        """Copy the tokens of a pass: the next one may write over them."""
        self._cells = self._cells or (tokens.boxes_vox, tokens.level)  # all passes are of one size
        self._terms[corner] = tuple(values.cpu().clone() for values in tokens[2:])

    def heard(self, record: GridRecord) -> TokenPasses | None:
        """All passes, in an order that no slabs change."""
        if self._cells is None:
            return None
        corners = tuple(in_order(list(self._terms), record.order))
        terms = [self._terms[corner] for corner in corners]
        kept, boundary, semantic, diversity, score, codes = map(_stacked, zip(*terms, strict=True))
        boxes_vox, level = (values.cpu().numpy() for values in self._cells)
        return TokenPasses(corners, boxes_vox, level, kept, boundary, semantic, diversity, score, codes)


def _stacked(tensors: tuple[Tensor, ...]) -> np.ndarray:
    values = torch.cat(tensors)
    return (values.float() if values.is_floating_point() else values).numpy()
