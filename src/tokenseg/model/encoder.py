"""Hierarchical encoder: volume -> four-level pyramid -> candidate tokens.

Paper: a feature pyramid with levels at 1/2, 1/4, 1/8 and 1/16; at each level local cells are pooled into tokens, 400
candidates in all. Differs: no stage at full resolution. Space-to-depth brings all voxels into channels at 1/2, so
nothing is lost, and what runs at stride 1 decides the cost. An axis that is coarse already is not pooled.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenseg.model.blocks import ConvBlock, Pyramid, ResidualBlock, Stride
from tokenseg.model.cells import pool_cells
from tokenseg.shapes import Features, Tokens


class HierarchicalEncoder(nn.Module):
    """Residual convolution stages, one a level.

    Args:
        image_channels: C, channels of the image.
        widths: W of each level.
        blocks: Residual depth of each level; the first block of a level changes width and stride.
        strides: Down-sampling of each level against the one before it.
        skipped: Probability with which a residual block is skipped in training.
    """

    def __init__(
        self,
        image_channels: int,
        widths: tuple[int, ...],
        blocks: tuple[int, ...],
        strides: tuple[Stride, ...],
        *,
        skipped: float = 0.0,
    ) -> None:
        super().__init__()
        sx, sy, sz = strides[0]
        stages = [_stage(image_channels * sx * sy * sz, widths[0], blocks[0], (1, 1, 1), skipped)]
        stages += [
            _stage(widths[level - 1], widths[level], blocks[level], strides[level], skipped)
            for level in range(1, len(widths))
        ]
        self.stages = nn.ModuleList(stages)

    def forward(self, intensities: Features) -> Pyramid:
        """Return the pyramid, finest level first, from the raw voxels of each block, (B, S C, x, y, z)."""
        features: Tensor = intensities
        pyramid = []
        for stage in self.stages:
            features = stage(features)
            pyramid.append(features)
        return pyramid


class CandidateTokens(nn.Module):
    """Pool every level over the same grid of cells and project to the token width."""

    def __init__(self, widths: tuple[int, ...], token_width: int, grid: tuple[int, int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.project = nn.ModuleList(nn.Linear(width, token_width) for width in widths)
        self.norm = nn.LayerNorm(token_width)

    def pool(self, pyramid: Pyramid) -> list[Float[Tensor, "B n _"]]:
        """Cell averages of each level, (B, 100, W), as float32."""
        return [pool_cells(features, self.grid).flatten(1, 3).float() for features in pyramid]

    def forward(self, pooled: list[Float[Tensor, "B n _"]]) -> Tokens:
        """Join the levels into (B, N, F), finest level first."""
        projected = torch.cat([layer(cells) for layer, cells in zip(self.project, pooled, strict=True)], dim=1)
        tokens: Tensor = self.norm(projected)
        return tokens


def _stage(channels_in: int, channels_out: int, depth: int, stride: Stride, skipped: float) -> nn.Sequential:
    residual = [ResidualBlock(channels_out, skipped) for _ in range(depth - 1)]
    return nn.Sequential(ConvBlock(channels_in, channels_out, stride), *residual)
