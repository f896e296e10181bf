"""The dataset, whatever its layout on disk: cases, labels, channels, and given splits."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from tokenseg.config import Label
from tokenseg.errors import DataError
from tokenseg.files import is_utf8
from tokenseg.imaging.dicom.exam import Exam
from tokenseg.messages import first_few

LayoutName: TypeAlias = Literal["msd", "nnunet", "mamamia"]

MAX_CHANNELS = 8
MIN_CASES = 2
MAX_LABEL_CHARACTERS = 60
"""A name stands in lists and tables; DICOM has room for 64."""
MAX_ID_BYTES = 200
"""File names have 255 on most systems, and endings and temporary names are added."""


@dataclass(frozen=True, slots=True)
class Case:
    """One exam: its image files and, where there is one, its reference mask."""

    case_id: str
    """Unique in its dataset; names the output file, so it holds no path separator."""
    patient_id: str
    """Cases of one patient never stand on both sides of a split."""
    images: tuple[Path, ...]
    """One 3D file a channel, or a single 3D or 4D channel-last file."""
    label: Path | None = None
    channels: tuple[str, ...] = ()
    """Channels of `images` in order; empty where they are the dataset's source channels."""
    exam: Exam | None = None
    """The DICOM study that the case is, which then has no `images`."""
    problem: str = ""
    """Why it cannot be read, where that showed when it was listed."""


@dataclass(frozen=True, slots=True)
class Split:
    """Case ids of one fold."""

    train: tuple[str, ...]
    val: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Dataset:
    """A training dataset in one of the known layouts."""

    root: Path
    layout: LayoutName
    reason: str
    """Why this layout was recognised, one line to print."""
    cases: tuple[Case, ...]
    """Sorted by case id."""
    source_channels: tuple[str, ...]
    channels: tuple[str, ...]
    """Network input channels, see `Plan.channels`."""
    joint_zscore: bool
    ct_channels: tuple[bool, ...]
    """For each entry of `channels`, whether its intensities are Hounsfield units."""
    labels: tuple[Label, ...]
    regions: bool
    file_ending: str
    splits: tuple[Split, ...] | None = None
    """Folds that the dataset brings; None where it leaves them to us."""


def check_channel_names(names: dict[int, str], source: str) -> tuple[str, ...]:
    """Order channel names by their number.

    Args:
        names: Name by channel number.
        source: File and key that they come from, for messages.

    Raises:
        DataError: No channel, more than 8, numbers that are not 0, 1, 2..., or names that repeat, are empty or
            hold the " - " that stands for a difference of channels in a plan.
    """
    if sorted(names) != list(range(len(names))) or not 1 <= len(names) <= MAX_CHANNELS:
        raise DataError(
            f"{source} numbers its channels {', '.join(map(str, sorted(names))) or '(none)'}; "
            f'they must be "0", "1", ... without gaps, 1 to {MAX_CHANNELS} of them'
        )
    ordered = tuple(names[number].strip() for number in range(len(names)))
    if len(set(ordered)) != len(ordered) or "" in ordered:
        raise DataError(f"{source} names its channels {', '.join(map(repr, ordered))}; give each its own name")
    for name in ordered:
        if " - " in name:
            raise DataError(f"{source} has the channel {name!r}; ' - ' means a difference of channels here, rename it")
    return ordered


def check_label_names(names: Sequence[str], source: Path) -> None:
    """Check that labels can be told apart by their names, and that these can be shown.

    Args:
        names: Of the foreground labels.
        source: The `dataset.json` that they come from, for messages.

    Raises:
        DataError: A name is empty or long, holds a control character or half a character, or is given twice.
    """
    # In messages, no line break of a name may make two lines of one.
    unusable = [repr(name[: MAX_LABEL_CHARACTERS + 1]) for name in names if not _is_label_name(name)]
    if unusable:
        raise DataError(
            f"{source}, key labels, has names that cannot be used: {first_few(unusable)}; "
            f"give each label a name of 1 to {MAX_LABEL_CHARACTERS} characters on one line"
        )
    repeated = sorted(name for name, count in Counter(name.strip() for name in names).items() if count > 1)
    if repeated:
        raise DataError(
            f"{source}, key labels, gives a name to several labels: {first_few(repeated)}; give each label its own name"
        )


def _is_label_name(name: str) -> bool:
    is_line = is_utf8(name) and not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", name)
    return is_line and name.strip() != "" and len(name) <= MAX_LABEL_CHARACTERS


def check_cases(cases: Sequence[Case], root: Path) -> tuple[Case, ...]:
    """Sort training cases by id after checking that they can be trained on.

    Raises:
        DataError: Fewer than two cases, ids that repeat or cannot name a file, or image or label files that are
            not there (the first few are listed).
    """
    if len(cases) < MIN_CASES:
        found = "no training case" if not cases else f"one training case only ({cases[0].case_id})"
        raise DataError(f"dataset {root} has {found}; training needs at least {MIN_CASES}, to hold one out")
    check_case_ids([case.case_id for case in cases], root)
    needed = [path for case in cases for path in (*case.images, case.label) if path is not None]
    missing = [path for path in needed if not path.is_file()]
    if missing:
        raise DataError(
            f"dataset {root}: {len(missing)} of {len(needed)} image and label files are missing: "
            f"{first_few([str(_below(path, root)) for path in missing])}; complete the dataset, or take the cases out"
        )
    return tuple(sorted(cases, key=lambda case: case.case_id))


def check_case_ids(case_ids: Sequence[str], root: Path) -> None:
    """Check that case ids are unique and can name files.

    Raises:
        DataError: An id repeats, is empty or very long, starts with a dot, or holds a path separator or control
            character.
    """
    pattern = r"[^./\\\x00-\x1f][^/\\\x00-\x1f]*"
    usable = [is_utf8(each) and len(each.encode()) <= MAX_ID_BYTES and re.fullmatch(pattern, each) for each in case_ids]
    if not all(usable):
        # A line break in one would make two lines of the message.
        unusable = [
            each if each.isprintable() else repr(each) for each, ok in zip(case_ids, usable, strict=True) if not ok
        ]
        raise DataError(f"{root}: case ids must be usable as file names; these are not: {first_few(unusable)}")
    repeated = sorted(case_id for case_id, count in Counter(case_ids).items() if count > 1)
    if repeated:
        raise DataError(f"{root}: case ids must be unique; these are given more than once: {first_few(repeated)}")


def shared_labels(cases: Sequence[Case]) -> dict[str, str]:
    """What is wrong with each case whose label file is listed for another case too, by its id."""
    users: dict[str, list[str]] = defaultdict(list)
    for case in cases:
        if case.label is not None:
            users[os.path.normpath(case.label)].append(case.case_id)
    faults: dict[str, str] = {}
    for label, ids in users.items():
        for case_id in ids if len(ids) > 1 else ():
            others = first_few([other for other in ids if other != case_id])
            faults[case_id] = f"label file {Path(label).name} is that of {others} too"
    return faults


OWN_LABEL = "list for each case its own label file, or leave a case out"
"""What mends a fault of `shared_labels`."""


def _below(path: Path, root: Path) -> Path:
    return path.relative_to(root) if path.is_relative_to(root) else path
