"""Probabilities on a scan's own grid, on disk as they come: float16 in a `.npy` file, never all of them in memory.

The file holds (L, X, Y, Z) in the scan's axes as stored, like its mask: background and the labels, or the regions of a
model that has these. Rows are planes across any axis. Of NumPy's two orders in memory the one is taken in which a row
is not scattered voxel by voxel.
"""

from __future__ import annotations

import math
from contextlib import suppress
from functools import reduce
from itertools import product
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float16
from torch import Tensor

from tokenseg.files import DAMAGED_ARRAY, put_in_place, temporary_beside, writing
from tokenseg.outputs import Outputs
from tokenseg.plan_grid.preprocess import GridRecord

_DTYPE = np.dtype("<f2")


def is_probabilities(path: Path) -> bool:
    """Whether a file is of the form that is written here."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except DAMAGED_ARRAY:
        return False
    return isinstance(array, np.ndarray) and (array.dtype, array.ndim) == (_DTYPE, 4)


class ProbabilityFile:
    """A `.npy` file that is filled row by row, and then waits for its mask under a temporary name.

    Args:
        path: Where it goes in the end.
        record: Of the scan.
        num_outputs: L.
        meaning: Of these outputs.
        temperature: By what logits are divided (`inference/temperature.py`).

    Raises:
        FileError: It cannot be written, or the disk is full.
    """

    def __init__(self, path: Path, record: GridRecord, num_outputs: int, meaning: Outputs, temperature: float) -> None:
        self._path, self._temporary = path, temporary_beside(path)
        self._record, self._meaning, self._temperature = record, meaning, temperature
        shape = (num_outputs, *record.native_shape)
        # In Fortran's order the last axis is the slowest, in C's the first: rows across it lie in few pieces.
        self._fortran = record.axes.index(record.order[0]) == len(record.axes) - 1
        self._stored = shape[::-1] if self._fortran else shape
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._temporary.open("w+b")

    def begin(self) -> None:
        """Write what comes before the rows."""
        shape = self._stored[::-1] if self._fortran else self._stored
        header = {"descr": np.lib.format.dtype_to_descr(_DTYPE), "fortran_order": self._fortran, "shape": shape}
        with writing(self._path):
            np.lib.format.write_array_header_1_0(self._file, header)
            self._start = self._file.tell()
            self._file.truncate(self._start + math.prod(shape) * _DTYPE.itemsize)
            if self._record.crop_shape != self._record.canonical_shape and self._meaning.first_label:
                self._fill_background()

    def end(self) -> None:
        """Have all rows in the file."""
        with writing(self._path):
            self._file.close()

    def place(self) -> None:
        """Give the file its name.

        Raises:
            FileError: That fails.
        """
        put_in_place(self._temporary, self._path)

    def discard(self) -> None:
        """Remove it, unless it has its name."""
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self._temporary.unlink(missing_ok=True)

    def write(self, number: int, stretch: slice, logits: Float[Tensor, "L b c"]) -> None:
        """Write a stretch of a row from logits on the scan's own grid; both are counted within what was kept of it."""
        values = self._meaning.probabilities(logits / self._temperature).numpy().astype(_DTYPE)
        record = self._record
        kept = (slice(number, number + 1), stretch, slice(0, values.shape[2]))
        places = [record.order.index(axis) for axis in record.axes]
        values = values[:, np.newaxis].transpose(0, *(place + 1 for place in places))
        starts = [0]
        for stored, (axis, place) in enumerate(zip(record.axes, places, strict=True)):
            start, stop = (record.crop_start[axis] + end for end in (kept[place].start, kept[place].stop))
            if record.flipped[stored]:
                start = record.native_shape[stored] - stop
                values = np.flip(values, stored + 1)
            starts.append(start)
        self._write_box(starts, values)

    def _write_box(self, starts: list[int], values: Float16[np.ndarray, "L _ _ _"]) -> None:
        """Write a box that begins at `starts`, in as few pieces as it has in the file."""
        if self._fortran:
            starts, values = starts[::-1], values.T
        whole = [count == size for count, size in zip(values.shape, self._stored, strict=True)]
        split = max((axis for axis, is_whole in enumerate(whole) if not is_whole), default=0)
        strides = [math.prod(self._stored[axis + 1 :]) for axis in range(len(starts))]
        along = [
            (start + np.arange(count)) * stride
            for start, count, stride in zip(starts, values.shape, strides, strict=True)
        ]
        first = sum(start * stride for start, stride in zip(starts[split:], strides[split:], strict=True))
        offsets = reduce(np.add.outer, along[:split], np.array(first)).ravel()
        pieces = np.ascontiguousarray(values).reshape(len(offsets), -1)
        with writing(self._path):
            for offset, piece in zip(offsets.tolist(), pieces, strict=True):
                self._file.seek(self._start + offset * _DTYPE.itemsize)
                self._file.write(piece.data)

    def _fill_background(self) -> None:
        """Before rows come: what was cropped of the scan is background."""
        self._file.seek(self._start)
        for index in product(*map(range, self._stored[:2])):
            plane = np.zeros(self._stored[2:], _DTYPE)
            if self._fortran:
                plane[..., 0] = 1
            elif index[0] == 0:
                plane[:] = 1
            self._file.write(plane.data)
