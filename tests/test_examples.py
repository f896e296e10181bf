"""Each public name shows its use in an example of its docstring, which runs as it stands."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

import tokenseg


@pytest.mark.parametrize("name", [name for name in tokenseg.__all__ if name != "__version__"])
def test_the_example_of_a_public_name_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (own,) = doctest.DocTestFinder(recurse=False).find(getattr(tokenseg, name), name, globs={})
    assert own.examples, f"the docstring of {name} has no example"
    told: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(own, out=told.append)
    assert result.failed == 0, "".join(told)
    assert list(tmp_path.iterdir()) == []
