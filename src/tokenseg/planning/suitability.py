"""Suitability of a scan for a model, by the scans of its training: extent, voxels, and what kind of numbers it holds.

A model segments whatever it is given, and gives a mask that looks like any other. So scans far from all training
scans get a warning that says in what they differ. They are never refused: the limits are wide, but not exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float

from tokenseg.config import Settings
from tokenseg.imaging.far_off import HOUNSFIELD_MINIMUM, spread_of
from tokenseg.imaging.formats import orientation_problem
from tokenseg.imaging.orientation import to_canonical
from tokenseg.imaging.volume import Volume
from tokenseg.messages import times
from tokenseg.planning.fingerprint import CaseFingerprint

Range: TypeAlias = tuple[float, float]
"""Smallest and largest of the training scans."""
Range3: TypeAlias = tuple[Range, Range, Range]

FAR = 2.0
"""A size this many times above the largest of training, or below the smallest, is far off."""
_ROUNDING = 1 + 1e-6
_AIR = (-1100.0, -900.0)
_NEGATIVE_SHARE = 0.05
"""Resampling leaves a few values below 0 around sharp edges; a larger share is another kind of image."""


class ChannelRange(Settings):
    """What kind of numbers one source channel held in training."""

    name: str
    """As in `Plan.source_channels`."""
    minimum: Range
    """Smallest value of a scan, as stored."""
    negative_share: Range
    """Share of a scan's voxels below 0."""


class InputFacts(Settings):
    """What the scans that a model was trained on were like."""

    content: str = "scans"
    """What they show, such as `crops around the hippocampus`."""
    extent_mm: Range3
    """Field of view along right, anterior, superior."""
    spacing_mm: Range3
    """Voxel spacing along right, anterior, superior."""
    anisotropy: Range
    """Largest spacing of a scan over its smallest."""
    channels: tuple[ChannelRange, ...] = ()
    """One a source channel; empty where the run's fingerprint does not tell."""


class _Sizes(NamedTuple):
    extent_mm: tuple[float, float, float]
    spacing_mm: tuple[float, float, float]

    @property
    def anisotropy(self) -> float:
        return max(self.spacing_mm) / min(self.spacing_mm)


def summarise_inputs(cases: Iterable[CaseFingerprint], channels: Sequence[str]) -> InputFacts:
    """Put the training scans in numbers.

    Args:
        cases: Fingerprints of the training cases, at least one.
        channels: Source channels of the dataset, in the order of the fingerprints.
    """
    listed = list(cases)
    sizes = [_sizes(case.shape_vox, case.spacing_mm) for case in listed]
    told = [case.all_voxels for case in listed if case.all_voxels]
    return InputFacts(
        extent_mm=_range3(each.extent_mm for each in sizes),
        spacing_mm=_range3(each.spacing_mm for each in sizes),
        anisotropy=_range(each.anisotropy for each in sizes),
        channels=tuple(
            ChannelRange(
                name=name,
                minimum=_range(case[row].minimum for case in told),
                negative_share=_range(case[row].negative_share for case in told),
            )
            for row, name in enumerate(channels if told else ())
        ),
    )


def check_input(volume: Volume, facts: InputFacts | None) -> tuple[str, ...]:
    """Say what is odd about a scan: where it may lie otherwise, or is far from all that a model was trained on.

    Args:
        volume: The scan, with the channels that the model expects.
        facts: `ModelFacts.inputs`; None for a model that does not tell.

    Returns:
        A sentence each; empty where there is nothing to say.
    """
    warnings = [orientation_problem(volume.header), *_constant_warnings(volume)]
    if facts is not None:
        warnings += _far_warnings(volume, facts)
    return tuple(warning for warning in warnings if warning)


def _constant_warnings(volume: Volume) -> list[str]:
    return [
        f"{name} has one value everywhere; is it the scan?"
        for name, values in zip(volume.channels, volume.array, strict=True)
        if values.min() == values.max()
    ]


def _far_warnings(volume: Volume, facts: InputFacts) -> list[str]:
    turned, spacing_mm = to_canonical(volume.array[0], volume.affine)
    sizes = _sizes(turned.shape, spacing_mm)
    warnings = [_extent_warning(sizes, facts), _spacing_warning(sizes, facts)]
    for known in facts.channels:
        if known.name in volume.channels:
            values = volume.array[volume.channels.index(known.name)]
            warnings += [_value_warning(values, known), _spread_warning(values, known)]
    return warnings


def describe_inputs(facts: InputFacts) -> str:
    """What the training scans were like, in one line for the model's card."""
    return (
        f"{facts.content}, {_ranges(facts.extent_mm)} mm (right, anterior, superior), "
        f"voxels {_ranges(facts.spacing_mm)} mm"
    )


def _extent_warning(sizes: _Sizes, facts: InputFacts) -> str:
    compared = list(zip(sizes.extent_mm, facts.extent_mm, strict=True))
    trained = f"trained on {_ranges(facts.extent_mm)} mm {facts.content}"
    shown = f"field of view {_rounded(sizes.extent_mm)} mm; {trained}"
    if any(_is_above(size, known) for size, known in compared):
        return f"{shown}; crop it first"
    if any(_is_below(size, known) for size, known in compared):
        return f"{shown}; give more of the surroundings"
    return ""


def _spacing_warning(sizes: _Sizes, facts: InputFacts) -> str:
    compared = zip(sizes.spacing_mm, facts.spacing_mm, strict=True)
    if any(_is_above(size, known) or _is_below(size, known) for size, known in compared):
        return (
            f"voxels {_rounded(sizes.spacing_mm)} mm; trained on {_ranges(facts.spacing_mm)} mm; "
            "check the header, and look at the mask closely"
        )
    if _is_above(sizes.anisotropy, facts.anisotropy):
        return (
            f"voxels {_rounded(sizes.spacing_mm)} mm are {_number(sizes.anisotropy)} times as long as wide; "
            f"in training at most {_number(facts.anisotropy[1])} times; look at the mask closely"
        )
    return ""


def _value_warning(values: Float[np.ndarray, "X Y Z"], known: ChannelRange) -> str:
    minimum, negative = float(values.min()), _share(values, -np.inf, 0.0, ends=False)
    below, above = HOUNSFIELD_MINIMUM
    trained = f"the smallest value of a training scan of {known.name} was {_ranges([known.minimum], ' to ')}"
    if below <= minimum <= above < known.minimum[0]:
        air = _share(values, *_AIR, ends=True)
        return (
            f"values look like CT (Hounsfield units): minimum {_number(minimum)}, {air:.0%} near -1000 (air); {trained}"
        )
    if known.minimum[1] <= above and minimum >= 0:
        return f"no value below 0, so {known.name} is not in Hounsfield units; {trained}; check how it was converted"
    if negative > _NEGATIVE_SHARE + known.negative_share[1] and known.negative_share[1] <= _NEGATIVE_SHARE:
        return (
            f"{negative:.0%} of the voxels of {known.name} are below 0 (minimum {_number(minimum)}), "
            f"in training at most {known.negative_share[1]:.0%}; is it CT, or normalised?"
        )
    return ""


def _spread_warning(values: Float[np.ndarray, "X Y Z"], known: ChannelRange) -> str:
    spread = spread_of(values)
    is_ct = known.minimum[1] <= HOUNSFIELD_MINIMUM[1]
    return f"{known.name}: {spread}; look at the scan" if spread.is_ruled_by_few and not is_ct else ""


def _share(values: Float[np.ndarray, "X Y Z"], low: float, high: float, *, ends: bool) -> float:
    """Share of the voxels from `low` to `high`, counted a plane at a time; `ends` counts in `high` itself."""
    planes = (values[:, :, z] for z in range(values.shape[2]))
    count = sum(
        int(np.count_nonzero((plane >= low) & ((plane <= high) if ends else (plane < high)))) for plane in planes
    )
    return count / values.size


def _sizes(shape_vox: Sequence[int], spacing_mm: tuple[float, float, float]) -> _Sizes:
    x, y, z = (count * size for count, size in zip(shape_vox, spacing_mm, strict=True))
    return _Sizes((x, y, z), spacing_mm)


def _is_above(size: float, known: Range) -> bool:
    return size > FAR * known[1] * _ROUNDING


def _is_below(size: float, known: Range) -> bool:
    return size * FAR * _ROUNDING < known[0]


def _range(values: Iterable[float]) -> Range:
    listed = list(values)
    return min(listed), max(listed)


def _range3(values: Iterable[tuple[float, float, float]]) -> Range3:
    right, anterior, superior = (_range(axis) for axis in zip(*values, strict=True))
    return right, anterior, superior


def _ranges(ranges: Iterable[Range], joint: str = "-") -> str:
    return " x ".join(joint.join(dict.fromkeys(map(_number, known))) for known in ranges)


def _rounded(sizes: Iterable[float]) -> str:
    return times(float(f"{size:.3g}") for size in sizes)


def _number(value: float) -> str:
    return f"{float(f'{value:.3g}'):g}"
