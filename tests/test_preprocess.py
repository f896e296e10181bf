"""The way to the plan's grid and back: exact where the grid stays, in place where it does not."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from tokenseg.config import ChannelNormalisation, Label, Plan
from tokenseg.errors import DataError, GeometryError
from tokenseg.imaging.volume import Mask, Volume, check_same_grid, read_mask, read_volume
from tokenseg.plan_grid.intensities import select_channels
from tokenseg.plan_grid.preprocess import GridRecord, prepare_image, prepare_labels
from tokenseg.plan_grid.restore import restore_labels, restore_logits

ZSCORE = ChannelNormalisation(kind="zscore")
# Leaves intensities as they are.
IDENTITY = ChannelNormalisation(kind="window", low=-1e6, high=1e6)
ONE = (Label(name="tumour", values=(1,), output_value=1),)
TWO = (Label(name="anterior", values=(3,), output_value=3), Label(name="posterior", values=(7,), output_value=7))
NESTED = (
    Label(name="whole", values=(1, 2, 4), output_value=2),
    Label(name="core", values=(1, 4), output_value=1),
    Label(name="enhancing", values=(4,), output_value=4),
)


def make_plan(
    labels=ONE,
    spacing_mm=(1.0, 1.0, 1.0),
    channels=("MR",),
    sources=None,
    normalisation=IDENTITY,
    joint=False,
    regions=False,
):
    return Plan(
        channels=channels,
        source_channels=sources or channels,
        joint_zscore=joint,
        normalisation=(normalisation,) * len(channels),
        labels=labels,
        regions=regions,
        spacing_mm=spacing_mm,
        window_vox=(32, 32, 32),
        whole_limit_vox=(64, 64, 64),
        strides=((2, 2, 2),) * 4,
        grid=(4, 5, 5),
        batch_size=1,
        steps=1,
    )


def make_volume(*arrays, affine=None, channels=None):
    stack = np.stack([np.asarray(array, np.float32) for array in arrays])
    return Volume(stack, np.eye(4) if affine is None else affine, channels or ("MR", "T2", "PD")[: len(arrays)])


def make_affine(angles=(0, 0, 0), spacing=(1, 1, 1), signs=(1, 1, 1), order=(0, 1, 2), shift=(0, 0, 0)):
    matrix = nib.eulerangles.euler2mat(*angles) @ np.diag(np.multiply(spacing, signs).astype(float))
    return nib.affines.from_matvec(matrix[:, list(order)], shift)


def dice(first, second):
    return 2 * np.count_nonzero(first & second) / (np.count_nonzero(first) + np.count_nonzero(second))


def plan_affine(affine, record):
    """Affine of the plan's grid, by nibabel's own orientation algebra: the second implementation."""
    orientation = np.column_stack([record.axes, np.where(record.flipped, -1, 1)])
    canonical = affine @ nib.orientations.inv_ornt_aff(orientation, record.native_shape)
    factors = np.divide(record.crop_shape, record.grid_shape)
    step = np.diag([*factors, 1.0])
    step[:3, 3] = np.asarray(record.crop_start) + (factors - 1) / 2
    return canonical @ step


signs = st.tuples(*[st.sampled_from([-1, 1])] * 3)
angles = st.tuples(*[st.floats(-3.1, 3.1)] * 3)
orders = st.permutations(range(3))
shapes = st.tuples(*[st.integers(1, 9)] * 3)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def affines(draw, finest_mm=0.3, coarsest_mm=6.0):
    spacings = st.floats(finest_mm, coarsest_mm)
    spacing = draw(st.tuples(spacings, spacings, spacings))
    shift = draw(st.tuples(*[st.floats(-300, 300)] * 3))
    return make_affine(draw(angles), spacing, draw(signs), draw(orders), shift)


def spacing_of(affine):
    """Spacing along RAS+ of a grid, by nibabel."""
    canonical = nib.as_closest_canonical(nib.Nifti1Image(np.zeros((2, 3, 4), np.uint8), affine))
    return tuple(np.linalg.norm(canonical.affine[:3, :3], axis=0).tolist())


@settings(deadline=None, max_examples=80)
@given(affine=affines(), shape=shapes, seed=seeds, border=st.booleans())
def test_labels_survive_the_round_trip_exactly(affine, shape, seed, border):
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 3, 7], size=shape).astype(np.uint8)
    image = rng.normal(size=shape)
    if border:
        inside = tuple(slice(size // 4, size - size // 4) for size in shape)
        image = np.full(shape, -5.0)
        image[inside] = rng.normal(size=image[inside].shape)
    plan = make_plan(TWO, spacing_of(affine), normalisation=ZSCORE)
    mask = Mask(labels, affine)
    prepared = prepare_image(make_volume(image, affine=affine), plan, covering=mask)
    maps = prepare_labels(mask, prepared.record, plan)
    assert prepared.image.shape == (1, *maps.shape[1:]) == (1, *prepared.record.grid_shape)
    assert prepared.image.flags.c_contiguous
    assert prepared.image.dtype == np.float32
    assert prepared.record.grid_shape == prepared.record.crop_shape
    restored = restore_labels(maps, prepared.record, plan)
    assert restored.dtype == np.uint8
    np.testing.assert_array_equal(restored, labels)


@settings(deadline=None, max_examples=40)
@given(affine=affines(), shape=shapes, seed=seeds)
def test_nested_regions_survive_the_round_trip_exactly(affine, shape, seed):
    labels = np.random.default_rng(seed).choice([0, 1, 2, 4], size=shape).astype(np.uint8)
    plan = make_plan(NESTED, spacing_of(affine), regions=True)
    record = prepare_image(make_volume(labels, affine=affine), plan).record
    maps = prepare_labels(Mask(labels, affine), record, plan)
    assert maps.sum(axis=(1, 2, 3)).tolist() == [np.isin(labels, label.values).sum() for label in NESTED]
    np.testing.assert_array_equal(restore_labels(maps, record, plan), labels)


@settings(deadline=None, max_examples=60)
@given(affine=affines(), shape=st.tuples(*[st.integers(2, 7)] * 3), seed=seeds)
def test_canonical_order_is_that_of_nibabel(affine, shape, seed):
    array = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    prepared = prepare_image(make_volume(array, affine=affine), make_plan(spacing_mm=spacing_of(affine)))
    canonical = nib.as_closest_canonical(nib.Nifti1Image(array, affine))
    np.testing.assert_array_equal(prepared.image[0], np.asarray(canonical.dataobj))
    assert prepared.record.canonical_shape == canonical.shape
    assert prepared.record.spacing_mm == pytest.approx(canonical.header.get_zooms(), rel=1e-6)
    np.testing.assert_allclose(plan_affine(affine, prepared.record), canonical.affine, atol=1e-9)


def test_known_world_position_ends_in_ras():
    """Stored axes run inferior, left, anterior; a voxel 3 right, 1 anterior, 2 superior of the RAS corner is marked."""
    affine = np.array([[0, -1, 0, 30.0], [0, 0, 1, 10.0], [-1, 0, 0, 50.0], [0, 0, 0, 1]])
    array = np.zeros((4, 6, 5))
    right_mm, anterior_mm, superior_mm = 30 - 5 + 3, 10 + 1, 50 - 3 + 2
    stored = np.linalg.inv(affine) @ [right_mm, anterior_mm, superior_mm, 1]
    array[tuple(stored[:3].astype(int))] = 1
    array[0, 0, 0] = array[-1, -1, -1] = 0.5
    prepared = prepare_image(make_volume(array, affine=affine), make_plan())
    assert np.argwhere(prepared.image[0] == 1).tolist() == [[3, 1, 2]]
    assert prepared.record == GridRecord(
        native_shape=(4, 6, 5),
        axes=(2, 0, 1),
        flipped=(True, True, False),
        spacing_mm=(1.0, 1.0, 1.0),
        crop_start=(0, 0, 0),
        crop_stop=(6, 5, 4),
        grid_shape=(6, 5, 4),
    )


def test_grid_keeps_the_extent():
    """9 voxels of 2 mm are 18 of 1 mm; 5 of 1 mm are 2.5, so 3, of 2 mm; a lone slice stays one."""
    affine = make_affine(spacing=(2.0, 1.0, 0.5))
    plan = make_plan(spacing_mm=(1.0, 2.0, 3.0))
    record = prepare_image(make_volume(np.random.default_rng(0).normal(size=(9, 5, 1)), affine=affine), plan).record
    assert record.grid_shape == (18, 3, 1)


def test_resampling_is_linear_between_voxel_centres():
    """A ramp over voxel centres 0.5, 1.5, 2.5 seen at half the spacing: centres 0.25, 0.75, ..., edges held."""
    ramp = np.tile(np.arange(3.0)[:, None, None], (1, 2, 2))
    prepared = prepare_image(make_volume(ramp), make_plan(spacing_mm=(0.5, 1.0, 1.0)))
    expected = np.clip(np.arange(0.25, 3, 0.5) - 0.5, 0, 2)
    np.testing.assert_allclose(prepared.image[0, :, 0, 0], expected, atol=1e-6)


def test_values_are_untouched_where_the_grid_stays():
    array = np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32)
    prepared = prepare_image(make_volume(array), make_plan(spacing_mm=(1.02, 0.99, 1.0)))
    np.testing.assert_array_equal(prepared.image[0], array)


def middle_of(affine, shape):
    return nib.affines.apply_affine(affine, (np.asarray(shape) - 1) / 2)


def shape_of_22_mm(affine):
    return tuple(np.ceil(22 / np.linalg.norm(affine[:3, :3], axis=0)).astype(int).tolist())


def distances_mm(shape, affine, centre_mm):
    positions = nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    return np.linalg.norm(positions - centre_mm, axis=-1)


def centroid_mm(weights, affine):
    return nib.affines.apply_affine(affine, ndimage.center_of_mass(weights.astype(float)))


resampling = given(
    affine=affines(0.7, 1.6),
    target=st.tuples(*[st.floats(0.7, 1.6)] * 3),
    offset_mm=st.tuples(*[st.floats(-1.5, 1.5)] * 3),
)


@settings(deadline=None, max_examples=25)
@resampling
def test_image_stays_in_place_when_resampled(affine, target, offset_mm):
    """A soft ball keeps its centre within a twentieth of a voxel; a slip of half a voxel would be ten times that."""
    shape = shape_of_22_mm(affine)
    soft = np.exp(-((distances_mm(shape, affine, middle_of(affine, shape) + offset_mm) / 2.2) ** 2) / 2)
    prepared = prepare_image(make_volume(soft, affine=affine), make_plan(spacing_mm=target))
    moved_mm = centroid_mm(prepared.image[0], plan_affine(affine, prepared.record)) - centroid_mm(soft, affine)
    assert np.linalg.norm(moved_mm) < 0.05 * 0.7


@settings(deadline=None, max_examples=25)
@resampling
def test_logits_return_in_place_when_resampled(affine, target, offset_mm):
    """Signed distances to a ball, known in closed form on the plan's grid, give that ball on the scan's grid."""
    shape = shape_of_22_mm(affine)
    centre_mm = middle_of(affine, shape) + offset_mm
    plan = make_plan(spacing_mm=target)
    noise = np.random.default_rng(0).normal(size=shape)
    record = prepare_image(make_volume(noise, affine=affine), plan).record
    inside = torch.from_numpy(7.0 - distances_mm(record.grid_shape, plan_affine(affine, record), centre_mm))
    restored = restore_logits(torch.stack([-inside, inside]), record, plan) == 1
    expected = distances_mm(shape, affine, centre_mm) <= 7.0
    assert dice(restored, expected) > 0.93
    # Whole voxels only, so the centre moves by up to a tenth of one; a slip of half a voxel would be five times that.
    assert np.linalg.norm(centroid_mm(restored, affine) - centroid_mm(expected, affine)) < 0.15 * 0.7


@settings(deadline=None, max_examples=25)
@resampling
def test_solid_labels_return_when_resampled(affine, target, offset_mm):
    shape = shape_of_22_mm(affine)
    solid = distances_mm(shape, affine, middle_of(affine, shape) + offset_mm) <= 7.0
    mask, plan = Mask(np.where(solid, 7, 0).astype(np.uint8), affine), make_plan(TWO, target)
    noise = np.random.default_rng(0).normal(size=shape)
    record = prepare_image(make_volume(noise, affine=affine), plan).record
    restored = restore_labels(prepare_labels(mask, record, plan), record, plan)
    assert set(np.unique(restored)) == {0, 7}
    assert dice(restored == 7, solid) > 0.9


def test_image_and_labels_stay_together_when_resampled():
    """The same ball as image and as label, through both ways; one half of it is brighter, so a shift would show."""
    affine = make_affine((0.2, 0.1, -0.3), (0.7, 1.1, 2.5), (-1, 1, -1), (2, 0, 1), (5, 6, 7))
    shape = (12, 44, 28)
    centre_mm = nib.affines.apply_affine(affine, (np.asarray(shape) - 1) / 2)
    solid = distances_mm(shape, affine, centre_mm) <= 9.0
    plan = make_plan(spacing_mm=(1.0, 1.0, 1.0))
    prepared = prepare_image(make_volume(solid, affine=affine), plan)
    maps = prepare_labels(Mask(solid.astype(np.uint8), affine), prepared.record, plan)
    assert prepared.record.crop_shape != prepared.record.canonical_shape
    clear = np.abs(prepared.image[0] - 0.5) > 1e-6  # a tie may fall either way by rounding
    np.testing.assert_array_equal((prepared.image[0] > 0.5)[clear], (maps[0] == 1)[clear])
    assert clear.mean() > 0.95
    assert dice(restore_labels(maps, prepared.record, plan) == 1, solid) > 0.9


def test_no_label_is_favoured_by_its_number():
    """Two halves of a cube, which differ in number only, stay mirror images, 4 mm thick, when resampled."""
    labels = np.zeros((12, 12, 12), np.uint8)
    labels[2:6, 2:10, 2:10], labels[6:10, 2:10, 2:10] = 3, 7
    plan = make_plan(TWO, (0.75, 0.75, 0.75))
    record = prepare_image(make_volume(np.random.default_rng(0).normal(size=(12, 12, 12))), plan).record
    maps = prepare_labels(Mask(labels, np.eye(4)), record, plan)
    np.testing.assert_array_equal(maps == 1, (maps == 2)[:, ::-1])
    assert np.count_nonzero(maps[0, :, 8, 8] == 1) * 0.75 == pytest.approx(4, abs=0.75)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 9, 9), (9, 1, 9), (9, 9, 1), (1, 1, 9)])
@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (0.5, 2.0, 3.0)])
def test_thin_volumes(shape, spacing_mm):
    labels = np.ones(shape, np.uint8)
    plan = make_plan(spacing_mm=spacing_mm, normalisation=ZSCORE)
    prepared = prepare_image(make_volume(np.random.default_rng(0).normal(size=shape)), plan)
    assert np.isfinite(prepared.image).all()
    maps = prepare_labels(Mask(labels, np.eye(4)), prepared.record, plan)
    np.testing.assert_array_equal(restore_labels(maps, prepared.record, plan), labels)


def padded(inner, before, after, value=-5.0):
    return np.pad(inner, list(zip(before, after, strict=True)), constant_values=value)


def test_constant_border_is_cropped_and_comes_back():
    inner = np.random.default_rng(0).uniform(1, 2, size=(3, 4, 5))
    first = padded(inner, (1, 2, 3), (4, 0, 1))
    second = np.full(first.shape, 7.0)
    second[0, 3, 4] = 9.0  # one voxel outside the first channel's box
    plan = make_plan(channels=("MR", "T2"))
    prepared = prepare_image(make_volume(first, second), plan)
    assert (prepared.record.crop_start, prepared.record.crop_stop) == ((0, 2, 3), (4, 6, 8))
    np.testing.assert_array_equal(prepared.image[0], first[:4, 2:6, 3:8].astype(np.float32))
    logits = torch.zeros(2, 4, 4, 5)
    logits[1] = 1.0
    restored = restore_logits(logits, prepared.record, plan)
    assert restored.shape == first.shape
    assert np.argwhere(restored).min(axis=0).tolist() == [0, 2, 3]
    assert restored.sum() == 4 * 4 * 5


@pytest.mark.parametrize("corner", [(0, 0, 0), (-1, 0, -1), (-1, -1, -1)])
def test_nothing_is_cropped_where_a_corner_is_not_background(corner):
    array = padded(np.ones((3, 3, 3)), (2, 2, 2), (2, 2, 2))
    array[corner] = 0.0
    record = prepare_image(make_volume(array), make_plan()).record
    assert record.crop_shape == (7, 7, 7)


def test_constant_volume_is_kept_whole_and_becomes_zeros():
    prepared = prepare_image(make_volume(np.full((3, 4, 5), 0.1)), make_plan(normalisation=ZSCORE))
    assert prepared.image.shape == (1, 3, 4, 5)
    assert (prepared.image == 0).all()


def test_foreground_in_the_border_is_never_lost():
    image = padded(np.ones((3, 3, 3)), (3, 3, 3), (3, 3, 3))
    labels = np.zeros(image.shape, np.uint8)
    labels[4, 4, 4] = labels[1, 4, 4] = labels[1, 4, 8] = 1
    mask, plan = Mask(labels, np.eye(4)), make_plan()
    with pytest.raises(DataError, match=r"mask has 2 foreground voxel\(s\) in the constant border .*covering=mask"):
        prepare_labels(mask, prepare_image(make_volume(image), plan).record, plan)
    record = prepare_image(make_volume(image), plan, covering=mask).record
    assert (record.crop_start, record.crop_stop) == ((1, 3, 3), (6, 6, 9))
    np.testing.assert_array_equal(restore_labels(prepare_labels(mask, record, plan), record, plan), labels)


def test_zscore_by_hand():
    array = np.arange(24.0).reshape(2, 3, 4)
    image = prepare_image(make_volume(array), make_plan(normalisation=ZSCORE)).image
    np.testing.assert_allclose(image[0], (array - 11.5) / np.sqrt((24**2 - 1) / 12), rtol=1e-6)


def test_zscore_leaves_padding_out():
    """Padding of more than a quarter is left out of the statistics; of less, it is not."""
    array = np.random.default_rng(0).normal(100, 10, size=(10, 10, 10))
    array[:3] = -1000.0
    image = prepare_image(make_volume(array), make_plan(normalisation=ZSCORE)).image[0]
    assert image[3:].mean() == pytest.approx(0, abs=1e-5)
    assert image[3:].std() == pytest.approx(1, abs=1e-5)
    array[2:3] = np.random.default_rng(1).normal(100, 10, size=(1, 10, 10))
    image = prepare_image(make_volume(array), make_plan(normalisation=ZSCORE)).image[0]
    assert image.mean() == pytest.approx(0, abs=1e-5)
    assert image.std() == pytest.approx(1, abs=1e-5)


def test_zscore_of_a_two_valued_volume_is_finite():
    array = padded(np.ones((3, 3, 3)), (2, 2, 2), (2, 2, 2), value=0.0)
    image = prepare_image(make_volume(array), make_plan(normalisation=ZSCORE)).image[0]
    share = 27 / 343
    np.testing.assert_allclose(image, (1 - share) / np.sqrt(share * (1 - share)), rtol=1e-5)


@settings(deadline=None, max_examples=30)
@given(scale=st.floats(1e-4, 1e6), offset=st.floats(-1000, 1000), seed=seeds)
def test_zscore_does_not_depend_on_scale_and_offset(scale, offset, seed):
    array = np.random.default_rng(seed).normal(size=(6, 6, 6)).astype(np.float32)
    plan = make_plan(normalisation=ZSCORE)
    first = prepare_image(make_volume(array), plan).image
    second = prepare_image(make_volume((array.astype(np.float64) + offset) * scale), plan).image
    np.testing.assert_allclose(first, second, atol=1e-3)


def test_crop_and_covering_do_not_change_intensities():
    array = padded(np.random.default_rng(0).normal(size=(4, 4, 4)), (3, 3, 3), (3, 3, 3))
    corner = np.zeros(array.shape, np.uint8)
    corner[0, 0, 0] = 1
    plan = make_plan(normalisation=ZSCORE)
    small = prepare_image(make_volume(array), plan).image
    large = prepare_image(make_volume(array), plan, covering=Mask(corner, np.eye(4))).image
    np.testing.assert_array_equal(large[:, 3:7, 3:7, 3:7], small)


def test_window_by_hand():
    rule = ChannelNormalisation(kind="window", low=-100, high=200, mean=50, std=25)
    array = np.array([-1000, -100, 50, 75, 200, 3000.0]).reshape(6, 1, 1)
    image = prepare_image(make_volume(array), make_plan(normalisation=rule)).image
    assert image.ravel().tolist() == [-6, -6, 0, 1, 6, 6]


def test_channels_are_found_by_name():
    volume = make_volume(*[np.full((2, 2, 2), value) for value in (1, 10, 100)], channels=("T2", "post", "pre"))
    plan = make_plan(channels=("post", "post - pre"), sources=("pre", "post"))
    assert select_channels(volume, plan)[:, 0, 0, 0].tolist() == [10, -90]


def test_missing_channel_is_named():
    plan = make_plan(channels=("FLAIR", "t1gd"))
    with pytest.raises(DataError, match=r"model expects FLAIR, t1gd; t1gd is missing \(given: FLAIR, T2w\)"):
        prepare_image(make_volume(np.zeros((2, 2, 2)), np.zeros((2, 2, 2)), channels=("FLAIR", "T2w")), plan)


def test_joint_zscore_is_over_all_channels():
    rng = np.random.default_rng(0)
    arrays = [rng.normal(mean, 3, size=(4, 5, 6)).astype(np.float32) for mean in (10, 60, 40)]
    volume = make_volume(*arrays, channels=("pre", "post1", "post2"))
    plan = make_plan(channels=("post1", "post1 - pre"), sources=("pre", "post1"), joint=True)
    pre, post1, _ = (np.stack(arrays) - np.mean(arrays, dtype=float)) / np.std(arrays, dtype=float)
    image = prepare_image(volume, plan).image
    np.testing.assert_allclose(image, [post1, post1 - pre], atol=1e-5)


def test_restored_values_and_ties():
    plan = make_plan(TWO)
    record = prepare_image(make_volume(np.arange(4.0).reshape(4, 1, 1)), plan).record
    logits = torch.tensor([[1.0, 0.0, 0.0, 5.0], [0.0, 1.0, 0.0, 5.0], [0.0, 0.0, 1.0, 5.0]]).reshape(3, 4, 1, 1)
    assert restore_logits(logits, record, plan).ravel().tolist() == [0, 3, 7, 0]
    assert restore_logits(logits.bfloat16(), record, plan).ravel().tolist() == [0, 3, 7, 0]


def test_regions_are_painted_in_order():
    plan = make_plan(NESTED, regions=True)
    record = prepare_image(make_volume(np.arange(5.0).reshape(5, 1, 1)), plan).record
    logits = torch.tensor([[-1.0, 1, 1, 1, 0], [-1.0, -1, 1, 1, 0], [-1.0, -1, -1, 1, 0]]).reshape(3, 5, 1, 1)
    assert restore_logits(logits, record, plan).ravel().tolist() == [0, 2, 1, 4, 0]


def test_large_output_values_are_kept():
    plan = make_plan((Label(name="a", values=(70000,), output_value=70000),))
    record = prepare_image(make_volume(np.arange(2.0).reshape(2, 1, 1)), plan).record
    restored = restore_labels(np.array([0, 1], np.uint8).reshape(1, 2, 1, 1), record, plan)
    assert (restored.dtype, restored.ravel().tolist()) == (np.int32, [0, 70000])


def test_logits_are_interpolated_before_the_largest_is_taken():
    """Background leads by 1 in one voxel, the label by 3 in the next: the border is a quarter into the first."""
    plan = make_plan(spacing_mm=(4.0, 1.0, 1.0))
    record = prepare_image(make_volume(np.arange(8.0).reshape(8, 1, 1)), plan).record
    assert record.grid_shape == (2, 1, 1)
    logits = torch.tensor([[1.0, 0.0], [0.0, 3.0]]).reshape(2, 2, 1, 1)
    # Voxel centres lie at -0.375, -0.125, 0.125, 0.375, ... of the way from the first logit to the second.
    differences = ndimage.map_coordinates(
        np.array([-1.0, 3.0]), [np.arange(-0.375, 1.5, 0.25)], order=1, mode="nearest"
    )
    restored = restore_logits(logits, record, plan).ravel().tolist()
    assert restored == (differences > 0).astype(int).tolist() == [0, 0, 0, 1, 1, 1, 1, 1]


def test_logits_of_another_grid_are_refused():
    plan = make_plan()
    record = prepare_image(make_volume(np.zeros((3, 4, 5))), plan).record
    for shape in ((2, 3, 4, 6), (3, 3, 4, 5)):
        with pytest.raises(GeometryError, match=r"the record and plan say \(2, 3, 4, 5\)"):
            restore_logits(torch.zeros(shape), record, plan)


def test_mask_of_another_shape_is_refused():
    plan, volume, mask = make_plan(), make_volume(np.zeros((3, 4, 5))), Mask(np.zeros((3, 4, 6), np.uint8), np.eye(4))
    said = "mask is 3 x 4 x 6 voxels, its scan 3 x 4 x 5; resample the mask"
    with pytest.raises(GeometryError, match=said):
        prepare_labels(mask, prepare_image(volume, plan).record, plan)
    with pytest.raises(GeometryError, match=said):
        prepare_image(volume, plan, covering=mask)


def labelled(values, labels):
    plan = make_plan(labels)
    array = np.array(values, np.int16).reshape(-1, 1, 1)
    record = prepare_image(make_volume(np.arange(float(len(values))).reshape(-1, 1, 1)), plan).record
    return prepare_labels(Mask(array, np.eye(4)), record, plan).ravel().tolist()


def test_labels_become_positions():
    assert labelled([0, 3, 7, 3], TWO) == [0, 1, 2, 1]


def test_unlisted_labels_are_named():
    with pytest.raises(DataError) as fault:
        labelled([0, 3, 9, -1], TWO)
    assert "unlisted labels -1, 9; known are 0 (background), 3 (anterior), 7 (posterior)" in str(fault.value)


def test_black_and_white_masks_are_explained():
    with pytest.raises(
        DataError, match=r"holds 0 and 255, .* but 'tumour' is 1; replace 255 by 1 in the masks, or list 255"
    ):
        labelled([0, 255], ONE)
    with pytest.raises(DataError, match="unlisted labels 255;"):
        labelled([0, 1, 255], ONE)
    with pytest.raises(DataError, match="unlisted labels 255;"):
        labelled([0, 255], TWO)
    assert labelled([0, 255], (Label(name="tumour", values=(255,), output_value=255),)) == [0, 1]


def test_absurd_spacing_is_refused():
    volume = make_volume(np.zeros((3, 4, 5)), affine=make_affine(spacing=(1000, 1000, 1000)))
    with pytest.raises(GeometryError, match=r"voxels of 1000 x 1000 x 1000 mm and would be .* correct the spacing"):
        prepare_image(volume, make_plan())


@pytest.mark.parametrize(
    ("task", "labels", "count"),
    [
        ("Task04_Hippocampus", [("anterior", 1), ("posterior", 2)], 40),
        ("LeftAtrium", [("left atrium", 1)], 5),
    ],
)
def test_real_labels_survive_exactly(real_data, task, labels, count):
    plan = make_plan(tuple(Label(name=name, values=(value,), output_value=value) for name, value in labels))
    paths = sorted((real_data / task / "imagesTr").glob("[!.]*.nii.gz"))[:count]
    assert len(paths) == count
    for path in paths:
        scan, mask = read_volume(path, ("MR",)), read_mask(real_data / task / "labelsTr" / path.name)
        check_same_grid(scan, mask, ("scan", "mask"))
        record = prepare_image(scan, plan).record
        np.testing.assert_array_equal(restore_labels(prepare_labels(mask, record, plan), record, plan), mask.array)
