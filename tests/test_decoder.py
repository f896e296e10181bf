"""Reprojection into the pyramid, and the way back to full resolution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from plans import ISOTROPIC, THICK_SLICES
from tokenseg.config import Stride3
from tokenseg.model.blocks import depth_to_space, space_to_depth
from tokenseg.model.decoder import Reprojection, SparseToDenseDecoder
from tokenseg.model.encoder import HierarchicalEncoder

WIDTHS = (4, 6, 8, 10)
GRID = (4, 5, 5)


def random_pyramid(sizes: list[tuple[int, int, int]]) -> list[Tensor]:
    return [torch.randn(1, width, *size) for width, size in zip(WIDTHS, sizes, strict=True)]


def cubes(*lengths: int) -> list[tuple[int, int, int]]:
    return [(length, length, length) for length in lengths]


def test_reprojection_starts_as_nothing() -> None:
    pyramid = random_pyramid(cubes(20, 10, 5, 3))
    fused = Reprojection(WIDTHS, 8, GRID)(pyramid, torch.randn(1, 400, 8))
    assert all(torch.equal(after, before) for after, before in zip(fused, pyramid, strict=True))


# The finest level's enter at the next one: a map at 1/2 costs too much.
@pytest.mark.parametrize(("own", "level"), [(0, 1), (1, 1), (2, 2), (3, 3)])
def test_a_token_lands_in_its_cell_at_its_level(own: int, level: int) -> None:
    reprojection = Reprojection(WIDTHS, 8, GRID)
    for layer in reprojection.project:
        nn.init.ones_(layer.weight)
    pyramid = random_pyramid([(16, 20, 20)] * 4)
    (x, y, z) = (1, 3, 0)
    tokens = torch.zeros(1, 400, 8)
    tokens[0, 100 * own + 25 * x + 5 * y + z, 0] = 8.0
    fused = reprojection(pyramid, tokens)
    for other in {0, 1, 2, 3} - {level}:
        assert torch.equal(fused[other], pyramid[other])
    change = (fused[level] - pyramid[level])[0]
    # Cells are 4 voxels wide, centred between the 2nd and the 3rd; linear weights there are 7/8 inside the volume
    # and 1 towards its face.
    corner = change[:, 4 * x + 1, 4 * y + 1, 4 * z + 1]
    torch.testing.assert_close(corner, torch.full_like(corner, 8 * 7 / 8 * 7 / 8), atol=1e-5, rtol=0)
    reached = (change[0] > 0).nonzero()
    assert reached.amin(dim=0).tolist() == [2, 10, 0]
    assert reached.amax(dim=0).tolist() == [9, 17, 5]


def test_zero_tokens_change_nothing() -> None:
    reprojection = Reprojection(WIDTHS, 8, GRID)
    for layer in reprojection.project:
        nn.init.normal_(layer.weight)
    pyramid = random_pyramid(cubes(20, 10, 5, 3))
    fused = reprojection(pyramid, torch.zeros(1, 400, 8))
    assert all(torch.equal(after, before) for after, before in zip(fused, pyramid, strict=True))


@pytest.mark.parametrize(
    ("strides", "size"),
    [(ISOTROPIC, (34, 30, 22)), (ISOTROPIC, (32, 48, 64)), (THICK_SLICES, (34, 38, 7)), (((1, 1, 1),) * 4, (3, 2, 5))],
)
def test_logits_are_at_full_resolution(
    strides: tuple[Stride3, Stride3, Stride3, Stride3], size: tuple[int, int, int]
) -> None:
    intensities = space_to_depth(torch.randn(2, 1, *size), strides[0])
    pyramid = HierarchicalEncoder(1, WIDTHS, (1, 1, 1, 1), strides)(intensities)
    decoder = SparseToDenseDecoder(WIDTHS, strides, 3)
    features, block_logits, deep = decoder(pyramid)
    assert features.shape == pyramid[0].shape
    assert depth_to_space(block_logits, strides[0]).shape == (2, 3, *size)
    assert [level.shape for level in deep] == [(2, 3, *pyramid[1].shape[2:]), (2, 3, *pyramid[2].shape[2:])]
    assert decoder.eval()(pyramid).deep_logits == ()


def test_all_levels_reach_the_logits() -> None:
    torch.manual_seed(0)
    pyramid = [features.requires_grad_() for features in random_pyramid(cubes(16, 8, 4, 2))]
    logits = SparseToDenseDecoder(WIDTHS, ISOTROPIC, 2)(pyramid).block_logits
    gradients = torch.autograd.grad(logits, pyramid, torch.randn_like(logits))
    assert all((gradient != 0).any() for gradient in gradients)


def test_upsampling_keeps_places() -> None:
    """A mark in one voxel of the coarsest map, 16 voxels wide, stands out in the logits there and nowhere else."""
    torch.manual_seed(0)
    decoder = SparseToDenseDecoder(WIDTHS, ISOTROPIC, 1).eval()
    pyramid = [torch.zeros(1, width, *size) for width, size in zip(WIDTHS, cubes(64, 32, 16, 8), strict=True)]
    pyramid[3][0, :, 2, 5, 1] = torch.randn(10)
    logits = depth_to_space(decoder(pyramid).block_logits, (2, 2, 2))[0, 0]
    change = (logits - logits.median()).abs()
    reached = (change > change.amax() / 4).nonzero()
    first = torch.tensor([32, 80, 16])
    halo = 8 + 4 + 2  # one convolution each at 1/8, 1/4 and 1/2
    assert (reached >= first - halo).all()
    assert (reached < first + 16 + halo).all()
    assert len(reached) > 16**3 / 4
