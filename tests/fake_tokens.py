"""A network whose tokens are known by hand: each box's score is the sum of the image in it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tokenseg.config import PRESETS, NetworkConfig, Plan
from tokenseg.model.importance import Importance
from tokenseg.model.network import TokenRecord, TokenSegOutput
from tokenseg.saved_model.checkpoint import Model, ModelFacts

NUM_CODES = PRESETS["tiny"].codebook_size


class BoxSums(nn.Module):
    """Splits its input evenly into the plan's grid, four levels alike; keeps the boxes with the largest sums.

    The terms tell where they come from: `boundary` is the level, `semantic` the pass, codes count the candidates.
    """

    def __init__(self, plan: Plan, logits: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.grid, self.logits, self.passes = plan.grid, logits, 0

    def forward(self, images: Tensor, num_kept: int | None = None) -> TokenSegOutput:
        ends = [
            torch.arange(count + 1) * size // count for count, size in zip(self.grid, images.shape[2:], strict=True)
        ]
        low = torch.cartesian_prod(*(axis[:-1] for axis in ends))
        high = torch.cartesian_prod(*(axis[1:] for axis in ends))
        boxes = torch.stack([low, high], dim=1).repeat(4, 1, 1)
        sums = torch.stack([images[0, 0, a:d, b:e, c:f].sum() for (a, b, c), (d, e, f) in boxes.tolist()])[None]
        count = len(boxes)
        level = torch.arange(4).repeat_interleave(count // 4)
        kept = torch.zeros(1, count, dtype=torch.bool)
        kept[0, (sums[0] - 1e-4 * torch.arange(count)).topk(num_kept or 5).indices] = True
        importance = Importance(
            boundary=level[None].float(),
            semantic=torch.full((1, count), float(self.passes)),
            diversity=torch.zeros(1, count),
            logit=sums,
            score=sums,
            presence_logits=torch.zeros(1, count, 2),
        )
        self.passes += 1
        codes = torch.arange(count)[None] % NUM_CODES
        record = TokenRecord(boxes, level, codes, importance, kept, torch.zeros(()))
        return TokenSegOutput(self.logits(images), (), record)


def box_sums_model(
    plan: Plan, logits: Callable[[Tensor], Tensor], config: NetworkConfig = PRESETS["tiny"], name: str = "boxes"
) -> Model:
    network = BoxSums(plan, logits).eval()
    return Model(network, ModelFacts(name=name, plan=plan, network=config), torch.device("cpu"))
