"""Objectives by hand and by brute force."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plans import make_plan
from tokenseg.config import PRESETS, TrainConfig
from tokenseg.model.importance import Importance
from tokenseg.model.network import TokenRecord, TokenSeg, TokenSegOutput
from tokenseg.outputs import EXCLUSIVE, REGIONS, Outputs
from tokenseg.training.losses import (
    cell_foreground,
    coarse_targets,
    recall_loss,
    score_loss,
    segmentation_loss,
    training_loss,
)

LN2 = math.log(2)


def sure_logits(targets: Tensor) -> Tensor:
    """Logits of 20 where the target is, -20 elsewhere."""
    return 40 * targets - 20


def half_full(num_outputs: int = 2) -> Tensor:
    """Two 4 x 4 x 4 volumes: the first half has the last label, the rest is background."""
    labels = torch.zeros(2, 1, 4, 4, 4, dtype=torch.long)
    labels[:, :, :2] = num_outputs - 1
    return labels


def test_one_hot_of_exclusive_labels_starts_with_background() -> None:
    maps = EXCLUSIVE.targets(torch.tensor([0, 1, 2, 1]).reshape(1, 1, 4, 1, 1), 3)
    assert maps[0, :, :, 0, 0].tolist() == [[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0]]


def test_one_hot_of_regions_is_the_regions() -> None:
    labels = torch.tensor([[1, 1, 0], [1, 0, 0]]).reshape(1, 2, 3, 1, 1)
    maps = REGIONS.targets(labels, 2)
    assert maps.dtype == torch.float32
    assert torch.equal(maps, labels.float())


@pytest.mark.parametrize("regions", [False, True])
def test_perfect_prediction_costs_nothing(regions: bool) -> None:
    labels = half_full()
    targets = Outputs(regions).targets(labels, 2)
    assert segmentation_loss(sure_logits(targets), targets, Outputs(regions)).item() == pytest.approx(0, abs=1e-5)


def test_worst_prediction_costs_all_of_dice_and_the_whole_margin() -> None:
    targets = EXCLUSIVE.targets(half_full(), 2)
    # Softmax of -20 against 20 is e^-40; Dice of foreground and prediction that do not overlap is 0.
    assert segmentation_loss(sure_logits(1 - targets), targets, EXCLUSIVE).item() == pytest.approx(1 + 40)
    # Sigmoid of -20 is e^-20.
    assert segmentation_loss(sure_logits(1 - targets), targets, REGIONS).item() == pytest.approx(1 + 20)


def test_undecided_prediction_by_hand() -> None:
    """Probabilities of 1/3 for three exclusive labels of which the second is absent and the third half the volume."""
    targets = EXCLUSIVE.targets(half_full(3), 3)
    absent = 1e-5 / (64 * 2 / 3 + 1e-5)
    present = 2 * (64 / 3) / (128 / 3 + 64)
    expected = 1 - (absent + present) / 2 + math.log(3)
    loss = segmentation_loss(torch.zeros(2, 3, 4, 4, 4), targets, EXCLUSIVE)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_undecided_regions_by_hand() -> None:
    """Every region counts, the first as well: probabilities of 1/2, regions of all and of half of the voxels."""
    targets = torch.ones(1, 2, 4, 4, 4)
    targets[:, 1, :2] = 0
    dice = (2 * 32 / (32 + 64) + 2 * 16 / (32 + 32)) / 2
    loss = segmentation_loss(torch.zeros(1, 2, 4, 4, 4), targets, REGIONS)
    assert loss.item() == pytest.approx(1 - dice + LN2, rel=1e-5)


def test_dice_is_over_the_batch_not_the_volume() -> None:
    """A volume without foreground, with a false positive, beside a perfect one: one Dice of 2 * 32 / (32 + 32 + 64)."""
    targets = EXCLUSIVE.targets(half_full(), 2)
    targets[1, 0], targets[1, 1] = 1, 0
    predicted = targets.clone()
    predicted[1, 0], predicted[1, 1] = 0, 1
    loss = segmentation_loss(sure_logits(predicted), targets, EXCLUSIVE)
    assert loss.item() == pytest.approx(1 - 2 * 32 / (32 + 64 + 32) + 40 / 2, rel=1e-5)


@pytest.mark.parametrize("regions", [False, True])
def test_no_foreground_anywhere_is_finite(regions: bool) -> None:
    logits = torch.randn(1, 2, 4, 4, 4, requires_grad=True)
    targets = Outputs(regions).targets(torch.zeros(1, 2 if regions else 1, 4, 4, 4, dtype=torch.long), 2)
    loss = segmentation_loss(logits, targets, Outputs(regions))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_segmentation_loss_is_in_full_precision() -> None:
    targets = EXCLUSIVE.targets(half_full(), 2)
    assert segmentation_loss(torch.zeros(2, 2, 4, 4, 4, dtype=torch.bfloat16), targets, EXCLUSIVE).dtype == (
        torch.float32
    )


def test_deep_supervision_averages_targets_and_levels() -> None:
    """A mixed 4 x 4 x 4 block is a target of 1/2: by hand for undecided logits at two coarser levels."""
    labels = torch.zeros(1, 1, 8, 8, 8, dtype=torch.long)
    labels[:, :, :2] = 1  # a quarter; blocks of 4 are half full or empty
    output = TokenSegOutput(
        torch.zeros(1, 2, 8, 8, 8),
        (torch.zeros(1, 2, 2, 2, 2), 20 * torch.tensor([1.0, -1.0]).reshape(1, 2, 1, 1, 1)),
        None,
    )
    config = TrainConfig(deep_supervision_weight=0.5)
    parts = training_loss(output, labels, plan=make_plan(), config=config)
    undecided = 1 - 2 * (0.5 * 2) / (4 + 2) + LN2
    # One voxel with a target of 1/4, and a prediction of nothing.
    nothing = 1 - 1e-5 / (0.25 + 1e-5) + 0.25 * 40
    assert parts.deep.item() == pytest.approx((undecided + nothing) / 2, rel=1e-5)
    assert parts.segmentation.item() == pytest.approx(1 - 2 * 8 / (32 + 16) + LN2, rel=1e-5)
    assert parts.total.item() == pytest.approx(parts.segmentation.item() + 0.5 * parts.deep.item())
    assert parts.commitment == 0
    assert parts.score == 0


def test_coarse_targets_stay_in_place_where_the_window_is_no_multiple_of_the_stride() -> None:
    targets = torch.zeros(1, 1, 6, 4, 2)
    targets[:, :, 4:] = 1
    coarse = coarse_targets(targets, torch.zeros(1, 1, 2, 1, 2), (4, 4, 2))
    # Of the second voxel along x half lies in the window, full; of the second along z nothing does.
    torch.testing.assert_close(coarse[0, 0, :, 0], torch.tensor([[0.0, 0.0], [0.5, 0.0]]))


def test_foreground_and_background_weigh_the_same_in_a_coarse_view() -> None:
    """One foreground voxel of 64 at 1/4, the others at 1/8: half of each one's own mean."""
    foreground = torch.zeros(1, 4, 4, 4, dtype=torch.bool)
    foreground[0, 1, 2, 3] = True
    probability = torch.where(foreground, 0.25, 0.125)
    logit = probability.logit()
    expected = -0.5 * (math.log(0.25) + math.log(0.875))
    exclusive = torch.stack([torch.zeros_like(logit), logit], dim=1)
    assert recall_loss(exclusive, foreground, EXCLUSIVE).item() == pytest.approx(expected, rel=1e-5)
    # Which of the labels it is does not matter: two of half the odds are the same.
    shared = torch.stack([torch.zeros_like(logit), logit - LN2, logit - LN2], dim=1)
    assert recall_loss(shared, foreground, EXCLUSIVE).item() == pytest.approx(expected, rel=1e-5)
    # Of regions the likeliest counts.
    likeliest = torch.stack([logit, logit - 3], dim=1)
    assert recall_loss(likeliest, foreground, REGIONS).item() == pytest.approx(expected, rel=1e-5)


def test_a_coarse_view_without_foreground_counts_its_background() -> None:
    nothing = torch.zeros(1, 4, 4, 4, dtype=torch.bool)
    undecided = torch.zeros(1, 2, 4, 4, 4)
    assert recall_loss(undecided, nothing, EXCLUSIVE).item() == pytest.approx(0.5 * LN2)
    assert recall_loss(undecided, ~nothing, EXCLUSIVE).item() == pytest.approx(0.5 * LN2)


def test_coarse_views_are_asked_where_to_look() -> None:
    torch.manual_seed(0)
    output = TokenSeg(PRESETS["tiny"], make_plan(1, 2)).train()(torch.randn(1, 1, 32, 32, 32))
    labels = torch.randint(0, 3, (1, 1, 32, 32, 32))
    config = TrainConfig()
    parts = training_loss(output, labels, plan=make_plan(), config=config, coarse_view=True)
    torch.testing.assert_close(parts.segmentation, recall_loss(output.logits, labels[:, 0] > 0, EXCLUSIVE))
    assert parts.deep == 0
    # Each weight has a gradient, if only zero, as several processes expect.
    assert parts.deep.requires_grad
    rest = config.commitment_weight * parts.commitment + config.score_weight * parts.score
    torch.testing.assert_close(parts.total, parts.segmentation + rest)


def test_total_is_the_weighted_sum() -> None:
    torch.manual_seed(0)
    output = TokenSeg(PRESETS["tiny"], make_plan(1, 2)).train()(torch.randn(1, 1, 32, 32, 32))
    labels = torch.randint(0, 3, (1, 1, 32, 32, 32))
    config = TrainConfig(deep_supervision_weight=0.3, commitment_weight=0.7, score_weight=0.2)
    parts = training_loss(output, labels, plan=make_plan(), config=config)
    assert all(part > 0 for part in parts)
    expected = parts.segmentation + 0.3 * parts.deep + 0.7 * parts.commitment + 0.2 * parts.score
    torch.testing.assert_close(parts.total, expected)
    assert output.tokens is not None
    torch.testing.assert_close(parts.score, score_loss(output.tokens, labels[:, 0] > 0))


def test_evaluation_mode_has_no_deep_loss() -> None:
    output = TokenSeg(PRESETS["tiny"], make_plan()).eval()(torch.randn(1, 1, 32, 32, 32))
    parts = training_loss(
        output, torch.ones(1, 1, 32, 32, 32, dtype=torch.long), plan=make_plan(), config=TrainConfig()
    )
    assert parts.deep == 0


def test_any_region_counts_as_foreground_of_a_cell() -> None:
    torch.manual_seed(0)
    output = TokenSeg(PRESETS["tiny"], make_plan(1, 2, regions=True)).train()(torch.randn(1, 1, 32, 32, 32))
    labels = torch.zeros(1, 2, 32, 32, 32, dtype=torch.long)
    labels[:, 1, 10:20] = 1
    parts = training_loss(output, labels, plan=make_plan(1, 2, regions=True), config=TrainConfig())
    assert output.tokens is not None
    torch.testing.assert_close(parts.score, score_loss(output.tokens, labels[:, 1] > 0))


BOXES = torch.tensor([[[0, 0, 0], [2, 4, 4]], [[1, 0, 0], [3, 4, 4]], [[2, 0, 0], [4, 4, 4]], [[4, 4, 4], [4, 4, 4]]])


def record(logit: list[float], presence_logits: list[list[float]]) -> TokenRecord:
    """Four cells of a 4 x 4 x 4 volume: first half, middle, second half, and an empty one in the padding."""
    unused = torch.zeros(1, 4)
    importance = Importance(
        unused, unused, unused, torch.tensor([logit]), torch.tensor([logit]).sigmoid(), torch.tensor([presence_logits])
    )
    return TokenRecord(BOXES, torch.zeros(4).long(), torch.zeros(1, 4).long(), importance, unused > 0, torch.zeros(()))


# The first half is foreground: cell 0 holds only foreground, cell 1 both, cell 2 only background.
FIRST_HALF = half_full()[:1, 0] > 0
TRUE_LOGITS = [-20.0, 20.0, -20.0]
TRUE_PRESENCE = [[20.0, -20.0], [20.0, 20.0], [-20.0, 20.0]]


def test_score_loss_by_hand() -> None:
    undecided = record([0.0] * 4, [[0.0, 0.0]] * 4)
    right = record([*TRUE_LOGITS, 0.0], [*TRUE_PRESENCE, [0.0, 0.0]])
    wrong = record([-value for value in TRUE_LOGITS] + [0.0], [[-a, -b] for a, b in TRUE_PRESENCE] + [[0.0, 0.0]])
    assert score_loss(undecided, FIRST_HALF).item() == pytest.approx(2 * LN2)
    assert score_loss(right, FIRST_HALF).item() == pytest.approx(0, abs=1e-6)
    assert score_loss(wrong, FIRST_HALF).item() == pytest.approx(40)


@pytest.mark.parametrize("cell", range(3))
def test_score_loss_falls_when_one_logit_moves_to_the_truth(cell: int) -> None:
    moved = [0.0] * 4
    moved[cell] = TRUE_LOGITS[cell]
    before, after = (score_loss(record(logits, [[0.0, 0.0]] * 4), FIRST_HALF) for logits in ([0.0] * 4, moved))
    assert (before - after).item() == pytest.approx(LN2 / 3)


def test_cells_in_padding_do_not_count() -> None:
    low, high = (record([*TRUE_LOGITS, value], [*TRUE_PRESENCE, [value, value]]) for value in (-1000.0, 1000.0))
    assert score_loss(low, FIRST_HALF) == score_loss(high, FIRST_HALF)


@settings(deadline=None, max_examples=30)
@given(size=st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7)), data=st.data(), seed=st.integers(0, 99))
def test_cell_foreground_counts_voxels(size: tuple[int, int, int], data: st.DataObject, seed: int) -> None:
    foreground = torch.rand(2, *size, generator=torch.Generator().manual_seed(seed)) > 0.5
    corners = [
        [sorted(data.draw(st.tuples(st.integers(0, length), st.integers(0, length)))) for length in size]
        for _ in range(4)
    ]
    boxes = torch.tensor(corners).transpose(1, 2)
    inside, volume = cell_foreground(foreground, boxes)
    for number, ((x0, x1), (y0, y1), (z0, z1)) in enumerate(corners):
        cut = foreground[:, x0:x1, y0:y1, z0:z1]
        assert inside[:, number].tolist() == cut.flatten(1).sum(dim=1).tolist()
        assert volume[number] == cut[0].numel()
