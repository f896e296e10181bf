from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tokenseg.training.board import open_board, write_row


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_a_row_becomes_curves_and_a_resume_hides_what_runs_again(tmp_path: Path) -> None:
    board = open_board(tmp_path)
    assert board is not None
    for step in (1, 2, 3):
        write_row(board, {"step": step, "loss": step / 2, "val_dice": 0.25})
    board.close()
    board = open_board(tmp_path, resume_step=1)
    assert board is not None
    write_row(board, {"step": 2, "loss": 8.0})
    board.close()
    assert scalars(tmp_path, "loss") == [(1, 0.5), (2, 8.0)]
    assert scalars(tmp_path, "val_dice") == [(1, 0.25)]


def test_without_the_extra_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenseg.training.board.find_spec", lambda _: None)
    assert open_board(tmp_path / "board") is None
    assert not (tmp_path / "board").exists()
