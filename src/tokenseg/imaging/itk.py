"""NRRD and MetaImage files through SimpleITK: formats behind `tokenseg.imaging.volume`, through which all others read.

SimpleITK reads and writes; what it would take on trust is checked before: a header may not name other files than its
own voxels, nor more voxels than its file can hold.
"""
# SimpleITK's functions carry no types:
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import errno
import math
import os
import re
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from tokenseg.errors import ConfigError, DataError, FileError, GeometryError
from tokenseg.files import check_no_device, replaced_on_success
from tokenseg.messages import times
from tokenseg.shapes import LPS_TO_RAS, Affine

ITK_ENDINGS = (".nrrd", ".mha", ".mhd")

_HEADER_LIMIT = 1 << 20
_DEFLATE_LIMIT = 1032
"""No gzip file holds more than so many times its own size."""
_CHUNK_BYTES = 1 << 24
_ANY_ZLIB = 47
"""For zlib: a gzip stream, or one of its own, with a window of any size."""
_LINE_LIMIT = 512
"""Bytes of a NRRD field; SimpleITK overruns a buffer on twice as many, and the process dies of it."""
_MAX_AXES = 4
"""SimpleITK overruns an array where a MetaImage declares many, and the process dies of it."""


class ItkGeometry(NamedTuple):
    """What places an image in the world, as the file has it: millimetres, LPS+."""

    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]
    direction: tuple[float, ...]
    """3 x 3 cosines, row by row."""

    @property
    def affine(self) -> Affine:
        """From voxel indices to mm in RAS+ world coordinates."""
        lps = np.eye(4)
        lps[:3, :3] = np.reshape(self.direction, (3, 3)) * self.spacing
        lps[:3, 3] = self.origin
        return LPS_TO_RAS @ lps


class ItkHeader(NamedTuple):
    """What a header says.

    Attributes:
        shape: X Y Z, or X Y Z C.
        geometry: Place in the world.
    """

    shape: tuple[int, ...]
    geometry: ItkGeometry


def geometry_of_affine(affine: Affine, spacing_mm: tuple[float, float, float]) -> ItkGeometry:
    """Turn an affine into what an ITK header holds."""
    lps = LPS_TO_RAS @ affine
    cosines = lps[:3, :3] / spacing_mm
    x, y, z = (float(value) for value in lps[:3, 3])
    return ItkGeometry(spacing_mm, (x, y, z), tuple(float(value) for value in cosines.ravel()))


def read_header(path: Path) -> ItkHeader:
    """Read the header alone.

    Raises:
        FileError: The file is missing, or not of its format.
        DataError: It is neither 3D nor 4D, or not of real numbers.
        ConfigError: SimpleITK is not installed.
    """
    return _header(_opened(path), path)


def read_values(path: Path) -> tuple[ItkHeader, Shaped[np.ndarray, "*shape"]]:
    """Read the whole file, values as stored; several values a voxel come on a last axis.

    Raises:
        FileError: The file is missing, truncated, or not of its format.
        DataError: It is neither 3D nor 4D, or not of real numbers.
        ConfigError: SimpleITK is not installed.
    """
    reader = _opened(path)
    header = _header(reader, path)
    library = _library()
    try:
        stored = library.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        raise FileError(f"{path} is truncated or damaged ({_reason(error)}); copy or download it again") from error
    # numpy's axes run the other way round, save that of several values a voxel, which is last in both.
    spatial = tuple(reversed(range(reader.GetDimension())))
    return header, stored.transpose(*spatial, *range(len(spatial), stored.ndim))


def write_values(path: Path, values: Shaped[np.ndarray, "*shape"], geometry: ItkGeometry) -> None:
    """Write numbers in their own type, compressed, with exactly this geometry.

    Raises:
        FileError: The file cannot be written; what was there is then as it was. Or it would be a .mhd, which is two
            files and cannot be replaced at once.
        ConfigError: SimpleITK is not installed.
    """
    if path.name.endswith(".mhd"):
        raise FileError(f"{path} would be two files, a header and its voxels; name the mask .mha, the same in one file")
    library = _library()
    axes = [2, 1, 0, *range(3, values.ndim)]  # several values a voxel stay last
    ordered = np.ascontiguousarray(values.transpose(axes))
    image = library.GetImageFromArray(ordered, isVector=values.ndim > 3)
    image.SetSpacing(geometry.spacing)
    image.SetOrigin(geometry.origin)
    image.SetDirection(geometry.direction)
    with replaced_on_success(path) as temporary:
        try:
            library.WriteImage(image, str(temporary), useCompression=True)
        except RuntimeError as error:
            raise OSError(_reason(error)) from error
        # SimpleITK says nothing where the disk is full.
        if not _is_whole(temporary, ordered.data.cast("B")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _is_whole(path: Path, voxels: memoryview) -> bool:
    """Whether a file that was written, compressed, holds these bytes to the last one of its checksum."""
    content = path.read_bytes()
    rest = content.partition(b"\n\n" if path.name.endswith(".nrrd") else b"ElementDataFile = LOCAL\n")[2]
    stream, done = zlib.decompressobj(_ANY_ZLIB), 0
    try:
        while not stream.eof:
            piece = stream.decompress(rest, _CHUNK_BYTES)
            rest = stream.unconsumed_tail
            if (not piece and not stream.eof) or voxels[done : done + len(piece)] != piece:
                return False
            done += len(piece)
    except zlib.error:
        return False
    return done == len(voxels)


def _library() -> Any:  # noqa: ANN401 - a module
    try:
        import SimpleITK
    except ImportError as error:
        raise ConfigError(
            f"{', '.join(ITK_ENDINGS)} files need the extra 'itk': pip install 'tokenseg[itk]'"
        ) from error
    return SimpleITK


def _opened(path: Path) -> Any:  # noqa: ANN401 - SimpleITK's reader
    """A reader that has read the header."""
    limit_bytes = _check_text(path)
    library = _library()
    reader = library.ImageFileReader()
    # Left to itself, SimpleITK goes by the ending, and does not know it in capitals.
    reader.SetImageIO("NrrdImageIO" if path.name.lower().endswith(".nrrd") else "MetaImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise FileError(f"{path} is not a {path.suffix} image ({_reason(error)}); export it again") from error
    declared = math.prod(reader.GetSize()) * reader.GetNumberOfComponents()
    # SimpleITK takes memory for all of them before it reads the first.
    if declared * _value_bytes(reader) > limit_bytes:
        raise FileError(f"{path} is truncated: its header declares {declared} values; copy or download it again")
    return reader


def data_file(path: Path) -> Path:
    """File with the voxels of a .mhd.

    Raises:
        FileError: It cannot be read, or names none, or one that is not beside it.
    """
    check_no_device(path)
    try:
        with path.open("rb") as stream:
            return _meta_file(stream.read(_HEADER_LIMIT), path)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}; check the path") from error


def _check_text(path: Path) -> int:
    """The most bytes that the voxels in the file can be, after a look at the header's text.

    A header may name another file for the voxels: only that of a .mhd, and only beside it.
    """
    check_no_device(path)
    try:
        with path.open("rb") as stream:
            start = stream.read(_HEADER_LIMIT)
        is_nrrd = path.name.lower().endswith(".nrrd")
        if not start.startswith(b"NRRD0" if is_nrrd else (b"ObjectType", b"NDims", b"Comment")):
            raise FileError(f"{path} is not a {path.suffix} image, whatever its name says; convert it")
        voxels = _nrrd_file(start, path) if is_nrrd else _meta_file(start, path)
        packed = rb"^encoding:\s*gz" if is_nrrd else rb"^\s*CompressedData\s*[=:]\s*[Tt1]"
        is_packed = re.search(packed, start, flags=re.MULTILINE | re.IGNORECASE)
        return voxels.stat().st_size * (_DEFLATE_LIMIT if is_packed else 1)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}; check the path") from error


def _nrrd_file(start: bytes, path: Path) -> Path:
    header, *rest = re.split(rb"\r?\n\r?\n", start, maxsplit=1)
    if not rest:
        raise FileError(f"{path} has no end of its header within {_HEADER_LIMIT} bytes; export it again")
    if any(len(line) > _LINE_LIMIT and _is_field(line) for line in header.splitlines()):
        raise FileError(f"{path} has a line of more than {_LINE_LIMIT} bytes in its header; export it again")
    fields = dict(line.lower().split(b":", 1) for line in header.splitlines()[1:] if b":" in line and line[:1] != b"#")
    if {b"data file", b"datafile"} & set(fields):
        raise FileError(f"{path} has its voxels in another file; save it as one .nrrd file")
    units = set(re.findall(rb'"([^"]*)"', fields.get(b"space units", b"")))
    if units - {b"mm", b"millimeter", b"millimeters", b""}:
        shown = b", ".join(sorted(units)).decode(errors="replace")
        raise GeometryError(f"{path}: lengths are in {shown}; give them in mm and set space units to mm")
    if b"nan" in fields.get(b"spacings", b""):
        raise GeometryError(f"{path}: an axis has no spacing (nan); set spacings, or space directions, in its header")
    return path


def _is_field(line: bytes) -> bool:
    """Whether a line of a NRRD header is neither a comment nor a key with a value of somebody's own."""
    key, is_own, _ = line.partition(b":=")
    return not line.startswith(b"#") and (not is_own or b": " in key)


def _meta_file(start: bytes, path: Path) -> Path:
    axes = re.findall(rb"NDims\s*[=:]\s*(\S*)", start)
    if any(not re.fullmatch(rb"[0-9]", count) or int(count) > _MAX_AXES for count in axes):
        raise FileError(f"{path} declares a number of axes (NDims) that is not 1 to {_MAX_AXES}; export it again")
    named = re.findall(rb"^\s*ElementDataFile\s*[=:](.*)$", start, flags=re.MULTILINE)
    if len(named) != 1:
        raise FileError(f"{path} names {len(named)} files for its voxels (ElementDataFile), not 1; export it again")
    name = named[0].strip().decode("utf-8", errors="replace")
    if name.upper() == "LOCAL":
        return path
    beside = path.with_name(Path(name).name) if Path(name).name else path
    is_beside = name == beside.name and "\\" not in name and _real_folder(beside) == _real_folder(path)
    # A list, or a pattern, would name files of its own.
    is_several = name.upper().startswith("LIST") or "%" in name
    if path.name.lower().endswith(".mhd") and is_beside and not is_several:
        return beside
    # Which file is not said: its name may be a patient's, and hidden names are those of the case's own files.
    raise FileError(
        f"{path} has its voxels in another folder or in several files; save it as one .mha file, or as a .mhd beside "
        "its data"
    )


def _real_folder(path: Path) -> str:
    return os.path.dirname(os.path.realpath(path))  # noqa: PTH120 - Path.resolve raises where links make a loop


def _value_bytes(reader: Any) -> int:  # noqa: ANN401
    bits = re.search("([0-9]+)-bit", _library().GetPixelIDValueAsString(reader.GetPixelID()))
    return int(bits[1]) // 8 if bits else 1


def _header(reader: Any, path: Path) -> ItkHeader:  # noqa: ANN401
    size, channels = reader.GetSize(), reader.GetNumberOfComponents()
    shape = (*size, channels) if channels > 1 else tuple(size)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (3, 4) or min(shape) < 1:
        sizes = " x ".join(map(str, shape))
        raise DataError(f"{path} is {len(shape)}D ({sizes}); expected is 3D, or 4D with channels last")
    library = _library()
    if "complex" in library.GetPixelIDValueAsString(reader.GetPixelID()):
        raise DataError(f"{path} holds complex numbers; expected is one real number a voxel: export it as grey values")
    # Of a 4D image, the first three axes are space.
    dimension = len(size)
    direction = np.reshape(reader.GetDirection(), (dimension, dimension))[:3, :3]
    if dimension < 3:
        raise GeometryError(f"{path} is flat; expected is a 3D image")
    spacing, origin = reader.GetSpacing()[:3], reader.GetOrigin()[:3]
    if min(spacing) <= 0:  # SimpleITK reads it, and would not write it
        raise GeometryError(f"{path}: spacing is {times(spacing)} mm, must be positive; correct it in its header")
    return ItkHeader(shape, ItkGeometry(spacing, origin, tuple(float(value) for value in direction.ravel())))


def _reason(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
