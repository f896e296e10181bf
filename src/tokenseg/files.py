"""Files written whole or not at all: a crash never leaves half of one behind."""

from __future__ import annotations

import glob
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tokenize import TokenError

from tokenseg.errors import FileError

_TEMPORARY = ".partial-"
DAMAGED_ARRAY = (OSError, ValueError, OverflowError, TypeError, AttributeError, EOFError, SyntaxError, TokenError)
"""What numpy raises of `.npy` files that are damaged or something else, and what asking an archive for a shape does."""


@contextmanager
def replaced_on_success(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and takes the name `path`.

    The temporary name keeps the ending of `path`, since libraries choose the format by it.

    Raises:
        FileError: The folder cannot be written, or the disk is full; `path` is then as it was.
    """
    temporary = temporary_beside(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
        put_in_place(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def put_in_place(temporary: Path, path: Path) -> None:
    """Have a temporary file on disk and give it the name `path`.

    Raises:
        FileError: That fails; `path` is then as it was.
    """
    with writing(path):
        _flush(temporary)
        temporary.replace(path)
        _flush_folder(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name what is being written, and not its temporary file, in whatever goes wrong on disk.

    Raises:
        FileError: With the system's reason.
    """
    try:
        yield
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}; nothing was changed there") from error


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside `folder`, which must not be there; on success it takes the name `folder`.

    Raises:
        FileError: It cannot be written; nothing is left of it then.
    """
    temporary = temporary_beside(folder)
    try:
        with writing(folder):
            temporary.mkdir(parents=True)
            yield temporary
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`, all or nothing."""
    with replaced_on_success(path) as temporary:
        temporary.write_bytes(content)


def is_utf8(text: str) -> bool:
    """Whether a text is whole characters: names of files may be other bytes, and JSON may hold halves."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_no_device(path: Path) -> None:
    """Refuse a pipe or a device: reading one may wait for ever, or never come to an end.

    Raises:
        FileError: It is there, and neither a file nor a folder.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise FileError(f"{path} is a pipe or a device; give a file")


def check_there(path: Path) -> None:
    """Refuse what is not there, and say so of a link too, which is.

    Raises:
        FileError: It is missing, or a link to what is missing; or the system does not tell.
    """
    try:
        if path.exists():
            return
        if path.is_symlink():
            raise FileError(f"{path} is a link, and what it points to is not there; mend the link, or put a file there")
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}; check the path") from error
    raise FileError(f"{path} does not exist; check the path")


def check_writable(folder: Path, output: Path) -> None:
    """Try to write where `output` is to be: before hours of work, not after. Nothing is left behind.

    Raises:
        FileError: It cannot be made or written.
    """
    probe = folder / f"{_TEMPORARY}{secrets.token_hex(4)}-probe"
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
        for path in absent:
            path.rmdir()
    except OSError as error:
        raise FileError(f"output {output} cannot be written: {error.strerror or error}; name another place") from error


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders that a killed process left directly in `folder`."""
    for path in (*folder.glob(f"{_TEMPORARY}*"), *folder.glob(f".old{_TEMPORARY}*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def remove_leftovers_of(path: Path) -> None:
    """Remove temporary files that a killed process left when it was to write `path`."""
    for leftover in path.parent.glob(f"{_TEMPORARY}*-{glob.escape(path.name)}"):
        leftover.unlink(missing_ok=True)


def temporary_beside(path: Path) -> Path:
    """A free name beside `path`, with its ending; `remove_leftovers` finds it."""
    return path.with_name(f"{_TEMPORARY}{secrets.token_hex(4)}-{path.name}")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(folder: Path) -> None:
    # Windows gives no handle of a folder; its renames need none.
    if os.name == "nt":  # pragma: no cover - windows
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_json_with(path: Path, keys: set[str]) -> bool:
    """Whether a file is a JSON object that has these keys: one of ours, of whatever version."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and keys <= content.keys()
