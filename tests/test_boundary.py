from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tokenseg.boundary import near_boundary
from tokenseg.errors import DataError
from tokenseg.model.importance import Importance
from tokenseg.model.network import TokenRecord


def record(boxes: list[list[list[int]]], kept: list[bool]) -> TokenRecord:
    """Tokens with the given boxes; the other fields do not matter here."""
    count = len(boxes)
    zeros = torch.zeros(1, count)
    importance = Importance(zeros, zeros, zeros, zeros, zeros, torch.zeros(1, count, 2))
    codes = torch.zeros(1, count, dtype=torch.long)
    level = torch.zeros(count, dtype=torch.long)
    return TokenRecord(torch.tensor(boxes), level, codes, importance, torch.tensor([kept]), torch.zeros(()))


# Ten cells of one voxel thickness along x; the foreground is x >= 5, so its surface is the plane x = 5.
SLABS = [[[x, 0, 0], [x + 1, 4, 4]] for x in range(10)]
MASK = np.zeros((10, 4, 4), dtype=bool)
MASK[5:] = True


@pytest.mark.parametrize(("radius_mm", "near"), [(0.0, {5}), (2.0, {4, 5, 6}), (4.0, {3, 4, 5, 6, 7})])
def test_slabs_by_hand(radius_mm: float, near: set[int]) -> None:
    kept = {4, 5, 9}
    tokens = record(SLABS, [x in kept for x in range(10)])
    measured = near_boundary(tokens, MASK, (2.0, 1.0, 1.0), radius_mm)
    share, base_rate = len(near & kept) / 3, len(near) / 10
    assert measured.share == pytest.approx(share)
    assert measured.base_rate == pytest.approx(base_rate)
    assert measured.enrichment == pytest.approx(share / base_rate)
    assert measured.ceiling == pytest.approx(min(1.0, len(near) / 3))


def test_cells_in_padding_are_never_near() -> None:
    tokens = record([*SLABS, [[10, 0, 0], [10, 4, 4]]], [False] * 10 + [True])
    assert near_boundary(tokens, MASK, (1.0, 1.0, 1.0), 5.0).share == 0


@pytest.mark.parametrize("value", [False, True])
def test_a_mask_without_boundary_is_refused(value: bool) -> None:
    with pytest.raises(DataError, match="no boundary: it is empty or fills"):
        near_boundary(record(SLABS, [True] * 10), np.full((10, 4, 4), value), (1.0, 1.0, 1.0), 2.0)


def test_enrichment_is_finite_where_something_is_near() -> None:
    assert not math.isnan(near_boundary(record(SLABS, [True] * 10), MASK, (1.0, 1.0, 1.0), 0.0).enrichment)
