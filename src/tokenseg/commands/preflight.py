"""Checks of a request before the work, so that it does not fail after it."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

from tokenseg.errors import ConfigError, FileError

_ENDINGS = {"json": ".json", "csv": ".csv", "report": ".html", "picture": ".png", "plot": ".png"}
_READ_BACK = (
    *("dataset.json", "model.json", "run.json", "splits.json", "fingerprint.json", "cohort.json", "lesions.json"),
    *("summary.csv", "log.csv"),
)
"""Files that TokenSeg itself reads; an output must not take the place of one."""


def check_outputs(**paths: Path | None) -> None:
    """Refuse what cannot be written, or would take the place of something else, before the work and not after.

    Endings keep outputs apart from images and masks, and from each other.

    Args:
        paths: By the name of their option; None where it is not given.

    Raises:
        ConfigError: A name has the wrong ending, or is that of a folder or of a file TokenSeg reads.
        FileError: A place cannot be written.
    """
    from tokenseg.files import check_writable

    for option, path in paths.items():
        if path is None:
            continue
        given, ending = f"--{option} {path}", _ENDINGS[option]
        if path.is_dir():
            raise ConfigError(
                f"{given}: this is a folder; name a file ending in {ending}, such as {path / option}{ending}"
            )
        if path.suffix.lower() != ending:
            raise ConfigError(f"{given}: the name must end in {ending}; name it so")
        if path.name in _READ_BACK and path.exists():
            raise ConfigError(f"{given}: a file of this name is there, and TokenSeg reads it; choose another name")
        blocking = next(parent for parent in path.parents if parent.exists())
        if not blocking.is_dir():
            raise FileError(f"output {path} cannot be written: {blocking} is a file, not a folder; name another place")
        check_writable(path.parent, path)


def refuse_file(folder: Path) -> None:
    """Refuse a file where a folder is to be made.

    Raises:
        FileError: `folder` is a file.
    """
    if folder.is_file():
        raise FileError(f"{folder} is a file; name a folder, which is made if it is not there")


def refuse_used_folder(folder: Path) -> None:
    """Refuse a folder with something in it: what is written there must not mix with, or replace, what was.

    Raises:
        FileError: It is a file, or not empty.
    """
    refuse_file(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise FileError(f"{folder} is not empty; name a new folder")


def needs_extra(extra: str, *modules: str) -> None:
    """Refuse to begin without the packages of an optional extra.

    Raises:
        ConfigError: One of the modules is not installed; the message is the command that installs it.
    """
    from importlib.util import find_spec

    if any(find_spec(module) is None for module in modules):
        raise ConfigError(f"this command needs the extra {extra!r}: pip install 'tokenseg[{extra}]'")


def quieten_training_libraries() -> None:
    """Keep notes of the training libraries off the user's screen; ours stay."""
    warnings.filterwarnings("ignore", module="monai")
    # Fabric sets the level of its logger when it is imported.
    import lightning_fabric  # noqa: F401

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
