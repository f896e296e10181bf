"""A table of cases: a CSV file with a row a case, for cohorts whose files lie anywhere.

It has a column `case` that names the masks, and either a column `image` (one file with all channels, or a DICOM study:
a folder or a zip archive) or a column for each channel of the model, by name. Paths are absolute, or start there.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from tokenseg.config import Plan
from tokenseg.data.cases import Case, check_case_ids, first_few
from tokenseg.data.dicom_exam import list_exams
from tokenseg.data.dicom_files import may_be_dicom
from tokenseg.data.formats import IMAGE_ENDINGS
from tokenseg.errors import DataError, FileError


def read_case_table(path: Path, plan: Plan, series: str = "") -> tuple[Case, ...]:
    """Read a table of cases; images are not read, DICOM headers are.

    Args:
        path: The CSV file.
        plan: The model's plan, for the names of its channels.
        series: Which DICOM series is wanted.

    Returns:
        Cases in the order of the table. One whose file is missing is listed; it fails when it is read.

    Raises:
        FileError: The table cannot be read.
        DataError: It has no cases, lacks a column, or names a case twice; or a DICOM study cannot be used.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            cells = list(reader)
            long = [str(number) for number, row in enumerate(cells, start=2) if None in row]
            rows = [
                {(key or "").strip(): (value or "").strip() for key, value in row.items() if key is not None}
                for row in cells
            ]
            columns = [(name or "").strip() for name in reader.fieldnames or ()]
    except (OSError, UnicodeDecodeError, csv.Error, AttributeError) as error:
        raise FileError(f"{path} cannot be read as a table in CSV ({error}); save it as CSV in UTF-8") from error
    if long:
        raise DataError(f"{path}: line(s) {first_few(long)} have more cells than the header; quote what holds a comma")
    channels = _channel_columns(columns, plan)
    if "case" not in columns or not ("image" in columns or channels):
        raise DataError(
            f"{path} has the columns {', '.join(filter(None, columns)) or '(none)'}; it needs `case`, and `image` or "
            f"one a channel: {', '.join(plan.source_channels)}"
        )
    if not rows:
        raise DataError(f"{path} lists no case; give it a row a case")
    empty = [str(number) for number, row in enumerate(rows, start=2) if not all(row[c] for c in ("case", *channels))]
    if empty:
        raise DataError(f"{path}: cells are empty in line(s) {first_few(empty)}; fill them, or take the lines out")
    check_case_ids([row["case"] for row in rows], path)
    return tuple(_case(row, channels, path.parent, series) for row in rows)


def _channel_columns(columns: list[str], plan: Plan) -> dict[str, str]:
    """Column of each channel, whatever the case of its letters; empty where there is a column for all."""
    spelled = {name.casefold(): name for name in columns}
    if "image" in columns or any(name.casefold() not in spelled for name in plan.source_channels):
        return {} if "image" not in columns else {"image": "image"}
    return {spelled[name.casefold()]: name for name in plan.source_channels}


def _case(row: Mapping[str, str], channels: Mapping[str, str], folder: Path, series: str) -> Case:
    name, paths = row["case"], [folder / row[column] for column in channels]
    if "image" not in channels:
        return Case(name, name, tuple(paths), channels=tuple(channels.values()))
    (path,) = paths
    if path.name.endswith(IMAGE_ENDINGS) or not path.exists() or not may_be_dicom(path):
        return Case(name, name, (path,))
    exams = list_exams(path, series)
    if len(exams) != 1:
        raise DataError(f"{path} holds {len(exams)} DICOM studies; name the folder of one of them for case {name}")
    return Case(name, name, (), exam=exams[0])
