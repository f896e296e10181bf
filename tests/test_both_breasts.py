"""Both breasts in one field of view, at a coarse spacing for speed, and exams of them."""

from __future__ import annotations

import numpy as np
import pytest

from tokenseg.synthetic import scanner
from tokenseg.synthetic.both_breasts import draw_both
from tokenseg.synthetic.exam import make_exam
from tokenseg.synthetic.grid import ScanGrid
from tokenseg.synthetic.scanner import draw_protocol

GRID = ScanGrid(shape_vox=(86, 84, 44), spacing_mm=(4.0, 4.0, 4.0))


@pytest.fixture(scope="module")
def both():
    return draw_both(np.random.default_rng(5), GRID)


@pytest.fixture
def coarse_scans(monkeypatch):
    monkeypatch.setattr(
        scanner, "_whole_grid", lambda _: ScanGrid(shape_vox=(116, 112, 58), spacing_mm=(3.0, 3.0, 3.0))
    )


def test_there_is_a_breast_on_each_side(both):
    anatomy, right_mm = both
    left_mm = anatomy.nipple_mm
    assert (left_mm[0], right_mm[0]) == (172 + 58, 172 - 58)
    body = sum(anatomy.shares.values())
    for place in (left_mm, right_mm):
        x, y, z = (int(position // 4) for position in place)
        assert body[x, y + 2, z] > 0.9
        assert not body[x, : y - 3, z].any()  # air in front of the nipple
        assert anatomy.shares["gland"][x - 10 : x + 11].sum() > 100
    # Between them, in front of the breast bone, is a gap.
    middle, depth = 172 // 4, int(max(left_mm[1], right_mm[1]) // 4) + 8
    assert not body[middle, :depth, int(left_mm[2] // 4)].any()


def test_shares_are_shares_and_the_seam_is_smooth(both):
    anatomy, _ = both
    total = sum(anatomy.shares.values())
    assert {share.shape for share in anatomy.shares.values()} == {(86, 84, 44)} == {anatomy.depth_mm.shape}
    assert all(share.min() > -1e-5 for share in anatomy.shares.values())
    assert total.max() < 1 + 1e-5
    steps = np.abs(np.diff(anatomy.above_chest_mm, axis=0)).mean(axis=(1, 2))
    assert steps[40:46].max() < 2 * steps[10:76].max()


def test_heart_is_on_the_left_and_liver_on_the_right(both):
    shares = both[0].shares
    x = np.arange(86)[:, None, None]
    centre = {name: (x * shares[name]).sum() / shares[name].sum() for name in ("heart", "liver")}
    assert centre["liver"] < 42.5 < centre["heart"]


@pytest.mark.parametrize("centre", ["internal", "external"])
def test_whole_exams_are_large(centre):
    for seed in range(30):
        grid = draw_protocol(np.random.default_rng(seed), centre, whole=True).grid
        assert all(size >= least for size, least in zip(grid.shape_vox, (320, 320, 96), strict=True))
        assert np.prod(grid.shape_vox) < 14e6


def test_a_whole_exam_has_its_lesions_and_as_many_small_ones(coarse_scans):
    exam = make_exam(np.random.default_rng(1), "internal", 2, whole=True)
    assert exam.mask.shape == (116, 112, 58)
    assert len(exam.lesions) == 4
    assert all(5 <= lesion.diameter_mm <= 10 for lesion in exam.lesions[2:])
    assert exam.mask.sum() * 0.027 == pytest.approx(sum(lesion.volume_ml for lesion in exam.lesions), rel=0.3)


def test_a_whole_exam_follows_from_its_seed_and_may_have_no_lesion(coarse_scans):
    one, two = (make_exam(np.random.default_rng(2), "internal", 0, whole=True) for _ in range(2))
    assert not one.mask.any()
    assert one.lesions == ()
    np.testing.assert_array_equal(one.phases[2], two.phases[2])
