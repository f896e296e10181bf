"""`log.csv`: one row a step, always; the same to TensorBoard where it is installed and wanted."""

from __future__ import annotations

import csv
import io
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


class Journal:
    """Appends rows to `log.csv`.

    Args:
        path: The file; rows past `resume_step` are dropped, since those steps run again.
        resume_step: Steps that the resumed state has finished; 0 starts a new file.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        rows = [row for row in read_journal(path) if int(row["step"]) <= resume_step] if path.exists() else []
        write_atomically(path, _lines([dict(zip(COLUMNS, COLUMNS, strict=True)), *rows]))
        try:
            self._file = path.open("ab")
        except OSError as error:
            raise FileError(f"cannot write {path}: {error.strerror or error}") from error

    def write(self, row: dict[str, float | int | str]) -> None:
        """Append one row; columns that are not given stay empty."""
        try:
            self._file.write(_lines([{key: _text(value) for key, value in row.items()}]))
            self._file.flush()
        except OSError as error:
            raise FileError(f"cannot write {self._file.name}: {error.strerror or error}") from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_journal(path: Path) -> list[dict[str, str]]:
    """Read complete rows of `log.csv`; a row that a kill cut short is left out."""
    text = path.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    return [
        row for row in csv.DictReader(io.StringIO(complete)) if row["step"].isdecimal() and None not in row.values()
    ]


def _lines(rows: list[dict[str, str]]) -> bytes:
    text = io.StringIO()
    csv.DictWriter(text, COLUMNS, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _text(value: float | int | str) -> str:
    return f"{value:.7g}" if isinstance(value, float) else str(value)
