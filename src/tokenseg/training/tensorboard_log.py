"""TensorBoard beside `log.csv`, where the extra `tensorboard` is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def open_tensorboard(folder: Path, resume_step: int = 0) -> SummaryWriter | None:
    """Open an event file in `folder`, hiding steps past `resume_step`, which run again; None without the extra."""
    if find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder, purge_step=resume_step + 1)


def write_row(writer: SummaryWriter, row: dict[str, float | int | str]) -> None:
    """Write a row of the log, one curve a column."""
    step = int(row["step"])
    for name, value in row.items():
        if name != "step":
            writer.add_scalar(name, float(value), step)
