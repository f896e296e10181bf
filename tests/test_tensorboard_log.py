from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tokenseg.training.tensorboard_log import open_tensorboard, write_row


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_a_row_becomes_curves_and_a_resume_hides_what_runs_again(tmp_path: Path) -> None:
    writer = open_tensorboard(tmp_path)
    assert writer is not None
    for step in (1, 2, 3):
        write_row(writer, {"step": step, "loss": step / 2, "val_dice": 0.25})
    writer.close()
    writer = open_tensorboard(tmp_path, resume_step=1)
    assert writer is not None
    write_row(writer, {"step": 2, "loss": 8.0})
    writer.close()
    assert scalars(tmp_path, "loss") == [(1, 0.5), (2, 8.0)]
    assert scalars(tmp_path, "val_dice") == [(1, 0.25)]


def test_without_the_extra_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenseg.training.tensorboard_log.find_spec", lambda _: None)
    assert open_tensorboard(tmp_path / "board") is None
    assert not (tmp_path / "board").exists()
