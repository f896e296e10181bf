"""Token mixer: pre-norm transformer layers over the K kept tokens.

The paper does not say how its tokens exchange information; this is the plainest way.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn


class TokenMixer(nn.Sequential):
    """`num_layers` transformer layers; none at all is the identity."""

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__(*(MixerLayer(width) for _ in range(num_layers)))


class MixerLayer(nn.Module):
    """Self-attention with four heads, then a two-layer perceptron, each around an identity."""

    num_heads = 4

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, tokens: Float[Tensor, "B K F"]) -> Float[Tensor, "B K F"]:
        """Mix the tokens of each volume; their order does not matter."""
        heads = self.query_key_value(self.attention_norm(tokens)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.attention_out(attended.transpose(1, 2).flatten(2))
        mixed: Tensor = tokens + self.perceptron(tokens)
        return mixed
