"""Image files in folders: endings, hidden files, and the `CASE_0000` naming of channels."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenseg.errors import DataError
from tokenseg.files import is_utf8
from tokenseg.imaging.formats import image_stem, is_named_as_image

MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 2048
_CHANNEL_STEM = re.compile(r"(?P<case>.+)_(?P<number>[0-9]{4})")


def image_files(folder: Path) -> list[Path]:
    """List the image files of a folder, sorted; nothing where the folder is not there.

    Names that start with a dot (macOS leaves `._x.nii.gz` beside `x.nii.gz`) are not images. A link to a file that is
    missing is listed: it stands for a case, which fails when it is read, and is not left out in silence.
    """
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if not path.name.startswith(".") and is_named_as_image(path) and (path.is_file() or _is_dangling(path))
    )


def _is_dangling(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def group_channels(paths: Iterable[Path]) -> dict[str, dict[int, Path]]:
    """Group `CASE_0000.nii.gz`, `CASE_0001.nii.gz`... by case: the file of each channel number, in order.

    Files that are not named so are left out.
    """
    groups: dict[str, dict[int, Path]] = {}
    for path in sorted(paths):
        match = _CHANNEL_STEM.fullmatch(image_stem(path))
        if match:
            groups.setdefault(match["case"], {})[int(match["number"])] = path
    return groups


def name_channels(numbers: Iterable[int], names: Sequence[str]) -> tuple[str, ...]:
    """Name numbered channel files; a number beyond the known names is named after itself, as `_0004`."""
    return tuple(names[number] if number < len(names) else f"_{number:04d}" for number in numbers)


def is_unnamed(channel: str) -> bool:
    """Whether `name_channels` knew no name for this channel."""
    return re.fullmatch("_[0-9]{4}", channel) is not None


def channel_file(path: Path, number: int) -> Path:
    """Name the file of one channel of a case: `x.nii.gz` and 2 give `x_0002.nii.gz`."""
    stem = image_stem(path)
    return path.with_name(f"{stem}_{number:04d}{path.name.removeprefix(stem)}")


def check_path_text(text: str, source: Path) -> None:
    """Refuse what no system takes for a path.

    Raises:
        DataError: It holds a zero byte or half a character, or is too long.
    """
    parts = [len(part.encode(errors="surrogatepass")) for part in text.split("/")]
    if not is_utf8(text) or "\0" in text or max(parts) > MAX_NAME_BYTES or sum(parts) > MAX_PATH_BYTES:
        raise DataError(f"{source} names {text[:100]!r}, which cannot be a path; correct it")


def path_inside(root: Path, text: str, source: Path) -> Path:
    """Join a relative path, as a `dataset.json` gives it, to the dataset's folder.

    Symbolic links are not followed for the check, since datasets are often assembled from them.

    Raises:
        DataError: The path is absolute, leads out of the folder, or can be none.
    """
    check_path_text(text, source)
    relative = Path(os.path.normpath(text))
    if relative.is_absolute() or relative.parts[:1] == ("..",):
        raise DataError(f"{source} names {text!r}, which is outside the dataset folder; use paths relative to it")
    return root / relative
