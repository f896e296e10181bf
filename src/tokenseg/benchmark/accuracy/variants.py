"""TokenSeg with one part changed, by name: what a part is worth shows in the gap to its variant.

Most variants are settings. Two are networks of their own that no user should want, so they live here: kept tokens
drawn at random, and a residual convolution of as many parameters in place of the token path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenseg.config import PRESETS, NetworkConfig, Plan
from tokenseg.errors import ConfigError
from tokenseg.model.blocks import ConvBlock, Convolution, InstanceNorm, Pyramid
from tokenseg.model.importance import Importance, ImportanceScore
from tokenseg.model.network import TokenSeg
from tokenseg.saved_model.checkpoint import MakeNetwork
from tokenseg.shapes import Features, Tokens, TokenScalars


class Variant(NamedTuple):
    """One variant of TokenSeg."""

    settings: Callable[[NetworkConfig], NetworkConfig]
    """Turns the settings of the plain network into those of the variant."""
    make: MakeNetwork
    """Makes the network from the variant's settings."""


class RandomScore(ImportanceScore):
    """Importance whose score is a constant with a little noise, so that any candidate is as likely to be kept.

    The terms and the logit stay those of the learned score, and are trained as ever. The same forward pass of a
    training draws the same noise, whatever was drawn before; outside training it is the same for every volume.
    """

    num_draws: Tensor

    def __init__(self, token_width: int, num_levels: int, *, learned: bool) -> None:
        super().__init__(token_width, num_levels, learned=learned)
        self.register_buffer("num_draws", torch.zeros((), dtype=torch.long))

    def forward(self, tokens: Tokens, gradient: Float[Tensor, "B n"], rarity: TokenScalars) -> Importance:
        """Score the candidates as `ImportanceScore` does, and replace the score: 0.45 to 0.55, uniform."""
        importance = super().forward(tokens, gradient, rarity)
        generator = torch.Generator()
        if self.training:
            self.num_draws += 1
            generator.manual_seed(int(self.num_draws))
        noise = torch.rand(importance.score.shape, generator=generator).to(importance.score)
        return importance._replace(score=0.45 + 0.1 * noise)


class RandomTokens(TokenSeg):
    """TokenSeg that keeps tokens at random."""

    def __init__(self, config: NetworkConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        if self.tokenizer is not None:
            self.tokenizer.score = RandomScore(
                config.token_width, len(config.widths), learned=config.score == "learned"
            )


class ResidualBottleneck(nn.Module):
    """Two 3x3x3 convolutions, W to `hidden` to W channels, around an identity; starts as the identity."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.narrow = ConvBlock(channels, hidden)
        self.widen = Convolution(hidden, channels)
        self.norm = InstanceNorm(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, features: Features) -> Features:
        """Keep the shape (B, W, X, Y, Z)."""
        change: Features = self.norm(self.widen(self.narrow(features)))
        return features + change


class _WidenedEncoder(nn.Module):
    """An encoder with a block more on its deepest level."""

    def __init__(self, encoder: nn.Module, block: nn.Module) -> None:
        super().__init__()
        self.encoder, self.block = encoder, block

    def forward(self, intensities: Features) -> Pyramid:
        pyramid: Pyramid = self.encoder(intensities)
        return [*pyramid[:-1], self.block(pyramid[-1])]


class BottleneckTwin(TokenSeg):
    """TokenSeg without tokens, and as many parameters in a `ResidualBottleneck` at the deepest level."""

    def __init__(self, config: NetworkConfig, plan: Plan) -> None:
        without = config.model_copy(update={"tokens": False})
        super().__init__(without, plan)
        with torch.device("meta"):
            with_tokens = TokenSeg(config.model_copy(update={"tokens": True}), plan)
        block = ResidualBottleneck(
            config.widths[-1], _hidden_width(config.widths[-1], count_parameters(with_tokens) - count_parameters(self))
        )
        self.encoder = _WidenedEncoder(self.encoder, block)  # type: ignore[assignment]
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


def count_parameters(network: nn.Module) -> int:
    """Parameters of a network, those that are not trained included."""
    return sum(parameter.numel() for parameter in network.parameters())


def variant_network(name: str) -> MakeNetwork:
    """What makes the variant of this name from the settings of the plain network.

    Raises:
        ConfigError: There is no such variant.
    """
    if name not in VARIANTS:
        raise ConfigError(f"no variant of TokenSeg is called {name!r}; choose from {', '.join(VARIANTS)}")
    variant = VARIANTS[name]
    return lambda config, plan: variant.make(variant.settings(config), plan)


def _hidden_width(channels: int, wanted: int) -> int:
    """Width that brings a `ResidualBottleneck` nearest to so many parameters."""
    own = 2 * channels
    return max(1, round((wanted - own) / (2 * 27 * channels + 2)))


def _plain(config: NetworkConfig) -> NetworkConfig:
    return config


def _paper(_: NetworkConfig) -> NetworkConfig:
    return PRESETS["paper"]


def _changed(**update: bool | int | float | str) -> Variant:
    return Variant(lambda config: config.model_copy(update=update), TokenSeg)


VARIANTS: dict[str, Variant] = {
    "tokenseg": Variant(_plain, TokenSeg),
    "tokenseg-paper": Variant(_paper, TokenSeg),
    "tokenseg-no-tokens": _changed(tokens=False),
    "tokenseg-no-refinement": _changed(refine_fraction=0.0),
    "tokenseg-dense-refinement": _changed(refine_fraction=1.0),
    "tokenseg-k25": _changed(tokens=True, num_kept=25),
    "tokenseg-k400": _changed(tokens=True, num_kept=400),
    "tokenseg-fsq": _changed(tokens=True, quantizer="fsq"),
    "tokenseg-no-codebook": _changed(tokens=True, quantizer="none"),
    "tokenseg-random-k": Variant(lambda config: config.model_copy(update={"tokens": True}), RandomTokens),
    "tokenseg-bottleneck": Variant(lambda config: config.model_copy(update={"tokens": False}), BottleneckTwin),
}
"""Variants by name; `tokenseg` is the network as it is shipped."""
