"""What all tests share: where real scans are, a cache of their own, and torch as the engine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real scans; absent outside continuous integration it skips, inside it fails."""
    folder = os.environ.get("TOKENSEG_DATA")
    if folder and Path(folder).is_dir():
        return Path(folder).resolve()
    reason = f"real scans not found: TOKENSEG_DATA is {folder!r}, set it to a folder with Task04_Hippocampus in it"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(autouse=True)
def _torch_computes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Converting each test's model for another engine would take seconds and leave files in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    if request.path.name != "test_engine.py":
        monkeypatch.setattr("tokenseg.inference.engine.is_installed", lambda: False)
