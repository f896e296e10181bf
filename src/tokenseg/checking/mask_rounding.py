"""The whole numbers that a mask of fractions was meant to hold, where rounding gives them; else what to do instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from tokenseg.config import Label

ROUNDING = 0.01
"""How far from whole numbers the values of a mask of several labels may be to be rounded."""
_NOISE = 1e-5
"""What computing with float32 leaves in place of 0, in many voxels alike."""
_LABEL_SHARE = 0.1
"""A value beside 0 in so many voxels, of those that stay foreground, is a label and not left by interpolation."""
_SCALES = (255, 65535)
"""What masks are divided by where the range of a type is stored as 0 to 1."""


class RoundedMask(NamedTuple):
    """A mask in whole numbers."""

    values: Shaped[np.ndarray, "*shape"]
    """Rounded; NaN and infinity are 0."""
    is_whole: bool
    """Whether it held whole numbers as it was."""
    remedy: str = ""
    """What to do where rounding is wrong; empty where it is right."""
    loses_labels: bool = False
    """Whether rounding makes background of labels, so that `values` do not tell what is in the mask."""


def round_mask(values: Shaped[np.ndarray, "*shape"], labels: Sequence[Label]) -> RoundedMask:
    """Round a mask, and say whether that is right for a dataset of these labels."""
    if np.issubdtype(values.dtype, np.integer):
        return RoundedMask(values, is_whole=True)
    known = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    whole = np.rint(known)
    if np.array_equal(whole, values):
        return RoundedMask(whole, is_whole=True)
    if _loses_labels(known, whole):
        return RoundedMask(whole, is_whole=False, remedy=_scaling(known, labels), loses_labels=True)
    if len(labels) > 1 and float(np.abs(known - whole).max()) > ROUNDING:
        # Between two labels lies a third one, so rounding would invent it.
        remedy = "it was interpolated: export it again, with the nearest value"
        return RoundedMask(whole, is_whole=False, remedy=remedy)
    return RoundedMask(whole, is_whole=False)


def _loses_labels(known: Float[np.ndarray, "*shape"], whole: Float[np.ndarray, "*shape"]) -> bool:
    """Whether all foreground rounds to background, or a value beside 0 does that many voxels hold."""
    foreground = np.count_nonzero(whole)
    if foreground == 0:
        return bool(known.any())
    beside = known[(whole == 0) & (np.abs(known) <= ROUNDING)]
    values, counts = np.unique(beside, return_counts=True)
    if not len(counts):
        return False
    counts[np.argmax(counts)] = 0  # the background, whatever an offset in the header makes of it
    return bool((counts[np.abs(values) > _NOISE] >= _LABEL_SHARE * foreground).any())


def _scaling(known: Float[np.ndarray, "*shape"], labels: Sequence[Label]) -> str:
    """By what to multiply a mask to have the values of labels, in words."""
    listed = {value for label in labels for value in label.values}
    found = np.unique(known[known != 0]).astype(np.float64)
    if len(found) <= len(listed):
        for scale in (*_SCALES, *(value / float(np.abs(found).min()) for value in sorted(listed))):
            scaled = np.rint(found * scale)
            if np.allclose(found * scale, scaled, rtol=0, atol=ROUNDING) and set(scaled.tolist()) <= listed:
                return f"it looks divided by {scale:.6g}: multiply it by {scale:.6g} and round it, or export it again"
    return "multiply it by what it was divided by and round it, or export it again as whole numbers"
