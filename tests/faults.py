"""Commands in a process that is killed at some moment, or may write small files only."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_SERVER = """
import json, os, pathlib, resource, signal, sys, time, traceback
import torch
torch.set_num_threads(1)  # threads do not outlive a fork
import SimpleITK
import tokenseg.report.reports, tokenseg.segmentation.segment, tokenseg.training.train
from tokenseg.cli import main
from tokenseg.training import loop

loop.SAVE_SECONDS = 0.02  # about every second step


def read_waiting(pipe):
    read = b""
    try:
        while chunk := os.read(pipe, 1 << 16):
            read += chunk
    except BlockingIOError:
        pass
    return read


print("ready", flush=True)
for line in sys.stdin:
    wanted = json.loads(line)
    reader, writer = os.pipe()  # has no size that a limit could be put to
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            if wanted["file_bytes"] is not None:
                _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.setrlimit(resource.RLIMIT_FSIZE, (wanted["file_bytes"], hard))
            code = main(wanted["arguments"])
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    os.close(writer)
    os.set_blocking(reader, False)
    printed, deadline = b"", time.monotonic() + wanted["delay_s"]
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        printed += read_waiting(reader)
        if time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
            break
        time.sleep(0.0005)
    pathlib.Path(wanted["printed"]).write_bytes(printed + read_waiting(reader))
    os.close(reader)
    print(os.waitstatus_to_exitcode(ended[1]), flush=True)
"""
KILLED = -9


class Server:
    """Runs commands, each in a fork of a process that has all libraries loaded and nothing computed."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process, self._printed = process, folder / "printed.txt"

    def run(
        self, arguments: Sequence[str | Path], *, kill_after_s: float = 300.0, file_bytes: int | None = None
    ) -> int:
        """Exit code of a command; -9 where it was killed.

        Args:
            arguments: As on the command line.
            kill_after_s: When to kill it.
            file_bytes: No file may grow beyond it, as on a disk that is full; None for any size.
        """
        wanted = {"arguments": [str(argument) for argument in arguments], "delay_s": kill_after_s}
        wanted |= {"file_bytes": file_bytes, "printed": str(self._printed)}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(wanted) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    @property
    def printed(self) -> str:
        """What the last command printed on both streams."""
        return self._printed.read_text()


@contextmanager
def server_in(folder: Path) -> Iterator[Server]:
    """Start a server that keeps its file in `folder`."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", _SERVER], **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Server(process, folder)
        assert process.stdin is not None
        process.stdin.close()


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in a folder, by its path in it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def leftovers(folder: Path) -> list[Path]:
    """Temporary files that a killed process left."""
    return [path for path in folder.rglob("*") if ".partial-" in path.name]
