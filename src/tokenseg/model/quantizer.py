"""Quantizers: tokens -> entries of a codebook.

Paper: VQ-VAE quantisation against M = 4096 prototypes, nearest in L2, straight-through gradient, "standard VQ
objective". Differs: the codebook follows the tokens by exponential moving averages (van den Oord 2017, appendix A)
instead of a codebook loss, and codes that fall out of use restart at the worst-served tokens. Finite scalar
quantisation (Mentzer 2024) is the alternative that cannot collapse.
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenseg.model import traced
from tokenseg.model.traced import traced_as
from tokenseg.processes import gather_rows
from tokenseg.shapes import Codes, Tokens


class Quantized(NamedTuple):
    """Tokens after quantisation."""

    tokens: Tokens
    """Quantised tokens (B, N, F); the gradient passes straight through."""
    codes: Codes
    """Index of the code of each token (B, N); -1 without a codebook."""


class CodeUsage(nn.Module):
    """How often each code is used: an exponential moving average of its share of the tokens."""

    frequency: Float[Tensor, " E"]

    def __init__(self, num_codes: int, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("frequency", torch.full((num_codes,), 1 / num_codes))

    @torch.no_grad()
    def update(self, codes: Codes) -> None:
        """Move the shares towards those of this batch."""
        counts = torch.bincount(codes.flatten(), minlength=self.frequency.numel()).to(self.frequency)
        self.frequency.lerp_(counts / codes.numel(), 1 - self.decay)

    def rarity(self, codes: Codes) -> Float[Tensor, "B N"]:
        """-log of the share of each token's code, nats; large for codes that are seldom used."""
        return -torch.log(self.frequency[codes] + 1e-8)

    def perplexity(self) -> float:
        """Effective number of codes in use: exp of the entropy of the shares, 1 to E."""
        share = self.frequency / self.frequency.sum()
        return float(torch.exp(-(share * torch.log(share + 1e-12)).sum()))

    def used_fraction(self) -> float:
        """Share of codes that take at least a tenth of an even share of the tokens, 0 to 1."""
        return float((self.frequency * self.frequency.numel() > 0.1).float().mean())


class VectorQuantizer(nn.Module):
    """Codebook of E entries, learned by exponential moving averages of the tokens assigned to each."""

    codebook: Float[Tensor, "E F"]
    token_sum: Float[Tensor, "E F"]
    token_count: Float[Tensor, " E"]
    started: Tensor

    def __init__(self, num_codes: int, width: int, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.usage = CodeUsage(num_codes, decay)
        codebook = torch.randn(num_codes, width)
        self.register_buffer("codebook", codebook)
        self.register_buffer("token_sum", codebook.clone())
        self.register_buffer("token_count", torch.ones(num_codes))
        self.register_buffer("started", torch.zeros((), dtype=torch.long))

    def forward(self, tokens: Tokens) -> Quantized:
        """Replace each token by its nearest code; in training, move the codebook too.

        The codebook follows the tokens of the whole batch, those of other processes included: their codebooks stay one.
        """
        if self.training:
            everyones = gather_rows(tokens.detach())
            self._start_from(everyones)
        codes = self._nearest(tokens)
        quantized = self.codebook[codes]
        if self.training:
            everyones_codes = gather_rows(codes)
            self.usage.update(everyones_codes)
            self._follow(everyones, everyones_codes)
        return Quantized(_straight_through(tokens, quantized), codes)

    def commitment(self, tokens: Tokens, codes: Codes) -> Float[Tensor, ""]:
        """Mean squared distance from `tokens` to their codes; the gradient reaches only the tokens."""
        return nn.functional.mse_loss(tokens, self.codebook[codes])

    def _nearest(self, tokens: Tokens) -> Codes:
        # |t - c|^2 without |t|^2, which does not change the order.
        distance = self.codebook.square().sum(dim=1) - 2 * torch.matmul(tokens, self.codebook.t())
        return _nearest(distance)

    @torch.no_grad()
    def _start_from(self, tokens: Tokens) -> None:
        """Put codes onto real tokens, evenly spread over the batch, until all codes have started."""
        started, total = int(self.started), self.codebook.shape[0]
        if started >= total:
            return
        flat = tokens.reshape(-1, tokens.shape[-1])
        take = min(total - started, flat.shape[0])
        chosen = torch.linspace(0, flat.shape[0] - 1, take, device=flat.device).long()
        self._place(torch.arange(started, started + take, device=flat.device), flat[chosen], flat.shape[0] / total)
        self.started.fill_(started + take)

    @torch.no_grad()
    def _follow(self, tokens: Tokens, codes: Codes) -> None:
        flat, assigned = tokens.reshape(-1, tokens.shape[-1]), codes.flatten()
        counts = torch.bincount(assigned, minlength=self.codebook.shape[0]).to(flat)
        sums = torch.zeros_like(self.token_sum).index_add_(0, assigned, flat)
        self.token_count.lerp_(counts, 1 - self.decay)
        self.token_sum.lerp_(sums, 1 - self.decay)
        self.codebook.copy_(self.token_sum / self.token_count.clamp(min=1e-5)[:, None])
        self._restart_dead(flat, assigned)

    def _restart_dead(self, flat: Float[Tensor, "n F"], assigned: Tensor) -> None:
        """Move codes with less than a tenth of an even share onto the tokens that are served worst.

        The threshold scales with tokens a step over codes: a fixed one of 2, a common default, would restart nearly
        every code at every step here (800 tokens, 4096 codes). Worst-served instead of random tokens: repeatable.
        """
        mean_count = flat.shape[0] / self.codebook.shape[0]
        dead = torch.nonzero(self.token_count < 0.1 * mean_count).flatten()
        take = min(dead.numel(), flat.shape[0] // 8)
        if take == 0:
            return
        error = (flat - self.codebook[assigned]).square().sum(dim=1)
        worst = torch.sort(error, descending=True, stable=True).indices[:take]
        self._place(dead[:take], flat[worst], mean_count)

    def _place(self, codes: Tensor, tokens: Float[Tensor, "n F"], mean_count: float) -> None:
        self.codebook[codes] = tokens
        self.token_sum[codes] = tokens * mean_count
        self.token_count[codes] = mean_count


class FiniteScalarQuantizer(nn.Module):
    """Round a 4-dimensional projection to 8 values a dimension: 4096 codes with nothing to learn or to collapse."""

    levels: ClassVar[tuple[int, ...]] = (8, 8, 8, 8)
    half_range: Tensor
    basis: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        levels = torch.tensor(self.levels)
        self.usage = CodeUsage(math.prod(self.levels))
        self.shrink = nn.Linear(width, len(self.levels))
        self.widen = nn.Linear(len(self.levels), width)
        self.register_buffer("half_range", levels / 2, persistent=False)
        self.register_buffer("basis", torch.cumprod(torch.tensor([1, *self.levels[:-1]]), 0), persistent=False)

    def forward(self, tokens: Tokens) -> Quantized:
        """Round each token's projection; the gradient passes straight through the rounding."""
        # An even number of values lies at half-integers: shift by 1/2 before rounding down and after.
        bounded = torch.tanh(self.shrink(tokens)) * (self.half_range - 1e-3)
        rounded = torch.floor(bounded) + 0.5
        codes = ((rounded.detach() + self.half_range - 0.5).long() * self.basis).sum(dim=-1)
        if self.training:
            self.usage.update(gather_rows(codes))
        return Quantized(self.widen(_straight_through(bounded, rounded) / self.half_range), codes)


def _straight_through(values: Tokens, quantized: Tokens) -> Tokens:
    """`quantized` to the last bit, with the gradient of `values`.

    The customary `values + (quantized - values).detach()` leaves rounding: tokens of one code, alike otherwise, would
    differ by it, and the gradient of the score's largest and smallest token go to whichever it favoured.
    """
    return quantized.detach() + (values - values.detach())


def build_quantizer(kind: str, num_codes: int, width: int) -> VectorQuantizer | FiniteScalarQuantizer | None:
    """Make the quantizer named in `NetworkConfig.quantizer`."""
    if kind == "vq":
        return VectorQuantizer(num_codes, width)
    return FiniteScalarQuantizer(width) if kind == "fsq" else None


@traced_as(traced.nearest)
def _nearest(distance: Float[Tensor, "B N E"]) -> Codes:
    return distance.argmin(dim=-1)
