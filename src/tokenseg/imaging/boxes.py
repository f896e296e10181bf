"""The smallest box around what is wanted, in a plane or in a volume that comes a plane at a time."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool


def box_of(found: Bool[np.ndarray, "b c"]) -> tuple[slice, slice] | None:
    """The rectangle around all that is true; None where nothing is."""
    box = box_of_planes([found])
    return None if box is None else (box[0], box[1])


def box_of_planes(planes: Iterable[Bool[np.ndarray, "X Y"]]) -> tuple[slice, slice, slice] | None:
    """The box around all that is true in the planes of a volume along its last axis; None where nothing is."""
    found = [(plane.any(axis=1), plane.any(axis=0), plane.any()) for plane in planes]
    rows, columns, hits = zip(*found, strict=True)
    if not any(hits):
        return None
    ends = [np.flatnonzero(line) for line in (np.any(rows, axis=0), np.any(columns, axis=0), hits)]
    x, y, z = (slice(int(end[0]), int(end[-1]) + 1) for end in ends)
    return x, y, z
