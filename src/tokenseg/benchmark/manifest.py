"""Under which conditions a row was measured."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

from tokenseg import __version__

MANIFEST_COLUMNS = ("date", "commit", "tokenseg", "torch", "cpu", "gpu", "os")


def manifest(device: torch.device) -> dict[str, str]:
    """Date, versions and machine, by `MANIFEST_COLUMNS`; `gpu` is empty for a CPU."""
    gpu = ""
    if device.type == "cuda":  # pragma: no cover - cuda
        gpu = torch.cuda.get_device_name(device)
    values = (
        *(datetime.now(tz=UTC).date().isoformat(), commit(), __version__, torch.__version__.split("+")[0]),
        *(_cpu(), gpu, f"{platform.system()} {platform.release()}"),
    )
    return dict(zip(MANIFEST_COLUMNS, values, strict=True))


def commit() -> str:
    """Commit of this program, `-dirty` with changes; empty where it does not run from a checkout of its own."""
    here = Path(__file__)
    try:
        # An installed package may lie in somebody else's checkout, which does not track it.
        _git("ls-files", "--error-unmatch", here.with_name("__init__.py").name)
        return _git("describe", "--always", "--dirty")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _cpu() -> str:
    """Name and logical cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x {len(names)}" if names else platform.processor()
