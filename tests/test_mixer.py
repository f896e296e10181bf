"""The token mixer against torch's own transformer layer."""

from __future__ import annotations

import torch
from torch import nn

from tokenseg.model.mixer import MixerLayer, TokenMixer


def test_layer_is_torchs_pre_norm_transformer_layer() -> None:
    torch.manual_seed(0)
    ours = MixerLayer(16)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3)
    torchs = nn.TransformerEncoderLayer(
        16, 4, dim_feedforward=32, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    norm, widen, _, narrow = ours.perceptron
    attention, out = ours.query_key_value, ours.attention_out
    with torch.no_grad():
        torchs.self_attn.in_proj_weight.copy_(attention.weight)
        torchs.self_attn.in_proj_bias.copy_(attention.bias)
    for source, target in (
        (out, torchs.self_attn.out_proj),
        (ours.attention_norm, torchs.norm1),
        (norm, torchs.norm2),
        (widen, torchs.linear1),
        (narrow, torchs.linear2),
    ):
        target.load_state_dict(source.state_dict())
    tokens = torch.randn(2, 7, 16)
    torch.testing.assert_close(ours(tokens), torchs(tokens), atol=1e-5, rtol=1e-5)


def test_order_of_the_tokens_does_not_matter() -> None:
    torch.manual_seed(0)
    mixer, tokens, order = TokenMixer(16, 2), torch.randn(2, 9, 16), torch.randperm(9)
    torch.testing.assert_close(mixer(tokens[:, order]), mixer(tokens)[:, order], atol=1e-5, rtol=1e-5)


def test_tokens_of_a_volume_see_each_other_and_no_other_volume() -> None:
    torch.manual_seed(0)
    mixer, tokens = TokenMixer(16, 1), torch.randn(2, 9, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixer(tokens)[0, 0].sum(), tokens)
    assert (gradient[0].abs().sum(dim=1) > 0).all()
    assert (gradient[1] == 0).all()


def test_no_layers_are_the_identity() -> None:
    tokens = torch.randn(1, 5, 16)
    assert torch.equal(TokenMixer(16, 0)(tokens), tokens)
