"""A table of cases: a CSV file with a row a case, for cohorts whose files lie anywhere.

It has a column `case` that names the masks, and either a column `image` (one file with all channels, or a DICOM study:
a folder or a zip archive) or a column for each channel of the model, by name. A DCE model takes further phases too, in
columns that go on counting. Paths are absolute, or start there.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tokenseg.config import Plan
from tokenseg.datasets.cases import Case, check_case_ids
from tokenseg.datasets.folders import check_path_text
from tokenseg.errors import DataError, FileError, TokenSegError
from tokenseg.imaging.channel_names import phase_name
from tokenseg.imaging.dicom.exam import list_exams
from tokenseg.imaging.dicom_files import may_be_dicom
from tokenseg.imaging.formats import is_named_as_image
from tokenseg.messages import first_few

_SEPARATORS = {";": "semicolons", "\t": "tabs"}
"""What spreadsheets write in place of commas, in some countries or if told so."""


class _Row(NamedTuple):
    line: int
    """Where it ends in the file."""
    cells: Mapping[str, str]
    extra: Sequence[str]
    """Cells beyond the header."""


def is_case_table(path: Path) -> bool:
    """Whether an input is a table of cases."""
    return path.is_file() and path.suffix.lower() == ".csv"


def read_case_table(path: Path, plan: Plan, series: str = "") -> tuple[Case, ...]:
    """Read a table of cases; images are not read, DICOM headers are.

    Args:
        path: The CSV file.
        plan: The model's plan, for the names of its channels.
        series: Which DICOM series is wanted.

    Returns:
        Cases in the order of the table. One whose file is missing, or whose DICOM study cannot be used, is listed; it
        fails when it is read.

    Raises:
        FileError: The table cannot be read.
        DataError: It has no cases, lacks a column, has one twice or without those before it, or names a case twice.
    """
    columns, rows = _rows(path)
    _check_columns(columns, path)
    channels = _channel_columns(columns, plan, path)
    if "case" not in columns or not channels:
        raise DataError(
            f"{path} has the columns {', '.join(filter(None, columns)) or '(none)'}; it needs `case`, and `image` or "
            f"one a channel: {', '.join(plan.source_channels)}"
        )
    if not rows:
        raise DataError(f"{path} lists no case; give it a row a case")
    _check_cells(rows, channels, path, needed=len(channels) if "image" in channels else len(plan.source_channels))
    check_case_ids([row.cells["case"] for row in rows], path)
    return tuple(_case(row.cells, channels, path, series) for row in rows)


def _rows(path: Path) -> tuple[list[str], list[_Row]]:
    """Names of the columns, and the rows but for empty ones, which spreadsheets leave at the end."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            columns = [name.strip() for name in next((row for row in reader if row), [])]
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FileError(f"{path} cannot be read as a table in CSV ({error}); save it as CSV in UTF-8") from error
    width = len(columns)
    return columns, [
        _Row(line, dict(zip(columns, [*row, *[""] * (width - len(row))], strict=False)), row[width:])
        for line, row in rows
        if any(row)
    ]


def _check_columns(columns: Sequence[str], path: Path) -> None:
    if len(columns) == 1:
        for separator, name in _SEPARATORS.items():
            if separator in columns[0]:
                raise DataError(f"{path} separates its columns by {name}; save it as CSV with commas")
    # In whatever letters: a channel's column is found so.
    repeated = [name for name, count in Counter(map(str.casefold, filter(None, columns))).items() if count > 1]
    if repeated:
        raise DataError(f"{path} has more than one column {first_few(repeated)}; rename or remove all but one")


def _channel_columns(columns: Sequence[str], plan: Plan, path: Path) -> dict[str, str]:
    """Channel of each column that holds files, whatever the case of its letters; none where one is lacking."""
    if "image" in columns:
        return {"image": "image"}
    spelled = {name.casefold(): name for name in columns}
    names = list(plan.source_channels)
    if any(name.casefold() not in spelled for name in names):
        return {}
    if plan.joint_zscore:
        while phase_name(len(names)) in spelled:
            names.append(phase_name(len(names)))
        beyond = [spelled[name] for name in spelled if re.fullmatch("phase[0-9]+", name) and name not in names]
        if beyond:
            raise DataError(
                f"{path} has the column {first_few(beyond)} and none {phase_name(len(names))}; all phases of an exam "
                "count: number their columns without a gap"
            )
    return {spelled[name.casefold()]: name for name in names}


def _check_cells(rows: Sequence[_Row], channels: Mapping[str, str], path: Path, *, needed: int) -> None:
    """Check that rows fit the header; exams may have fewer phases than others, but never one after a missing one.

    `needed` says how many of the columns with files are filled in each row.
    """
    long = [str(row.line) for row in rows if any(row.extra)]
    if long:
        raise DataError(f"{path}: line(s) {first_few(long)} have more cells than the header; quote what holds a comma")
    empty = []
    for row in rows:
        filled = [bool(row.cells[column]) for column in channels]
        if not row.cells["case"] or not all(filled[: max(needed, sum(filled))]):
            empty.append(str(row.line))
    if empty:
        raise DataError(f"{path}: cells are empty in line(s) {first_few(empty)}; fill them, or take the lines out")


def _case(cells: Mapping[str, str], channels: Mapping[str, str], table: Path, series: str) -> Case:
    """A case, or one with a problem: the fault of one is no reason to stop the others."""
    name, texts = cells["case"], [cells[column] for column in channels if cells[column]]
    try:
        for text in texts:
            check_path_text(text, table)
    except DataError:
        # The text may be a patient's name, and belongs to no file that would be told from it.
        return Case(name, name, (), problem=f"the table gives {name} a path that none can be; correct its line")
    paths = tuple(table.parent / text for text in texts)
    if "image" not in channels:
        return Case(name, name, paths, channels=tuple(channels.values())[: len(paths)])
    try:
        return _image_case(name, paths[0], series)
    except TokenSegError as error:
        return Case(name, name, paths, problem=str(error))


def _image_case(name: str, path: Path, series: str) -> Case:
    try:
        if is_named_as_image(path) or not path.exists():
            return Case(name, name, (path,))
        is_dicom = may_be_dicom(path)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}; check the path") from error
    exams = list_exams(path, series) if is_dicom else []
    if len(exams) == 1:
        return Case(name, name, (), exam=exams[0])
    if exams:
        raise DataError(f"{path} holds {len(exams)} DICOM studies; name the folder of one of them for case {name}")
    if path.is_dir():
        raise DataError(f"{path} is a folder without DICOM images; name a file, or the folder of a DICOM study")
    return Case(name, name, (path,))
