"""What the paper states in numbers, and what was asked of the presets."""

from __future__ import annotations

import pytest
import torch

from plans import make_plan
from tokenseg.config import PRESETS, NetworkConfig, PresetName, TrainConfig
from tokenseg.model.blocks import space_to_depth
from tokenseg.model.network import TokenSeg
from tokenseg.model.quantizer import FiniteScalarQuantizer, VectorQuantizer
from tokenseg.training.losses import training_loss


def size_of(config: NetworkConfig) -> tuple[int, int]:
    """Learned parameters, and numbers in the codebook."""
    network = TokenSeg(config, make_plan())
    assert network.tokenizer is not None
    assert isinstance(network.tokenizer.quantizer, VectorQuantizer)
    return sum(parameter.numel() for parameter in network.parameters()), network.tokenizer.quantizer.codebook.numel()


def test_the_paper_preset_has_the_papers_size_and_codebook() -> None:
    parameters, codebook = size_of(PRESETS["paper"])
    assert parameters + codebook == pytest.approx(23.8e6, rel=0.05)
    assert codebook == 4096 * PRESETS["paper"].token_width


def test_small_is_small() -> None:
    parameters, codebook = size_of(PRESETS["small"])
    assert parameters + codebook <= 5.5e6


def test_tiny_is_for_tests() -> None:
    assert sum(size_of(PRESETS["tiny"])) < 100_000


@pytest.mark.parametrize("preset", PRESETS)
def test_100_of_400_candidates_on_four_levels(preset: PresetName) -> None:
    """A pyramid at 1/2, 1/4, 1/8, 1/16; 4 x 5 x 5 cells a level; "TokenSeg-100"."""
    network = TokenSeg(PRESETS[preset], make_plan()).eval()
    images = torch.randn(1, 1, 32, 48, 32)
    with torch.inference_mode():
        sizes = [tuple(level.shape[2:]) for level in network.encoder(space_to_depth(images, (2, 2, 2)))]
        output = network(images)
    assert sizes == [(16, 24, 16), (8, 12, 8), (4, 6, 4), (2, 3, 2)]
    assert output.tokens is not None
    assert output.tokens.kept.shape == (1, 400)
    assert output.tokens.kept.sum() == 100
    assert output.logits.shape == (1, 2, 32, 48, 32)


def test_scalar_quantisation_has_as_many_codes_as_the_papers_codebook() -> None:
    assert FiniteScalarQuantizer(8).usage.frequency.numel() == PRESETS["paper"].codebook_size == 4096


def test_score_as_the_papers_plain_sum_of_three_terms() -> None:
    network = TokenSeg(PRESETS["tiny"].model_copy(update={"score": "sum"}), make_plan()).train()
    for _ in range(3):
        output = network(torch.randn(2, 1, 32, 32, 32))
    assert output.tokens is not None
    importance = output.tokens.importance
    total = importance.boundary + importance.semantic + importance.diversity
    assert all(term.amax() > 0.5 for term in importance[:3])
    torch.testing.assert_close(torch.logit(importance.score) - total, torch.full_like(total, -1.5), atol=1e-4, rtol=0)


def test_loss_is_dice_plus_cross_entropy_plus_vq() -> None:
    network = TokenSeg(PRESETS["tiny"], make_plan()).train()
    output = network(torch.randn(1, 1, 32, 32, 32))
    only = TrainConfig(deep_supervision_weight=0, score_weight=0, commitment_weight=0.25)
    loss = training_loss(output, torch.randint(0, 2, (1, 1, 32, 32, 32)), plan=make_plan(), config=only)
    assert loss.commitment > 0
    torch.testing.assert_close(loss.total, loss.segmentation + 0.25 * loss.commitment)
