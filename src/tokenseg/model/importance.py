"""Boundary-aware importance score of the candidate tokens.

Paper: score = boundary strength (predefined gradient features) + semantic strength + codebook diversity. Differs: the
default joins the three terms with weights learned against the cells that the reference surface crosses; the plain sum
stays as `sum`.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenseg.model.blocks import Stride
from tokenseg.model.cells import pool_cells
from tokenseg.shapes import Features, Images, Tokens, TokenScalars


class Importance(NamedTuple):
    """Score of each candidate, its three terms, and the logits that training supervises."""

    boundary: TokenScalars
    """Gradient magnitude of the image in the cell; 0..1 within a volume."""
    semantic: TokenScalars
    """Predicted probability that the cell holds both foreground and background; 0..1 within a volume."""
    diversity: TokenScalars
    """-log usage of the token's code; 0..1 within a volume; 0 without a codebook."""
    logit: TokenScalars
    """Joined score before the sigmoid."""
    score: TokenScalars
    """Importance, 0..1."""
    presence_logits: Float[Tensor, "B N 2"]
    """Logits of: the cell holds foreground; the cell holds background."""


class ImportanceScore(nn.Module):
    """Three terms, each scaled to 0..1 within a volume, joined into one score."""

    def __init__(self, token_width: int, num_levels: int, *, learned: bool) -> None:
        super().__init__()
        self.num_levels = num_levels
        self.presence = nn.Linear(token_width, 2)
        self.term_weights = nn.Parameter(torch.ones(num_levels, 1, 3), requires_grad=learned)
        self.level_bias = nn.Parameter(torch.full((num_levels, 1), -1.5), requires_grad=learned)

    def forward(self, tokens: Tokens, gradient: Float[Tensor, "B n"], rarity: TokenScalars) -> Importance:
        """Score the candidates.

        Args:
            tokens: Quantised tokens of all levels.
            gradient: Gradient magnitude in each cell of the grid; cells of all levels cover the same boxes.
            rarity: -log usage of each token's code.
        """
        presence_logits = self.presence(tokens)
        boundary = _unit_range(gradient.repeat(1, self.num_levels))
        semantic = _unit_range(presence_logits.sigmoid().prod(dim=-1))
        diversity = _unit_range(rarity)
        terms = torch.stack([boundary, semantic, diversity], dim=-1)
        terms = terms.reshape(len(tokens), self.num_levels, -1, 3)
        logit = ((terms * self.term_weights).sum(dim=-1) + self.level_bias).flatten(1)
        return Importance(boundary, semantic, diversity, logit, logit.sigmoid(), presence_logits)


def cell_gradient(
    intensities: Features, stride: Stride, spacing_mm: tuple[float, float, float], grid: tuple[int, int, int]
) -> Float[Tensor, "B n"]:
    """Mean gradient magnitude of the image in every cell, per mm, all channels together.

    Taken at 1/2, where it costs an eighth of full resolution: cells are many voxels wide. Differences run over two
    voxels and are divided by the distance in mm, so that anisotropic voxels count rightly.

    Args:
        intensities: Raw voxels of each block, (B, S C, x, y, z), as `space_to_depth` gives them.
        stride: Down-sampling of the first level.
        spacing_mm: Voxel spacing of the image.
        grid: Cells along each axis.
    """
    block_vox = prod(stride)
    averaging = torch.eye(intensities.shape[1] // block_vox, device=intensities.device) / block_vox
    blocks = intensities.permute(0, 2, 3, 4, 1).float()
    coarse = torch.matmul(blocks, averaging.repeat_interleave(block_vox, dim=0)).permute(0, 4, 1, 2, 3)
    squares = torch.zeros_like(coarse[:, :1])
    for axis in range(3):
        distance_mm = 2 * stride[axis] * spacing_mm[axis]
        squares = squares + (_difference(coarse, axis + 2) / distance_mm).square().sum(dim=1, keepdim=True)
    return pool_cells(squares.sqrt(), grid).flatten(1).float()


def _difference(values: Images, dim: int) -> Images:
    """Next minus previous voxel along `dim`; 0 at the two ends."""
    length = values.shape[dim]
    if length < 3:
        return torch.zeros_like(values)
    step = values.narrow(dim, 2, length - 2) - values.narrow(dim, 0, length - 2)
    ends = [0, 0] * (values.ndim - 1 - dim) + [1, 1]
    return nn.functional.pad(step, ends)


def _unit_range(values: TokenScalars) -> TokenScalars:
    low, high = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)
    return (values - low) / (high - low + 1e-6)
