"""The mended copy of `tokenseg check --fix`; nothing of the original dataset is touched.

Channels and masks on another grid are resampled onto that of the first channel (masks to the nearest voxel), fractions
in masks are rounded, NaN and infinity become the channel's lowest value, and the value of a 0/255 mask of one label is
listed, so that the model writes 255 as the user does.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from tokenseg.checking.findings import LISTS_255, Finding
from tokenseg.checking.mask_rounding import round_mask
from tokenseg.config import Label
from tokenseg.datasets.cases import Case, Dataset, shared_labels
from tokenseg.datasets.dataset_json import read_json
from tokenseg.datasets.layouts import list_dataset_images
from tokenseg.errors import DataError, FileError, TokenSegError
from tokenseg.files import replaced_folder, write_atomically
from tokenseg.imaging.formats import Stored, is_written, read_header, read_values, voxel_files, write_values
from tokenseg.imaging.grids import is_lost_header, relate_grids, resample
from tokenseg.imaging.volume import Grid
from tokenseg.progress import Progress


def check_target(dataset: Dataset, out: Path) -> None:
    """Refuse a place for the copy before the work and not after.

    Raises:
        FileError: It exists, or lies in the dataset.
        DataError: The dataset names its files by paths, which a copy cannot follow.
    """
    if out.exists():
        raise FileError(f"--fix {out} is there already; name a new folder")
    if out.resolve().is_relative_to(dataset.root.resolve()):
        raise FileError(f"--fix {out} lies in the dataset itself; name a folder beside it")
    manifest = read_json(dataset.root / "dataset.json") if (dataset.root / "dataset.json").is_file() else {}
    by_path = dataset.layout == "nnunet" and isinstance(manifest, dict) and "dataset" in manifest
    if by_path or any(not _is_inside(path, dataset.root) for case in dataset.cases for path in _files(case)):
        raise DataError(f"{dataset.root} names files by their paths; copy them into imagesTr/ and labelsTr/ for --fix")


def mend_dataset(dataset: Dataset, findings: Sequence[Finding], out: Path, progress: Progress) -> list[str]:
    """Write a copy of a dataset in which what can be mended is.

    Args:
        dataset: As it is.
        findings: From `check_dataset`; those that are not fixable stay as they are.
        out: Folder to make.
        progress: Told about each case.

    Returns:
        Names of the files that differ.

    Raises:
        FileError: `out` cannot be used, see `check_target`, or written; then nothing is left there.
        DataError: See `check_target`.
    """
    check_target(dataset, out)
    shared = shared_labels(dataset.cases)
    to_mend = {finding.case_id for finding in findings if finding.fixable}
    progress.stage("mending", len(dataset.cases))
    changed: list[str] = []
    with replaced_folder(out) as folder:
        for path in _all_files(dataset):
            _copy(path, folder / path.relative_to(dataset.root))
        if any(finding.kind == LISTS_255 for finding in findings):
            _list_255(folder / "dataset.json", dataset)
            changed.append("dataset.json")
        for case in dataset.cases:
            if case.case_id in to_mend:
                # A mask of two cases stays as it is, since only one of them can be right.
                paths = case.images if case.case_id in shared else _files(case)
                changed += _mend_case(dataset, case, paths, folder)
            progress.advance(case.case_id)
    return changed


def _all_files(dataset: Dataset) -> list[Path]:
    """Files of the cases, further images, and what lies beside dataset.json."""
    listed = list_dataset_images(dataset.root) or ()
    images = {path for case in (*dataset.cases, *listed) for path in _files(case) if _is_inside(path, dataset.root)}
    beside = {path for path in dataset.root.iterdir() if path.is_file() and not path.name.startswith(".")}
    parts = {part for path in images for part in voxel_files(path)}
    return sorted(path for path in images | beside | parts if path.is_file())


def _copy(path: Path, target: Path) -> None:
    # Content alone: a mode that forbids writing would stand in the way of mending and of taking it back.
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)


def _is_inside(path: Path, root: Path) -> bool:
    return Path(os.path.normpath(path)).is_relative_to(os.path.normpath(root))


def _files(case: Case) -> list[Path]:
    return [*case.images, *([] if case.label is None else [case.label])]


def _mend_case(dataset: Dataset, case: Case, paths: Sequence[Path], folder: Path) -> list[str]:
    """Mend what can be read of these files of a case; what cannot stays as it is."""
    changed = []
    try:
        first = read_header(case.images[0])
    except TokenSegError:
        return []
    for path in filter(is_written, paths):
        try:
            mended = _mended(path, first, dataset.labels if path == case.label else None)
        except TokenSegError:
            continue
        if mended is not None:
            _write(folder / path.relative_to(dataset.root), *mended)
            changed.append(path.name)
    return changed


def _mended(
    path: Path, first: Stored, labels: Sequence[Label] | None
) -> tuple[Shaped[np.ndarray, "*shape"], Stored] | None:
    """Mended values and the header that they belong to, the file's own or the first channel's; None to leave it.

    `labels` are those of a mask, None for an image.
    """
    stored, values = read_values(path)
    mended = _finite(values) if labels is None else _rounded(values, labels)
    grid, target = _grid(stored), _grid(first)
    elsewhere = values.ndim == 3 and relate_grids(target, grid).kind == "other grid"
    if elsewhere and not is_lost_header(target, grid):
        return resample(mended, grid, target, order=1 if labels is None else 0), first
    return None if mended is values else (mended, stored)


def _grid(stored: Stored) -> Grid:
    return Grid((stored.shape[0], stored.shape[1], stored.shape[2]), 1, stored.affine)


def _finite(values: Shaped[np.ndarray, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
    if np.isfinite(values).all():
        return values
    mended = np.array(values, dtype=np.float32, order="C")
    for channel in np.moveaxis(mended.reshape(*values.shape[:3], -1), 3, 0):
        finite = np.isfinite(channel)
        channel[~finite] = channel[finite].min() if finite.any() else 0
    return mended


def _rounded(values: Shaped[np.ndarray, "*shape"], labels: Sequence[Label]) -> Shaped[np.ndarray, "*shape"]:
    whole, is_whole, remedy, _ = round_mask(values, labels)
    if is_whole or remedy:
        return values
    mended: Shaped[np.ndarray, "*shape"] = whole.astype(np.int16 if np.abs(whole).max() < 2**15 else np.int32)
    return mended


def _write(path: Path, values: Shaped[np.ndarray, "*shape"], like: Stored) -> None:
    if values.dtype == np.float64:
        values = values.astype(np.float32)
    write_values(path, values, like.affine, _grid(like).spacing_mm, like.header)


def _list_255(path: Path, dataset: Dataset) -> None:
    """Say in `dataset.json` that the only label is stored as 255; masks stay, and the model writes 255."""
    manifest = read_json(path)
    if not isinstance(manifest, dict):
        raise DataError(f"{path} holds no JSON object")
    (label,) = dataset.labels
    manifest["labels"] = (
        {"0": "background", "255": label.name} if dataset.layout == "msd" else {"background": 0, label.name: 255}
    )
    write_atomically(path, json.dumps(manifest, indent=2).encode())
