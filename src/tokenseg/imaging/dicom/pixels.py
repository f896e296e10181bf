"""Intensities of DICOM slices: decoded, rescaled as the files say, in the order of the grid."""
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from jaxtyping import Shaped

from tokenseg.errors import FileError, GeometryError
from tokenseg.imaging.dicom.grid import stack_slices
from tokenseg.imaging.dicom.series import PLACE_TAGS, Frame, placements_of
from tokenseg.imaging.dicom_files import DicomFile, read_dataset
from tokenseg.imaging.formats import DicomSlices
from tokenseg.imaging.volume import Volume
from tokenseg.shapes import ImageArray


def read_frames(frames: Sequence[Frame], channel: str, what: str) -> Volume:
    """Read slices as one volume: axes column, row, slice, in the order of their positions.

    Args:
        frames: In any order.
        channel: Name of the volume's channel.
        what: How messages name the slices.

    Raises:
        FileError: A file is truncated or damaged, or its values are no plain intensities.
        GeometryError: The slices make no regular grid.
    """
    faults = sorted({frame.fault for frame in frames if frame.fault})
    if faults:
        raise FileError(f"{what}: {faults[0]}; export it as plain intensities")
    placements = placements_of(frames)
    if len(placements) < len(frames) or not placements:
        count = len(frames) - len(placements)
        raise GeometryError(
            f"{what}: {count} slice(s) do not say where they are ({PLACE_TAGS}); export the series again"
        )
    try:
        grid = stack_slices(placements)
    except GeometryError as error:
        raise GeometryError(f"{what}: {error}") from error
    ordered = [frames[index] for index in grid.order]
    header = DicomSlices(grid.affine, tuple((frame.file, frame.number) for frame in ordered))
    return Volume(_pixels(ordered, placements[0].size), grid.affine, (channel,), header)


def _pixels(frames: Sequence[Frame], size: tuple[int, int]) -> ImageArray:
    """Rescaled intensities (1, column, row, slice)."""
    rows, columns = size
    array = np.empty((1, columns, rows, len(frames)), np.float32)
    by_file: dict[DicomFile, list[int]] = defaultdict(list)
    for slot, frame in enumerate(frames):
        by_file[frame.file].append(slot)
    for file, slots in by_file.items():
        for slot, stored in zip(slots, _decoded(file, [frames[slot].number for slot in slots]), strict=True):
            if stored.shape != size:
                raise FileError(f"{file} holds {stored.shape} pixels, its header says {size}; export it again")
            frame = frames[slot]
            with np.errstate(over="ignore", invalid="ignore"):  # infinity is refused by Volume
                array[0, :, :, slot] = (stored.astype(np.float64) * frame.slope + frame.intercept).T
    return array


def _decoded(file: DicomFile, numbers: Sequence[int]) -> list[Shaped[np.ndarray, "rows columns"]]:
    from pydicom.pixels.utils import iter_pixels
    from pydicom.uid import JPEGLSLossless, JPEGLSNearLossless

    dataset = read_dataset(file, pixels=True)
    syntax = dataset.file_meta.TransferSyntaxUID
    # GDCM decodes JPEG-LS of few bits wrongly.
    plugin = "pyjpegls" if syntax in (JPEGLSLossless, JPEGLSNearLossless) else ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            decoded = iter_pixels(dataset, indices=list(numbers), raw=True, decoding_plugin=plugin)
            return [frame.copy() for frame in decoded]
    except MemoryError:
        raise
    except Exception as error:  # whatever a decoder may raise on damaged pixels
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise FileError(f"{file}: its pixels ({syntax.name}) cannot be decoded: {reason}; export it again") from error
