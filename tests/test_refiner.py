"""Sparse refinement: which blocks, from what, and that nothing else changes."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from plans import THICK_SLICES, make_plan
from tokenseg.config import PRESETS
from tokenseg.model.network import TokenSeg
from tokenseg.model.refiner import SparseRefiner, _neighbours
from tokenseg.outputs import EXCLUSIVE, Outputs

SIZE = (6, 5, 7)
COUNT = 6 * 5 * 7


def make_refiner(
    *, outputs: int = 2, regions: bool = False, fraction: float = 0.05, block_vox: int = 8
) -> SparseRefiner:
    """A refiner that does change logits, which it does not at first."""
    torch.manual_seed(0)
    refiner = SparseRefiner(2, 4, block_vox, outputs, meaning=Outputs(regions), fraction=fraction)
    nn.init.normal_(refiner.change.weight)
    return refiner


def make_inputs(outputs: int = 2, batch: int = 1, block_vox: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return (
        torch.randn(batch, 2 * block_vox, *SIZE),
        torch.randn(batch, 4, *SIZE),
        10 * torch.randn(batch, *SIZE, block_vox * outputs),
    )


def changed_blocks(before: Tensor, after: Tensor) -> Tensor:
    return (before != after).any(dim=-1)


def test_it_starts_as_nothing() -> None:
    intensities, features, logits = make_inputs()
    refiner = SparseRefiner(2, 4, 8, 2, meaning=EXCLUSIVE, fraction=1.0)
    assert torch.equal(refiner(intensities, features, logits), logits)


@pytest.mark.parametrize(("fraction", "expected"), [(0.05, 11), (1 / 16, 14), (0.5, 105), (1.0, COUNT)])
def test_as_many_blocks_as_asked_for_in_every_volume(fraction: float, expected: int) -> None:
    intensities, features, logits = make_inputs(batch=3)
    after = make_refiner(fraction=fraction)(intensities, features, logits)
    assert changed_blocks(logits, after).sum(dim=(1, 2, 3)).tolist() == [expected] * 3


def test_the_least_certain_blocks_are_refined() -> None:
    """Three labels; a block whose voxels are certain but disagree counts as uncertain too."""
    intensities, features, _ = make_inputs()
    logits = torch.zeros(1, *SIZE, 8, 3)
    logits[..., 0] = 9.0
    torn, even, near = (1, 2, 3), (5, 0, 6), (0, 4, 0)
    logits[0][torn] = 0
    logits[0][torn][:4, 0], logits[0][torn][4:, 1] = 9.0, 9.0
    logits[0][even] = 0
    logits[0][near] = torch.tensor([2.0, 0.0, 1.9])
    before = logits.flatten(-2)
    after = make_refiner(outputs=3, fraction=3 / COUNT)(intensities, features, before)
    assert {tuple(place) for place in changed_blocks(before, after)[0].nonzero().tolist()} == {torn, even, near}


def test_regions_are_uncertain_where_any_is_near_zero() -> None:
    intensities, features, _ = make_inputs()
    logits = torch.full((1, *SIZE, 8, 2), -9.0)
    open_place, sure_place = (3, 1, 2), (2, 2, 2)
    logits[0][open_place][:, 1] = 0.1
    logits[0][sure_place] = 9.0
    before = logits.flatten(-2)
    after = make_refiner(regions=True, fraction=1 / COUNT)(intensities, features, before)
    assert changed_blocks(before, after)[0].nonzero().tolist() == [list(open_place)]


def test_the_sparse_answer_is_the_dense_one_in_the_blocks_refined() -> None:
    intensities, features, logits = make_inputs(batch=2)
    sparse, dense = make_refiner(fraction=0.1), make_refiner(fraction=1.0)
    dense.load_state_dict(sparse.state_dict())
    some, all_ = sparse(intensities, features, logits), dense(intensities, features, logits)
    changed = changed_blocks(logits, some)
    torch.testing.assert_close(some[changed], all_[changed])


def test_a_block_sees_the_raw_voxels_of_itself_and_at_its_faces() -> None:
    intensities, features, logits = make_inputs()
    refiner = make_refiner(fraction=1.0)
    before = refiner(intensities, features, logits)
    intensities[0, 3, 2, 2, 4] += 1
    reached = changed_blocks(before, refiner(intensities, features, logits))[0].nonzero()
    distances = (reached - torch.tensor([2, 2, 4])).abs().sum(dim=1)
    assert sorted(distances.tolist()) == [0, 1, 1, 1, 1, 1, 1]


@settings(deadline=None, max_examples=30)
@given(size=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)), batch=st.integers(1, 3))
def test_neighbours_are_those_of_a_grid_held_at_its_edges(size: tuple[int, int, int], batch: int) -> None:
    grid = torch.arange(batch * size[0] * size[1] * size[2]).reshape(batch, *size)
    found = _neighbours(grid.flatten(), size).reshape(batch, *size, 7)
    steps = [(0, 0, 0), (-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, -1), (0, 0, 1)]
    for volume, x, y, z in product(range(batch), *(range(length) for length in size)):
        places = [
            [min(max(at + step, 0), length - 1) for at, step, length in zip((x, y, z), by, size, strict=True)]
            for by in steps
        ]
        expected = [int(grid[volume, i, j, k]) for i, j, k in places]
        assert found[volume, x, y, z].tolist() == expected


def test_volumes_of_a_batch_do_not_touch_each_other() -> None:
    intensities, features, logits = make_inputs(batch=2)
    refiner = make_refiner(fraction=0.2)
    together = refiner(intensities, features, logits)
    alone = refiner(intensities[1:], features[1:], logits[1:])
    torch.testing.assert_close(together[1:], alone)


def test_gradients_reach_what_is_refined() -> None:
    intensities, features, logits = make_inputs()
    features.requires_grad_()
    refiner = make_refiner(fraction=0.1)
    after = refiner(intensities, features, logits)
    (gradient,) = torch.autograd.grad(after.sum(), features)
    assert torch.equal((gradient != 0).any(dim=1), changed_blocks(logits, after))


@pytest.mark.parametrize("fraction", [0.0, 1 / 16])
@pytest.mark.parametrize("strides", [((2, 2, 2),) * 4, THICK_SLICES])
def test_a_fraction_of_zero_leaves_the_refinement_out(fraction: float, strides: tuple) -> None:
    config = PRESETS["tiny"].model_copy(update={"refine_fraction": fraction})
    network = TokenSeg(config, make_plan(strides=strides)).eval()
    assert (network.refiner is None) == (fraction == 0)
    names = [name for name in network.state_dict() if "refiner" in name]
    assert bool(names) == (fraction > 0)
    assert network(torch.randn(1, 1, 20, 22, 9)).logits.shape == (1, 2, 20, 22, 9)
