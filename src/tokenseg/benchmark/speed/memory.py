"""Memory of a work: the most that it held, and a child process that is ended where it takes more than a limit.

Only Linux says how much a process has used at most; elsewhere there is no figure, and no limit.
"""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tokenseg.inference.memory import status_kib

_PROCESS = Path("/proc/self")
_POLL_SECONDS = 0.02


class Ended(NamedTuple):
    """How a child process ended."""

    code: int
    """Exit code; negative is the signal that ended it."""
    over_limit: bool
    """Whether it was ended for using more memory than the limit."""
    errors: str
    """What it wrote on stderr."""


def peak_mib(work: Callable[[], object]) -> float | None:
    """Highest resident memory of this process during `work`, above that before it; None where it cannot be known.

    Run it in a fresh process, with everything loaded that is not to count.
    """
    gc.collect()
    _give_back_freed()
    try:
        before = status_kib(_PROCESS, "VmRSS")
        # Begins the count of the highest anew.
        (_PROCESS / "clear_refs").write_text("5")
    except (OSError, StopIteration):
        return None
    work()
    return max(0, status_kib(_PROCESS, "VmHWM") - before) / 1024


def run_limited(command: Sequence[str], limit_mib: float | None) -> Ended:
    """Run a command, and end it as soon as it holds more memory than the limit.

    Args:
        command: Its standard output is dropped.
        limit_mib: Resident memory; None for no limit.
    """
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            over_limit = limit_mib is not None and _watch(child, limit_mib)
            code = child.wait()
        finally:
            child.kill()
            child.wait()
        errors.seek(0)
        return Ended(code, over_limit, errors.read().decode(errors="replace"))


def _watch(child: subprocess.Popen[bytes], limit_mib: float) -> bool:
    folder = Path(f"/proc/{child.pid}")
    with suppress(OSError):
        # Should memory run out between two looks, the system ends this process and no other.
        (folder / "oom_score_adj").write_text("1000")
    while child.poll() is None:
        with suppress(OSError, StopIteration):
            if status_kib(folder, "VmRSS") / 1024 > limit_mib:
                child.kill()
                return True
        time.sleep(_POLL_SECONDS)
    return False


def _give_back_freed() -> None:
    """Let the C library return what is free; a work would use that first, and seem to need less."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
