"""The scan in a DICOM study: which series is which channel.

What was not asked for is never guessed: where two series could be meant, the list of them is the error.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tokenseg.config import Plan
from tokenseg.errors import DataError, FileError, GeometryError
from tokenseg.imaging.channel_names import is_ct, phase_name
from tokenseg.imaging.dicom.grid import stack_slices
from tokenseg.imaging.dicom.phases import choose_phases, split_phases
from tokenseg.imaging.dicom.pixels import read_frames
from tokenseg.imaging.dicom.series import PLACE_TAGS, Frame, Series, list_series, placements_of
from tokenseg.imaging.dicom_files import Damaged, DicomFile, folders_below
from tokenseg.imaging.volume import Volume, check_same_grid, join_channels
from tokenseg.shapes import Affine

_LOCALIZERS = ("LOCALIZER", "SCOUT")
"""How parts of ImageType begin."""
_DIGITS = 8


@dataclass(frozen=True, slots=True)
class Exam:
    """The image series of one study."""

    name: str
    """Of its folder or archive; names the output."""
    series: tuple[Series, ...]
    wanted: str = ""
    """UID of a series, or a part of its description; empty leaves the choice to the model's needs."""
    damaged: tuple[Damaged, ...] = ()
    """Files that may be slices of it, so that it cannot be read."""

    @property
    def files(self) -> tuple[DicomFile, ...]:
        """All its files, each once, those that are damaged last."""
        frames = (frame.file for series in self.series for frame in series.frames)
        return tuple(dict.fromkeys([*frames, *(each.file for each in self.damaged)]))


class Channel(NamedTuple):
    """What becomes one channel of a scan."""

    name: str
    series: Series
    frames: tuple[Frame, ...]
    """In any order; all of the series, or one phase of it."""


def list_exams(root: Path, wanted: str = "") -> list[Exam]:
    """All studies below a folder, in a zip archive or in one file, by name.

    A damaged file may be a slice of any study near it. So all studies of its folder below the one that was given, the
    patient's as a rule, count as damaged, and the others can be read. What a folder holds is told by the files in it
    that can be read.

    Raises:
        FileError: A DICOM file cannot be read, in a folder where no other can, or where studies do not lie apart.
        ConfigError: pydicom is not installed.
    """
    found, damaged = list_series(root)
    studies: dict[str, list[Series]] = defaultdict(list)
    for series in found:
        studies[series.study_uid].append(series)
    near = _damaged_near(root, studies, damaged) if damaged else {}
    names = _study_names(root, list(studies.values()))
    exams = [
        Exam(name, tuple(series), wanted, near.get(uid, ()))
        for name, (uid, series) in zip(names, studies.items(), strict=True)
    ]
    return sorted(exams, key=lambda exam: exam.name)


def _damaged_near(
    root: Path, studies: dict[str, list[Series]], damaged: Sequence[Damaged]
) -> dict[str, tuple[Damaged, ...]]:
    """The damaged files that may belong to each study, by its UID.

    Raises:
        FileError: One may belong to any.
    """
    folders = {uid: _folders(root, series) for uid, series in studies.items()}
    held = set[tuple[str, ...]]().union(*folders.values())
    depth = len(_shared(held))
    tops = {uid: {folder[depth : depth + 1] for folder in own} for uid, own in folders.items()}
    apart = len(set[tuple[str, ...]]().union(*tops.values())) > 1
    apart = apart and all(len(own) == 1 and () not in own for own in tops.values())
    for file, problem in damaged:
        if not apart or folders_below(root, file) not in held:
            raise FileError(problem)
    return {
        uid: tuple(each for each in damaged if folders_below(root, each.file)[depth : depth + 1] in own)
        for uid, own in tops.items()
    }


def choose_channels(exam: Exam, plan: Plan) -> tuple[Channel, ...]:
    """Choose the series, or the phases, that a model needs.

    Raises:
        FileError: A file is damaged that may be one of its slices.
        DataError: None fits, or several do: the message lists what there is.
    """
    if exam.damaged:
        raise FileError(exam.damaged[0].problem)
    if exam.wanted and not any(_is_wanted(each, exam) for each in exam.series):
        raise DataError(f"{exam.name} has no series {exam.wanted!r}. There are: {_listed(exam.series)}")
    if plan.joint_zscore:
        return _choose_phases(exam, plan)
    chosen = [_choose_series(exam, name, alone=len(plan.source_channels) == 1) for name in plan.source_channels]
    if len({series.uid for series in chosen}) < len(chosen):
        raise DataError(
            f"{exam.name} has one series for two of the channels {', '.join(plan.source_channels)}: "
            f"{_listed(exam.series)}"
        )
    return tuple(
        Channel(name, series, _single_phase(series)) for name, series in zip(plan.source_channels, chosen, strict=True)
    )


def read_exam(exam: Exam, plan: Plan) -> Volume:
    """Read the channels that a model needs, rescaled as the files say, on the grid of the first.

    Raises:
        FileError: A file is truncated or damaged.
        DataError: See `choose_channels`; or a compression that cannot be decoded.
        GeometryError: Slices make no regular grid, or channels are on different ones.
    """
    channels = choose_channels(exam, plan)
    volumes = [read_frames(channel.frames, channel.name, str(channel.series)) for channel in channels]
    first = volumes[0]
    for channel, volume in zip(channels[1:], volumes[1:], strict=True):
        check_same_grid(first, volume, (str(channels[0].series), str(channel.series)))
        del volume
    del first  # so that each is free once it is joined
    return join_channels(volumes)


def exam_size(exam: Exam, plan: Plan) -> tuple[tuple[int, int, int], Affine, int]:
    """Voxels, affine and number of the channels that `read_exam` gives, from the headers.

    Raises:
        DataError: See `choose_channels`.
        GeometryError: Slices make no regular grid.
    """
    channels = choose_channels(exam, plan)
    frames = channels[0].frames
    placements = placements_of(frames)
    if not placements:
        raise GeometryError(f"{channels[0].series}: no slice says where it is ({PLACE_TAGS}); export the series again")
    rows, columns = placements[0].size
    try:
        affine = stack_slices(placements).affine
    except GeometryError as error:
        raise GeometryError(f"{channels[0].series}: {error}") from error
    return (columns, rows, len(frames)), affine, len(channels)


def phase_table(exam: Exam, plan: Plan) -> tuple[str, ...]:
    """What was found and used, a line each, for a DCE model; else nothing.

    Raises:
        TokenSegError: See `choose_channels`.
    """
    if not plan.joint_zscore:
        return ()
    channels = choose_channels(exam, plan)
    moments = [min((f.acquired for f in channel.frames if f.acquired), default=None) for channel in channels]
    lines = []
    for channel, moment in zip(channels, moments, strict=True):
        later = ""
        if moment is not None and moments[0] is not None:
            later = f", {(moment - moments[0]).total_seconds():.0f} s after the first"
        series = channel.series
        lines.append(
            f"{channel.name}: series {series.number or '?'} ({series.description or 'no description'}), "
            f"{len(channel.frames)} slices{later}"
        )
    used = {channel.series.uid for channel in channels}
    return (*lines, *(f"not used: {series}" for series in exam.series if series.uid not in used))


def _choose_series(exam: Exam, channel: str, *, alone: bool) -> Series:
    """The wanted series; else the only one that says the channel's name; else, if it is `alone`, the only scan."""
    if alone and exam.wanted:
        candidates = [each for each in exam.series if _is_wanted(each, exam)]
    else:
        scans = [each for each in exam.series if _is_scan(each) and (each.modality == "CT") == is_ct(channel)]
        candidates = [each for each in scans if _says(each, channel)] or (scans if alone else [])
        if len(candidates) > 1 and exam.wanted:
            candidates = [each for each in candidates if _is_wanted(each, exam)] or candidates
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        what = "with parallel slices that is no localizer" if alone else "whose description says so"
        kind = "of computed tomography" if is_ct(channel) else "other than computed tomography"
        raise DataError(f"{exam.name} has no series for {channel!r}, {kind} and {what}: {_listed(exam.series)}")
    raise DataError(
        f"{exam.name} has {len(candidates)} series that could be {channel!r}; name one with --series, by its UID or a "
        f"part of its description: {_listed(candidates)}"
    )


def _choose_phases(exam: Exam, plan: Plan) -> tuple[Channel, ...]:
    candidates = [each for each in exam.series if (_is_wanted(each, exam) if exam.wanted else _is_scan(each))]
    try:
        phases = choose_phases(candidates, len(plan.source_channels), by_user=bool(exam.wanted))
    except DataError as error:
        raise type(error)(
            f"{exam.name}: {error}. Choose with --series, by a part of the description that all phases share. "
            f"There are: {_listed(exam.series)}"
        ) from error
    return tuple(Channel(phase_name(number), phase.series, phase.frames) for number, phase in enumerate(phases))


def _is_scan(series: Series) -> bool:
    """Two or more slices, not called a localizer nor known to be of several orientations, no picture of a screen."""
    places = series.placements
    if len(series.frames) < 2 or not places or any(part.startswith(_LOCALIZERS) for part in series.image_type):
        return False
    return all(np.allclose(place.orientation, places[0].orientation, rtol=0, atol=1e-2) for place in places)


def _is_wanted(series: Series, exam: Exam) -> bool:
    return series.uid == exam.wanted or exam.wanted.casefold() in series.description.casefold()


def _says(series: Series, name: str) -> bool:
    """Whether a description has a channel's name as a word of its own."""
    word = rf"(?<![a-z0-9]){re.escape(name.casefold())}(?![a-z0-9])"
    return re.search(word, series.description.casefold()) is not None


def _listed(series: Sequence[Series]) -> str:
    return "".join(f"\n  {each}" for each in series) or "none"


def _single_phase(series: Series) -> tuple[Frame, ...]:
    phases = split_phases(series)
    if len(phases) > 1:
        raise DataError(f"{series} holds {len(phases)} phases; the model takes one: choose another series")
    return phases[0].frames


def _study_names(root: Path, studies: Sequence[Sequence[Series]]) -> list[str]:
    """A name for each study: that of what was given if it is the only one, else of the folders that hold it alone."""
    stem = root.name if root.is_dir() else root.name.removesuffix(".zip").removesuffix(".dcm")
    own = root.resolve().name if root.is_dir() and not stem else stem
    if len(studies) == 1:
        return [own]
    names = ["-".join(_shared(_folders(root, study))) for study in studies]
    if "" in names or len(set(names)) < len(names):
        # Not by number, which another study added later would change; and the UID may not be a name by itself.
        return [f"{own}-{hashlib.sha256(study[0].study_uid.encode()).hexdigest()[:_DIGITS]}" for study in studies]
    return names


def _folders(root: Path, study: Sequence[Series]) -> set[tuple[str, ...]]:
    return {folders_below(root, frame.file) for series in study for frame in series.frames}


def _shared(folders: Collection[tuple[str, ...]]) -> tuple[str, ...]:
    """The folders that all of them begin with."""
    same = takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False))
    return tuple(parts[0] for parts in same)
