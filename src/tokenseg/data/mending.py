"""`tokenseg check --fix`: a mended copy of a dataset; nothing of the original is touched.

Channels and masks on another grid are resampled onto that of the first channel (masks to the nearest voxel), fractions
in masks are rounded, NaN and infinity become the channel's lowest value, and the value of a 0/255 mask of one label is
listed, so that the model writes 255 as the user does.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from tokenseg.data.cases import Case, Dataset
from tokenseg.data.findings import Finding
from tokenseg.data.formats import Stored, mask_ending, read_values, write_values
from tokenseg.data.grids import relate_grids, resample
from tokenseg.data.manifest import read_json
from tokenseg.data.volume import Grid, read_grid
from tokenseg.errors import DataError, FileError
from tokenseg.files import replaced_folder, write_atomically
from tokenseg.progress import Progress


def mend_dataset(dataset: Dataset, findings: Sequence[Finding], out: Path, progress: Progress) -> int:
    """Write a copy of a dataset in which what can be mended is; returns the number of files that differ.

    Args:
        dataset: As it is.
        findings: From `check_dataset`; those that are not fixable stay as they are.
        out: Folder to make; must not exist.
        progress: Told about each case.

    Raises:
        FileError: `out` exists or lies in the dataset, or a file cannot be read or written; then nothing is left there.
        DataError: Files of the dataset lie outside its folder.
    """
    if out.exists():
        raise FileError(f"--fix {out} is there already; name a new folder")
    if out.resolve().is_relative_to(dataset.root.resolve()):
        raise FileError(f"--fix {out} lies in the dataset itself; name a folder beside it")
    outside = [path for case in dataset.cases for path in _files(case) if not path.is_relative_to(dataset.root)]
    if outside:
        raise DataError(f"{outside[0]} lies outside {dataset.root}; copy the files into it first")
    to_mend = {finding.case_id for finding in findings if finding.fixable}
    progress.stage("mending", len(dataset.cases))
    num_changed = 0
    with replaced_folder(out) as folder:
        shutil.copytree(dataset.root, folder, dirs_exist_ok=True)
        if any(finding.fixable and finding.kind == "label" and "does not list" in finding.text for finding in findings):
            _list_255(folder / "dataset.json", dataset)
            num_changed += 1
        for case in dataset.cases:
            if case.case_id in to_mend:
                num_changed += _mend_case(dataset, case, folder)
            progress.advance(case.case_id)
    return num_changed


def _files(case: Case) -> list[Path]:
    return [*case.images, *([] if case.label is None else [case.label])]


def _mend_case(dataset: Dataset, case: Case, folder: Path) -> int:
    changed = 0
    first = read_grid(case.images[0])
    for path in _files(case):
        stored, values = read_values(path)
        is_mask = path == case.label
        mended = _rounded(values) if is_mask else _finite(values)
        grid = Grid((stored.shape[0], stored.shape[1], stored.shape[2]), 1, stored.affine)
        elsewhere = values.ndim == 3 and relate_grids(first, grid).kind == "other grid"
        if elsewhere:
            mended = resample(mended, grid, first, order=0 if is_mask else 1)
        if mended is values:
            continue
        like = read_values(case.images[0])[0] if elsewhere else stored
        _write(folder / path.relative_to(dataset.root), mended, like)
        changed += 1
    return changed


def _finite(values: Shaped[np.ndarray, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
    finite = np.isfinite(values)
    if finite.all():
        return values
    lowest = values[finite].min() if finite.any() else 0
    return np.where(finite, values, lowest).astype(np.float32)


def _rounded(values: Shaped[np.ndarray, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
    if np.issubdtype(values.dtype, np.integer) or (np.isfinite(values).all() and (values == np.rint(values)).all()):
        return values
    whole: Shaped[np.ndarray, "*shape"] = np.rint(np.nan_to_num(values)).astype(np.int16)
    return whole


def _write(path: Path, values: Shaped[np.ndarray, "*shape"], like: Stored) -> None:
    ending = path.name[path.name.index(".") :]
    if mask_ending(ending) != ending:
        raise FileError(f"{path.name} is two files, which are not mended; convert it to .mha first")
    spacing = Grid((1, 1, 1), 1, like.affine).spacing_mm
    if values.dtype == np.float64:
        values = values.astype(np.float32)
    write_values(path, values, like.affine, spacing, like.header)


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
