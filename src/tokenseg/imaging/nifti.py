"""NIfTI files, parsed strictly: the format behind `tokenseg.imaging.volume`, through which all others read.

A file that ends early, or whose gzip checksum is wrong, is refused whole, and no memory is taken on the word of a
header alone.
"""
# nibabel's methods carry no types:
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import gzip
import logging
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped
from nibabel.nifti1 import Nifti1Header, Nifti1Image
from nibabel.nifti2 import Nifti2Header, Nifti2Image
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from tokenseg.errors import DataError, FileError, GeometryError
from tokenseg.files import check_no_device, replaced_on_success
from tokenseg.shapes import Affine

_GEOMETRY_FIELDS = (
    *("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z", "xyzt_units"),
)
_UNITS_NOT_MM = {1: "metres", 3: "micrometres"}
_CHUNK_BYTES = 1 << 24
_ASIDE_BYTES = 1 << 28
"""Most that may stand before and behind the voxels; a gzip file of zeros holds a thousand times its size of it."""
# nibabel would print on stderr what it mends in a header. Not registered with `logging`, so nothing global changes.
_SILENT = logging.Logger("nifti", level=logging.CRITICAL + 1)  # noqa: LOG001


class NiftiHeader(NamedTuple):
    """What a header says.

    Attributes:
        shape: X Y Z, or X Y Z C.
        affine: From voxel indices to mm in RAS+ world coordinates.
        raw: The header itself.
    """

    shape: tuple[int, ...]
    affine: Affine
    raw: Nifti1Header


def read_header(path: Path) -> NiftiHeader:
    """Read the header alone; trailing axes of length one after the third are dropped.

    Raises:
        FileError: The file is missing, or not NIfTI.
        DataError: It is neither 3D nor 4D.
        GeometryError: Its spacing, affine or unit is not usable.
    """
    with _opened(path) as stream:
        return _parse_header(stream, path)


def read_values(path: Path) -> tuple[NiftiHeader, Shaped[np.ndarray, "*shape"]]:
    """Read the whole file: float64 where the header scales the values, else as stored.

    Raises:
        FileError: The file is missing, truncated, or not NIfTI.
        DataError: It is neither 3D nor 4D, or not of real numbers.
        GeometryError: Its spacing, affine or unit is not usable.
    """
    header, stored, scale = _read_stored(path)
    if scale is None:
        return header, stored
    slope, inter = scale
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is infinite, and refused as such
        scaled = stored.astype(np.float64)
        scaled *= slope
        scaled += inter
    return header, scaled


def read_intensities(path: Path) -> tuple[NiftiHeader, Float[np.ndarray, "*shape"]]:
    """Read the whole file as float32, scaled as `read_values` does it, a plane at a time; for the errors see there."""
    header, stored, scale = _read_stored(path)
    if scale is None:
        with np.errstate(over="ignore", invalid="ignore"):
            return header, stored.astype(np.float32)
    slope, inter = scale
    intensities = np.empty(stored.shape, np.float32, order="F")
    with np.errstate(over="ignore", invalid="ignore"):
        for index in np.ndindex(stored.shape[2:]):
            intensities[(..., *index)] = stored[(..., *index)].astype(np.float64) * slope + inter
    return header, intensities


def _read_stored(path: Path) -> tuple[NiftiHeader, Shaped[np.ndarray, "*shape"], tuple[float, float] | None]:
    """Voxels as stored, and the slope and intercept that scale them, if they do."""
    with _opened(path) as stream:
        header = _parse_header(stream, path)
        dtype = _real_dtype(header.raw, path)
        _skip(stream, int(header.raw["vox_offset"]) - int(header.raw["sizeof_hdr"]), path)
        content = _read_exactly(stream, math.prod(header.shape) * dtype.itemsize)
        behind = 0
        while piece := stream.read(_CHUNK_BYTES):  # to the end, where gzip has its checksum
            behind += len(piece)
            _check_aside(behind, path)
    stored = np.frombuffer(content, dtype).reshape(header.shape, order="F")
    slope, inter = header.raw.get_slope_inter()
    return header, stored, None if slope is None or (slope, inter) == (1, 0) else (slope, inter)


def write_values(path: Path, values: Shaped[np.ndarray, "*shape"], header: Nifti1Header) -> None:
    """Write numbers unscaled in their own type, with the geometry of `header` bit for bit and nothing else of it.

    Raises:
        FileError: The file cannot be written; what was there is then as it was.
    """
    written = type(header)()
    written["pixdim"][:4] = header["pixdim"][:4]
    for field in _GEOMETRY_FIELDS:
        written[field] = header[field]
    written.set_data_shape(values.shape)
    written.set_data_dtype(values.dtype)
    kind = Nifti2Image if isinstance(header, Nifti2Header) else Nifti1Image
    with replaced_on_success(path) as temporary:
        kind(values, None, written).to_filename(temporary)


def header_of_affine(affine: Affine, spacing_mm: tuple[float, float, float]) -> Nifti1Header:
    """Make a header that holds an affine, rounded to float32, as sform with code 1."""
    header = Nifti1Header()
    header.set_xyzt_units("mm")
    header["pixdim"][1:4] = spacing_mm
    header.set_sform(affine, code=1)
    return header


@contextmanager
def _opened(path: Path) -> Iterator[BufferedIOBase]:
    """Open a file, un-gzipped; all that a broken file can raise while it is read becomes a FileError."""
    check_no_device(path)
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as stream:
            yield stream
    except FileNotFoundError as error:
        raise FileError(f"{path} does not exist; check the path") from error
    except EOFError as error:
        raise FileError(f"{path} is truncated or empty; copy or download it again") from error
    except (zlib.error, gzip.BadGzipFile) as error:
        raise FileError(f"{path} is not an intact gzip file ({error}); copy or download it again") from error
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}; check the path") from error


def _read_exactly(stream: BufferedIOBase, count: int) -> bytearray:
    """Read in pieces, so that memory is taken for what is there and not for what a header declares."""
    content = bytearray()
    while len(content) < count:
        piece = stream.read(min(_CHUNK_BYTES, count - len(content)))
        if not piece:
            raise EOFError
        content += piece
    return content


def _skip(stream: BufferedIOBase, count: int, path: Path) -> None:
    """Pass over what stands between header and voxels, in pieces as `_read_exactly` does."""
    skipped = 0
    while skipped < count:
        skipped += len(_read_exactly(stream, min(_CHUNK_BYTES, count - skipped)))
        _check_aside(skipped, path)


def _check_aside(num_bytes: int, path: Path) -> None:
    if num_bytes > _ASIDE_BYTES:
        raise FileError(f"{path} holds over {_ASIDE_BYTES >> 20} MiB that are no voxels; convert it again")


def _parse_header(stream: BufferedIOBase, path: Path) -> NiftiHeader:
    start = bytes(_read_exactly(stream, 4))
    sizes = int.from_bytes(start, "little"), int.from_bytes(start, "big")
    kind = Nifti1Header if 348 in sizes else Nifti2Header if 540 in sizes else None
    if kind is None:
        raise FileError(f"{path} is not a NIfTI image, whatever its name says; convert it to NIfTI")
    block = start + bytes(_read_exactly(stream, kind.template_dtype.itemsize - len(start)))
    try:
        header = kind(block, check=False)
        if header["magic"].item() != kind.single_magic:
            raise HeaderDataError(f"magic is {header['magic'].item()!r}")
        if not np.isfinite(header["vox_offset"]):
            raise HeaderDataError(f"vox_offset is {header['vox_offset']}")
        _check_pixdim(header, path)
        header.check_fix(logger=_SILENT)
        header.get_slope_inter()
        shape = _shape(header, path)
    except (HeaderDataError, WrapStructError) as error:
        raise FileError(f"{path} is not a NIfTI image in one file ({error}); convert it again") from error
    return NiftiHeader(shape, _affine(header, path), header)


def _check_pixdim(header: Nifti1Header, path: Path) -> None:
    """Refuse a bad spacing where the affine depends on it; nibabel would quietly put 1 for 0."""
    spacing = header["pixdim"][1:4]
    if header["sform_code"] == 0 and not (np.isfinite(spacing).all() and (spacing > 0).all()):
        values = ", ".join(f"{value:g}" for value in spacing)
        raise GeometryError(f"{path}: spacing is {values} mm, must be positive; set pixdim in its header")


def _shape(header: Nifti1Header, path: Path) -> tuple[int, ...]:
    shape = tuple(int(size) for size in header.get_data_shape())
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    sizes = " x ".join(str(size) for size in shape)
    if any(size < 1 for size in shape):
        raise FileError(f"{path}: its header declares {sizes} voxels; the file is corrupt, convert it again")
    if len(shape) not in (3, 4):
        raise DataError(f"{path} is {len(shape)}D ({sizes}); expected is 3D, or 4D with channels last")
    return shape


def _real_dtype(header: Nifti1Header, path: Path) -> np.dtype[Any]:
    dtype = np.dtype(header.get_data_dtype())
    if dtype.kind not in "iuf":
        kind = "complex numbers" if dtype.kind == "c" else "colours"
        raise DataError(f"{path} holds {kind}; expected is one real number a voxel: export it as grey values")
    return dtype


def _affine(header: Nifti1Header, path: Path) -> Affine:
    unit = _UNITS_NOT_MM.get(int(header["xyzt_units"]) % 8)
    if unit:
        raise GeometryError(f"{path}: lengths are in {unit}; give them in mm and set xyzt_units in its header to mm")
    try:
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and overflow are refused by who checks the affine
            return np.asarray(header.get_best_affine(), dtype=np.float64)
    except (HeaderDataError, ValueError) as error:
        raise GeometryError(f"{path}: its header gives no affine ({error}); set qform or sform") from error
