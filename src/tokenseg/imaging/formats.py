"""Image formats by file name, and one way to read and write them all, for `tokenseg.imaging.volume`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float, Shaped
from nibabel.nifti1 import Nifti1Header

from tokenseg.errors import FileError
from tokenseg.imaging import itk, nifti
from tokenseg.imaging.dicom_files import DicomFile
from tokenseg.imaging.itk import ITK_ENDINGS, ItkGeometry
from tokenseg.shapes import Affine

IMAGE_ENDINGS = (".nii.gz", ".nii", *ITK_ENDINGS)


class DicomSlices(NamedTuple):
    """The slices that a scan was built from.

    Attributes:
        affine: From voxel indices (column, row, slice) to mm in RAS+ world coordinates.
        frames: File and number in the file of each slice, in the order of the last axis.
    """

    affine: Affine
    frames: tuple[tuple[DicomFile, int], ...]


Header: TypeAlias = Nifti1Header | ItkGeometry | DicomSlices
"""What a file of one format says of its place in the world, so that a mask can say exactly the same."""


class Stored(NamedTuple):
    """What a header says.

    Attributes:
        shape: X Y Z, or X Y Z C.
        affine: From voxel indices to mm in RAS+ world coordinates.
        header: The header itself.
    """

    shape: tuple[int, ...]
    affine: Affine
    header: Header


def is_named_as_image(path: Path) -> bool:
    """Whether a file name ends as images do, in small letters or capitals."""
    return path.name.lower().endswith(IMAGE_ENDINGS)


def image_ending(path: Path) -> str:
    """Give the part of a file name that names its format, such as `.nii.gz`, in small letters.

    Raises:
        FileError: It is none of `IMAGE_ENDINGS`.
    """
    for ending in IMAGE_ENDINGS:
        if path.name.lower().endswith(ending) and len(path.name) > len(ending):
            return ending
    *most, last = IMAGE_ENDINGS
    raise FileError(f"{path} is not named as an image: its name must end in {', '.join(most)} or {last}")


def image_stem(path: Path) -> str:
    """Give a file name without folder and image ending.

    Raises:
        FileError: The ending is none of `IMAGE_ENDINGS`.
    """
    return path.name[: -len(image_ending(path))]


def is_written(path: Path) -> bool:
    """Whether files of this name can be written; a .mhd is two files, which cannot be replaced at once."""
    return not path.name.lower().endswith(".mhd")


def mask_ending(ending: str) -> str:
    """Ending of the mask of an image: the same format, in one file."""
    return ".mha" if ending == ".mhd" else ending


def read_header(path: Path) -> Stored:
    """Read the header alone; trailing axes of length one after the third are dropped.

    Raises:
        FileError: The file is missing, or not of the format that its name says.
        DataError: It is neither 3D nor 4D.
        GeometryError: Its spacing, affine or unit is not usable.
        ConfigError: Its format needs an extra that is not installed.
    """
    if image_ending(path) in ITK_ENDINGS:
        shape, geometry = itk.read_header(path)
        return Stored(shape, geometry.affine, geometry)
    return Stored(*nifti.read_header(path))


def orientation_problem(header: Header | None) -> str:
    """What is wrong with a header that does not say where the axes of its voxels point; empty for all others.

    NIfTI allows that (both codes 0). The axes then count as running to the left, to the front and up, as in nibabel;
    for programs that are built on ITK the second runs to the back.
    """
    if not isinstance(header, Nifti1Header) or header["qform_code"] > 0 or header["sform_code"] > 0:
        return ""
    return "its header does not say where its axes point (qform and sform codes are 0): it may be mirrored"


def voxel_files(path: Path) -> tuple[Path, ...]:
    """The files that an image is: itself, and of a .mhd the one with its voxels, if that can be told."""
    if not path.name.lower().endswith(".mhd"):
        return (path,)
    try:
        return path, itk.data_file(path)
    except FileError:
        return (path,)


def voxel_bytes(path: Path) -> int:
    """Memory a voxel of a file that reading takes beside what it gives, from the header; see `read_header`."""
    header = read_header(path).header
    # SimpleITK gives its values as a copy, and does not say their type in a few words: two of 16 bits.
    return int(header.get_data_dtype().itemsize) if isinstance(header, Nifti1Header) else 4  # type: ignore[no-untyped-call]


def read_values(path: Path) -> tuple[Stored, Shaped[np.ndarray, "*shape"]]:
    """Read the whole file: float64 where a header scales the values, else as stored.

    Raises:
        FileError: The file is missing, truncated, or not of the format that its name says.
        DataError: It is neither 3D nor 4D, or not of real numbers.
        GeometryError: Its spacing, affine or unit is not usable.
        ConfigError: Its format needs an extra that is not installed.
    """
    if image_ending(path) in ITK_ENDINGS:
        (shape, geometry), values = itk.read_values(path)
        return Stored(shape, geometry.affine, geometry), values.reshape(shape)
    header, values = nifti.read_values(path)
    return Stored(*header), values


def read_intensities(path: Path) -> tuple[Stored, Float[np.ndarray, "*shape"]]:
    """Read the whole file as float32, scaled as its header says; for the errors see `read_values`."""
    if image_ending(path) in ITK_ENDINGS:
        stored, values = read_values(path)
        with np.errstate(over="ignore", invalid="ignore"):
            return stored, values.astype(np.float32)
    header, intensities = nifti.read_intensities(path)
    return Stored(*header), intensities


def write_values(
    path: Path,
    values: Shaped[np.ndarray, "*shape"],
    affine: Affine,
    spacing_mm: tuple[float, float, float],
    header: Header | None,
) -> None:
    """Write numbers in their own type, in the format that the name says, all or nothing.

    A header of the same format is kept to the bit; without one the file gets the affine.

    Raises:
        FileError: The file cannot be written; what was there is then as it was.
        ConfigError: Its format needs an extra that is not installed.
    """
    if image_ending(path) in ITK_ENDINGS:
        itk.write_values(
            path, values, header if isinstance(header, ItkGeometry) else itk.geometry_of_affine(affine, spacing_mm)
        )
        return
    nifti.write_values(
        path, values, header if isinstance(header, Nifti1Header) else nifti.header_of_affine(affine, spacing_mm)
    )
