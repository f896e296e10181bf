"""Scans, masks and their grids, read strictly from image files and written exactly: the interface for all others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Shaped
from nibabel.nifti1 import Nifti1Header

from tokenseg.errors import DataError, GeometryError
from tokenseg.imaging.formats import (
    Header,
    image_ending,
    image_stem,
    read_header,
    read_intensities,
    read_values,
    write_values,
)
from tokenseg.messages import times
from tokenseg.shapes import Affine, ImageArray, MaskArray

POSITION_TOLERANCE_MM = 1e-3
SPACING_TOLERANCE_MM = 1e-3
DIRECTION_TOLERANCE = 1e-4
SPACINGS_MM = (1e-6, 1e6)
"""Beyond them a header is damaged, and what is computed of it may overflow."""


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan with its place in the world, axes in stored (file) order.

    Voxels may be of any size along each axis, and axes oblique; nothing is resampled here.

    >>> import numpy as np
    >>> from tokenseg import Volume
    >>> scan = Volume(np.zeros((1, 64, 48, 20), np.float32), np.diag([0.7, 0.7, 2.5, 1.0]), ("MRI",))
    >>> scan.spacing_mm
    (0.7, 0.7, 2.5)
    >>> Volume(np.full((1, 4, 4, 4), np.nan, np.float32), np.eye(4), ("MRI",))
    Traceback (most recent call last):
    tokenseg.errors.DataError: volume: 64 voxel(s) are NaN or infinite; replace them, for example by ...

    Attributes:
        array: Intensities (C, X, Y, Z), float32, finite, of any range; no axis is empty.
        affine: 4 x 4, from voxel indices to mm in RAS+ world coordinates.
        channels: Name of each channel, unique; models find their channels by it.
        header: Header of the (first) file, from which a mask takes its geometry fields; None for a volume that was
            made from arrays.

    Raises:
        DataError: The array is not finite float32 of four axes, or the names do not fit it.
        GeometryError: The affine cannot be inverted or has a spacing below 1e-6 or above 1e6 mm, or it contradicts
            the header.
    """

    array: ImageArray
    affine: Affine
    channels: tuple[str, ...]
    header: Header | None = None

    def __post_init__(self) -> None:
        _check_image_array(self.array)
        if len(self.channels) != len(self.array) or len(set(self.channels)) != len(self.channels):
            raise DataError(
                f"volume has {len(self.array)} channel(s), named {', '.join(self.channels) or '(nothing)'}; "
                "give each channel one name of its own"
            )
        _check_affine(self.affine, "volume")
        if self.header is not None:
            _check_header_fits(self.header, self.array.shape[1:], self.affine)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between voxel centres along each stored axis."""
        return _spacing_mm(self.affine)


@dataclass(frozen=True, eq=False)
class Mask:
    """A label map with its place in the world, axes in stored (file) order.

    Attributes:
        array: Label values, 0 for background.
        affine: From voxel indices to mm in RAS+ world coordinates.

    Raises:
        DataError: The array is not of integers, or not 3D.
        GeometryError: The affine is not usable.
    """

    array: MaskArray
    affine: Affine

    def __post_init__(self) -> None:
        if self.array.ndim != 3 or not np.issubdtype(self.array.dtype, np.integer):
            raise DataError(f"mask must be 3D integers, not {self.array.ndim}D {self.array.dtype}")
        _check_affine(self.affine, "mask")

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between voxel centres along each stored axis."""
        return _spacing_mm(self.affine)


@dataclass(frozen=True, eq=False)
class Grid:
    """What a header says of an image: spatial shape, channels (1 for a 3D file), affine."""

    shape: tuple[int, int, int]
    num_channels: int
    affine: Affine

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between voxel centres along each stored axis."""
        return _spacing_mm(self.affine)


def read_volume(path: Path | str, channels: tuple[str, ...]) -> Volume:
    """Read a scan from one file: 3D for one channel, or 4D with the channels on the last axis.

    Trailing axes of length one are dropped, and the header's scale slope and intercept are applied. Spacing, also an
    anisotropic one, and the order of the axes stay as stored.

    >>> import nibabel, numpy as np, tempfile
    >>> from pathlib import Path
    >>> from tokenseg import read_volume
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "scan.nii.gz"
    ...     nibabel.save(nibabel.Nifti1Image(np.ones((64, 48, 20), np.int16), np.diag([0.7, 0.7, 2.5, 1])), path)
    ...     scan = read_volume(path, ("MRI",))
    >>> scan.array.shape, scan.array.dtype.name, scan.channels
    ((1, 64, 48, 20), 'float32', ('MRI',))

    Args:
        path: NIfTI (`.nii`, `.nii.gz`) or, with the extra `itk`, NRRD or MetaImage.
        channels: Name of each channel, in the order of the file.

    Raises:
        FileError: The file is missing, truncated, or not of the format that its name says.
        DataError: It has another number of channels or axes, is not of real numbers, or holds NaN or infinite voxels.
        GeometryError: Its spacing, affine or unit is not usable.
    """
    path = Path(path)
    stored, values = read_intensities(path)
    array = values[..., np.newaxis] if values.ndim == 3 else values
    if array.shape[3] != len(channels):
        raise DataError(
            f"model expects {', '.join(channels)}; {path} holds {array.shape[3]} channel(s). "
            "Give one 3D file a channel, or one 4D file with these channels along its last axis"
        )
    intensities = np.moveaxis(array, 3, 0)
    _check_finite(intensities, str(path))
    _check_affine(stored.affine, str(path))
    return Volume(intensities, stored.affine, channels, stored.header)


def read_channels(paths: tuple[Path, ...], channels: tuple[str, ...]) -> Volume:
    """Read one 3D file a channel and stack them on the grid of the first file.

    Raises:
        FileError: A file is missing, truncated, or not NIfTI.
        DataError: The number of files is not that of the channels, or a file is not usable, see `read_volume`.
        GeometryError: The files are not on one grid, see `check_same_grid`.
    """
    if not paths or len(paths) != len(channels):
        given = ", ".join(str(path) for path in paths) or "none"
        raise DataError(
            f"model expects {', '.join(channels)}; {len(paths)} file(s) given ({given}); give one a channel"
        )
    volumes = [read_volume(path, (channel,)) for path, channel in zip(paths, channels, strict=True)]
    first = volumes[0]
    for path, volume in zip(paths[1:], volumes[1:], strict=True):
        check_same_grid(first, volume, (str(paths[0]), str(path)))
    return join_channels(volumes)


def join_channels(volumes: list[Volume]) -> Volume:
    """Put volumes on one grid together as channels; the list is empty then, so that each is free once it is copied."""
    first = volumes[0]
    if len(volumes) == 1:
        return volumes.pop()
    names = tuple(name for volume in volumes for name in volume.channels)
    # Planes of the last axis stay together in memory, as they are in the files.
    joined = np.empty((len(names), *reversed(first.array.shape[1:])), np.float32).transpose(0, 3, 2, 1)
    done = 0
    while volumes:
        volume = volumes.pop(0)
        joined[done : done + len(volume.array)] = volume.array
        done += len(volume.array)
    return Volume(joined, first.affine, names, first.header)


def read_mask(path: Path) -> Mask:
    """Read a label map; floating-point files are accepted where every value is a whole number.

    Raises:
        FileError: The file is missing, truncated, or not NIfTI.
        DataError: It is not 3D, or its values are not whole numbers of at most 32 bits.
        GeometryError: Its spacing, affine or unit is not usable.
    """
    stored, values = read_values(path)
    _check_affine(stored.affine, str(path))
    if values.ndim != 3:
        raise DataError(f"{path} is 4D ({times(values.shape)}); a mask must be 3D with one label value a voxel")
    if not np.issubdtype(values.dtype, np.integer):
        _check_finite(values, str(path))
        fractional = values != np.round(values)
        if fractional.any():
            raise DataError(
                f"{path}: {fractional.sum()} voxel(s) hold no whole number (first: {values[fractional][0]:g}); "
                f"labels must be integers. Where rounding is right, this makes a copy: {_rounding_command(path)}"
            )
    return Mask(_smallest_integers(values, str(path)), stored.affine)


def _rounding_command(path: Path) -> str:
    copy = path.with_name(f"{image_stem(path)}-rounded{image_ending(path)}")
    return (
        'python -c "import nibabel as n, numpy as np; '
        f"i = n.load('{path}'); n.save(n.Nifti1Image(np.rint(i.get_fdata()).astype('int16'), i.affine), '{copy}')\""
    )


def read_grid(path: Path) -> Grid:
    """Read only the header: the voxels are neither read nor checked.

    Raises:
        FileError: The file is missing, or not NIfTI.
        DataError: It is neither 3D nor 4D.
        GeometryError: Its spacing, affine or unit is not usable.
    """
    shape, affine, _ = read_header(path)
    _check_affine(affine, str(path))
    return Grid((shape[0], shape[1], shape[2]), shape[3] if len(shape) == 4 else 1, affine)


def check_same_grid(first: Volume | Mask, second: Volume | Mask, what: tuple[str, str]) -> None:
    """Check that two images share shape, position, spacing and direction, save for rounding.

    Args:
        first: One image.
        second: The other.
        what: How messages name them, such as their paths.

    Raises:
        GeometryError: They differ by more than 0.001 mm in position of the first voxel or in spacing, by more than
            0.0001 in a direction cosine, or in shape at all.
    """
    shapes = first.array.shape[-3:], second.array.shape[-3:]
    both = f"{what[0]} and {what[1]} are not on one grid"
    if shapes[0] != shapes[1]:
        raise GeometryError(f"{both}: {times(shapes[0])} against {times(shapes[1])} voxels; resample one to the other")
    faults = affine_differences(first.affine, second.affine)
    if faults:
        raise GeometryError(f"{both}: they differ in {'; in '.join(faults)}. Resample one to the grid of the other")


def affine_differences(first: Affine, second: Affine) -> list[str]:
    """In what two affines differ beyond rounding, in words; the tolerances are those of `check_same_grid`."""
    spacings = np.asarray(_spacing_mm(first)), np.asarray(_spacing_mm(second))
    directions = first[:3, :3] / spacings[0] - second[:3, :3] / spacings[1]
    measured = (
        ("position of the first voxel", first[:3, 3] - second[:3, 3], POSITION_TOLERANCE_MM, " mm"),
        ("spacing", spacings[0] - spacings[1], SPACING_TOLERANCE_MM, " mm"),
        ("direction of the axes", directions, DIRECTION_TOLERANCE, " (cosines)"),
    )
    return [
        f"{name} by {np.abs(difference).max():.4g}{unit}, allowed {tolerance:g}"
        for name, difference, tolerance, unit in measured
        if np.abs(difference).max() > tolerance
    ]


def write_mask(path: Path | str, mask: MaskArray, like: Volume) -> None:
    """Write a label map onto the grid of a scan, all or nothing; a file that is there is replaced.

    Both affines of the scan's header (qform and sform) with their codes, and the units, are kept bit for bit; a
    volume without header gives its affine, rounded to float32, as sform with code 1. Nothing else of the scan's
    header (descriptions, extensions) is copied. The type is uint8 where the values fit, else int16 or int32; a mask
    that is empty (all 0) is written like any other.

    >>> import numpy as np, tempfile
    >>> from pathlib import Path
    >>> from tokenseg import Volume, read_volume, write_mask
    >>> scan = Volume(np.zeros((1, 64, 48, 20), np.float32), np.diag([0.7, 0.7, 2.5, 1.0]), ("MRI",))
    >>> mask = np.zeros((64, 48, 20), np.uint8)
    >>> mask[30:34, 20:24, 10] = 2
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_mask(Path(folder) / "mask.nii.gz", mask, like=scan)
    ...     again = read_volume(Path(folder) / "mask.nii.gz", ("mask",))
    >>> bool((again.array[0] == mask).all()), [round(mm, 3) for mm in again.spacing_mm]
    (True, [0.7, 0.7, 2.5])

    Args:
        path: The file; its ending chooses the format, as for `read_volume`.
        mask: Label values (X, Y, Z), whole numbers, 0 for background.
        like: The scan that the mask belongs to.

    Raises:
        FileError: The name is not that of an image, or the file cannot be written.
        DataError: A value does not fit int32.
        GeometryError: The mask has another shape than the scan.
    """
    path = Path(path)
    image_ending(path)
    if mask.shape != like.array.shape[1:]:
        raise GeometryError(
            f"mask for {path} is {times(mask.shape)} voxels, its scan {times(like.array.shape[1:])}; "
            "bring it back to the grid of the scan first"
        )
    write_values(path, _smallest_integers(mask, str(path)), like.affine, like.spacing_mm, like.header)


def write_volume(path: Path | str, volume: Volume) -> None:
    """Write a scan of one channel as int16, rounded to whole numbers as scanners store them, all or nothing.

    The geometry is that of the volume's header, or its affine where it has none, as for `write_mask`.

    Raises:
        FileError: The name is not that of an image, or the file cannot be written.
        DataError: The scan has several channels, or an intensity does not fit int16.
    """
    path = Path(path)
    image_ending(path)
    if len(volume.array) != 1:
        raise DataError(f"scan for {path} has {len(volume.array)} channels; write each to a file of its own")
    rounded, limits = np.rint(volume.array[0]), np.iinfo(np.int16)
    low, high = float(rounded.min()), float(rounded.max())
    if low < limits.min or high > limits.max:
        raise DataError(
            f"scan for {path} has intensities from {low:g} to {high:g}; int16 holds {limits.min} to {limits.max}: "
            "scale them first"
        )
    write_values(path, rounded.astype(np.int16), volume.affine, volume.spacing_mm, volume.header)


def _check_affine(affine: Affine, name: str) -> None:
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or (affine[3] != (0, 0, 0, 1)).any():
        raise GeometryError(f"{name}: affine must be 4 x 4, finite, with last row 0 0 0 1, not {affine.tolist()}")
    spacing = np.asarray(_spacing_mm(affine))
    if spacing.max() > SPACINGS_MM[1] or 0 < spacing.min() < SPACINGS_MM[0]:
        raise GeometryError(f"{name}: spacing is {times(spacing)} mm; correct it in its header")
    if (spacing <= 0).any() or abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-6:
        raise GeometryError(f"{name}: affine {affine.tolist()} cannot be inverted; set qform or sform of its header")


def _check_header_fits(header: Header, shape: tuple[int, ...], affine: Affine) -> None:
    if isinstance(header, Nifti1Header):
        same_shape = tuple(header.get_data_shape()[:3]) == shape  # type: ignore[no-untyped-call]
        own_affine = header.get_best_affine()  # type: ignore[no-untyped-call]
    else:
        same_shape, own_affine = True, header.affine
    if not (same_shape and np.array_equal(own_affine, affine)):
        raise GeometryError("volume and its header have different grids; leave the header out (None) after resampling")


def _check_image_array(array: ImageArray) -> None:
    if array.ndim != 4 or array.dtype != np.float32 or 0 in array.shape:
        raise DataError(
            f"volume must be float32 with axes C X Y Z, none empty, not {array.dtype} of shape {array.shape}; "
            "add a channel axis or convert it"
        )
    _check_finite(array, "volume")


def _check_finite(array: Shaped[np.ndarray, "*shape"], name: str) -> None:
    planes = np.moveaxis(array, -1, 0) if array.ndim > 2 else [array]
    count = array.size - sum(int(np.count_nonzero(np.isfinite(plane))) for plane in planes)
    if count:
        raise DataError(
            f"{name}: {count} voxel(s) are NaN or infinite; replace them, for example by the background value"
        )


def _smallest_integers(values: Shaped[np.ndarray, "X Y Z"], name: str) -> MaskArray:
    low, high = values.min(initial=0), values.max(initial=0)
    for dtype in (np.uint8, np.int16, np.int32):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return values.astype(dtype, copy=False)
    raise DataError(f"{name}: label values from {low:g} to {high:g} do not fit 32 bits; renumber the labels")


def _spacing_mm(affine: Affine) -> tuple[float, float, float]:
    x, y, z = (math.hypot(*column) for column in affine[:3, :3].T)
    return x, y, z
