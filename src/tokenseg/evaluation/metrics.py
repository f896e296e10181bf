"""Metrics of a mask: overlap, surface distance, volume and lesions, in millimetres and millilitres.

Every function takes boolean masks (X, Y, Z) and `spacing_mm`, the voxel size along each axis; masks are True inside.

Empty masks (frozen; a missed lesion never improves the mean of a score):

- Both masks empty, status `both_empty`: nothing was to be found and nothing was claimed. Every score is NaN, is left
  out of means, and is counted.
- Only the prediction empty, status `missed`: Dice, IoU, NSD and lesion F1 are 0; HD95 is the diagonal of the image in
  mm, which no pair of surfaces reaches; the relative volume error is 2, its largest value.
- Only the reference empty, status `false_positive`: the same values.

The volume error in ml is a signed bias and not a score: its mean may fall or rise by a missed lesion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float

from tokenseg.errors import ConfigError
from tokenseg.evaluation.lesions import LesionCounts, match_lesions
from tokenseg.evaluation.mask_pairs import PredictionMask, SpacingMm, check_same_shape, ratio
from tokenseg.evaluation.surfaces import SurfaceDistances, surface_distances_mm
from tokenseg.shapes import BoolMask

METRICS_VERSION = 1
"""Goes up whenever a definition in this file changes, so that numbers can be told apart."""


# The same distance computed along two paths differs in the last digits; a tolerance of 0.3 mm must include 3 x 0.1 mm.
_ROUNDING_MM = 1e-6


Status: TypeAlias = Literal["both_present", "both_empty", "missed", "false_positive"]


class VoxelCounts(NamedTuple):
    """Voxels by agreement of the two masks."""

    true_positive: int
    false_positive: int
    false_negative: int
    true_negative: int

    @property
    def dice(self) -> float:
        """See `dice`."""
        return ratio(2 * self.true_positive, 2 * self.true_positive + self.false_positive + self.false_negative)

    @property
    def iou(self) -> float:
        """See `iou`."""
        return ratio(self.true_positive, self.true_positive + self.false_positive + self.false_negative)

    @property
    def relative_volume_error(self) -> float:
        """See `relative_volume_error`."""
        size_sum = 2 * self.true_positive + self.false_positive + self.false_negative
        return ratio(2 * abs(self.false_positive - self.false_negative), size_sum)


class Interval(NamedTuple):
    """A mean with its 95 % bootstrap interval, in the unit of the values."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class CaseLabelScore:
    """All measures of one label of one case; NaN stands for "not defined", see the policy of this module."""

    status: Status
    """Which of the two masks is empty; `both_present` also where they do not touch."""
    dice: float
    """[0, 1]."""
    iou: float
    """[0, 1]."""
    hd95_mm: float
    """[0, diagonal of the image]."""
    nsd: float
    """Normalised surface Dice at the tolerance given, [0, 1]."""
    reference_ml: float
    prediction_ml: float
    volume_error_ml: float
    """Prediction less reference, signed; always defined."""
    relative_volume_error: float
    """Unsigned and symmetric, [0, 2]."""
    lesion_f1: float
    """[0, 1]."""
    lesions: LesionCounts
    voxels: VoxelCounts


def dice(reference: BoolMask, prediction: PredictionMask) -> float:
    """Dice coefficient, 2 |A and B| / (|A| + |B|), in [0, 1]; NaN if both masks are empty.

    Raises:
        GeometryError: The masks differ in shape.
    """
    return _count_voxels(reference, prediction).dice


def iou(reference: BoolMask, prediction: PredictionMask) -> float:
    """Intersection over union, in [0, 1]; NaN if both masks are empty.

    Raises:
        GeometryError: The masks differ in shape.
    """
    return _count_voxels(reference, prediction).iou


def hd95_mm(reference: BoolMask, prediction: PredictionMask, spacing_mm: SpacingMm) -> float:
    """Hausdorff distance at the 95th percentile: the larger of the two directed percentiles, in mm.

    Returns:
        In [0, diagonal of the image]. One empty mask gives the diagonal, two give NaN.

    Raises:
        GeometryError: The masks differ in shape, or a spacing is not positive.
    """
    distances = surface_distances_mm(reference, prediction, spacing_mm)
    return _hd95_mm(distances, image_diagonal_mm(reference.shape, spacing_mm))


def normalised_surface_dice(
    reference: BoolMask, prediction: PredictionMask, spacing_mm: SpacingMm, tolerance_mm: float
) -> float:
    """Share of both surfaces that lies within `tolerance_mm` of the other surface.

    Surface voxels are counted, each with the same weight whatever the spacing.

    Returns:
        In [0, 1]. One empty mask gives 0, two give NaN.

    Raises:
        GeometryError: The masks differ in shape, or a spacing is not positive.
        ConfigError: `tolerance_mm` is negative or not finite.
    """
    check_tolerance(tolerance_mm)
    return _surface_dice(surface_distances_mm(reference, prediction, spacing_mm), tolerance_mm)


def image_diagonal_mm(shape: tuple[int, ...], spacing_mm: SpacingMm) -> float:
    """Length of the diagonal of the whole image, in mm: larger than any distance between two voxel centres."""
    return float(np.linalg.norm(np.asarray(shape) * np.asarray(spacing_mm)))


def volume_ml(mask: BoolMask, spacing_mm: SpacingMm) -> float:
    """Volume of a mask: voxels times voxel volume, in ml; 0 if empty."""
    return int(np.count_nonzero(mask)) * float(np.prod(spacing_mm)) / 1000.0


def volume_error_ml(reference: BoolMask, prediction: PredictionMask, spacing_mm: SpacingMm) -> float:
    """Volume of the prediction less that of the reference, in ml; negative where too little was found.

    Raises:
        GeometryError: The masks differ in shape.
    """
    check_same_shape(reference, prediction)
    return volume_ml(prediction, spacing_mm) - volume_ml(reference, spacing_mm)


def relative_volume_error(reference: BoolMask, prediction: PredictionMask) -> float:
    """Unsigned volume error by the mean of the two volumes, 2 |P - R| / (P + R), in [0, 2].

    Unlike the error by the reference's volume, it is bounded, defined for an empty reference, and largest where one
    mask is empty, so that a missed lesion is never a good volume. Two empty masks give NaN.

    Raises:
        GeometryError: The masks differ in shape.
    """
    return _count_voxels(reference, prediction).relative_volume_error


def score_label(
    reference: BoolMask, prediction: PredictionMask, spacing_mm: SpacingMm, tolerance_mm: float
) -> CaseLabelScore:
    """Measure one label of one case in every way of this module.

    Args:
        reference: What is there.
        prediction: What was found, on the same grid.
        spacing_mm: Voxel size along each axis; may be anisotropic.
        tolerance_mm: Distance up to which two surfaces agree, for the normalised surface Dice.

    Raises:
        GeometryError: The masks differ in shape, or a spacing is not positive.
        ConfigError: `tolerance_mm` is negative or not finite.
    """
    check_tolerance(tolerance_mm)
    voxels = _count_voxels(reference, prediction)
    distances = surface_distances_mm(reference, prediction, spacing_mm)
    lesions = match_lesions(reference, prediction)
    return CaseLabelScore(
        status=_status(distances),
        dice=voxels.dice,
        iou=voxels.iou,
        hd95_mm=_hd95_mm(distances, image_diagonal_mm(reference.shape, spacing_mm)),
        nsd=_surface_dice(distances, tolerance_mm),
        reference_ml=volume_ml(reference, spacing_mm),
        prediction_ml=volume_ml(prediction, spacing_mm),
        volume_error_ml=volume_error_ml(reference, prediction, spacing_mm),
        relative_volume_error=voxels.relative_volume_error,
        lesion_f1=lesions.f1,
        lesions=lesions,
        voxels=voxels,
    )


def bootstrap_interval(values: Float[np.ndarray, " n"], *, seed: int = 0, resamples: int = 2000) -> Interval:
    """Mean and 95 % percentile-bootstrap interval over cases.

    Args:
        values: One value a case; NaN values are left out.
        seed: Of the resampling; the same values and seed give the same interval.
        resamples: Bootstrap samples drawn.

    Returns:
        NaNs if no value is left; one value is its own interval.
    """
    present = values[~np.isnan(values)]
    if present.size == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    draws = np.random.default_rng(seed).integers(0, present.size, size=(resamples, present.size))
    low, high = np.percentile(present[draws].mean(axis=1), (2.5, 97.5))
    return Interval(float(present.mean()), float(low), float(high))


def check_tolerance(tolerance_mm: float) -> None:
    """Refuse a tolerance that is no length.

    Raises:
        ConfigError: `tolerance_mm` is negative or not finite.
    """
    if not (np.isfinite(tolerance_mm) and tolerance_mm >= 0):
        raise ConfigError(f"surface tolerance is {tolerance_mm} mm; give a finite number of millimetres, 0 or more")


def _count_voxels(reference: BoolMask, prediction: PredictionMask) -> VoxelCounts:
    check_same_shape(reference, prediction)
    both = int(np.count_nonzero(reference & prediction))
    only_prediction = int(np.count_nonzero(prediction)) - both
    only_reference = int(np.count_nonzero(reference)) - both
    return VoxelCounts(both, only_prediction, only_reference, reference.size - both - only_prediction - only_reference)


def _status(distances: SurfaceDistances) -> Status:
    has_reference, has_prediction = (directed_mm.size > 0 for directed_mm in distances)
    if has_reference:
        return "both_present" if has_prediction else "missed"
    return "false_positive" if has_prediction else "both_empty"


def _hd95_mm(distances: SurfaceDistances, diagonal_mm: float) -> float:
    status = _status(distances)
    if status == "both_empty":
        return float("nan")
    if status != "both_present":
        return diagonal_mm
    return max(float(np.percentile(directed_mm, 95)) for directed_mm in distances)


def _surface_dice(distances: SurfaceDistances, tolerance_mm: float) -> float:
    both_ways_mm = np.concatenate(distances)
    return float(np.mean(both_ways_mm <= tolerance_mm + _ROUNDING_MM)) if both_ways_mm.size else float("nan")
