"""The importance score, its three terms, and the image gradient behind the first."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenseg.model.blocks import space_to_depth
from tokenseg.model.importance import Importance, ImportanceScore, cell_gradient

GRID = (4, 5, 5)
ISOTROPIC_MM = (1.0, 1.0, 1.0)


def gradient_of(
    images: Tensor, stride: tuple[int, int, int], spacing_mm: tuple[float, float, float], grid: tuple[int, int, int]
) -> Tensor:
    return cell_gradient(space_to_depth(images, stride), stride, spacing_mm, grid)


def scored(
    *, gradient: Tensor | None = None, rarity: Tensor | None = None, learned: bool = True, tokens: Tensor | None = None
) -> tuple[ImportanceScore, Importance]:
    """Scores of two volumes with three levels of four cells."""
    torch.manual_seed(0)
    score = ImportanceScore(8, 3, learned=learned)
    gradient = torch.rand(2, 4) if gradient is None else gradient
    rarity = torch.rand(2, 12) * 9 if rarity is None else rarity
    return score, score(torch.randn(2, 12, 8) if tokens is None else tokens, gradient, rarity)


@settings(deadline=None, max_examples=25)
@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-1e2, 1e2), seed=st.integers(0, 99))
def test_terms_span_0_to_1_in_each_volume(scale: float, shift: float, seed: int) -> None:
    torch.manual_seed(seed)
    _, result = scored(gradient=torch.rand(2, 4) * scale, rarity=torch.rand(2, 12) * scale + shift)
    for term in (result.boundary, result.semantic, result.diversity):
        assert (term >= 0).all()
        assert (term <= 1).all()
        assert (term.amin(dim=1) == 0).all()
    assert (result.semantic.amax(dim=1) > 0.99).all()
    assert ((result.score > 0) & (result.score < 1)).all()


def test_boundary_term_by_hand_is_the_same_on_all_levels() -> None:
    _, result = scored(gradient=torch.tensor([[2.0, 4.0, 3.0, 6.0], [0.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(result.boundary[0], torch.tensor([0.0, 0.5, 0.25, 1.0] * 3))
    assert (result.boundary[1] == 0).all()


def test_semantic_term_is_highest_where_foreground_and_background_are_both_likely() -> None:
    tokens = torch.zeros(2, 12, 8)
    tokens[:, 1, :2] = torch.tensor([5.0, 5.0])
    tokens[:, 2, :2] = torch.tensor([5.0, -5.0])
    tokens[:, 3, :2] = torch.tensor([-5.0, 5.0])
    score = ImportanceScore(8, 3, learned=True)
    with torch.no_grad():
        score.presence.weight.copy_(torch.eye(2, 8))
        score.presence.bias.zero_()
    result = score(tokens, torch.rand(2, 4), torch.rand(2, 12))
    assert result.semantic.argmax(dim=1).tolist() == [1, 1]
    torch.testing.assert_close(result.semantic[:, 2], result.semantic[:, 3])
    assert (result.semantic[:, 2] < result.semantic[:, 0]).all()


def test_terms_of_a_volume_without_contrast_are_zero_and_finite() -> None:
    _, result = scored(gradient=torch.zeros(2, 4), rarity=torch.full((2, 12), 8.3), tokens=torch.zeros(2, 12, 8))
    for term in (result.boundary, result.semantic, result.diversity):
        assert (term == 0).all()
    torch.testing.assert_close(result.score, torch.full((2, 12), torch.sigmoid(torch.tensor(-1.5)).item()))


def test_score_starts_as_the_plain_sum() -> None:
    for learned in (True, False):
        _, result = scored(learned=learned)
        total = result.boundary + result.semantic + result.diversity
        torch.testing.assert_close(result.logit, total - 1.5)
        torch.testing.assert_close(result.score, result.logit.sigmoid())


def test_learned_weights_belong_to_a_level_and_a_term() -> None:
    score, _ = scored()
    with torch.no_grad():
        score.term_weights.zero_()
        score.term_weights[1, 0, 2] = 3.0
        score.level_bias[2] = 0.5
    result = score(torch.randn(2, 12, 8), torch.rand(2, 4), torch.rand(2, 12))
    expected = torch.full((2, 12), -1.5)
    expected[:, 4:8] += 3 * result.diversity[:, 4:8]
    expected[:, 8:] = 0.5
    torch.testing.assert_close(result.logit, expected)


def test_only_the_learned_score_learns_its_weights() -> None:
    for learned in (True, False):
        score, result = scored(learned=learned)
        result.logit.sum().backward()
        assert (score.term_weights.grad is not None) == learned
        assert (score.level_bias.grad is not None) == learned


def ramp(axis: int, size: int = 24) -> Tensor:
    """An image that rises by one a voxel along `axis`."""
    shape = [1, 1, 1, 1, 1]
    shape[axis + 2] = size
    return torch.arange(float(size)).reshape(shape).expand(1, 1, size, size, size)


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("spacing_mm", [ISOTROPIC_MM, (0.5, 2.0, 4.0)])
@pytest.mark.parametrize("stride", [(2, 2, 2), (2, 2, 1)])
def test_gradient_of_a_ramp_is_its_slope_per_mm(
    axis: int, spacing_mm: tuple[float, float, float], stride: tuple[int, int, int]
) -> None:
    cells = gradient_of(ramp(axis), stride, spacing_mm, (4, 4, 4)).reshape(4, 4, 4)
    inner = cells.movedim(axis, 0)[1:3]
    torch.testing.assert_close(inner, torch.full_like(inner, 1 / spacing_mm[axis]))


def test_gradients_of_axes_and_channels_add_in_squares() -> None:
    both = torch.cat([3 * ramp(0) + 4 * ramp(1), 12 * ramp(2)], dim=1)
    cells = gradient_of(both, (2, 2, 2), ISOTROPIC_MM, (3, 3, 3))
    assert cells.reshape(3, 3, 3)[1, 1, 1].item() == pytest.approx(13)


def test_coarser_spacing_along_all_axes_divides_the_gradient() -> None:
    images = torch.randn(1, 2, 16, 18, 20)
    fine = gradient_of(images, (2, 2, 2), ISOTROPIC_MM, GRID)
    torch.testing.assert_close(gradient_of(images, (2, 2, 2), (3.0, 3.0, 3.0), GRID), fine / 3)


def test_constant_image_has_no_gradient() -> None:
    cells = gradient_of(torch.full((2, 1, 18, 20, 22), 7.0), (2, 2, 2), ISOTROPIC_MM, GRID)
    assert torch.equal(cells, torch.zeros(2, 100))


@pytest.mark.parametrize("axis", range(3))
def test_step_edge_is_strongest_in_the_cells_that_hold_it(axis: int) -> None:
    images = torch.zeros(1, 1, 40, 40, 40)
    images.movedim(axis + 2, 0)[12:] = 1  # the second fifth runs from 8 to 16
    cells = gradient_of(images, (2, 2, 2), ISOTROPIC_MM, (5, 5, 5)).reshape(5, 5, 5).movedim(axis, 0)
    assert (cells[1] > 0).all()
    assert (cells[[0, 2, 3, 4]] == 0).all()


@pytest.mark.parametrize("size", [(2, 2, 2), (1, 18, 18), (4, 2, 18)])
def test_gradient_of_tiny_volumes_is_finite(size: tuple[int, int, int]) -> None:
    stride = (1, 2, 2) if size[0] == 1 else (2, 2, 2)
    assert gradient_of(torch.randn(1, 1, *size), stride, ISOTROPIC_MM, GRID).isfinite().all()
