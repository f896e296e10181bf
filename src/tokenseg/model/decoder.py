"""Sparse-to-dense decoder: kept tokens and pyramid -> full-resolution logits.

Paper: token reprojection, progressive upsampling, skip connections, cross-level fusion. Differs: reprojection starts at
zero, so that the network starts as its own token-free twin, and cells without a kept token keep their own features;
upsampling is sub-pixel (a linear layer, then depth-to-space), which is exact on odd sizes after cropping.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from jaxtyping import Float
from torch import Tensor, nn

from tokenseg.model.blocks import ConvBlock, Pyramid, Stride, pointwise, upsampled
from tokenseg.model.cells import expand_cells
from tokenseg.shapes import Features, Tokens

CoarseLogits: TypeAlias = Float[Tensor, "B L _ _ _"]


class Decoded(NamedTuple):
    """What the decoder leaves at 1/2."""

    features: Features
    block_logits: Float[Tensor, "B Xl Yl Zl _"]
    """Logits of the full-resolution voxels of every block, voxel by voxel."""
    deep_logits: tuple[CoarseLogits, ...]
    """At 1/4 and 1/8, in training; else empty."""


class Reprojection(nn.Module):
    """Add each kept token to its cell at its level; tokens of the finest level enter at the next one.

    A map at 1/2 costs eight times as much as one at 1/4, and a cell is many voxels wide on both.
    """

    def __init__(self, widths: tuple[int, ...], token_width: int, grid: tuple[int, int, int]) -> None:
        super().__init__()
        self.grid = grid
        layers = [nn.Linear(token_width, width, bias=False) for width in (widths[1], *widths[1:])]
        for layer in layers:
            nn.init.zeros_(layer.weight)
        self.project = nn.ModuleList(layers)

    def forward(self, pyramid: Pyramid, tokens: Tokens) -> Pyramid:
        """Return the pyramid with `tokens` (zero where not kept) spread linearly from the cell centres."""
        levels = tokens.chunk(len(pyramid), dim=1)
        finest, *changes = (layer(cells) for layer, cells in zip(self.project, levels, strict=True))
        changes[0] = changes[0] + finest
        fused = [pyramid[0]]
        for features, change in zip(pyramid[1:], changes, strict=True):
            x, y, z = features.shape[2:]
            fused.append(features + expand_cells(change.unflatten(1, self.grid).to(features.dtype), (x, y, z)))
        return fused


class SparseToDenseDecoder(nn.Module):
    """From 1/16 to 1/2: sub-pixel upsampling, added skip, a convolution a level; then logits of each block's voxels."""

    def __init__(self, widths: tuple[int, ...], strides: tuple[Stride, ...], num_outputs: int) -> None:
        super().__init__()
        self.strides = strides
        self.upsample = nn.ModuleList(
            nn.Linear(widths[level + 1], widths[level] * _product(strides[level + 1]), bias=False)
            for level in range(len(widths) - 1)
        )
        self.fuse = nn.ModuleList(ConvBlock(width, width) for width in widths[:-1])
        self.head = nn.Linear(widths[0], num_outputs * _product(strides[0]))
        self.deep_heads = nn.ModuleList(nn.Linear(width, num_outputs) for width in widths[1:3])

    def forward(self, pyramid: Pyramid) -> Decoded:
        """Decode; deep-supervision logits only in training."""
        features, deep = pyramid[-1], []
        for level in reversed(range(len(self.fuse))):
            skip = pyramid[level]
            x, y, z = skip.shape[2:]
            # In one expression, so that what is raised is let go before the convolution: at 1/2 that is the peak.
            features = self.fuse[level](
                upsampled(features, self.upsample[level], self.strides[level + 1])[:, :, :x, :y, :z] + skip
            )
            if self.training and level in (1, 2):
                deep.append(pointwise(features, self.deep_heads[level - 1]).permute(0, 4, 1, 2, 3))
        return Decoded(features, pointwise(features, self.head), tuple(reversed(deep)))


def _product(stride: Stride) -> int:
    return stride[0] * stride[1] * stride[2]
