"""Intensities as the network takes them: channels picked by name, differences formed, normalised by the whole scan.

Statistics are gathered a plane at a time, along the last stored axis, so that they take no memory to speak of. A few
voxels that are far off (`imaging/far_off.py`) are cut off first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from tokenseg.config import ChannelNormalisation, Plan
from tokenseg.errors import DataError
from tokenseg.imaging.far_off import spread_of_difference
from tokenseg.imaging.volume import Volume
from tokenseg.shapes import ImageArray

PADDING_FRACTION = 0.25
"""Above this share of voxels at a channel's minimum, they are padding and left out of its statistics."""


class Scaling(NamedTuple):
    """A channel becomes (clip(channel, low, high) - mean) / std."""

    mean: float
    std: float
    low: float = -np.inf
    high: float = np.inf

    def applied(self, values: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
        """Scale stored intensities; computed in float64, given in float32."""
        scaled = np.clip(values.astype(np.float64, order="C"), self.low, self.high)
        scaled -= self.mean
        scaled /= self.std
        return scaled.astype(np.float32)


def check_channels(volume: Volume, plan: Plan) -> None:
    """Refuse a volume that lacks a channel; channels are never matched by their position.

    Raises:
        DataError: With the names of those that are missing, and of those that are there.
    """
    missing = [name for name in plan.needed_channels if name not in volume.channels]
    if missing:
        raise DataError(
            f"model expects {', '.join(plan.needed_channels)}; {', '.join(missing)} is missing "
            f"(given: {', '.join(volume.channels)}). Name the channels of the input, or add the missing one"
        )


def select_channels(volume: Volume, plan: Plan) -> ImageArray:
    """Pick the plan's channels by name, and form its differences, in stored intensities.

    Raises:
        DataError: The volume lacks a channel.
    """
    check_channels(volume, plan)
    return np.stack([channel_image(expression, volume) for expression in plan.channels])


def channel_image(expression: str, volume: Volume) -> Float[np.ndarray, "X Y Z"]:
    """One entry of `Plan.channels`, a channel or a difference of two that the volume must have, as stored."""
    return reduce(np.subtract, channel_terms(expression, volume))


def channel_terms(expression: str, volume: Volume) -> list[Float[np.ndarray, "X Y Z"]]:
    """The channels of the volume that an entry of `Plan.channels` subtracts from each other (views)."""
    return [volume.array[volume.channels.index(name.strip())] for name in expression.split(" - ")]


def find_scalings(volume: Volume, plan: Plan) -> list[Scaling]:
    """How each of the plan's channels is scaled in this scan."""
    if not plan.joint_zscore:
        return [
            _find_scaling(channel_terms(expression, volume), rule)
            for expression, rule in zip(plan.channels, plan.normalisation, strict=True)
        ]
    mean, std = _mean_std([_Image.of([channel]) for channel in volume.array])
    images = [_Image.of(channel_terms(expression, volume)) for expression in plan.channels]
    # The mean cancels in a difference of two channels.
    return [Scaling(0.0 if len(image.terms) > 1 else mean, std, image.low, image.high) for image in images]


def _find_scaling(terms: Sequence[Float[np.ndarray, "X Y Z"]], rule: ChannelNormalisation) -> Scaling:
    if rule.kind == "window":
        return Scaling(rule.mean, rule.std, rule.low, rule.high)
    image = _Image.of(terms)
    least = min(float(plane.min()) for plane in image.planes())
    num_padding = sum(int((plane == least).sum()) for plane in image.planes())
    if num_padding > PADDING_FRACTION * terms[0].size:
        inside = _mean_std([image], above=least)
        if inside.std:
            return Scaling(*inside, image.low, image.high)
    return Scaling(*_mean_std([image]), image.low, image.high)


class _Image(NamedTuple):
    """A channel or a difference of several, as stored, and the limits beyond which a few voxels are far off."""

    terms: Sequence[Float[np.ndarray, "X Y Z"]]
    low: float
    high: float

    @classmethod
    def of(cls, terms: Sequence[Float[np.ndarray, "X Y Z"]]) -> _Image:
        return cls(terms, *spread_of_difference(terms).limits)

    def planes(self) -> Iterator[Float[np.ndarray, "X Y"]]:
        """Along the last axis, cut off at the limits."""
        for index in range(self.terms[0].shape[2]):
            plane = reduce(np.subtract, [term[:, :, index] for term in self.terms])
            yield plane if (self.low, self.high) == (-np.inf, np.inf) else np.clip(plane, self.low, self.high)


class _MeanStd(NamedTuple):
    mean: float
    std: float


def _mean_std(images: Sequence[_Image], above: float = -np.inf) -> _MeanStd:
    """Mean and deviation of all voxels above a value; a deviation of 1 where all are the same, 0 where none is."""

    def values() -> Iterator[Float[np.ndarray, "*shape"]]:
        for image in images:
            for plane in image.planes():
                yield plane if above == -np.inf else plane[plane > above]

    parts = [(part.size, float(part.sum(dtype=np.float64))) for part in values()]
    count = sum(size for size, _ in parts)
    if not count:
        return _MeanStd(0.0, 0.0)
    ends = [(float(part.min()), float(part.max())) for part in values() if part.size]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    if low == high:
        # Of what is above padding, one value only is no contrast.
        return _MeanStd(low, 1.0 if above == -np.inf else 0.0)
    mean = math.fsum(total for _, total in parts) / count
    squares = math.fsum(float(np.square(part - np.float64(mean)).sum()) for part in values())
    return _MeanStd(mean, math.sqrt(squares / count))
