"""The meaning of a network's L outputs: labels that exclude each other (softmax), or regions that overlap (sigmoid).

Exclusive labels have an output of background first, and the largest wins, the first in a tie. Regions have an output
each, positive logits are inside, and later ones are painted over earlier ones. Whatever reads logits, or makes targets
for them, asks here: nobody else tells the two apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer, Shaped, UInt8
from torch import Tensor
from torch.nn import functional as F

from tokenseg.config import Plan
from tokenseg.shapes import BoolMask


class Certainty(NamedTuple):
    """What logits of a plane say of each of its voxels."""

    probability: Float[Tensor, "labels b c"]
    found: Bool[Tensor, "labels b c"]
    """Whether the mask shows the label there."""
    foreground: Float[Tensor, "b c"]
    """Probability of anything but background; of regions, that of the likeliest."""
    entropy: Float[Tensor, "b c"]
    """In nats; of regions, that of the likeliest."""


@dataclass(frozen=True)
class Outputs:
    """One of the two meanings.

    Attributes:
        regions: Whether outputs may overlap; else a voxel has one label, or background.
    """

    regions: bool

    @property
    def first_label(self) -> int:
        """Number of the output of the first label."""
        return 0 if self.regions else 1

    # ---- reading logits

    def probabilities(self, logits: Float[Tensor, ...], dim: int = 0) -> Float[Tensor, ...]:
        """Probability of each output; `dim` is the axis of the outputs."""
        return logits.sigmoid() if self.regions else logits.softmax(dim=dim)

    def mean_logits(self, logits: Sequence[Float[Tensor, "L b c"]]) -> Float[Tensor, "L b c"]:
        """Logits of the mean of several networks' probabilities."""
        if len(logits) == 1:
            return logits[0]
        mean = torch.stack([self.probabilities(each) for each in logits]).mean(dim=0)
        return mean.logit(eps=1e-7) if self.regions else mean.clamp(min=1e-7).log()

    def foreground(self, logits: Float[Tensor, "L ..."]) -> Float[Tensor, ...]:
        """Probability that a voxel is no background; of regions, that of the likeliest."""
        return logits.sigmoid().amax(dim=0) if self.regions else 1 - logits.softmax(dim=0)[0]

    def foreground_logits(self, logits: Float[Tensor, "B L ..."]) -> Float[Tensor, "B ..."]:
        """The logit of `foreground`, of a batch."""
        return logits.amax(dim=1) if self.regions else logits[:, 1:].logsumexp(dim=1) - logits[:, 0]

    def found(self, logits: Float[Tensor, "L ..."]) -> Bool[Tensor, "labels ..."]:
        """Whether the mask shows each label."""
        if self.regions:
            return logits > 0
        return logits.argmax(dim=0) == torch.arange(1, len(logits)).reshape(-1, *(1,) * (logits.ndim - 1))

    def may_be_found(self, logits: Float[Tensor, "L b c"]) -> Bool[Tensor, "b c"]:
        """Where interpolated logits may show a label: no voxel that does is missed."""
        return (logits > 0 if self.regions else logits[1:] > logits[:1]).any(dim=0)

    def may_exceed(self, logits: Float[Tensor, "L b c"], probability: float) -> Bool[Tensor, "b c"]:
        """Where the probability of foreground reaches a small value, and in a few more voxels; cheap to tell."""
        if self.regions:
            return logits.amax(dim=0) >= math.log(probability)
        return logits[1:].amax(dim=0) - logits[0] >= math.log(probability / (len(logits) - 1))

    def certainty(self, logits: Float[Tensor, "L b c"]) -> Certainty:
        """Probabilities, labels found and entropy of a plane."""
        if self.regions:
            probability = logits.sigmoid()
            foreground = probability.amax(dim=0)
            unsure = foreground.clamp(1e-7, 1 - 1e-7)
            entropy = -(unsure * unsure.log() + (1 - unsure) * (1 - unsure).log())
            return Certainty(probability, self.found(logits), foreground, entropy)
        logs = logits.log_softmax(dim=0)
        every = logs.exp()
        return Certainty(every[1:], self.found(logits), (1 - every[0]).clamp(0, 1), -(every * logs).sum(dim=0))

    def lead(self, logits: Float[Tensor, "L n"]) -> Float[Tensor, " n"]:
        """How far each is from undecided: least where the answer is open."""
        return logits.abs().amin(dim=0) if self.regions else logits.amax(dim=0) - logits.logsumexp(dim=0)

    def painted(self, logits: Iterable[Tensor], values: Sequence[int], dtype: torch.dtype) -> Integer[Tensor, ...]:
        """The value of each voxel in a mask, 0 for background.

        Args:
            logits: One output after the other.
            values: Of the labels.
            dtype: Of the mask.
        """
        if not self.regions:
            return _largest(logits, [0, *values], dtype)
        pairs = zip(logits, values, strict=True)
        logit, value = next(pairs)
        painted = (logit > 0).to(dtype) * value
        for logit, value in pairs:
            painted.masked_fill_(logit > 0, value)
        return painted

    # ---- against a reference

    def scored(
        self, logits: Float[Tensor, "B L X Y Z"], targets: Float[Tensor, "B L X Y Z"]
    ) -> tuple[Float[Tensor, "B L X Y Z"], Float[Tensor, ""]]:
        """Probabilities, and their mean cross-entropy; targets may be fractions."""
        if self.regions:
            return logits.sigmoid(), F.binary_cross_entropy_with_logits(logits, targets)
        log_probabilities = logits.log_softmax(dim=1)
        return log_probabilities.exp(), -(targets * log_probabilities).sum(dim=1).mean()

    def likelihood_loss(self, logits: Float[Tensor, "n L"], labels: Integer[Tensor, "n R"]) -> float:
        """Mean negative log-likelihood of the reference labels of single voxels."""
        if self.regions:
            return float(F.binary_cross_entropy_with_logits(logits, labels.float()))
        return float(F.cross_entropy(logits, labels[:, 0]))

    def confidence(
        self, logits: Float[Tensor, "n L"], labels: Integer[Tensor, "n R"]
    ) -> tuple[Float[Tensor, " m"], Bool[Tensor, " m"]]:
        """Probability of what is predicted, and whether it is right; of regions, for each of them."""
        if self.regions:
            probability = logits.sigmoid()
            return torch.maximum(probability, 1 - probability).flatten(), ((logits > 0) == (labels > 0)).flatten()
        best = logits.softmax(dim=1).max(dim=1)
        return best.values, best.indices == labels[:, 0]

    # ---- label maps, as `plan_grid.preprocess.prepare_labels` makes them: R = 1 with 0 for background and n + 1 for
    # `plan.labels[n]`, or a 0/1 map a region

    def targets(self, labels: Integer[Tensor, "B R X Y Z"], num_outputs: int) -> Float[Tensor, "B L X Y Z"]:
        """One 0/1 map an output."""
        if self.regions:
            return labels.float()
        return F.one_hot(labels[:, 0].long(), num_outputs).movedim(-1, 1).float()

    def label_maps(self, labels: Shaped[Tensor, "R X Y Z"], num_labels: int) -> Float[Tensor, "labels X Y Z"]:
        """One 0/1 map a label, since the values themselves cannot be interpolated."""
        if self.regions:
            return labels.float()
        return torch.cat([labels == value for value in range(1, num_labels + 1)]).float()

    def labels_of(self, maps: Float[Tensor, "labels X Y Z"]) -> Integer[Tensor, "R X Y Z"]:
        """Label maps again, from interpolated maps of each label: the largest share wins, background included."""
        if self.regions:
            return (maps > 0.5).to(torch.uint8)
        background = 1 - maps.sum(dim=0, keepdim=True)
        return torch.cat([background, maps]).argmax(dim=0, keepdim=True).to(torch.uint8)

    def label_place(self, labels: Shaped[np.ndarray, "R X Y Z"], number: int) -> BoolMask:
        """Where `plan.labels[number]` is."""
        place: BoolMask = labels[number] > 0 if self.regions else labels[0] == number + 1
        return place

    def present(self, labels: UInt8[np.ndarray, "R X Y Z"]) -> list[tuple[int, BoolMask]]:
        """Where each label is that is there, with its value, or the number of its map."""
        if self.regions:
            return [(number, each != 0) for number, each in enumerate(labels)]
        return [(int(value), labels[0] == value) for value in np.unique(labels) if value]

    def mask_values(self, values: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Values in a reference mask that belong to each output, from those of each label."""
        return list(values) if self.regions else [(0,), *values]

    def labels_of_shares(self, shares: Iterable[Tensor], num_outputs: int) -> UInt8[Tensor, "R X Y Z"]:
        """Label maps from the share that each output has in a voxel, one output after the other."""
        if self.regions:
            return torch.stack([(share > 0.5).to(torch.uint8) for share in shares])
        return _largest(shares, range(num_outputs), torch.uint8)[None]

    def sure_logits(self, labels: UInt8[Tensor, "R X Y Z"], num_outputs: int) -> Float[Tensor, "L X Y Z"]:
        """Logits by which a mask shows what label maps hold."""
        if self.regions:
            return labels.float() - 0.5
        return torch.cat([labels == value for value in range(num_outputs)]).float()


EXCLUSIVE, REGIONS = Outputs(regions=False), Outputs(regions=True)


def outputs_of(plan: Plan) -> Outputs:
    """What the outputs of a plan's networks mean."""
    return REGIONS if plan.regions else EXCLUSIVE


def _largest(scores: Iterable[Tensor], values: Sequence[int], dtype: torch.dtype) -> Integer[Tensor, ...]:
    """Give each voxel the value whose score is largest, the first in a tie, holding two scores at a time."""
    remaining = iter(scores)
    best = next(remaining)
    winner = torch.full_like(best, values[0], dtype=dtype)
    for score, value in zip(remaining, values[1:], strict=True):
        winner.masked_fill_(score > best, value)
        best = torch.maximum(best, score)
    return winner
