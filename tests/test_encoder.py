"""Pyramid and candidate tokens."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plans import ISOTROPIC, THICK_SLICES
from tokenseg.model.blocks import space_to_depth
from tokenseg.model.encoder import CandidateTokens, HierarchicalEncoder

WIDTHS = (4, 6, 8, 10)


def test_levels_are_at_half_quarter_eighth_and_sixteenth() -> None:
    pyramid = HierarchicalEncoder(2, WIDTHS, (1, 1, 1, 1), ISOTROPIC)(torch.randn(1, 16, 32, 24, 16))
    assert [tuple(level.shape) for level in pyramid] == [
        (1, 4, 32, 24, 16),
        (1, 6, 16, 12, 8),
        (1, 8, 8, 6, 4),
        (1, 10, 4, 3, 2),
    ]


@settings(deadline=None, max_examples=20)
@given(size=st.tuples(st.integers(9, 20), st.integers(9, 20), st.integers(9, 20)))
def test_coarse_axis_is_pooled_late_and_odd_sizes_round_up(size: tuple[int, int, int]) -> None:
    x, y, z = size
    pyramid = HierarchicalEncoder(1, WIDTHS, (1, 1, 1, 1), THICK_SLICES)(torch.randn(1, 4, x, y, z))
    expected = [
        (-(-2 * x // factor), -(-2 * y // factor), -(-z // depth))
        for factor, depth in [(2, 1), (4, 1), (8, 2), (16, 4)]
    ]
    assert [tuple(level.shape[2:]) for level in pyramid] == expected


def test_blocks_set_the_depth_of_each_level() -> None:
    encoder = HierarchicalEncoder(1, WIDTHS, (1, 2, 3, 2), ISOTROPIC)
    assert [len(stage) for stage in encoder.stages] == [1, 2, 3, 2]


def test_every_voxel_reaches_the_first_level() -> None:
    """Nothing is lost by having no stage at full resolution: each voxel alone changes the finest features."""
    torch.manual_seed(0)
    encoder = HierarchicalEncoder(1, WIDTHS, (1, 1, 1, 1), ISOTROPIC)
    images = torch.randn(1, 1, 18, 18, 18, requires_grad=True)
    finest = encoder(space_to_depth(images, (2, 2, 2)))[0]
    (gradient,) = torch.autograd.grad(finest, images, torch.randn_like(finest))
    assert (gradient != 0).all()


def test_candidates_are_projected_cell_means_finest_level_first() -> None:
    torch.manual_seed(0)
    candidates = CandidateTokens((3, 2), 8, (2, 1, 1))
    pyramid = [torch.randn(1, 3, 4, 2, 2), torch.randn(1, 2, 2, 1, 1)]
    pooled = candidates.pool(pyramid)
    torch.testing.assert_close(pooled[0][0, 1], pyramid[0][0, :, 2:].mean(dim=(1, 2, 3)))
    tokens = candidates(pooled)
    assert tokens.shape == (1, 4, 8)
    expected = candidates.norm(candidates.project[1](pyramid[1][0, :, 1, 0, 0]))
    torch.testing.assert_close(tokens[0, 3], expected)


def test_pooled_cells_are_in_full_precision() -> None:
    candidates = CandidateTokens((3,), 8, (4, 5, 5))
    (pooled,) = candidates.pool([torch.randn(1, 3, 8, 8, 8, dtype=torch.bfloat16)])
    assert pooled.dtype == torch.float32
    assert pooled.shape == (1, 100, 3)
