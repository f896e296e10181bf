from __future__ import annotations

import pytest
import torch

from plans import make_plan
from tokenseg.benchmark.accuracy.variants import (
    VARIANTS,
    BottleneckTwin,
    RandomTokens,
    count_parameters,
    variant_network,
)
from tokenseg.config import PRESETS, NetworkConfig
from tokenseg.errors import ConfigError
from tokenseg.model.network import TokenSeg, TokenSegOutput

TINY, SMALL, PLAN = PRESETS["tiny"], PRESETS["small"], make_plan()


def run(network: torch.nn.Module, images: torch.Tensor, *, training: bool = False) -> TokenSegOutput:
    with torch.no_grad():
        return network.train(training)(images)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("tokenseg", {}),
        ("tokenseg-no-tokens", {"tokens": False}),
        ("tokenseg-no-refinement", {"refine_fraction": 0.0}),
        ("tokenseg-dense-refinement", {"refine_fraction": 1.0}),
        ("tokenseg-k25", {"num_kept": 25}),
        ("tokenseg-k400", {"num_kept": 400}),
        ("tokenseg-fsq", {"quantizer": "fsq"}),
        ("tokenseg-no-codebook", {"quantizer": "none"}),
    ],
)
def test_a_variant_of_settings_differs_from_the_plain_network_in_these_alone(
    name: str, changed: dict[str, object]
) -> None:
    plain = SMALL.model_copy(update={"tokens": True})
    assert VARIANTS[name].settings(plain) == plain.model_copy(update=changed)
    assert VARIANTS[name].make is TokenSeg


def test_base_is_the_base_preset_whatever_the_plain_network_is() -> None:
    assert VARIANTS["tokenseg-paper"].settings(TINY) == PRESETS["paper"]


@pytest.mark.parametrize("name", sorted(set(VARIANTS) - {"tokenseg-paper"}))
def test_every_variant_segments_and_is_the_same_twice(name: str, images: torch.Tensor) -> None:
    torch.manual_seed(0)
    network = variant_network(name)(TINY, PLAN)
    first = run(network, images).logits
    assert first.shape == (2, 2, 32, 32, 32)
    assert torch.equal(first, run(network, images).logits)


def test_an_unknown_variant_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no variant of TokenSeg is called 'tokenseg-k7'; .*tokenseg-k25"):
        variant_network("tokenseg-k7")


def kept(network: torch.nn.Module, images: torch.Tensor, *, training: bool = True) -> torch.Tensor:
    tokens = run(network, images, training=training).tokens
    assert tokens is not None
    return tokens.kept


def test_random_tokens_keep_as_many_and_each_candidate_as_often(images: torch.Tensor) -> None:
    torch.manual_seed(0)
    network = RandomTokens(TINY, PLAN)
    draws = torch.stack([kept(network, images) for _ in range(60)])
    assert torch.equal(draws.sum(dim=2), torch.full((60, 2), 100))
    share = draws.float().mean(dim=(0, 1))
    # 120 draws at a chance of a quarter: deviation 0.04.
    assert share.min() > 0.05
    assert share.max() < 0.5
    assert draws[0].ne(draws[1]).any()


def test_random_tokens_follow_the_step_and_not_the_image_or_earlier_draws(images: torch.Tensor) -> None:
    network = RandomTokens(TINY, PLAN)
    first, second = kept(network, images), kept(network, images)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    third = kept(network, images)
    torch.rand(17)
    network.load_state_dict(state)
    assert torch.equal(kept(network, -images), third)
    assert not torch.equal(first, second)
    held_out = kept(network, images, training=False)
    assert torch.equal(held_out, kept(network, -images, training=False))


def test_random_tokens_still_learn_the_score(images: torch.Tensor) -> None:
    torch.manual_seed(0)
    network = RandomTokens(TINY, PLAN).train()
    tokens = network(images).tokens
    assert tokens is not None
    assert bool(((tokens.importance.score >= 0.45) & (tokens.importance.score <= 0.55)).all())
    assert tokens.importance.logit.std() > 0.1
    tokens.importance.logit.sum().backward()
    assert network.tokenizer is not None
    gradient = network.tokenizer.score.term_weights.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("config", [SMALL, SMALL.model_copy(update={"quantizer": "none", "mixer_layers": 4})])
def test_the_bottleneck_has_as_many_parameters_as_the_token_path(config: NetworkConfig) -> None:
    with_tokens = count_parameters(TokenSeg(config.model_copy(update={"tokens": True}), PLAN))
    without = count_parameters(TokenSeg(config.model_copy(update={"tokens": False}), PLAN))
    twin = BottleneckTwin(config, PLAN)
    assert twin.tokenizer is None
    assert count_parameters(twin) - without == pytest.approx(with_tokens - without, rel=0.02)


def test_the_bottleneck_starts_as_the_network_without_tokens(images: torch.Tensor) -> None:
    torch.manual_seed(0)
    plain = TokenSeg(TINY.model_copy(update={"tokens": False}), PLAN)
    twin = BottleneckTwin(TINY, PLAN)
    block = {name: tensor for name, tensor in twin.state_dict().items() if "encoder.block." in name}
    renamed = {
        f"encoder.{name}" if name.startswith("encoder.") else name: value for name, value in plain.state_dict().items()
    }
    twin.load_state_dict(renamed | block)
    assert torch.equal(run(twin, images).logits, run(plain, images).logits)
    torch.nn.init.ones_(twin.encoder.block.norm.weight)
    assert not torch.equal(run(twin, images).logits, run(plain, images).logits)
