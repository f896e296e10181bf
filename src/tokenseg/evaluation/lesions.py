"""Lesions of a mask, matched one to one with those of a reference."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import ndimage

from tokenseg.evaluation.mask_pairs import PredictionMask, bounding_box, check_same_shape, ratio
from tokenseg.shapes import BoolMask

_NEIGHBOURS_26 = np.ones((3, 3, 3), dtype=bool)
LESION_MIN_IOU = 0.1
"""A predicted lesion finds a reference lesion if the two overlap in at least this share of their union."""


class LesionCounts(NamedTuple):
    """Lesions found, invented and overlooked; see `match_lesions` for the matching rule."""

    true_positive: int
    false_positive: int
    false_negative: int

    @property
    def f1(self) -> float:
        """2 TP / (2 TP + FP + FN), in [0, 1]; NaN where there are no lesions at all."""
        return ratio(2 * self.true_positive, 2 * self.true_positive + self.false_positive + self.false_negative)


def match_lesions(reference: BoolMask, prediction: PredictionMask) -> LesionCounts:
    """Count lesions found, invented and overlooked; the F1 is a property of the result.

    Rule "greedy one-to-one at IoU 0.1": lesions are the 26-connected components of each mask. Pairs of a reference and
    a predicted lesion that overlap in at least `LESION_MIN_IOU` of their union are matched one to one, the largest IoU
    first (ties: the lesion that comes first in the array). A matched pair is a true positive, a predicted lesion
    without a partner a false positive, a reference lesion without one a false negative. One prediction that joins two
    lesions thus finds one of them at most. No lesion is too small to count.

    Raises:
        GeometryError: The masks differ in shape.
    """
    check_same_shape(reference, prediction)
    box = bounding_box(reference | prediction)
    reference_labels, num_reference = ndimage.label(reference[box], structure=_NEIGHBOURS_26)
    prediction_labels, num_prediction = ndimage.label(prediction[box], structure=_NEIGHBOURS_26)
    found = _count_matches(_component_ious(reference_labels, prediction_labels))
    return LesionCounts(found, num_prediction - found, num_reference - found)


def _component_ious(
    reference_labels: Int[np.ndarray, "X Y Z"], prediction_labels: Int[np.ndarray, "X Y Z"]
) -> Float[np.ndarray, "n 3"]:
    """Reference label, predicted label and IoU of each pair of components that share a voxel."""
    reference_sizes = np.bincount(reference_labels.ravel())
    prediction_sizes = np.bincount(prediction_labels.ravel())
    shared = (reference_labels > 0) & (prediction_labels > 0)
    pairs, overlap = np.unique(
        np.stack([reference_labels[shared], prediction_labels[shared]], axis=1), axis=0, return_counts=True
    )
    union = reference_sizes[pairs[:, 0]] + prediction_sizes[pairs[:, 1]] - overlap
    return np.column_stack([pairs, overlap / union])


def _count_matches(pairs: Float[np.ndarray, "n 3"]) -> int:
    """Greedy one-to-one matching by falling IoU; the sort is stable, so ties keep the order of the array."""
    candidates = pairs[pairs[:, 2] >= LESION_MIN_IOU]
    taken_reference: set[int] = set()
    taken_prediction: set[int] = set()
    for reference_label, prediction_label, _ in candidates[np.argsort(-candidates[:, 2], kind="stable")]:
        if reference_label not in taken_reference and prediction_label not in taken_prediction:
            taken_reference.add(reference_label)
            taken_prediction.add(prediction_label)
    return len(taken_reference)
