"""Augmentation by MONAI: each window's random choices follow from one seed, so that any step can be repeated alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TypeAlias

from jaxtyping import Float, UInt8
from monai.transforms.compose import Compose
from monai.transforms.intensity.dictionary import (
    RandAdjustContrastd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityd,
)
from monai.transforms.spatial.dictionary import RandAffined, RandFlipd, RandSimulateLowResolutiond
from torch import Tensor

from tokenseg.config import Plan
from tokenseg.outputs import outputs_of

Window: TypeAlias = dict[str, Tensor]
Augmentation: TypeAlias = Callable[[Window, int], Window]


def build_augmentation(plan: Plan) -> Augmentation:
    """Make the augmentation for a plan: (window with `image` and `labels`, seed) -> augmented window.

    Rotation and scaling, left-right flip, noise, blur, brightness, contrast, coarser resolution; all of them lighter
    than customary in the field, where trainings are much longer (decision 0015). Labels are interpolated, too, one map
    each. Only left-right is flipped: along the other axes anatomy is not symmetric, and labels such as anterior and
    posterior would swap their meaning. Where labels are named both left and right, nothing is flipped. Rotation out of
    the plane is left out where slices are thick, or few: the window would be turned out of the image.
    """
    both, image = ["image", "labels"], ["image"]
    transforms = Compose(
        [
            RandAffined(
                both,
                prob=0.3,
                rotate_range=_rotation_rad(plan),
                scale_range=(0.1, 0.1, 0.1),
                mode="bilinear",
                padding_mode="zeros",
            ),
            RandFlipd(both, prob=0.0 if _is_sided(plan) else 0.5, spatial_axis=0),
            RandGaussianNoised(image, prob=0.05, std=0.2),
            RandGaussianSmoothd(image, prob=0.05, sigma_x=(0.5, 1.0), sigma_y=(0.5, 1.0), sigma_z=(0.5, 1.0)),
            RandScaleIntensityd(image, prob=0.1, factors=0.2),
            RandAdjustContrastd(image, prob=0.1, gamma=(0.7, 1.5), retain_stats=True),
            RandSimulateLowResolutiond(image, prob=0.05, zoom_range=(0.5, 1.0)),
        ]
    )

    outputs = outputs_of(plan)

    def augment(window: Window, seed: int) -> Window:
        transforms.set_random_state(seed=seed)
        maps = outputs.label_maps(window["labels"], len(plan.labels))
        result = transforms({"image": window["image"], "labels": maps})
        labels = outputs.labels_of(_plain(result["labels"]))
        return {"image": _plain(result["image"]).float(), "labels": labels}

    return augment


def leave_unchanged(window: Window, seed: int) -> Window:
    """Stand in for an augmentation where `TrainConfig.augment` is False."""
    del seed
    return {"image": window["image"].float(), "labels": window["labels"]}


def _is_sided(plan: Plan) -> bool:
    """Whether labels tell left from right."""
    words = {word for label in plan.labels for word in re.findall(r"[a-z]+", label.name.lower())}
    return {"left", "right"} <= words


def _plain(values: Tensor) -> Float[Tensor, "C X Y Z"] | UInt8[Tensor, "R X Y Z"]:
    """Drop MONAI's tensor subclass."""
    return values.as_subclass(Tensor).contiguous()


def _rotation_rad(plan: Plan) -> list[float]:
    """Largest rotation about each axis: 15 degrees where the plane across it is fairly even in mm and in voxels."""
    rotations = []
    for axis in range(3):
        planes = [
            [lengths[other] for other in range(3) if other != axis] for lengths in (plan.spacing_mm, plan.window_vox)
        ]
        rotations.append(math.radians(15) if all(max(plane) < 3 * min(plane) for plane in planes) else 0.0)
    return rotations
