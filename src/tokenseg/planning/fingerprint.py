"""The fingerprint of a dataset: shapes, spacings, intensities, labels; and the check of every file on the way.

Each case is read once. Everything that training would trip over later (unlisted label values, no foreground, images
and labels on different grids, NaN voxels) stops here, with the case named.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from jaxtyping import Float, Shaped

from tokenseg.config import Fraction, Label, Settings, Spacing3, Vox3
from tokenseg.datasets.cases import OWN_LABEL, Case, Dataset, shared_labels
from tokenseg.datasets.layouts import LabelledCase, load_case
from tokenseg.errors import DataError, TokenSegError
from tokenseg.imaging.far_off import spread_of
from tokenseg.imaging.orientation import orientation
from tokenseg.messages import first_few

_SAMPLES_A_CASE = 10_000
_LOOKED_AT = 3

_Values: TypeAlias = Float[np.ndarray, "C n"]


class Intensities(Settings):
    """Intensities of one source channel over the foreground; over all voxels where there is no foreground."""

    minimum: float
    maximum: float
    mean: float
    std: float
    """Population standard deviation."""
    percentile_00_5: float
    percentile_99_5: float


class VoxelRange(Settings):
    """Intensities of one source channel over all voxels, as stored."""

    minimum: float
    negative_share: Fraction
    """Share of the voxels below 0."""
    ruled_by_few: str = ""
    """Where a few voxels are so far off that they are cut off: in words; else empty."""


class CaseFingerprint(Settings):
    """One case in numbers; axes in canonical order (right, anterior, superior)."""

    case_id: str
    shape_vox: Vox3
    spacing_mm: Spacing3
    intensities: tuple[Intensities, ...]
    """One a source channel, over the case's foreground."""
    label_voxels: dict[int, int]
    """Voxels by label value, background 0 included; values that do not occur are left out."""
    all_voxels: tuple[VoxelRange, ...] = ()
    """One a source channel; empty in files of versions that did not keep it."""
    image_sha256: tuple[str, ...] = ()
    """Of the voxels of each source channel, by which the same image shows in two cases; likewise."""


class Fingerprint(Settings):
    """A dataset in numbers."""

    cases: tuple[CaseFingerprint, ...]
    intensities: tuple[Intensities, ...]
    """One a source channel, over up to 10 000 evenly spaced foreground voxels of each case."""


def label_volumes_ml(cases: Iterable[CaseFingerprint], labels: Iterable[Label]) -> dict[str, tuple[float, float]]:
    """Smallest and largest volume of each label, of the cases that have it; labels that no case has are left out."""
    listed, volumes = list(cases), dict[str, tuple[float, float]]()
    for label in labels:
        found = [
            sum(case.label_voxels.get(value, 0) for value in label.values) * math.prod(case.spacing_mm) / 1000
            for case in listed
        ]
        present = [volume for volume in found if volume > 0]
        if present:
            volumes[label.name] = min(present), max(present)
    return volumes


def take_fingerprint(dataset: Dataset, on_case: Callable[[int, int], None] | None = None) -> Fingerprint:
    """Read every case of a dataset once, check it, and put it in numbers.

    Args:
        dataset: The dataset.
        on_case: Called after each case with the number of cases done and of all, for a progress display.

    Raises:
        TokenSegError: The first fault, and how many more cases have one: a file is missing, truncated or not a medical
            image, label values are not listed, voxels are unusable, image and label are not on one grid, two cases
            have one label file. Or there is no foreground in any case.
    """
    cases: list[CaseFingerprint] = []
    samples: list[_Values] = []
    faults: list[TokenSegError] = []
    shared = shared_labels(dataset.cases)
    for done, case in enumerate(dataset.cases, start=1):
        try:
            if case.case_id in shared:
                raise DataError(f"case {case.case_id}: {shared[case.case_id]}; {OWN_LABEL}")
            loaded = load_case(dataset, case)
            label_voxels = _count_labels(loaded)
            _check_values(dataset, case, set(label_voxels))
        except TokenSegError as fault:
            faults.append(fault)
        else:
            values = _foreground(dataset, loaded)
            cases.append(_case_fingerprint(dataset, case, loaded, label_voxels, values))
            samples.append(values[:, :: -(-values.shape[1] // _SAMPLES_A_CASE)])
        if on_case is not None:
            on_case(done, len(dataset.cases))
    _raise_first(faults, dataset)
    if not any(value != 0 for case in cases for value in case.label_voxels):
        raise DataError(
            f"dataset {dataset.root} has no foreground: all {len(cases)} masks are zero everywhere; "
            "check that the label files are the right ones"
        )
    pooled = np.concatenate(samples, axis=1)
    return Fingerprint(cases=tuple(cases), intensities=_intensities(pooled))


def read_fingerprint(path: Path) -> tuple[CaseFingerprint, ...]:
    """The cases of a saved fingerprint; none where there is no file, or one of an earlier version."""
    try:
        return Fingerprint.model_validate_json(path.read_bytes()).cases
    except (OSError, ValueError):
        return ()


def check_same_scans(dataset: Dataset, known: Sequence[CaseFingerprint]) -> None:
    """Look at a few cases that are known by name, whether they hold the voxels that are known of them.

    Raises:
        TokenSegError: A case holds other voxels, or cannot be read.
    """
    told = {case.case_id: case.image_sha256 for case in known if case.image_sha256}
    chosen = [case for case in dataset.cases if case.case_id in told]
    for case in chosen[:: max(1, len(chosen) // _LOOKED_AT)]:
        if _image_digests(dataset, load_case(dataset, case)) != told[case.case_id]:
            raise DataError(
                f"the run was started on other scans: {case.case_id} of {dataset.root} holds other voxels; "
                "give the dataset it was started with, or start a new run"
            )


def _raise_first(faults: list[TokenSegError], dataset: Dataset) -> None:
    if len(faults) == 1:
        raise faults[0]
    if faults:
        more = f"{len(faults) - 1} more case(s) have faults; all of them: tokenseg check {dataset.root}"
        raise type(faults[0])(f"{faults[0]}. {more}") from faults[0]


def _case_fingerprint(
    dataset: Dataset, case: Case, loaded: LabelledCase, label_voxels: dict[int, int], values: _Values
) -> CaseFingerprint:
    shape, spacing = loaded.mask.array.shape, loaded.volume.spacing_mm
    axes, _ = orientation(loaded.volume.affine)
    stored_axis = np.argsort(axes)  # of each canonical axis
    return CaseFingerprint(
        case_id=case.case_id,
        shape_vox=(shape[stored_axis[0]], shape[stored_axis[1]], shape[stored_axis[2]]),
        spacing_mm=(spacing[stored_axis[0]], spacing[stored_axis[1]], spacing[stored_axis[2]]),
        intensities=_intensities(values),
        label_voxels=label_voxels,
        all_voxels=_voxel_ranges(dataset, loaded),
        image_sha256=_image_digests(dataset, loaded),
    )


def _image_digests(dataset: Dataset, loaded: LabelledCase) -> tuple[str, ...]:
    return tuple(voxel_digest(loaded.volume.array[row]) for row in _source_rows(dataset, loaded))


def voxel_digest(values: Shaped[np.ndarray, "*shape"]) -> str:
    """SHA-256 of shape and values, as float32 whatever they are stored as: so they are trained on, and compared."""
    with np.errstate(over="ignore"):
        intensities = np.ascontiguousarray(values, np.float32)
    # The type is told although it is always this one, since saved fingerprints have it in their sums; numpy spells that
    # of an array in several ways.
    digest = hashlib.sha256(str((values.shape, np.dtype(np.float32))).encode())
    digest.update(intensities.data)
    return digest.hexdigest()


def _count_labels(loaded: LabelledCase) -> dict[int, int]:
    values, counts = np.unique(loaded.mask.array, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _foreground(dataset: Dataset, loaded: LabelledCase) -> _Values:
    """Intensities of the source channels over the foreground, or over all voxels where the case has none."""
    rows = _source_rows(dataset, loaded)
    foreground: Shaped[np.ndarray, "X Y Z"] = loaded.mask.array != 0
    if not foreground.any():
        return loaded.volume.array[rows].reshape(len(rows), -1)
    return loaded.volume.array[rows][:, foreground]


def _voxel_ranges(dataset: Dataset, loaded: LabelledCase) -> tuple[VoxelRange, ...]:
    channels = loaded.volume.array[_source_rows(dataset, loaded)]
    spreads = [spread_of(channel) for channel in channels]
    return tuple(
        VoxelRange(
            minimum=spread.least,
            negative_share=float((channel < 0).mean()),
            ruled_by_few=str(spread) if spread.is_ruled_by_few else "",
        )
        for channel, spread in zip(channels, spreads, strict=True)
    )


def _source_rows(dataset: Dataset, loaded: LabelledCase) -> list[int]:
    return [loaded.volume.channels.index(name) for name in dataset.source_channels]


def _intensities(values: _Values) -> tuple[Intensities, ...]:
    low, high = np.percentile(values, (0.5, 99.5), axis=1)
    return tuple(
        Intensities(
            minimum=float(channel.min()),
            maximum=float(channel.max()),
            mean=float(channel.mean(dtype=np.float64)),
            std=float(channel.std(dtype=np.float64)),
            percentile_00_5=float(low[row]),
            percentile_99_5=float(high[row]),
        )
        for row, channel in enumerate(values)
    )


def _check_values(dataset: Dataset, case: Case, values: set[int]) -> None:
    listed = {0, *(value for label in dataset.labels for value in label.values)}
    unlisted = sorted(values - listed)
    if not unlisted or case.label is None:
        return
    raise DataError(
        f"case {case.case_id}: {case.label.name} holds the label values {first_few(list(map(str, unlisted)))}, "
        f"which the dataset does not list; it lists {', '.join(map(str, sorted(listed)))}. "
        f"{label_remedy(dataset, values)}"
    )


def label_remedy(dataset: Dataset, values: set[int]) -> str:
    """What mends unlisted label values; values need not be consecutive, so listing them is often enough."""
    if dataset.layout == "mamamia":
        return "MAMA-MIA masks hold 0 and 1: write the tumour as 1 in the file"
    if values <= {0, 255}:
        name = dataset.labels[0].name
        fix = f'"255": "{name}"' if dataset.layout == "msd" else f'"{name}": 255'
        return f"This looks like a 0/255 mask: write {fix} under labels of dataset.json, or divide the masks by 255"
    return "Add these values with their names under labels of dataset.json, or change them in the file to listed ones"
