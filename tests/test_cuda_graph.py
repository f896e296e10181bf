"""When a pass is recorded. What a recording gives is seen on a GPU alone; its rows are in `benchmarks/speed.csv`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import tokenseg.inference.cuda_graph
from tokenseg.inference.cuda_graph import repeated

ONE, OTHER = torch.ones(1, 1, 4, 4, 4), torch.ones(1, 1, 4, 4, 5)


class Calls:
    """Writes down what was computed and what recorded, in the order of both."""

    def __init__(self, fails: Exception | None = None) -> None:
        self.lines: list[str] = []
        self.fails = fails

    def compute(self, images: Tensor) -> float:
        self.lines.append("computed")
        return float(images.sum())

    def record(self, compute: Callable[[Tensor], float], images: Tensor) -> Callable[[Tensor], float]:
        if self.fails is not None:
            raise self.fails
        self.lines.append(f"recorded {tuple(images.shape)[-1]}")

        def replay(images: Tensor) -> float:
            self.lines.append("replayed")
            return float(images.sum())

        return replay


def test_a_shape_that_follows_itself_is_recorded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    monkeypatch.setattr(tokenseg.inference.cuda_graph, "Recording", calls.record)
    run = repeated(calls.compute)
    assert [run(each) for each in (ONE, ONE, 2 * ONE, OTHER, OTHER, ONE)] == [64, 64, 128, 80, 80, 64]
    assert calls.lines == [
        *("computed", "recorded 4", "replayed", "replayed"),
        *("computed", "recorded 5", "replayed"),
        "computed",
    ]


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted when stream is capturing"), "no memory"])
def test_what_cannot_be_recorded_runs_as_it_is(monkeypatch: pytest.MonkeyPatch, error: Exception | str) -> None:
    calls = Calls(torch.OutOfMemoryError(error) if isinstance(error, str) else error)
    monkeypatch.setattr(tokenseg.inference.cuda_graph, "Recording", calls.record)
    run = repeated(calls.compute)
    assert [run(ONE) for _ in range(3)] == [64, 64, 64]
    assert calls.lines == ["computed"] * 3


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(KeyError("a mistake of ours"))
    monkeypatch.setattr(tokenseg.inference.cuda_graph, "Recording", calls.record)
    run = repeated(calls.compute)
    run(ONE)
    with pytest.raises(KeyError):
        run(ONE)
