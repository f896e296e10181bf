"""Files: nibabel is the second implementation that they are checked against."""

from __future__ import annotations

import gzip
import pickle
import tempfile
import tracemalloc
from pathlib import Path

import jaxtyping
import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenseg.errors import DataError, FileError, GeometryError
from tokenseg.imaging.formats import image_ending, image_stem
from tokenseg.imaging.volume import (
    Mask,
    Volume,
    check_same_grid,
    read_channels,
    read_grid,
    read_mask,
    read_volume,
    write_mask,
    write_volume,
)

OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.3, -0.2, 0.5) @ np.diag([-0.7, 1.2, 5.0]), [12.5, -80.25, 33.0]
)
GEOMETRY_FIELDS = (
    *("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z", "xyzt_units"),
)


def save(path, array, affine=OBLIQUE, kind=nib.Nifti1Image, dtype=None):
    kind(array, affine, dtype=dtype or array.dtype).to_filename(path)
    return path


def with_header_field(path, source, **fields):
    """Copy an uncompressed file with raw header fields overwritten, past all of nibabel's checks."""
    content = bytearray(source.read_bytes())
    header = nib.Nifti1Header(bytes(content[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    content[:348] = header.binaryblock
    path.write_bytes(content)
    return path


def noise(shape=(3, 4, 5), dtype=np.float32):
    return (np.random.default_rng(0).normal(size=shape) * 50).astype(dtype)


def volume(shape=(1, 3, 4, 5), affine=OBLIQUE):
    return Volume(np.zeros(shape, np.float32), affine, tuple("abcdefgh"[: shape[0]]))


@pytest.mark.parametrize(
    ("name", "ending", "stem"), [("a.b_0000.nii.gz", ".nii.gz", "a.b_0000"), ("x.nii", ".nii", "x")]
)
def test_ending_and_stem(name, ending, stem):
    assert image_ending(Path("folder.nii") / name) == ending
    assert image_stem(Path("folder.nii") / name) == stem


@pytest.mark.parametrize("name", ["a.png", "a.gz", "a.nii.zip", "nii", ".nii.gz"])
def test_other_endings_are_refused(name):
    with pytest.raises(FileError, match=r"must end in \.nii\.gz, \.nii, \.nrrd, \.mha or \.mhd"):
        image_ending(Path(name))


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64, np.uint16])
def test_reads_what_nibabel_reads(tmp_path, ending, kind, dtype):
    path = save(tmp_path / f"a{ending}", noise(dtype=dtype), kind=kind)
    ours, theirs = read_volume(path, ("MR",)), nib.load(path)
    assert ours.array.dtype == np.float32
    np.testing.assert_array_equal(ours.array[0], theirs.get_fdata(dtype=np.float32))
    np.testing.assert_array_equal(ours.affine, theirs.affine)
    assert ours.channels == ("MR",)
    assert ours.spacing_mm == pytest.approx((0.7, 1.2, 5.0), abs=1e-6)


def test_reads_scaled_and_big_endian(tmp_path):
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    image = nib.Nifti1Image(np.linspace(-3, 900, 60).reshape(3, 4, 5), OBLIQUE, header)
    image.to_filename(tmp_path / "a.nii")
    assert image.header.get_data_dtype() == np.dtype(">i2")
    assert nib.load(tmp_path / "a.nii").dataobj.slope != 1
    ours = read_volume(tmp_path / "a.nii", ("CT",))
    np.testing.assert_allclose(ours.array[0], nib.load(tmp_path / "a.nii").get_fdata(), rtol=1e-6)


def test_reads_channels_on_the_last_axis(tmp_path):
    array = noise((3, 4, 5, 2))
    ours = read_volume(save(tmp_path / "a.nii.gz", array), ("FLAIR", "t1gd"))
    np.testing.assert_array_equal(ours.array[1], array[..., 1])
    assert ours.array.shape == (2, 3, 4, 5)


@pytest.mark.parametrize("shape", [(3, 4, 5, 1), (3, 4, 5, 1, 1), (3, 4, 1, 1)])
def test_drops_trailing_axes_of_one(tmp_path, shape):
    path = save(tmp_path / "a.nii", noise(shape, np.int16))
    assert read_volume(path, ("MR",)).array.shape == (1, *shape[:3])
    assert read_mask(path).array.shape == shape[:3]
    assert (read_grid(path).shape, read_grid(path).num_channels) == (shape[:3], 1)


def test_wrong_number_of_channels_speaks_in_names(tmp_path):
    with pytest.raises(DataError, match=r"model expects FLAIR, t1gd; .*a\.nii holds 1 channel"):
        read_volume(save(tmp_path / "a.nii", noise()), ("FLAIR", "t1gd"))
    with pytest.raises(DataError, match=r"model expects FLAIR; .*b\.nii holds 3 channel"):
        read_volume(save(tmp_path / "b.nii", noise((3, 4, 5, 3))), ("FLAIR",))


@pytest.mark.parametrize(("shape", "said"), [((3, 4), "2D (3 x 4)"), ((3, 4, 5, 1, 2), "5D (3 x 4 x 5 x 1 x 2)")])
def test_other_dimensions_are_refused(tmp_path, shape, said):
    path = save(tmp_path / "a.nii.gz", noise(shape, np.int16))
    for read in (lambda path: read_volume(path, ("MR",)), read_mask, read_grid):
        with pytest.raises(DataError) as fault:
            read(path)
        assert said in str(fault.value)
        assert "expected is 3D, or 4D with channels last" in str(fault.value)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist"),
        (b"", "truncated or empty"),
        (pickle.dumps({"a": list(range(500))}), "not a"),
        (b"\x89PNG\r\n\x1a\n" + bytes(1000), "not a"),
        (gzip.compress(b"patient,age\n" * 100), "not a NIfTI image"),
        (gzip.compress((348).to_bytes(4, "little") + bytes(600)), "not a NIfTI image"),
        ((348).to_bytes(4, "little") + bytes(600), "not a"),
    ],
)
def test_what_is_no_image_is_refused(tmp_path, ending, content, said):
    path = tmp_path / f"a{ending}"
    if content is not None:
        path.write_bytes(content)
    for read in (lambda path: read_volume(path, ("MR",)), read_mask, read_grid):
        with pytest.raises(FileError) as fault:
            read(path)
        assert said in str(fault.value)
        assert str(path) in str(fault.value)


def test_folder_is_refused(tmp_path):
    (tmp_path / "a.nii").mkdir()
    with pytest.raises(FileError, match=r"a\.nii cannot be read: Is a directory"):
        read_mask(tmp_path / "a.nii")


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_every_truncation_is_refused(tmp_path, ending):
    whole = save(tmp_path / f"whole{ending}", noise((4, 4, 3), np.int16)).read_bytes()
    path = tmp_path / f"cut{ending}"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(FileError, match=r"cut\.nii"):
            read_volume(path, ("MR",))
    path.write_bytes(whole)
    assert read_volume(path, ("MR",)).array.shape == (1, 4, 4, 3)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_bytes_after_the_voxels_do_not_matter(tmp_path, ending):
    content = nib.Nifti1Image(noise(), OBLIQUE).to_bytes() + bytes(1000)
    path = tmp_path / f"a{ending}"
    path.write_bytes(gzip.compress(content) if ending == ".nii.gz" else content)
    np.testing.assert_array_equal(read_volume(path, ("MR",)).array[0], noise())


def test_flipped_bit_in_gzip_is_refused(tmp_path):
    content = bytearray(save(tmp_path / "a.nii.gz", noise((8, 8, 8))).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a.nii.gz").write_bytes(content)
    with pytest.raises(FileError, match=r"a\.nii\.gz is (not an intact gzip file|truncated)"):
        read_volume(tmp_path / "a.nii.gz", ("MR",))


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_declared_size_is_not_allocated(tmp_path, ending):
    source = save(tmp_path / "a.nii", noise())
    path = with_header_field(tmp_path / "huge.nii", source, dim=[3, 30000, 30000, 30000, 1, 1, 1, 1])
    if ending == ".nii.gz":
        path = tmp_path / "huge.nii.gz"
        path.write_bytes(gzip.compress((tmp_path / "huge.nii").read_bytes()))
    tracemalloc.start()
    with pytest.raises(FileError, match="truncated"):
        read_volume(path, ("MR",))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 64 * 2**20


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"dim": [3, 3, 0, 5, 1, 1, 1, 1]}, "declares 3 x 0 x 5 voxels"),
        ({"dim": [3, 3, -4, 5, 1, 1, 1, 1]}, "declares 3 x -4 x 5 voxels"),
        ({"datatype": 999}, "not a NIfTI image in one file"),
        ({"magic": b"ni1"}, "not a NIfTI image in one file"),
        ({"vox_offset": np.nan}, "not a NIfTI image in one file"),
        ({"vox_offset": np.inf}, "not a NIfTI image in one file"),
        ({"vox_offset": 1e12}, "truncated"),
        ({"scl_slope": 1.0, "scl_inter": np.inf}, "not a NIfTI image in one file"),
    ],
)
def test_corrupt_headers_are_refused(tmp_path, fields, said):
    path = with_header_field(tmp_path / "bad.nii", save(tmp_path / "a.nii", noise()), **fields)
    with pytest.raises(FileError) as fault:
        read_volume(path, ("MR",))
    assert said in str(fault.value)
    assert str(path) in str(fault.value)


@settings(deadline=None, max_examples=300)
@given(position=st.integers(0, 351), value=st.integers(0, 255))
def test_no_header_byte_brings_down_the_reader(position, value):
    """Any one byte of a header may be wrong: the file is read, or refused with a message of ours."""
    content = bytearray(nib.Nifti1Image(noise((2, 2, 2)), OBLIQUE).to_bytes())
    content[position] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.nii"
        path.write_bytes(content)
        try:
            ours = read_volume(path, ("MR",))
        except (FileError, DataError) as fault:
            assert "a.nii" in str(fault)  # noqa: PT017
        else:
            np.testing.assert_array_equal(ours.affine, nib.load(path).affine)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_counted(tmp_path, bad):
    array = noise()
    array[0, 0, :3] = bad
    path = save(tmp_path / "a.nii", array)
    for read in (lambda path: read_volume(path, ("MR",)), read_mask):
        with pytest.raises(DataError, match=r"a\.nii: 3 voxel\(s\) are NaN or infinite; replace them"):
            read(path)


def test_values_beyond_float32_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"60 voxel\(s\) are NaN or infinite"):
        read_volume(save(tmp_path / "a.nii", np.full((3, 4, 5), 1e300)), ("MR",))


def test_colours_and_complex_are_refused(tmp_path):
    save(tmp_path / "rgb.nii", np.zeros((3, 4, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")]))
    save(tmp_path / "complex.nii", np.zeros((3, 4, 5), np.complex64))
    with pytest.raises(DataError, match=r"rgb\.nii holds colours; .*grey values"):
        read_volume(tmp_path / "rgb.nii", ("MR",))
    with pytest.raises(DataError, match=r"complex\.nii holds complex numbers"):
        read_mask(tmp_path / "complex.nii")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"xyzt_units": 1}, "lengths are in metres"),
        ({"xyzt_units": 3 + 8}, "lengths are in micrometres"),
        ({"srow_x": [0, 0, 0, 0]}, "cannot be inverted"),
        ({"srow_x": [np.nan, 0, 0, 0]}, "must be 4 x 4, finite"),
        ({"srow_z": [0, 0, 0, 0], "srow_y": [0, 0, 0, 0]}, "cannot be inverted"),
        ({"sform_code": 0, "pixdim": [1, 1, 0, 1, 1, 1, 1, 1]}, "spacing is 1, 0, 1 mm, must be positive"),
        ({"sform_code": 0, "pixdim": [1, 1, -2, 1, 1, 1, 1, 1]}, "spacing is 1, -2, 1 mm"),
        ({"sform_code": 0, "pixdim": [1, np.nan, 2, 1, 1, 1, 1, 1]}, "spacing is nan, 2, 1 mm"),
        ({"sform_code": 0, "qform_code": 1, "quatern_b": 3.0}, "its header gives no affine"),
    ],
)
def test_unusable_geometry_is_refused(tmp_path, fields, said):
    path = with_header_field(tmp_path / "bad.nii", save(tmp_path / "a.nii", noise(dtype=np.int16)), **fields)
    for read in (lambda path: read_volume(path, ("MR",)), read_mask, read_grid):
        with pytest.raises(GeometryError) as fault:
            read(path)
        assert said in str(fault.value)
        assert str(path) in str(fault.value)


def test_pixdim_does_not_matter_beside_an_sform(tmp_path, capfd):
    path = with_header_field(tmp_path / "b.nii", save(tmp_path / "a.nii", noise()), pixdim=[1, 0, 0, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(read_grid(path).affine, nib.load(tmp_path / "a.nii").affine)
    assert capfd.readouterr() == ("", "")


def test_read_grid_takes_only_the_header(tmp_path):
    path = save(tmp_path / "a.nii", noise((3, 4, 5, 2)))
    path.write_bytes(path.read_bytes()[:348])
    grid = read_grid(path)
    assert (grid.shape, grid.num_channels) == ((3, 4, 5), 2)
    assert grid.spacing_mm == pytest.approx((0.7, 1.2, 5.0), abs=1e-6)


def test_read_channels_stacks(tmp_path):
    arrays = noise(), noise() + 1
    paths = tuple(save(tmp_path / f"{index}.nii.gz", array) for index, array in enumerate(arrays))
    ours = read_channels(paths, ("pre", "post"))
    np.testing.assert_array_equal(ours.array, np.stack(arrays))
    assert ours.channels == ("pre", "post")
    with pytest.raises(DataError, match=r"model expects pre, post; 1 file\(s\) given \(.*0\.nii\.gz\)"):
        read_channels(paths[:1], ("pre", "post"))
    with pytest.raises(DataError, match=r"0 file\(s\) given \(none\)"):
        read_channels((), ())


def moved(**changes):
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    if "shift" in changes:
        affine[0, 3] += changes["shift"]
    if "stretch" in changes:
        affine[2, 2] += changes["stretch"]
    if "turn" in changes:
        turn = np.eye(4)
        turn[:3, :3] = nib.eulerangles.euler2mat(changes["turn"])
        affine = turn @ affine
    return affine


@pytest.mark.parametrize("changes", [{"shift": 0.9e-3}, {"stretch": -0.9e-3}, {"turn": 0.9e-4}])
def test_rounding_is_no_other_grid(tmp_path, changes):
    paths = save(tmp_path / "a.nii", noise(), moved()), save(tmp_path / "b.nii", noise(), moved(**changes))
    both = read_channels(paths, ("a", "b"))
    np.testing.assert_array_equal(both.affine, nib.load(paths[0]).affine)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shift": 1.5e-3}, "position of the first voxel by 0.0015 mm"),
        ({"stretch": 0.25}, "spacing by 0.25 mm, allowed 0.001"),
        ({"turn": 2e-4}, "direction of the axes by 0.0002 (cosines)"),
    ],
)
def test_other_grid_is_refused_with_both_names(tmp_path, changes, said):
    paths = save(tmp_path / "a.nii", noise(), moved()), save(tmp_path / "b.nii", noise(), moved(**changes))
    with pytest.raises(GeometryError) as fault:
        read_channels(paths, ("a", "b"))
    message = str(fault.value)
    assert said in message
    assert "Resample one" in message
    assert str(paths[0]) in message
    assert str(paths[1]) in message


def test_other_shape_is_refused():
    mask = Mask(np.zeros((3, 4, 6), np.uint8), OBLIQUE)
    with pytest.raises(
        GeometryError, match="im and la are not on one grid: 3 x 4 x 5 against 3 x 4 x 6 voxels; resample"
    ):
        check_same_grid(volume(), mask, ("im", "la"))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8, np.int16, np.int64])
def test_whole_numbers_of_any_type_are_labels(tmp_path, dtype):
    array = np.arange(60).reshape(3, 4, 5).astype(dtype)
    mask = read_mask(save(tmp_path / "a.nii.gz", array))
    assert mask.array.dtype == np.uint8
    np.testing.assert_array_equal(mask.array, array)


@pytest.mark.parametrize(("low", "high", "dtype"), [(-1, 300, np.int16), (0, 40000, np.int32), (0, 255, np.uint8)])
def test_labels_keep_their_values(tmp_path, low, high, dtype):
    array = np.full((3, 4, 5), low, np.int64)
    array[1, 1, 1] = high
    mask = read_mask(save(tmp_path / "a.nii", array))
    assert (mask.array.dtype, mask.array.min(), mask.array.max()) == (dtype, low, high)


def test_fractional_labels_are_refused(tmp_path):
    array = np.zeros((3, 4, 5), np.float32)
    array[0, 0, :2] = 0.5, 1.0
    with pytest.raises(DataError, match=r"a\.nii: 1 voxel\(s\) hold no whole number \(first: 0\.5\); .*Where rounding"):
        read_mask(save(tmp_path / "a.nii", array))


def test_scaled_labels_are_read_by_value(tmp_path):
    source = save(tmp_path / "a.nii", np.full((3, 4, 5), 2, np.uint8))
    scaled = with_header_field(tmp_path / "b.nii", source, scl_slope=2.0, scl_inter=1.0)
    assert (read_mask(scaled).array == 5).all()
    with pytest.raises(DataError, match=r"60 voxel\(s\) hold no whole number \(first: 0\.5\)"):
        read_mask(with_header_field(tmp_path / "c.nii", source, scl_slope=0.25, scl_inter=0.0))


def test_masks_of_several_channels_and_huge_values_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"a\.nii is 4D \(3 x 4 x 5 x 2\); a mask must be 3D"):
        read_mask(save(tmp_path / "a.nii", noise((3, 4, 5, 2), np.int16)))
    with pytest.raises(DataError, match=r"b\.nii: label values from 0 to 1e\+10 do not fit 32 bits"):
        read_mask(save(tmp_path / "b.nii", np.full((3, 4, 5), 10**10, np.int64)))


affines = st.builds(
    lambda angles, spacing, signs, order, shift: nib.affines.from_matvec(
        (nib.eulerangles.euler2mat(*angles) @ np.diag(np.multiply(spacing, signs)))[:, order], shift
    ),
    st.tuples(*[st.floats(-3.1, 3.1)] * 3),
    st.tuples(*[st.floats(0.1, 8.0)] * 3),
    st.tuples(*[st.sampled_from([-1, 1])] * 3),
    st.permutations(range(3)),
    st.tuples(*[st.floats(-500, 500)] * 3),
)


@settings(deadline=None, max_examples=60)
@given(
    sform=affines,
    qform=affines,
    codes=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    kind=st.sampled_from([nib.Nifti1Image, nib.Nifti2Image]),
    endianness=st.sampled_from("<>"),
    units=st.sampled_from(["unknown", "mm"]),
    ending=st.sampled_from([".nii", ".nii.gz"]),
)
def test_written_mask_has_the_geometry_of_its_scan(sform, qform, codes, kind, endianness, units, ending):
    header = kind.header_class(endianness=endianness)
    header.set_data_shape((3, 4, 5))
    header.set_xyzt_units(units, "sec")
    header.set_qform(qform, code=codes[0])
    header.set_sform(sform, code=codes[1])
    labels = np.arange(60, dtype=np.int64).reshape(3, 4, 5)
    with tempfile.TemporaryDirectory() as folder:
        scan, written = Path(folder) / f"scan{ending}", Path(folder) / "new" / f"mask{ending}"
        kind(noise(), None, header).to_filename(scan)
        write_mask(written, labels, read_volume(scan, ("MR",)))
        before, after = nib.load(scan), nib.load(written)
        assert [path.name for path in written.parent.iterdir()] == [written.name]
        for field in GEOMETRY_FIELDS:
            assert before.header[field].tolist() == after.header[field].tolist(), field
        assert before.header["pixdim"][:4].tolist() == after.header["pixdim"][:4].tolist()
        assert before.affine.tobytes() == after.affine.tobytes()
        assert type(before) is type(after)
        assert after.shape == before.shape
        assert after.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(np.asarray(after.dataobj), labels)
        check_same_grid(read_volume(scan, ("MR",)), read_mask(written), ("scan", "mask"))


def test_written_mask_of_a_4d_scan_is_3d(tmp_path):
    scan = read_volume(save(tmp_path / "a.nii", noise((3, 4, 5, 2))), ("a", "b"))
    write_mask(tmp_path / "m.nii.gz", np.ones((3, 4, 5), np.uint8), scan)
    after = nib.load(tmp_path / "m.nii.gz")
    assert after.shape == (3, 4, 5)
    np.testing.assert_array_equal(after.affine, nib.load(tmp_path / "a.nii").affine)


@pytest.mark.parametrize(
    ("value", "dtype"), [(255, np.uint8), (256, np.int16), (-1, np.int16), (32768, np.int32), (-(2**31), np.int32)]
)
def test_written_values_are_unscaled(tmp_path, value, dtype):
    mask = np.zeros((3, 4, 5), np.int64)
    mask[2, 1, 0] = value
    write_mask(tmp_path / "m.nii", mask, volume())
    after = nib.load(tmp_path / "m.nii")
    assert after.get_data_dtype() == dtype
    assert (after.dataobj.slope, after.dataobj.inter) == (1.0, 0.0)
    assert np.asarray(after.dataobj)[2, 1, 0] == value
    assert read_mask(tmp_path / "m.nii").array[2, 1, 0] == value


def test_volume_without_header_writes_its_affine(tmp_path):
    affine = OBLIQUE.astype(np.float32).astype(np.float64)
    write_mask(tmp_path / "m.nii.gz", np.zeros((3, 4, 5), np.uint8), volume(affine=affine))
    after = nib.load(tmp_path / "m.nii.gz")
    np.testing.assert_array_equal(after.affine, affine)
    assert (int(after.header["sform_code"]), int(after.header["qform_code"])) == (1, 0)
    assert after.header.get_zooms() == pytest.approx((0.7, 1.2, 5.0), abs=1e-6)
    assert after.header.get_xyzt_units()[0] == "mm"


def test_descriptions_are_not_copied(tmp_path):
    image = nib.Nifti1Image(noise(), OBLIQUE)
    image.header["descrip"] = b"Jane Doe 1970-01-01"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Jane Doe"))
    image.to_filename(tmp_path / "a.nii")
    write_mask(tmp_path / "m.nii", np.zeros((3, 4, 5), np.uint8), read_volume(tmp_path / "a.nii", ("MR",)))
    assert b"Jane" in (tmp_path / "a.nii").read_bytes()
    assert b"Jane" not in (tmp_path / "m.nii").read_bytes()


def test_writing_twice_gives_the_same_bytes(tmp_path):
    mask = (noise() > 0).astype(np.uint8)
    write_mask(tmp_path / "a.nii.gz", mask, volume())
    write_mask(tmp_path / "b.nii.gz", mask, volume())
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_what_cannot_be_written_is_refused(tmp_path):
    mask = np.zeros((3, 4, 5), np.int64)
    with pytest.raises(GeometryError, match=r"mask for .*m\.nii is 3 x 4 x 4 voxels, its scan 3 x 4 x 5"):
        write_mask(tmp_path / "m.nii", mask[..., :4], volume())
    with pytest.raises(DataError, match=r"m\.nii: label values from 0 to 2\.14748e\+09 do not fit 32 bits"):
        write_mask(tmp_path / "m.nii", mask + 2**31, volume())
    with pytest.raises(FileError, match="must end in"):
        write_mask(tmp_path / "m.png", mask, volume())
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match=r"cannot write .*m\.nii"):
        write_mask(tmp_path / "file" / "m.nii", mask, volume())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_failed_write_keeps_what_was_there(tmp_path, monkeypatch):
    write_mask(tmp_path / "m.nii", np.ones((3, 4, 5), np.uint8), volume())

    def full_disk(self, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nib.Nifti1Image, "to_filename", full_disk)
    with pytest.raises(FileError, match="No space left on device; nothing was changed"):
        write_mask(tmp_path / "m.nii", np.zeros((3, 4, 5), np.uint8), volume())
    assert (read_mask(tmp_path / "m.nii").array == 1).all()
    assert [path.name for path in tmp_path.iterdir()] == ["m.nii"]


@pytest.fixture
def as_for_users(monkeypatch):
    """Switch the tests' shape checks off, so that the package's own are seen."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.usefixtures("as_for_users")
def test_volume_refuses_what_it_cannot_hold():
    array = np.zeros((1, 3, 4, 5), np.float32)
    with pytest.raises(DataError, match=r"1 channel\(s\), named a, b; give each channel one name"):
        Volume(array, OBLIQUE, ("a", "b"))
    with pytest.raises(DataError, match=r"2 channel\(s\), named a, a;"):
        Volume(np.concatenate([array, array]), OBLIQUE, ("a", "a"))
    with pytest.raises(DataError, match=r"axes C X Y Z, none empty, not float32 of shape \(3, 4, 5\)"):
        Volume(array[0], OBLIQUE, ("a",))
    with pytest.raises(DataError, match="not float64 of shape"):
        Volume(array.astype(np.float64), OBLIQUE, ("a",))
    with pytest.raises(DataError, match=r"volume: 60 voxel\(s\) are NaN"):
        Volume(array + np.float32(np.nan), OBLIQUE, ("a",))
    with pytest.raises(GeometryError, match="must be 4 x 4"):
        Volume(array, np.eye(3), ("a",))
    with pytest.raises(GeometryError, match="cannot be inverted"):
        Volume(array, np.diag([1.0, 1.0, 0.0, 1.0]), ("a",))


def test_volume_refuses_the_header_of_another_grid(tmp_path):
    read = read_volume(save(tmp_path / "a.nii", noise()), ("MR",))
    with pytest.raises(GeometryError, match="header have different grids; leave the header out"):
        Volume(read.array[:, :2], read.affine, read.channels, read.header)
    with pytest.raises(GeometryError, match="header have different grids"):
        Volume(read.array, np.eye(4), read.channels, read.header)


@pytest.mark.usefixtures("as_for_users")
def test_mask_refuses_what_it_cannot_hold():
    with pytest.raises(DataError, match="mask must be 3D integers, not 3D float32"):
        Mask(noise(), OBLIQUE)
    with pytest.raises(DataError, match="not 2D uint8"):
        Mask(np.zeros((2, 2), np.uint8), OBLIQUE)
    assert Mask(np.zeros((1, 1, 1), np.uint8), OBLIQUE).spacing_mm == pytest.approx((0.7, 1.2, 5.0))


def test_real_scans_keep_their_affine(real_data, tmp_path):
    for path in sorted((real_data / "Task04_Hippocampus" / "labelsTr").glob("[!.]*.nii.gz"))[:20]:
        scan = read_volume(path.parent.parent / "imagesTr" / path.name, ("MRI",))
        mask = read_mask(path)
        write_mask(tmp_path / path.name, mask.array, scan)
        before, after = nib.load(path.parent.parent / "imagesTr" / path.name), nib.load(tmp_path / path.name)
        assert before.affine.tobytes() == after.affine.tobytes()
        np.testing.assert_array_equal(np.asarray(after.dataobj), np.asarray(nib.load(path).dataobj))


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_written_scan_reads_back_as_whole_numbers(tmp_path, name):
    scan = Volume(noise()[np.newaxis] + np.float32(0.25), OBLIQUE, ("MR",))
    write_volume(tmp_path / name, scan)
    stored = nib.load(tmp_path / name)
    assert stored.get_data_dtype() == np.int16
    np.testing.assert_array_equal(np.asarray(stored.dataobj), np.rint(scan.array[0]))
    np.testing.assert_allclose(stored.affine, OBLIQUE, rtol=1e-6)
    np.testing.assert_array_equal(read_volume(tmp_path / name, ("MR",)).array, np.rint(scan.array))


def test_a_written_scan_keeps_the_geometry_of_its_header(tmp_path):
    scan = read_volume(save(tmp_path / "in.nii", noise().astype(np.int16)), ("MR",))
    write_volume(tmp_path / "out.nii", scan)
    before, after = nib.load(tmp_path / "in.nii").header, nib.load(tmp_path / "out.nii").header
    assert all(before[field].tobytes() == after[field].tobytes() for field in GEOMETRY_FIELDS)


def test_a_scan_that_int16_cannot_hold_is_not_written(tmp_path):
    for high in (32768.0, -32769.0):
        array = np.array([high, 1.0], np.float32).reshape(1, 2, 1, 1)
        with pytest.raises(DataError, match=r"intensities from .* int16 holds -32768 to 32767: scale them first"):
            write_volume(tmp_path / "a.nii", Volume(array, np.eye(4), ("MR",)))
    with pytest.raises(DataError, match=r"a.nii has 2 channels; write each to a file of its own"):
        write_volume(tmp_path / "a.nii", Volume(np.zeros((2, 1, 1, 1), np.float32), np.eye(4), ("a", "b")))
    with pytest.raises(FileError, match="not named as an image"):
        write_volume(tmp_path / "a.png", Volume(np.zeros((1, 1, 1, 1), np.float32), np.eye(4), ("a",)))
    assert not list(tmp_path.iterdir())
