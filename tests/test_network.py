"""The network as a whole: sizes, shapes, its token-free twin, gradients, and the record of its tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from plans import THICK_SLICES, make_plan
from tokenseg.config import PRESETS, NetworkConfig, Plan, TrainConfig
from tokenseg.model.network import TokenRecord, TokenSeg
from tokenseg.model.passes import candidates_of
from tokenseg.training.losses import training_loss

TINY = PRESETS["tiny"]
WITHOUT_CODES = TINY.model_copy(update={"quantizer": "none"})
Triple = tuple[int, int, int]


def make_network(config: NetworkConfig = TINY, plan: Plan | None = None, *, active: bool = False) -> TokenSeg:
    """A network with fixed weights; `active` lets the tokens change the pyramid, which they do not at first."""
    torch.manual_seed(0)
    network = TokenSeg(config, plan or make_plan())
    if active:
        assert network.tokenizer is not None
        for layer in network.tokenizer.reproject.project:
            nn.init.normal_(layer.weight, std=0.3)
    return network


def record_of(network: TokenSeg, images: Tensor, num_kept: int | None = None) -> TokenRecord:
    tokens = network(images, num_kept).tokens
    assert tokens is not None
    return tokens


@settings(deadline=None, max_examples=25)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40)),
    channels=st.integers(1, 8),
    labels=st.integers(1, 4),
    regions=st.booleans(),
    thick=st.booleans(),
)
def test_any_input_size_gives_logits_of_that_size(
    size: Triple, channels: int, labels: int, regions: bool, thick: bool
) -> None:
    changes = {"strides": THICK_SLICES, "spacing_mm": (1.0, 1.0, 3.0)} if thick else {}
    plan = make_plan(channels, labels, regions=regions).model_copy(update=changes)
    with torch.inference_mode():
        output = make_network(TINY, plan).eval()(torch.randn(1, channels, *size))
    assert output.logits.shape == (1, labels if regions else labels + 1, *size)
    assert output.logits.isfinite().all()
    assert output.deep_logits == ()
    assert output.tokens is not None
    boxes = output.tokens.boxes_vox
    for mine, networks in zip(candidates_of(plan, size), (boxes, output.tokens.level), strict=True):
        assert torch.equal(mine, networks)
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor(size)).all()
    assert (boxes[:, 1] >= boxes[:, 0]).all()


@pytest.mark.parametrize("size", [(1, 1, 1), (64, 64, 1), (1, 40, 33)])
@pytest.mark.parametrize("training", [True, False])
def test_single_voxels_and_single_slices(size: Triple, training: bool) -> None:
    output = make_network().train(training)(torch.randn(2, 1, *size))
    assert output.logits.shape == (2, 2, *size)
    assert output.logits.isfinite().all()


def test_axis_that_is_never_pooled() -> None:
    plan = make_plan(strides=((2, 2, 1),) * 4, spacing_mm=(0.5, 0.5, 8.0))
    for depth in (1, 3):
        assert make_network(TINY, plan).eval()(torch.randn(1, 1, 48, 40, depth)).logits.shape == (1, 2, 48, 40, depth)


def test_deep_logits_are_at_a_quarter_and_an_eighth() -> None:
    quarter, eighth = make_network().train()(torch.randn(1, 1, 48, 32, 64)).deep_logits
    assert quarter.shape == (1, 2, 12, 8, 16)
    assert eighth.shape == (1, 2, 6, 4, 8)


@pytest.mark.parametrize("quantizer", ["vq", "fsq", "none"])
def test_it_starts_as_its_token_free_twin(quantizer: str) -> None:
    with_tokens = make_network(TINY.model_copy(update={"quantizer": quantizer})).eval()
    twin = make_network(TINY.model_copy(update={"tokens": False})).eval()
    missing, surplus = twin.load_state_dict(with_tokens.state_dict(), strict=False)
    assert missing == []
    assert {name.split(".")[0] for name in surplus} == {"tokenizer"}
    images = torch.randn(2, 1, 33, 20, 27)
    output = with_tokens(images)
    assert torch.equal(output.logits, twin(images).logits)
    assert output.tokens is not None
    assert twin(images).tokens is None


def test_tokens_change_the_logits_once_reprojected() -> None:
    network = make_network(active=True).eval()
    images = torch.randn(1, 1, 32, 32, 32)
    logits = network(images).logits
    assert (network(images, 10).logits - logits).abs().amax() > 0.01


def test_padding_is_as_small_as_two_voxels_at_the_last_level_allow() -> None:
    network = make_network(TINY, make_plan(strides=THICK_SLICES))
    # Total strides are 16, 16, 4; those of the first level 2, 2, 1. Padding is listed last axis first.
    assert network.padding((1, 17, 1)) == [0, 4, 0, 1, 0, 17]
    assert network.padding((18, 19, 5)) == [0, 0, 0, 1, 0, 0]


def test_gradients_reach_every_parameter_after_one_step() -> None:
    for quantizer in ("vq", "fsq", "none"):
        network = make_network(TINY.model_copy(update={"quantizer": quantizer})).train()
        optimiser = torch.optim.SGD(network.parameters(), lr=1e-2)
        images, labels = torch.randn(2, 1, 32, 32, 32), torch.randint(0, 2, (2, 1, 32, 32, 32))
        for _ in range(2):
            optimiser.zero_grad()
            training_loss(network(images), labels, plan=make_plan(), config=TrainConfig()).total.backward()
            optimiser.step()
        idle = {
            name
            for name, parameter in network.named_parameters()
            if parameter.grad is None or not parameter.grad.abs().sum() > 0
        }
        assert idle == set()


def test_only_the_weights_of_the_plain_sum_are_not_learned() -> None:
    network = make_network(TINY.model_copy(update={"score": "sum"}))
    fixed = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert fixed == {"tokenizer.score.term_weights", "tokenizer.score.level_bias"}


def test_commitment_does_not_reach_the_encoder() -> None:
    network = make_network().train()
    loss = record_of(network, torch.randn(1, 1, 32, 32, 32)).commitment_loss
    assert loss > 0
    named = dict(network.named_parameters())
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    reached = {name for name, gradient in zip(named, gradients, strict=True) if gradient is not None}
    assert reached == {name for name in named if name.startswith("tokenizer.candidates.")}


@pytest.mark.parametrize(("quantizer", "training"), [("vq", False), ("fsq", True), ("none", True)])
def test_commitment_is_zero_outside_the_training_of_a_codebook(quantizer: str, training: bool) -> None:
    network = make_network(TINY.model_copy(update={"quantizer": quantizer})).train(training)
    assert record_of(network, torch.randn(1, 1, 32, 32, 32)).commitment_loss == 0


def test_volumes_of_a_batch_do_not_see_each_other() -> None:
    network = make_network(active=True).eval()
    images = torch.randn(3, 1, 25, 30, 18)
    together = network(images)
    for volume in range(3):
        alone = network(images[volume : volume + 1])
        torch.testing.assert_close(together.logits[volume], alone.logits[0], atol=1e-4, rtol=1e-4)
        assert torch.equal(together.tokens.kept[volume], alone.tokens.kept[0])
        assert torch.equal(together.tokens.codes[volume], alone.tokens.codes[0])


def test_same_input_gives_bit_equal_output() -> None:
    network, images = make_network(active=True).eval(), torch.randn(1, 1, 33, 29, 40)
    assert torch.equal(network(images).logits, network(images).logits)


@pytest.mark.parametrize(("asked", "kept"), [(None, 100), (0, 0), (1, 1), (37, 37), (400, 400), (1000, 400)])
def test_number_of_kept_tokens_is_set_at_run_time(asked: int | None, kept: int) -> None:
    record = record_of(make_network().eval(), torch.randn(2, 1, 32, 32, 32), asked)
    assert record.kept.sum(dim=1).tolist() == [kept, kept]


def test_no_kept_tokens_are_no_tokens() -> None:
    network = make_network(active=True).eval()
    twin = make_network(TINY.model_copy(update={"tokens": False})).eval()
    twin.load_state_dict(network.state_dict(), strict=False)
    images = torch.randn(1, 1, 32, 32, 32)
    assert torch.equal(network(images, 0).logits, twin(images).logits)


def test_record_of_the_tokens() -> None:
    network = make_network().eval()
    record = record_of(network, torch.randn(2, 1, 64, 80, 80))
    assert record.level.tolist() == [level for level in range(4) for _ in range(100)]
    assert record.kept.sum(dim=1).tolist() == [100, 100]
    per_level = record.kept.reshape(2, 4, 100).sum(dim=2)
    assert (per_level >= 6).all()
    assert record.codes.amin() >= 0
    assert record.codes.amax() < 64
    # 4 x 5 x 5 cells of 16 x 16 x 16 voxels; the coarsest level has exactly one voxel a cell.
    cells = torch.cartesian_prod(torch.arange(4), torch.arange(5), torch.arange(5)) * 16
    for level in range(4):
        boxes = record.boxes_vox[100 * level : 100 * (level + 1)]
        assert torch.equal(boxes, torch.stack([cells, cells + 16], dim=1))
    score = record.importance.score
    kept_by_score = score.masked_fill(record.kept, 0).amax(dim=1)
    above = (score > kept_by_score[:, None]).sum(dim=1)
    assert (above >= 100 - 4 * 6).all()


def test_codes_are_minus_one_without_a_codebook() -> None:
    assert (record_of(make_network(WITHOUT_CODES), torch.randn(1, 1, 32, 32, 32)).codes == -1).all()


def test_boundary_term_points_at_an_edge_in_the_image() -> None:
    images = torch.zeros(1, 1, 64, 80, 80)
    images[:, :, 40:] = 1.0
    record = record_of(make_network().eval(), images)
    strongest = record.boxes_vox[record.importance.boundary[0] > 0.5]
    assert (strongest[:, 0, 0] == 32).all()
    assert (strongest[:, 1, 0] == 48).all()
    assert len(strongest) == 4 * 25


@pytest.mark.parametrize("value", [0.0, 5.0])
@pytest.mark.parametrize("size", [(1, 1, 1), (31, 18, 40)])
def test_constant_input_gives_finite_logits_and_gradients(value: float, size: Triple) -> None:
    network = make_network(active=True).train()
    output = network(torch.full((1, 1, *size), value))
    assert output.logits.isfinite().all()
    loss = training_loss(output, torch.zeros(1, 1, *size, dtype=torch.long), plan=make_plan(), config=TrainConfig())
    loss.total.backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("size", [(18, 19, 17), (16, 16, 16), (3, 2, 1)])
def test_bfloat16_is_near_full_precision_on_tiny_inputs(size: Triple) -> None:
    """bf16 convolutions on a CPU go wrong where one voxel is left along the last axis (pytorch issue 169688)."""
    network, images = make_network(TINY, make_plan(2, 2)).eval(), torch.randn(2, 2, *size)
    with torch.inference_mode():
        exact = network(images).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            near = network(images).logits.float()
    assert (near - exact).norm() < 0.05 * exact.norm()


def test_bfloat16_training_step_has_finite_gradients() -> None:
    network = make_network(active=True).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = network(torch.randn(1, 1, 32, 32, 32))
    labels = torch.randint(0, 2, (1, 1, 32, 32, 32))
    training_loss(output, labels, plan=make_plan(), config=TrainConfig()).total.backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_weights_round_trip_through_their_state() -> None:
    first = make_network(active=True)
    first.train()(torch.randn(2, 1, 32, 32, 32))
    torch.manual_seed(1)
    second = TokenSeg(TINY, make_plan())
    second.load_state_dict(first.state_dict())
    images = torch.randn(1, 1, 32, 32, 32)
    assert torch.equal(first.eval()(images).logits, second.eval()(images).logits)


def test_a_few_steps_learn_a_bright_ball() -> None:
    torch.manual_seed(0)
    network = make_network().train()
    axes = torch.meshgrid(*[torch.arange(24.0) - 11.5] * 3, indexing="ij")
    ball = (sum(axis**2 for axis in axes) < 49).long()[None, None]
    images = ball + 0.3 * torch.randn(1, 1, 24, 24, 24)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(40):
        optimiser.zero_grad()
        training_loss(network(images), ball, plan=make_plan(), config=TrainConfig()).total.backward()
        optimiser.step()
    predicted = network.eval()(images).logits.argmax(dim=1)
    dice = 2 * (predicted * ball[:, 0]).sum() / (predicted.sum() + ball.sum())
    assert dice > 0.85
