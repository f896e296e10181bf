"""Names that outputs may bear: a hash of a case's name in place of it, unless names are asked for.

File and folder names often are patients' names. They stay where a user put them, in the names of the masks and in the
summary that pairs them with their volumes, and go nowhere else: not into logs, status, manifests, quality files or
reports.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from tokenseg.data.cases import Case

_DIGITS = 12


def shown_name(case_id: str, *, show_names: bool) -> str:
    """What a case is called in outputs: `case-` and a hash, or its own name."""
    if show_names:
        return case_id
    return f"case-{hashlib.sha256(case_id.encode()).hexdigest()[:_DIGITS]}"


def without_names(text: str, case: Case, *, show_names: bool) -> str:
    """A message about a case without the case's name and the paths of its files."""
    if show_names:
        return text
    hidden = shown_name(case.case_id, show_names=False)
    for name in sorted(_names(case), key=len, reverse=True):
        text = text.replace(name, hidden)
    return text


def _names(case: Case) -> set[str]:
    paths = list(case.images)
    members: set[str] = set()
    if case.exam is not None:
        files = {frame.file for series in case.exam.series for frame in series.frames}
        paths += [file.path for file in files]
        members = {file.member for file in files} - {""}
    names = {case.case_id, *members}
    for path in paths:
        for spelling in {path, path.absolute(), path.resolve()}:
            names |= {str(spelling), *_folders(spelling)}
        names.add(path.name)
    return names - {"", ".", "/"}


def _folders(path: Path) -> set[str]:
    """Folders that hold a file, but for those so short that their letters stand in any text."""
    return {str(parent) for parent in path.parents if len(parent.parts) > 1}
