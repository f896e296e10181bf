"""Findings about a dataset, wrong or only odd: every case is looked at, every finding says what mends it.

`tokenseg train` stops at what it cannot use; this goes on from case to case, and sees what training would not notice:
the same image in two cases, a channel that holds a mask, one scan in other units than the rest. Only a dataset that
cannot be opened at all (its `dataset.json`, files that are missing) is an error by itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Bool

from tokenseg.checking.mask_rounding import RoundedMask, round_mask
from tokenseg.datasets.cases import OWN_LABEL, Case, Dataset, shared_labels
from tokenseg.errors import TokenSegError
from tokenseg.imaging.far_off import spread_of
from tokenseg.imaging.formats import is_written, orientation_problem, read_header, read_values
from tokenseg.imaging.grids import is_lost_header, relate_grids
from tokenseg.imaging.orientation import orientation
from tokenseg.imaging.volume import Grid, read_grid
from tokenseg.messages import first_few
from tokenseg.planning.fingerprint import CaseFingerprint, label_remedy, voxel_digest
from tokenseg.progress import Progress
from tokenseg.shapes import Affine

Severity: TypeAlias = Literal["error", "warning", "note"]

SHEAR_TOLERANCE = 1e-3
"""Largest cosine between two axes of an affine that counts as a right angle."""
LISTS_255 = "0/255"
"""Kind of the finding that `--fix` mends in `dataset.json` and not in masks."""
FEW_VALUES = 16
"""An image with at most so many distinct values looks like a mask."""
OUTLIER = 8.0
"""Distance from the median in robust deviations (1.4826 times the median absolute deviation)."""
NOT_WRITTEN = "--fix writes no .mhd: convert the dataset to .mha or .nii.gz, or mend it by hand"
"""What is said where it would mend a file of another format."""
SPACING_OUTLIER = 3.0
"""Times the median spacing, or a third of it."""
_MEND_FEW = "look at the image: hot voxels, or a fill value?"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing about one case."""

    severity: Severity
    """`error`: training refuses it; `warning`: look at it; `note`: harmless."""
    case_id: str
    kind: str
    """What it is about, in one word."""
    text: str
    mend: str = ""
    """What to do; empty where nothing needs doing."""
    fixable: bool = False
    """Whether `--fix` mends it."""


@dataclass
class _Facts:
    """What is compared across cases once all are read."""

    digests: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Cases by the fingerprint of an image."""
    spacings: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    medians: dict[str, list[tuple[str, float]]] = field(default_factory=lambda: defaultdict(list))
    """Cases and their median intensity in the foreground, by channel; only of channels in Hounsfield units."""
    label_values: dict[str, tuple[Path, set[int]]] = field(default_factory=dict)
    """Mask and its values, by case; no values, not even 0, where they cannot be told."""
    shared_labels: dict[str, str] = field(default_factory=dict)
    """What is wrong with cases whose mask is that of another case too."""


def check_dataset(dataset: Dataset, progress: Progress) -> list[Finding]:
    """Look at every case of a dataset; errors first, then by case."""
    facts = _Facts(shared_labels=shared_labels(dataset.cases))
    findings: list[Finding] = []
    progress.stage("checking", len(dataset.cases))
    for case in dataset.cases:
        findings += _check_case(dataset, case, facts)
        progress.advance(case.case_id)
    findings += [*_value_findings(dataset, facts), *_duplicates(facts)]
    findings += [*_spacing_outliers(facts), *_intensity_outliers(facts)]
    order = ("error", "warning", "note")
    return sorted(findings, key=lambda finding: (order.index(finding.severity), finding.case_id, finding.kind))


def compare_cases(cases: Sequence[CaseFingerprint]) -> list[Finding]:
    """What is odd in cases that were read to train on: one image in two of them, spacings far off, voxels far off."""
    facts = _Facts(spacings={case.case_id: case.spacing_mm for case in cases})
    for case in cases:
        for digest in case.image_sha256:
            facts.digests[digest].append(case.case_id)
    few = [
        Finding("warning", case.case_id, "values", channel.ruled_by_few, _MEND_FEW)
        for case in cases
        for channel in case.all_voxels
        if channel.ruled_by_few
    ]
    return [*_duplicates(facts), *_spacing_outliers(facts), *few]


def check_files(paths: Sequence[Path]) -> list[Finding]:
    """Compare the grids of files with that of the first.

    Raises:
        TokenSegError: The first file cannot be read.
    """
    first = read_grid(paths[0])
    findings = [*_affine_findings(paths[0].name, paths[0], first.affine)]
    findings += _orientation_findings(paths[0].name, paths[0])
    for path in paths[1:]:
        try:
            findings += _orientation_findings(path.name, path)
            findings += _grid_findings(path.name, paths[0], first, path, read_grid(path), fixable=False)
        except TokenSegError as error:
            findings.append(Finding("error", path.name, "file", str(error)))
    return findings


def _check_case(dataset: Dataset, case: Case, facts: _Facts) -> Iterator[Finding]:
    grids: list[tuple[Path, Grid]] = []
    for path in case.images:
        try:
            grid = read_grid(path)
            yield from _image_findings(dataset, case, path, grid, facts)
        except TokenSegError as error:
            yield Finding("error", case.case_id, "file", str(error))
            continue
        if grids:
            yield from _grid_findings(case.case_id, grids[0][0], grids[0][1], path, grid, fixable=True)
        else:
            facts.spacings[case.case_id] = _canonical_spacing(grid)
            yield from _affine_findings(case.case_id, path, grid.affine)
            yield from _orientation_findings(case.case_id, path)
        grids.append((path, grid))
    if case.label is not None:
        yield from _label_findings(dataset, case, case.label, grids, facts)


def _image_findings(dataset: Dataset, case: Case, path: Path, grid: Grid, facts: _Facts) -> Iterator[Finding]:
    channels = case.channels or dataset.source_channels
    wanted = 1 if len(case.images) > 1 else len(channels)
    if grid.num_channels != wanted:
        text = f"{path.name} holds {grid.num_channels} channel(s), the dataset lists {wanted}"
        yield Finding("error", case.case_id, "channels", text, "give each file its channels, or change dataset.json")
    _, values = read_values(path)
    finite = np.isfinite(values)
    if not finite.all():
        count = values.size - int(np.count_nonzero(finite))
        yield _fixable(case, path, "values", f"{path.name}: {count} voxel(s) are NaN or infinite")
        values = values[finite]
    elif values.size:
        facts.digests[voxel_digest(values)].append(case.case_id)
    if not values.size or values.min() == values.max():
        yield Finding("warning", case.case_id, "values", f"{path.name} is constant", "look at it; export it again")
        return
    sample = values.reshape(-1)[:: max(1, values.size // 100_000)]
    if len(np.unique(sample)) <= FEW_VALUES and len(np.unique(values)) <= FEW_VALUES:
        text = f"{path.name} holds {len(np.unique(values))} distinct values, as a mask does"
        yield Finding("warning", case.case_id, "values", text, "is it the image?")
    spreads = [spread_of(values)] if values.ndim < 4 else [spread_of(channel) for channel in np.moveaxis(values, 3, 0)]
    for spread in spreads:
        if spread.is_ruled_by_few:
            yield Finding("warning", case.case_id, "values", f"{path.name}: {spread}", _MEND_FEW)


def _label_findings(
    dataset: Dataset, case: Case, path: Path, grids: list[tuple[Path, Grid]], facts: _Facts
) -> Iterator[Finding]:
    if case.case_id in facts.shared_labels:
        # What else may be said of it depends on whose it is.
        yield Finding("error", case.case_id, "label", facts.shared_labels[case.case_id], OWN_LABEL)
        facts.label_values[case.case_id] = path, set()
        return
    try:
        _, values = read_values(path)
        grid = read_grid(path)
    except TokenSegError as error:
        yield Finding("error", case.case_id, "file", str(error))
        return
    if grids:
        yield from _grid_findings(case.case_id, grids[0][0], grids[0][1], path, grid, fixable=True)
    if values.ndim != 3:
        yield Finding("error", case.case_id, "label", f"{path.name} is {values.ndim}D; a mask is 3D", "export it again")
        return
    rounded = round_mask(values, dataset.labels)
    if not rounded.is_whole:
        yield _fraction_finding(case, path, rounded)
    found = set() if rounded.loses_labels else {int(value) for value in np.unique(rounded.values)}
    facts.label_values[case.case_id] = path, found
    for image_path, image_grid in grids:
        if relate_grids(image_grid, grid).kind in ("identical", "rounding"):
            _note_median(dataset, case, image_path, rounded.values != 0, facts)


def _fraction_finding(case: Case, path: Path, rounded: RoundedMask) -> Finding:
    text = f"{path.name} holds values that are no whole numbers"
    if rounded.loses_labels:
        text += ", and rounding would make background of labels"
    if rounded.remedy:
        return Finding("error", case.case_id, "label", text, rounded.remedy)
    return _fixable(case, path, "label", text)


def _note_median(
    dataset: Dataset, case: Case, path: Path, foreground: Bool[np.ndarray, "X Y Z"], facts: _Facts
) -> None:
    """Keep the median intensity in the foreground, of a channel in Hounsfield units."""
    channels = case.channels or dataset.source_channels
    channel = channels[case.images.index(path)]
    is_ct = channel in dataset.channels and dataset.ct_channels[dataset.channels.index(channel)]
    if not is_ct or len(case.images) != len(channels) or not foreground.any():
        return
    _, values = read_values(path)
    if values.ndim == 3:
        facts.medians[channel].append((case.case_id, float(np.median(values[foreground]))))


def _value_findings(dataset: Dataset, facts: _Facts) -> Iterator[Finding]:
    """Values that no label names; only once all masks are known it shows whether all are 0/255."""
    listed = {0, *(value for label in dataset.labels for value in label.values)}
    is_json = dataset.layout != "mamamia"
    all_255 = all(found and found <= {0, 255} for _, found in facts.label_values.values())
    for case_id, (path, found) in facts.label_values.items():
        if found - listed:
            unlisted = first_few([str(value) for value in sorted(found - listed)])
            text = f"{path.name} holds the values {unlisted}, which the dataset does not list"
            if all_255 and len(dataset.labels) == 1 and is_json:
                yield Finding("error", case_id, LISTS_255, text, "--fix OUT lists 255 in a copy", fixable=True)
            else:
                yield Finding("error", case_id, "label", text, label_remedy(dataset, found))
        elif found == {0}:
            yield Finding("note", case_id, "label", f"{path.name} has no foreground")
    if facts.label_values and all(found == {0} for _, found in facts.label_values.values()):
        yield Finding("error", "all cases", "label", "no mask has any foreground", "are they the right files?")


def _grid_findings(
    case_id: str, first_path: Path, first: Grid, path: Path, grid: Grid, *, fixable: bool
) -> Iterator[Finding]:
    relation = relate_grids(first, grid)
    against = _against(path, first_path)
    if relation.kind == "rounding":
        yield Finding("note", case_id, "grid", f"{against}: differs by rounding only, and counts as the same")
    elif relation.kind == "disjoint":
        text = f"{against}: in another place ({relation.difference})"
        yield Finding("error", case_id, "grid", text, "they do not belong together, or a header is wrong: export again")
    elif relation.kind == "other grid":
        lost = is_lost_header(first, grid)
        text = f"{against}: same place, other grid ({relation.difference})"
        mend = "--fix OUT resamples it" if fixable else "resample one to the other"
        if fixable and not is_written(path):
            fixable, mend = False, f"resample one to the other. {NOT_WRITTEN}"
        if lost and first.shape == grid.shape:
            mend = "as many voxels at other places: was a header lost? If so copy it, else resample one to the other"
        elif lost:
            mend = (
                "as many voxels along other axes: was it transposed? If so turn it back, else resample one to the other"
            )
        yield Finding("error", case_id, "grid", text, mend, fixable=fixable and not lost)


def _against(path: Path, first_path: Path) -> str:
    """Name two files, with their folders where that alone tells them apart."""
    if path.name != first_path.name:
        return f"{path.name} against {first_path.name}"
    named, first_named = (f"{each.parent.name}/{each.name}" for each in (path, first_path))
    return f"{named} against {first_named}"


def _affine_findings(case_id: str, path: Path, affine: Affine) -> Iterator[Finding]:
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    cosines = np.abs(axes.T @ axes - np.eye(3))
    if cosines.max() > SHEAR_TOLERANCE:
        text = f"{path.name}: axes are not at right angles (off by a cosine of {cosines.max():.3g})"
        yield Finding("warning", case_id, "affine", text, "it is treated as upright; resample it to an upright grid")


def _orientation_findings(case_id: str, path: Path) -> Iterator[Finding]:
    problem = orientation_problem(read_header(path).header)
    if problem:
        mend = "export it again, or set a code once you have seen that it lies right"
        yield Finding("warning", case_id, "affine", f"{path.name}: {problem}", mend)


def _duplicates(facts: _Facts) -> Iterator[Finding]:
    for cases in facts.digests.values():
        others = sorted(set(cases) - {cases[0]})
        if others:
            mend = "keep one: it may stand on both sides of a split, where it flatters the scores"
            yield Finding("warning", cases[0], "duplicate", f"the same image as in {first_few(others)}", mend)
        elif len(cases) > 1:
            yield Finding("warning", cases[0], "duplicate", "two of its channels are the same image", "export it again")


def _spacing_outliers(facts: _Facts) -> Iterator[Finding]:
    if not facts.spacings:
        return
    usual = np.median(list(facts.spacings.values()), axis=0)
    for case_id, spacing in facts.spacings.items():
        ratios = np.asarray(spacing) / usual
        if ratios.max() > SPACING_OUTLIER or ratios.min() < 1 / SPACING_OUTLIER:
            shown, median = (" x ".join(f"{value:.3g}" for value in values) for values in (spacing, usual))
            text = f"voxels of {shown} mm, in the median case {median}"
            yield Finding("warning", case_id, "spacing", text, "is the spacing in its header right?")


def _intensity_outliers(facts: _Facts) -> Iterator[Finding]:
    """Channels in Hounsfield units have one scale; MR is scaled scan by scan, so a different scale is no fault."""
    for channel, medians in facts.medians.items():
        values = np.array([value for _, value in medians])
        middle = float(np.median(values))
        deviation = max(1.0, 1.4826 * float(np.median(np.abs(values - middle))))
        for case_id, value in medians:
            if abs(value - middle) > OUTLIER * deviation:
                text = f"{channel}: median intensity {value:.4g}, in the median case {middle:.4g}"
                yield Finding("warning", case_id, "values", text, "is it in Hounsfield units, as the others are?")


def _fixable(case: Case, path: Path, kind: str, text: str) -> Finding:
    """An error in a file that `--fix` mends, if it writes such files."""
    mend = "--fix OUT mends it in a copy" if is_written(path) else NOT_WRITTEN
    return Finding("error", case.case_id, kind, text, mend, fixable=is_written(path))


def _canonical_spacing(grid: Grid) -> tuple[float, float, float]:
    """Along right, anterior, superior, however the voxels are stored."""
    axes, _ = orientation(grid.affine)
    order = np.argsort(axes)
    return grid.spacing_mm[order[0]], grid.spacing_mm[order[1]], grid.spacing_mm[order[2]]
