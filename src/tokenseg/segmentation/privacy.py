"""Names that outputs may bear: a hash of a case's name in place of it, unless names are asked for.

File and folder names often are patients' names. They stay where a user put them, in the names of the masks and in the
summary that pairs them with their volumes, and go nowhere else: not into logs, status, manifests, quality files or
reports.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from tokenseg.datasets.cases import Case
from tokenseg.imaging.dicom_files import paths_in_text

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
    hidden = _hidden(case)
    if case.problem:
        # Found when the case was listed, in one of files that the case itself does not know.
        alias = shown_name(case.case_id, show_names=False)
        hidden |= {name: alias for path in case.images for name in paths_in_text(path, text)}
    if not hidden:
        return text
    names = "|".join(re.escape(name) for name in sorted(hidden, key=len, reverse=True))
    # At once, so that nothing is replaced in a replacement. Whole words only, but endings such as _seg may follow.
    return re.sub(rf"(?<![^\W_])(?:{names})(?![^\W_])", lambda found: hidden[found[0]], text)


def _hidden(case: Case) -> dict[str, str]:
    """What stands for each name and path of a case."""
    alias = shown_name(case.case_id, show_names=False)
    paths, members = list(case.images), set[str]()
    if case.exam is not None:
        paths += [file.path for file in case.exam.files]
        members = {file.member for file in case.exam.files} - {""} | {case.exam.name}
    # A name such as 1 or a would be found in any sentence, and says nothing of who it is.
    names = set() if re.fullmatch(r"[0-9]{1,3}|[a-z]{1,2}", case.case_id) else {case.case_id}
    hidden = dict.fromkeys(names | members, alias)
    for path in paths:
        # The rest of a file's name says which channel it is.
        rest = path.name.removeprefix(case.case_id) if path.name.startswith(case.case_id) else ""
        hidden[path.name] = alias + rest
        for spelling in {str(path), os.path.abspath(path), os.path.realpath(path)}:  # noqa: PTH100 - links may loop
            hidden[spelling] = alias + rest
            # Folders, but for those so short that their letters stand in any text.
            hidden |= {str(parent): alias for parent in Path(spelling).parents if len(parent.parts) > 1}
    return hidden
