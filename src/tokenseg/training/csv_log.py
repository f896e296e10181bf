"""The training log `log.csv`: one row a step."""

from __future__ import annotations

import csv
import errno
import io
import os
import re
from pathlib import Path

from tokenseg.errors import FileError
from tokenseg.files import write_atomically

COLUMNS = (
    "step",
    "loss",
    "segmentation",
    "deep",
    "commitment",
    "score",
    "learning_rate",
    "seconds",
    "code_perplexity",
    "code_used_fraction",
    "val_dice",
)


class CsvLog:
    """Appends rows to `log.csv`.

    Args:
        path: The file; rows past `resume_step` are dropped, since those steps run again.
        resume_step: Steps that the resumed state has finished; 0 starts a new file.

    Raises:
        FileError: The file cannot be read or written.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        rows = [row for row in read_log(path) if int(row["step"]) <= resume_step] if path.exists() else []
        write_atomically(path, _lines([dict(zip(COLUMNS, COLUMNS, strict=True)), *rows]))
        try:
            # Unbuffered: what a full disk refuses must not come back when the file is closed.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise FileError(f"cannot write {path}: {error.strerror or error}") from error

    def write(self, row: dict[str, float | int | str]) -> None:
        """Append one row; columns that are not given stay empty.

        Raises:
            FileError: The disk is full.
        """
        try:
            line = _lines([{key: _text(value) for key, value in row.items()}])
            if self._file.write(line) < len(line):  # what no longer fits is left out without an error
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise FileError(f"cannot write {self._file.name}: {error.strerror or error}") from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_log(path: Path) -> list[dict[str, str]]:
    """Read complete rows of `log.csv`; a row that a kill cut short is left out.

    Raises:
        FileError: The file cannot be read, or is no log.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"log {path} cannot be read: {error}; move it away and resume") from error
    complete = text[: text.rfind("\n") + 1]
    reader = csv.DictReader(io.StringIO(complete))
    try:
        strange = sorted(set(reader.fieldnames or ()) - set(COLUMNS))
        rows = [row for row in reader if None not in row.values() and None not in row]
    except csv.Error as error:
        raise FileError(f"log {path} is damaged: {error}; move it away and resume") from error
    if strange and "step" in (reader.fieldnames or ()):  # else it is no log of ours at all
        raise FileError(f"log {path} is damaged: it has a column {strange[0][:40]!r}; move it away and resume")
    return [row for row in rows if re.fullmatch("[0-9]{1,18}", row.get("step", ""))]


def _lines(rows: list[dict[str, str]]) -> bytes:
    text = io.StringIO()
    csv.DictWriter(text, COLUMNS, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _text(value: float | int | str) -> str:
    return f"{value:.7g}" if isinstance(value, float) else str(value)
