"""Files of rows, and the rows of `tokenseg benchmark accuracy`: one a training, and one a case and label of it.

Several processes may write to the same files; each row is there once, however often a benchmark is resumed.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeAlias

from tokenseg.errors import ConfigError, FileError

if sys.platform != "win32":
    import fcntl

Row: TypeAlias = dict[str, str]
"""Texts by column, as they stand in the file."""

KEY_COLUMNS = ("dataset", "network", "fold", "seed", "budget", "threads", "precision", "device")
"""What tells one training from another."""
ROW_COLUMNS = (
    *("date", "commit", "dataset", "network", "parameters_m", "fold", "seed", "budget", "steps", "learning_rate"),
    *("threads", "precision", "device", "n", "dice", "dice_low", "dice_high", "dice_labels", "hd95_mm", "nsd_1mm"),
    *("missed", "train_s", "error"),
)
CASE_COLUMNS = (*KEY_COLUMNS, "case", "label", "dice")
CHOICE_COLUMNS = (
    *("date", "commit", "dataset", "network", "fold", "seed", "budget", "steps", "threads", "precision", "device"),
    *("learning_rate", "dice", "chosen", "error"),
)

_VOLATILE = ("date", "commit")


def cases_path(path: Path) -> Path:
    """Where the Dice of each case stands, for the rows in `path`."""
    return path.with_name(f"{path.stem}_cases{path.suffix}")


def key_of(row: Mapping[str, str]) -> tuple[str, ...]:
    """Which training a row, or a row of a case, is of."""
    return tuple(row[name] for name in KEY_COLUMNS)


def record(path: Path, row: Row, cases: Sequence[Row]) -> None:
    """Append a training's row, and before it those of its cases, unless it stands there already.

    A failure is the same as an earlier one with another date or commit.

    Raises:
        ConfigError: A file has other columns.
        FileError: A file cannot be read.
    """
    with _locked(path) as file:
        if _known(_read(file, path, ROW_COLUMNS), row):
            return
        append(cases_path(path), CASE_COLUMNS, cases)
        _append(file, ROW_COLUMNS, [row])


def append(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Append rows, with a header where the file is new.

    Raises:
        ConfigError: The file has other columns.
        FileError: The file cannot be read.
    """
    with _locked(path) as file:
        _read(file, path, columns)
        _append(file, columns, rows)


def append_missing(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Append those rows that do not stand there already.

    Raises:
        ConfigError: The file has other columns.
        FileError: The file cannot be read.
    """
    with _locked(path) as file:
        known = _read(file, path, columns)
        _append(file, columns, [row for row in rows if not _known(known, row)])


def read_rows(path: Path, columns: Sequence[str]) -> list[Row]:
    """Complete rows of a file, oldest first; none where there is no file.

    Raises:
        ConfigError: The file has other columns.
        FileError: The file cannot be read.
    """
    if not path.exists():
        return []
    with path.open("rb") as file:
        return _read(file, path, columns)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time into the body; a killed one leaves nothing behind that is in the way."""
    with _locked(path):
        yield


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        # Windows has no lock that a second handle of the same process may wait for: one process at a time there.
        if sys.platform != "win32":
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _read(file: BinaryIO, path: Path, columns: Sequence[str]) -> list[Row]:
    file.seek(0)
    content = file.read()
    try:
        # A row that a kill cut short does not count.
        text = content[: content.rfind(b"\n") + 1].decode()
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not text; name another file") from error
    reader = csv.DictReader(io.StringIO(text))
    rows = list(reader)
    whole = all(None not in row and None not in row.values() for row in rows)
    if text:
        ours = whole and tuple(reader.fieldnames or ()) == tuple(columns)
    else:
        # Nothing at all, or a header that a kill cut short; any other line without an end is somebody else's.
        ours = ",".join(columns).encode().startswith(content)
    if not ours:
        raise ConfigError(f"{path} has other columns than this benchmark writes; name another file")
    return rows


def _append(file: BinaryIO, columns: Sequence[str], rows: Sequence[Row]) -> None:
    file.seek(0)
    length = file.read().rfind(b"\n") + 1
    file.truncate(length)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if not length:
        writer.writeheader()
    writer.writerows(rows)
    file.write(text.getvalue().encode())


def _known(rows: Sequence[Row], row: Row) -> bool:
    ignored = _VOLATILE if row["error"] else ()
    return any(all(other[name] == text for name, text in row.items() if name not in ignored) for other in rows)
