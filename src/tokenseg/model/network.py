"""TokenSeg: hierarchical encoder -> boundary-aware tokenizer -> sparse-to-dense decoder.

Follow a volume through `TokenSeg.forward`: pad, pyramid, 400 candidate tokens, codes, importance, 100 kept tokens,
mixed, put back into the pyramid, decoded, cropped.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenseg.config import NetworkConfig, Plan
from tokenseg.model import traced
from tokenseg.model.blocks import Pyramid, depth_to_space, full_precision, space_to_depth
from tokenseg.model.cells import cell_boxes_vox
from tokenseg.model.decoder import CoarseLogits, Reprojection, SparseToDenseDecoder
from tokenseg.model.encoder import CandidateTokens, HierarchicalEncoder
from tokenseg.model.importance import Importance, ImportanceScore, cell_gradient
from tokenseg.model.mixer import TokenMixer
from tokenseg.model.quantizer import Quantized, VectorQuantizer, build_quantizer
from tokenseg.model.refiner import BlockLogits, SparseRefiner
from tokenseg.model.selection import gather_tokens, scatter_tokens, select_tokens
from tokenseg.model.traced import traced_as
from tokenseg.outputs import outputs_of
from tokenseg.shapes import Codes, Features, Images, Logits, TokenFlags, Tokens


class TokenRecord(NamedTuple):
    """What the tokenizer did with the candidates; metrics and pictures are made from it."""

    boxes_vox: Int[Tensor, "N 2 3"]
    """Cell corners in voxels of the input: first voxel, one past the last."""
    level: Int[Tensor, " N"]
    """Pyramid level of each candidate, 0 = 1/2."""
    codes: Codes
    """Codebook entry of each candidate; -1 without a codebook."""
    importance: Importance
    """The three terms, their joined score, and the logits behind them."""
    kept: TokenFlags
    """Whether each candidate was kept."""
    commitment_loss: Float[Tensor, ""]
    """Mean squared distance of tokens to their codes; 0 outside training."""


class BlockOutput(NamedTuple):
    """What the network computes at 1/2; full resolution is only another order of its logits."""

    logits: BlockLogits
    """Of every block of the padded image."""
    deep_logits: tuple[CoarseLogits, ...]
    tokens: TokenRecord | None


class TokenSegOutput(NamedTuple):
    """Result of one forward pass.

    >>> import torch
    >>> from tokenseg import load_model
    >>> network = load_model("hippocampus").network
    >>> with torch.inference_mode():
    ...     output = network(torch.zeros(1, 1, 24, 20, 16))
    >>> output.logits.shape, output.deep_logits
    (torch.Size([1, 3, 24, 20, 16]), ())
    >>> output.tokens.kept.shape, int(output.tokens.kept.sum())
    (torch.Size([1, 400]), 100)
    """

    logits: Logits
    """Full resolution, the input's own size: labels with background (softmax) or regions (sigmoid)."""
    deep_logits: tuple[CoarseLogits, ...]
    """Logits at 1/4 and 1/8 in training, else empty."""
    tokens: TokenRecord | None
    """None where the network has no token path."""


class TokenSeg(nn.Module):
    """The network of the paper, on a dataset's plan.

    Made so its weights are random, from torch's random state; `load_model` gives trained ones. It takes images
    (B, C, X, Y, Z) and knows nothing of mm, files or label values.

    >>> import torch
    >>> from tokenseg import TokenSeg, load_model
    >>> facts = load_model("hippocampus").facts
    >>> network = TokenSeg(facts.network, facts.plan).eval()
    >>> with torch.inference_mode():
    ...     output = network(torch.zeros(2, 1, 24, 20, 16), num_kept=50)
    >>> output.tokens.kept.sum(dim=1)
    tensor([50, 50])

    Args:
        config: Size and parts.
        plan: Gives channels, outputs, strides, cell grid and voxel spacing.
    """

    def __init__(self, config: NetworkConfig, plan: Plan) -> None:
        super().__init__()
        self.num_kept, self.grid = config.num_kept, plan.grid
        self.plan, self.stem_stride, self.total_strides = plan, plan.strides[0], plan.total_strides
        self.encoder = HierarchicalEncoder(
            len(plan.channels), config.widths, config.blocks, plan.strides, skipped=config.stochastic_depth
        )
        self.tokenizer = Tokenizer(config, plan) if config.tokens else None
        self.decoder = SparseToDenseDecoder(config.widths, plan.strides, plan.num_outputs)
        self.refiner = (
            SparseRefiner(
                len(plan.channels),
                config.widths[0],
                prod(self.stem_stride),
                plan.num_outputs,
                meaning=outputs_of(plan),
                fraction=config.refine_fraction,
            )
            if config.refine_fraction
            else None
        )
        # Convolutions on channels-last maps are several times faster on a CPU.
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def forward(self, images: Images, num_kept: int | None = None) -> TokenSegOutput:
        """Segment a batch of any size.

        Args:
            images: Normalised intensities on the plan grid, at least one voxel along each axis; NaN is not looked for.
            num_kept: K for this pass, at least 1, more than N means N; None takes the configured one.
        """
        x, y, z = images.shape[2:]
        blocks = self.blocks(images, num_kept)
        logits = self.voxels(blocks.logits)[:, :, :x, :y, :z]
        return TokenSegOutput(logits, blocks.deep_logits, blocks.tokens)

    def blocks(self, images: Images, num_kept: int | None = None) -> BlockOutput:
        """All of `forward` but the order of its logits: blocks of voxels, those of the padding included."""
        x, y, z = images.shape[2:]
        intensities = space_to_depth(_padded(images, self.padding((x, y, z))), self.stem_stride)
        pyramid: Pyramid = self.encoder(intensities)
        tokens = None
        if self.tokenizer is not None:
            boxes = self._boxes(pyramid, (x, y, z))
            pyramid, tokens = self.tokenizer(
                intensities, pyramid, boxes, self.num_kept if num_kept is None else num_kept
            )
        features, block_logits, deep_logits = self.decoder(pyramid)
        if self.refiner is not None:
            block_logits = self.refiner(intensities, features, block_logits)
        return BlockOutput(block_logits, deep_logits, tokens)

    def voxels(self, logits: BlockLogits) -> Logits:
        """Take blocks apart into voxels, padding included."""
        return depth_to_space(logits, self.stem_stride)

    def padding(self, size: tuple[int, int, int]) -> list[int]:
        """Zeros appended to each axis, see `padding_of`."""
        return padding_of(self.plan, size)

    def _boxes(self, pyramid: Pyramid, size: tuple[int, int, int]) -> Int[Tensor, "N 2 3"]:
        sizes = [(f.shape[2], f.shape[3], f.shape[4]) for f in pyramid]
        return cell_boxes_vox(sizes, list(self.total_strides), self.grid, size)


def padding_of(plan: Plan, size: tuple[int, int, int]) -> list[int]:
    """Zeros appended to each axis: a multiple of the first stride, and two voxels left at the last level.

    Two, because instance norm needs more than one voxel, and bf16 convolutions on a CPU are wrong where a strided one
    leaves a single voxel along the last axis (pytorch issue 169688).

    Returns:
        Voxels before and after, the last axis first, as torch's `pad` takes them.
    """
    padding = []
    for axis in (2, 1, 0):
        first, total = plan.strides[0][axis], plan.total_strides[-1][axis]
        least = max(size[axis], total + first)
        padding += [0, (least + first - 1) // first * first - size[axis]]
    return padding


@traced_as(traced.padded)
def _padded(images: Images, padding: list[int]) -> Float[Tensor, "B C _ _ _"]:
    return nn.functional.pad(images, padding)


class Tokenizer(nn.Module):
    """The token path: candidates -> codes -> importance -> kept -> mixed -> back into the pyramid."""

    def __init__(self, config: NetworkConfig, plan: Plan) -> None:
        super().__init__()
        width, self.num_levels = config.token_width, len(config.widths)
        self.grid, self.stem_stride, self.spacing_mm = plan.grid, plan.strides[0], plan.spacing_mm
        num_cells = plan.grid[0] * plan.grid[1] * plan.grid[2]
        self.candidates = CandidateTokens(config.widths, width, plan.grid)
        self.quantizer = build_quantizer(config.quantizer, config.codebook_size, width)
        self.score = ImportanceScore(width, self.num_levels, learned=config.score == "learned")
        # Added after quantisation, so that codes describe appearance and not place.
        self.position = nn.Parameter(torch.randn(self.num_levels * num_cells, width) * 0.02)
        self.mixer = TokenMixer(width, config.mixer_layers)
        self.reproject = Reprojection(config.widths, width, plan.grid)

    def forward(
        self, intensities: Features, pyramid: Pyramid, boxes_vox: Int[Tensor, "N 2 3"], num_kept: int
    ) -> tuple[Pyramid, TokenRecord]:
        """Return the pyramid with the kept tokens added, and the record of what was kept."""
        pooled = self.candidates.pool(pyramid)
        with full_precision(intensities.device):
            gradient = cell_gradient(intensities, self.stem_stride, self.spacing_mm, self.grid)
            quantized, commitment_loss = self._quantize(pooled)
            importance = self.score(quantized.tokens, gradient, self._rarity(quantized))
            selection = select_tokens(importance.score, num_kept=num_kept, num_levels=self.num_levels)
            gated = (quantized.tokens + self.position) * importance.score.unsqueeze(-1)
            mixed = self.mixer(gather_tokens(gated, selection.positions))
            sparse = scatter_tokens(mixed, selection.positions, gated.shape[1])
            level = torch.arange(self.num_levels).repeat_interleave(gated.shape[1] // self.num_levels)
        record = TokenRecord(boxes_vox, level, quantized.codes, importance, selection.kept, commitment_loss)
        return self.reproject(pyramid, sparse), record

    def _quantize(self, pooled: list[Float[Tensor, "B n _"]]) -> tuple[Quantized, Float[Tensor, ""]]:
        tokens: Tokens = self.candidates(pooled)
        if self.quantizer is None:
            return Quantized(tokens, torch.full(tokens.shape[:2], -1, device=tokens.device)), tokens.new_zeros(())
        quantized: Quantized = self.quantizer(tokens)
        commitment_loss = tokens.new_zeros(())
        if self.training and isinstance(self.quantizer, VectorQuantizer):
            # Commitment pulls the projection towards the codes; the encoder is left to the segmentation.
            detached = self.candidates([cells.detach() for cells in pooled])
            commitment_loss = self.quantizer.commitment(detached, quantized.codes)
        return quantized, commitment_loss

    def _rarity(self, quantized: Quantized) -> Float[Tensor, "B N"]:
        if self.quantizer is None:
            return torch.zeros_like(quantized.tokens[..., 0])
        return self.quantizer.usage.rarity(quantized.codes)
