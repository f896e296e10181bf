"""What all tests share: where real scans are."""

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
