"""Codes, codebook and usage against brute force, arithmetic on paper and an independent library."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize

from tokenseg.model.quantizer import CodeUsage, FiniteScalarQuantizer, VectorQuantizer, build_quantizer


def quantizer_with(codebook: Tensor, *, decay: float = 0.99, count: float = 1.0) -> VectorQuantizer:
    """A quantizer whose codes have all started, each with `count` tokens."""
    quantizer = VectorQuantizer(*codebook.shape, decay=decay)
    quantizer.codebook.copy_(codebook)
    quantizer.token_sum.copy_(codebook * count)
    quantizer.token_count.fill_(count)
    quantizer.started.fill_(len(codebook))
    return quantizer


def library_with(codebook: Tensor, *, decay: float, count: float = 1.0) -> VectorQuantize:
    """The library's quantizer with the same codebook, and without its smoothing of counts, which we lack."""
    library = VectorQuantize(
        codebook.shape[1], codebook.shape[0], decay=decay, eps=1e-12, rotation_trick=False, commitment_weight=1.0
    )
    library._codebook.embed.data.copy_(codebook[None])
    library._codebook.embed_avg.data.copy_(codebook[None] * count)
    library._codebook.cluster_size.data.fill_(count)
    return library


@settings(deadline=None, max_examples=30)
@given(num_codes=st.integers(2, 40), width=st.integers(1, 9), seed=st.integers(0, 999))
def test_codes_are_the_nearest_by_brute_force(num_codes: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    quantizer, tokens = quantizer_with(torch.randn(num_codes, width)).eval(), torch.randn(2, 30, width)
    result = quantizer(tokens)
    distance = torch.cdist(tokens.double(), quantizer.codebook.double()[None])
    chosen = distance.gather(2, result.codes[..., None])[..., 0]
    torch.testing.assert_close(chosen, distance.amin(dim=2), atol=1e-5, rtol=0)
    torch.testing.assert_close(result.tokens, quantizer.codebook[distance.argmin(dim=2)])


def test_codes_are_those_of_the_library() -> None:
    torch.manual_seed(0)
    codebook, tokens = torch.randn(64, 8), torch.randn(2, 400, 8)
    ours = quantizer_with(codebook).eval()(tokens)
    quantized, codes, _ = library_with(codebook, decay=0.99).eval()(tokens)
    assert torch.equal(ours.codes, codes)
    torch.testing.assert_close(ours.tokens, quantized)


def test_codebook_follows_the_tokens_like_the_librarys() -> None:
    torch.manual_seed(0)
    codebook = torch.randn(16, 4)
    ours, library = quantizer_with(codebook, decay=0.9, count=50), library_with(codebook, decay=0.9, count=50)
    for _ in range(3):
        tokens = torch.randn(2, 400, 4)
        codes, (_, library_codes, library_loss) = ours(tokens).codes, library(tokens)
        assert torch.equal(codes, library_codes)
    assert library_loss > 0
    torch.testing.assert_close(ours.token_count, library._codebook.cluster_size[0])
    torch.testing.assert_close(ours.codebook, library._codebook.embed[0], atol=1e-5, rtol=1e-5)


def test_one_step_of_the_codebook_by_hand() -> None:
    quantizer = quantizer_with(torch.tensor([[0.0, 0.0], [10.0, 0.0]]), decay=0.5)
    result = quantizer(torch.tensor([[[1.0, 0.0], [3.0, 0.0], [10.0, 4.0]]]))
    assert result.codes.tolist() == [[0, 0, 1]]
    # Counts: (1 + 2) / 2, (1 + 1) / 2. Sums: (0 + 4) / 2, (10 + 10) / 2 and (0 + 4) / 2.
    assert quantizer.token_count.tolist() == [1.5, 1.0]
    torch.testing.assert_close(quantizer.codebook, torch.tensor([[2 / 1.5, 0.0], [10.0, 2.0]]))


def test_nothing_moves_in_evaluation() -> None:
    quantizer = VectorQuantizer(8, 4).eval()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer(torch.randn(1, 20, 4))
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


def test_gradient_passes_straight_through() -> None:
    tokens = torch.randn(1, 20, 4, requires_grad=True)
    slope = torch.randn(1, 20, 4)
    quantized = VectorQuantizer(8, 4).eval()(tokens).tokens
    assert not torch.allclose(quantized, tokens)
    (gradient,) = torch.autograd.grad(quantized, tokens, slope)
    assert torch.equal(gradient, slope)


@pytest.mark.parametrize("quantizer", [VectorQuantizer(8, 4), FiniteScalarQuantizer(4)])
def test_tokens_of_one_code_are_alike_to_the_last_bit(quantizer: VectorQuantizer | FiniteScalarQuantizer) -> None:
    """Or the largest of them, which takes the gradient of a maximum, would be decided by rounding."""
    torch.manual_seed(0)
    tokens, codes = quantizer.eval()(torch.randn(1, 400, 4))
    assert len({tuple(row.tolist()) for row in tokens[0]}) == len(set(codes[0].tolist()))


def test_commitment_is_the_mean_squared_distance_and_pulls_tokens_to_their_codes() -> None:
    quantizer = quantizer_with(torch.tensor([[0.0, 0.0], [4.0, 0.0]]))
    tokens = torch.tensor([[[1.0, 2.0], [4.0, 0.0]]], requires_grad=True)
    loss = quantizer.commitment(tokens, torch.tensor([[0, 1]]))
    assert loss.item() == pytest.approx((1 + 4) / 4)
    (gradient,) = torch.autograd.grad(loss, tokens)
    assert gradient.tolist() == [[[0.5, 1.0], [0.0, 0.0]]]
    assert not quantizer.codebook.requires_grad


def test_codebook_starts_on_tokens() -> None:
    """The codes of the first batches are put onto tokens: with few codes at once, with many over several batches."""
    torch.manual_seed(0)
    tokens = torch.randn(1, 40, 3) + 50
    few = VectorQuantizer(4, 3)
    few(tokens)
    assert int(few.started) == 4
    assert few.codebook.mean(dim=1).sub(50).abs().max() < 5

    many = VectorQuantizer(100, 3)
    for started in (40, 80, 100, 100):
        many(tokens + torch.randn(1, 40, 3) * 0.1)
        assert int(many.started) == started
    assert many.codebook.mean(dim=1).sub(50).abs().max() < 5


def test_dead_code_restarts_at_the_worst_served_token() -> None:
    far = [1024.0, 1024.0]
    quantizer = quantizer_with(torch.tensor([[0.0, 0.0], far]), decay=0.5, count=8)
    tokens = torch.zeros(1, 16, 2)
    tokens[0, 5] = torch.tensor([3.0, 3.0])
    # An even share is 8 tokens a code; without any, 8 falls to 4, 2, 1 and then below a tenth of 8.
    for count in (4, 2, 1):
        quantizer(tokens)
        assert quantizer.token_count[1] == count
        assert quantizer.codebook[1].tolist() == far
    quantizer(tokens)
    assert quantizer.token_count[1] == 8
    assert quantizer.codebook[1].tolist() == [3.0, 3.0]
    assert quantizer(tokens).codes.tolist() == [[int(position == 5) for position in range(16)]]


def test_no_restart_storm_with_more_codes_than_tokens() -> None:
    """800 tokens a step for 4096 codes: the common threshold of 2 would restart nearly all codes at every step."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(4096, 4)
    for _ in range(6):
        quantizer(torch.randn(2, 400, 4))
    assert int(quantizer.started) == 4096
    restarted = 0
    for _ in range(12):
        quantizer(torch.randn(2, 400, 4))
        # A restarted code has exactly the mean count; a living one has it only by a rare accident.
        restarted += int((quantizer.token_count == 800 / 4096).sum())
    assert restarted == 0
    assert (quantizer.token_count < 2).all()


def test_restarts_a_step_are_an_eighth_of_the_tokens_at_most() -> None:
    quantizer = quantizer_with(torch.full((64, 2), 1e3), count=1e-3)
    quantizer(torch.randn(1, 80, 2))
    assert int((quantizer.codebook.norm(dim=1) < 100).sum()) in (10, 11)  # 10 restarts, and the code that all took


def test_usage_by_hand() -> None:
    usage = CodeUsage(4, decay=0.5)
    assert usage.perplexity() == pytest.approx(4)
    assert usage.used_fraction() == 1
    usage.update(torch.tensor([[0, 0, 0, 1]]))
    shares = [(0.25 + 0.75) / 2, 0.25, 0.125, 0.125]
    assert usage.frequency.tolist() == shares
    entropy = -sum(share * math.log(share) for share in shares)
    assert usage.perplexity() == pytest.approx(math.exp(entropy))
    torch.testing.assert_close(usage.rarity(torch.tensor([[0, 2]])), -torch.tensor([[0.5, 0.125]]).log())


def test_usage_of_a_single_code() -> None:
    usage = CodeUsage(8, decay=0.0)
    usage.update(torch.full((2, 10), 3))
    assert usage.perplexity() == pytest.approx(1, abs=1e-4)
    assert usage.used_fraction() == pytest.approx(1 / 8)
    assert usage.rarity(torch.tensor([[0]])).item() == pytest.approx(-math.log(1e-8), rel=1e-5)


def test_training_updates_the_usage() -> None:
    for quantizer in (VectorQuantizer(8, 4), FiniteScalarQuantizer(4)):
        before = quantizer.usage.perplexity()
        for _ in range(3):
            quantizer(torch.zeros(1, 50, 4))
        assert quantizer.usage.perplexity() < before


def scalar_quantizer() -> FiniteScalarQuantizer:
    """One whose projection hands the four numbers of a token through."""
    quantizer = FiniteScalarQuantizer(4).eval()
    for layer in (quantizer.shrink, quantizer.widen):
        torch.nn.init.eye_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return quantizer


@pytest.mark.parametrize("axis", range(4))
def test_scalar_quantizer_reaches_all_8_values_of_an_axis(axis: int) -> None:
    tokens = torch.zeros(1, 1001, 4)
    tokens[0, :, axis] = torch.linspace(-20, 20, 1001)
    result = scalar_quantizer()(tokens)
    values = (torch.arange(8) - 3.5) / 4
    assert sorted(set(result.tokens[0, :, axis].tolist())) == pytest.approx(values.tolist())
    rest = result.codes - result.codes // 8**axis % 8 * 8**axis
    assert len(set(result.codes.flatten().tolist())) == 8
    assert rest.unique().numel() == 1


def test_scalar_quantizer_has_4096_codes() -> None:
    grid = torch.cartesian_prod(*[torch.atanh((torch.arange(8) - 3.5) / 4)] * 4)
    result = scalar_quantizer()(grid[None])
    assert sorted(result.codes.flatten().tolist()) == list(range(4096))
    torch.testing.assert_close(result.tokens[0], grid.tanh())


def test_scalar_quantizers_gradient_passes_straight_through_the_rounding() -> None:
    tokens = torch.randn(1, 30, 4, requires_grad=True)
    slope = torch.randn(1, 30, 4)
    (gradient,) = torch.autograd.grad(scalar_quantizer()(tokens).tokens, tokens, slope)
    unrounded = tokens.tanh() * (4 - 1e-3) / 4
    (expected,) = torch.autograd.grad(unrounded, tokens, slope)
    torch.testing.assert_close(gradient, expected)


def test_the_settings_name_the_quantizer() -> None:
    vector = build_quantizer("vq", 7, 12)
    assert isinstance(vector, VectorQuantizer)
    assert vector.codebook.shape == (7, 12)
    assert isinstance(build_quantizer("fsq", 7, 12), FiniteScalarQuantizer)
    assert build_quantizer("none", 7, 12) is None
