"""Differentiable objectives.

Paper: Dice + BCE + VQ. Here: soft Dice over the batch plus cross-entropy (binary for regions), the same at 1/4 and 1/8
(deep supervision), commitment, and the importance score against the cells that the reference surface crosses. Coarse
views have a balanced cross-entropy in place of the first two.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from tokenseg.config import Plan, TrainConfig
from tokenseg.model.network import TokenRecord, TokenSegOutput
from tokenseg.outputs import Outputs, outputs_of
from tokenseg.processes import sum_over_processes
from tokenseg.shapes import Logits

Targets = Float[Tensor, "B L X Y Z"]


class LossParts(NamedTuple):
    """The training loss and what it is made of, before weighting."""

    total: Float[Tensor, ""]
    """Weighted sum; the one to differentiate."""
    segmentation: Float[Tensor, ""]
    """Dice + cross-entropy at full resolution; of coarse views, `recall_loss`."""
    deep: Float[Tensor, ""]
    """Mean of the same at 1/4 and 1/8; 0 of coarse views."""
    commitment: Float[Tensor, ""]
    """Mean squared distance of tokens to their codes."""
    score: Float[Tensor, ""]
    """Cross-entropies of the importance score and of the cell contents behind it."""


def training_loss(
    output: TokenSegOutput,
    labels: Integer[Tensor, "B R X Y Z"],
    *,
    plan: Plan,
    config: TrainConfig,
    coarse_view: bool = False,
) -> LossParts:
    """Join all objectives.

    Args:
        output: Of a forward pass in training mode.
        labels: R = 1 with label indices 0..n, or one 0/1 map a region.
        plan: Says whether outputs may overlap (sigmoid) or exclude each other (softmax), and the strides.
        config: Weights of the parts.
        coarse_view: The windows are coarse views of whole cases, which are asked where to look: `recall_loss` in place
            of Dice and cross-entropy, and no deep supervision.
    """
    meaning = outputs_of(plan)
    if coarse_view:
        segmentation = recall_loss(output.logits, labels.amax(dim=1) > 0, meaning)
        # Times zero and not left out: several processes wait for a gradient of every weight.
        deep = [0 * logits.float().sum() for logits in output.deep_logits]
    else:
        targets = meaning.targets(labels, output.logits.shape[1])
        segmentation = segmentation_loss(output.logits, targets, meaning)
        deep = [
            segmentation_loss(logits, coarse_targets(targets, logits, stride), meaning)
            for logits, stride in zip(output.deep_logits, plan.total_strides[1:3], strict=False)
        ]
    zero = segmentation.new_zeros(())
    deep_mean = torch.stack(deep).mean() if deep else zero
    commitment = output.tokens.commitment_loss if output.tokens is not None else zero
    score = score_loss(output.tokens, labels.amax(dim=1) > 0) if output.tokens is not None else zero
    total = (
        segmentation
        + config.deep_supervision_weight * deep_mean
        + config.commitment_weight * commitment
        + config.score_weight * score
    )
    return LossParts(total, segmentation, deep_mean, commitment, score)


def coarse_targets(
    targets: Targets, logits: Float[Tensor, "B L Xl Yl Zl"], stride: tuple[int, int, int]
) -> Float[Tensor, "B L Xl Yl Zl"]:
    """Fractions of each label in the voxels of a coarser map; voxels beyond the window count as nothing at all."""
    coarse = zip(logits.shape[2:], stride, targets.shape[2:], strict=True)
    missing = [size * factor - length for size, factor, length in coarse]
    padding = [side for amount in reversed(missing) for side in (0, amount)]
    return nn.functional.avg_pool3d(nn.functional.pad(targets, padding), stride)


def segmentation_loss(logits: Logits, targets: Targets, meaning: Outputs) -> Float[Tensor, ""]:
    """Soft Dice loss plus cross-entropy; `targets` may be fractions after averaging.

    Dice sums over the whole batch, windows of other processes included, so that one without foreground does not ask for
    an empty answer at full weight.
    """
    probabilities, entropy = meaning.scored(logits.float(), targets)
    axes = (0, 2, 3, 4)
    sums = [each.sum(dim=axes)[meaning.first_label :] for each in (probabilities * targets, probabilities + targets)]
    overlap, sizes = sum_over_processes(torch.stack(sums))
    dice = (2 * overlap + 1e-5) / (sizes + 1e-5)
    loss: Tensor = (1 - dice.mean()) + entropy
    return loss


def recall_loss(logits: Logits, foreground: Bool[Tensor, "B X Y Z"], meaning: Outputs) -> Float[Tensor, ""]:
    """Cross-entropy of foreground against background, in which both weigh the same however few voxels one has.

    Dice and plain cross-entropy teach a coarse view the large lesions only: the voxels of a small one weigh next to
    nothing. A batch that has only one of the two counts that one, with its half.
    """
    logit = meaning.foreground_logits(logits.float())
    entropy = nn.functional.binary_cross_entropy_with_logits(logit, foreground.float(), reduction="none")
    halves = (foreground.float(), (~foreground).float())
    sums = [torch.stack([(entropy * half).sum(), half.sum()]) for half in halves]
    entropies, voxels = sum_over_processes(torch.stack(sums, dim=1))
    loss: Tensor = 0.5 * (entropies / voxels.clamp(min=1)).sum()
    return loss


def score_loss(tokens: TokenRecord, foreground: Bool[Tensor, "B X Y Z"]) -> Float[Tensor, ""]:
    """Binary cross-entropy of the score (does the surface cross the cell?) and of the cell's predicted contents."""
    inside, volume = cell_foreground(foreground, tokens.boxes_vox)
    holds_foreground, holds_background = inside > 0, inside < volume
    real = (volume > 0).expand_as(inside)
    crossed = (holds_foreground & holds_background).float()
    contents = torch.stack([holds_foreground, holds_background], dim=-1).float()
    entropy = nn.functional.binary_cross_entropy_with_logits
    importance = tokens.importance
    return entropy(importance.logit[real], crossed[real]) + entropy(importance.presence_logits[real], contents[real])


def cell_foreground(
    foreground: Bool[Tensor, "B X Y Z"], boxes_vox: Integer[Tensor, "N 2 3"]
) -> tuple[Integer[Tensor, "B N"], Integer[Tensor, " N"]]:
    """Foreground voxels in each cell, and voxels of each cell, exactly (summed-area table)."""
    table = nn.functional.pad(foreground.long(), (1, 0, 1, 0, 1, 0)).cumsum(1).cumsum(2).cumsum(3)
    boxes = boxes_vox.to(foreground.device)
    inside = torch.zeros(foreground.shape[0], boxes.shape[0], dtype=torch.long, device=foreground.device)
    for corner in range(8):
        picks = [(corner >> axis) & 1 for axis in range(3)]
        x, y, z = (boxes[:, pick, axis] for axis, pick in enumerate(picks))
        inside += (-1) ** (3 - sum(picks)) * table[:, x, y, z]
    return inside, (boxes[:, 1] - boxes[:, 0]).prod(dim=1)
