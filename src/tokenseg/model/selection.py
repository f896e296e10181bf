"""Top-K selection: which candidates are kept.

Paper: the K = 100 most important of 400 ("TokenSeg-100"). Differs: every level keeps a few of its best, so that none
vanishes; equal scores go to the lower index.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokenseg.shapes import TokenFlags, Tokens, TokenScalars

# Far below any meaningful difference of scores in 0..1, far above float32 resolution.
_TIE_STEP = 1e-6


class Selection(NamedTuple):
    """The kept candidates of each volume."""

    positions: Int[Tensor, "B K"]
    """Positions of the kept among the candidates: each level's reserved best, then the rest, by falling importance."""
    kept: TokenFlags
    """True for kept candidates."""


def select_tokens(score: TokenScalars, *, num_kept: int, num_levels: int) -> Selection:
    """Keep the `num_kept` candidates with the highest score.

    A quarter of an even share per level is reserved for the level's own best (6 of 25 at K = 100).

    Args:
        score: Importance in 0..1; candidates of the levels one after the other, equally many each.
        num_kept: K; more than there are candidates means all of them.
        num_levels: Pyramid levels.
    """
    count = score.shape[1]
    num_kept = min(num_kept, count)
    rank = score - _TIE_STEP * torch.arange(count, device=score.device, dtype=score.dtype)
    floor = num_kept // (4 * num_levels)
    if floor:
        per_level = rank.reshape(-1, num_levels, count // num_levels)
        best = per_level.topk(floor, dim=2).indices
        rank = (per_level + torch.zeros_like(per_level).scatter(2, best, 2.0)).flatten(1)
    positions = rank.topk(num_kept, dim=1).indices
    kept = torch.zeros_like(score).scatter(1, positions, 1.0) > 0
    return Selection(positions, kept)


def gather_tokens(tokens: Tokens, positions: Int[Tensor, "B K"]) -> Float[Tensor, "B K F"]:
    """Pick the kept tokens."""
    return tokens.gather(1, positions.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def scatter_tokens(kept: Float[Tensor, "B K F"], positions: Int[Tensor, "B K"], count: int) -> Tokens:
    """Put kept tokens back among `count` candidates; all others are zero."""
    empty = kept.new_zeros(kept.shape[0], count, kept.shape[2])
    return empty.scatter(1, positions.unsqueeze(-1).expand(-1, -1, kept.shape[-1]), kept)
