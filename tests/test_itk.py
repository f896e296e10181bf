"""NRRD and MetaImage: SimpleITK writes what is read here, and reads what is written."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from tokenseg.errors import ConfigError, DataError, FileError, TokenSegError
from tokenseg.imaging.formats import image_ending, image_stem, mask_ending, voxel_files
from tokenseg.imaging.volume import Volume, check_same_grid, read_grid, read_mask, read_volume, write_mask

ENDINGS = (".nrrd", ".mha", ".mhd")
TURN = (0.36, 0.48, -0.8, -0.8, 0.6, 0.0, 0.48, 0.64, 0.6)


def noise(shape=(3, 4, 5), dtype=np.int16):
    return (np.random.default_rng(0).normal(size=shape) * 50).astype(dtype)


def save(path: Path, array: np.ndarray, *, vector: bool = False, compressed: bool = True) -> Path:
    axes = [2, 1, 0, 3][: array.ndim]  # SimpleITK's arrays run the other way round, values of a voxel last
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(axes)), isVector=vector)
    image.SetSpacing((0.7, 1.2, 5.0))
    image.SetOrigin((12.5, -80.25, 33.0))
    image.SetDirection(TURN)
    sitk.WriteImage(image, str(path), useCompression=compressed)
    return path


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_values_and_place(tmp_path, ending, dtype, compressed):
    array = noise(dtype=dtype)
    path = save(tmp_path / f"a{ending}", array, compressed=compressed)
    ours, theirs = read_volume(path, ("MR",)), sitk.ReadImage(str(path))
    np.testing.assert_array_equal(ours.array[0], array.astype(np.float32))
    assert image_ending(path) == ending
    assert ours.spacing_mm == pytest.approx((0.7, 1.2, 5.0))
    for index in ((0, 0, 0), (2, 1, 3)):
        lps = theirs.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose((ours.affine @ [*index, 1])[:3], np.array(lps) * (-1, -1, 1), atol=1e-9)
    grid = read_grid(path)
    assert (grid.shape, grid.num_channels) == ((3, 4, 5), 1)
    np.testing.assert_array_equal(grid.affine, ours.affine)


@pytest.mark.parametrize("ending", ENDINGS)
def test_names_in_capitals(tmp_path, ending):
    """SimpleITK goes by the ending, and does not know all of them in capitals."""
    path = save(tmp_path / f"a{ending}", noise())
    capitals = path.rename(path.with_name(f"B{ending.upper()}"))
    np.testing.assert_array_equal(read_volume(capitals, ("MR",)).array[0], noise().astype(np.float32))
    assert (image_ending(capitals), image_stem(capitals)) == (ending, "B")
    # The file beside a header is found, and counted, too.
    assert len(voxel_files(capitals)) == (2 if ending == ".mhd" else 1)


@pytest.mark.parametrize("ending", ENDINGS)
def test_several_values_a_voxel_are_channels(tmp_path, ending):
    array = noise((3, 4, 5, 2))
    both = read_volume(save(tmp_path / f"a{ending}", array, vector=True), ("a", "b"))
    np.testing.assert_array_equal(both.array, np.moveaxis(array, 3, 0).astype(np.float32))
    with pytest.raises(DataError, match=r"model expects MR; .* holds 2 channel"):
        read_volume(tmp_path / f"a{ending}", ("MR",))


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_mask_keeps_the_grid_to_the_bit(tmp_path, ending):
    scan = read_volume(save(tmp_path / f"scan{ending}", noise()), ("MR",))
    mask = (noise() > 20).astype(np.uint8) * 3
    path = tmp_path / f"mask{mask_ending(ending)}"
    write_mask(path, mask, scan)
    written, source = sitk.ReadImage(str(path)), sitk.ReadImage(str(tmp_path / f"scan{ending}"))
    assert written.GetSpacing() == source.GetSpacing()
    assert written.GetOrigin() == source.GetOrigin()
    assert written.GetDirection() == source.GetDirection()
    assert written.GetPixelIDTypeAsString() == "8-bit unsigned integer"
    np.testing.assert_array_equal(sitk.GetArrayFromImage(written).transpose(2, 1, 0), mask)
    back = read_mask(path)
    np.testing.assert_array_equal(back.array, mask)
    check_same_grid(scan, back, ("scan", "mask"))
    assert sorted(each.name for each in tmp_path.iterdir() if "partial" in each.name) == []


@pytest.mark.parametrize(("source", "target"), [(".nrrd", ".nii.gz"), (".nii.gz", ".mha"), (".mha", ".nrrd")])
def test_a_mask_in_another_format_is_in_the_same_place(tmp_path, source, target):
    scan = Volume(np.zeros((1, 3, 4, 5), np.float32), np.diag([-0.7, 1.2, 5.0, 1.0]), ("MR",))
    write_mask(tmp_path / f"scan{source}", noise(), scan)
    read = read_volume(tmp_path / f"scan{source}", ("MR",))
    write_mask(tmp_path / f"mask{target}", (noise() > 0).astype(np.uint8), read)
    back = read_mask(tmp_path / f"mask{target}")
    check_same_grid(read, back, ("scan", "mask"))
    np.testing.assert_array_equal(back.array, noise() > 0)


def test_no_mask_in_two_files(tmp_path):
    scan = read_volume(save(tmp_path / "scan.mhd", noise()), ("MR",))
    with pytest.raises(FileError, match=r"would be two files.*name the mask \.mha"):
        write_mask(tmp_path / "mask.mhd", noise(), scan)


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
@pytest.mark.parametrize("compressed", [True, False])
def test_every_truncation_is_refused_or_harmless(tmp_path, ending, compressed):
    whole = save(tmp_path / f"whole{ending}", noise(), compressed=compressed).read_bytes()
    path = tmp_path / f"cut{ending}"
    read = 0
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        try:
            volume = read_volume(path, ("MR",))
        except FileError as fault:
            assert "cut" in str(fault)  # noqa: PT017
        else:
            np.testing.assert_array_equal(volume.array[0], noise())
            read += 1
    assert read <= 3  # only the checksum at the end of a gzip stream was cut


NRRD = b"NRRD0004\ntype: short\nencoding: raw\nendian: little\n"
META = b"ObjectType = Image\nNDims = 3\n"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.nrrd", None, "cannot be read: No such file"),
        ("a.nrrd", b"", "not a .nrrd image"),
        ("a.mha", b"\x80\x04pickle" * 100, "not a .mha image"),
        ("a.nrrd", NRRD + b"dimension: 3\nsizes: 2 2 2\ndata file: /etc/passwd\n\n", "its voxels in another file"),
        ("a.mha", META + b"ElementDataFile = ../secret.raw\n", "its voxels in another folder or in several files"),
        ("a.mhd", META + b"ElementDataFile = ../secret.raw\n", "its voxels in another folder or in several files"),
        ("a.mha", META, "names 0 files for its voxels"),
        (
            "a.nrrd",
            NRRD + b"dimension: 3\nsizes: 30000 30000 30000\n\n" + bytes(100),
            "its header declares 27000000000000 values",
        ),
        (
            "a.mha",
            META + b"DimSize = 30000 30000 30000\nElementType = MET_SHORT\nElementDataFile = LOCAL\n" + bytes(100),
            "its header declares 27000000000000 values",
        ),
        ("a.nrrd", NRRD + b"dimension: 2\nsizes: 3 3\n\n" + bytes(18), "is 2D (3 x 3)"),
    ],
)
def test_what_is_no_image_is_refused(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenSegError) as fault:
        read_volume(tmp_path / name, ("MR",))
    assert said in str(fault.value)
    assert name in str(fault.value)


def test_real_lesions(real_data):
    """The numbers of lesion voxels are those that the data's description gives."""
    for name, count in (("brain1", 4137), ("brain2", 453), ("breast1", 143)):
        scan = read_volume(real_data / "nrrd_samples" / "images" / f"{name}_image.nrrd", ("MR",))
        mask = read_mask(real_data / "nrrd_samples" / "labels" / f"{name}_label.nrrd")
        check_same_grid(scan, mask, ("scan", "mask"))
        assert np.count_nonzero(mask.array) == count


def test_without_the_extra_one_line_says_what_to_do(tmp_path, monkeypatch):
    path = save(tmp_path / "a.nrrd", noise())
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(ConfigError, match=r"pip install 'tokenseg\[itk\]'"):
        read_volume(path, ("MR",))
