"""Damaged copies of files, and reading them in a child process that may crash, hang or eat memory."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from tokenseg.errors import TokenSegError

_INTEGERS = [
    number.to_bytes(size, order)
    for size in (1, 2, 4, 8)
    for number in (0, 1, (1 << 8 * size - 1) - 1, 1 << 8 * size - 1, (1 << 8 * size) - 1)
    for order in ("little", "big")
]
_FLOATS = [
    np.array(value, dtype).tobytes()
    for value in (np.nan, np.inf, -1.0, 0.0, 1e-38, 3e38)
    for dtype in ("<f4", ">f4", "<f8")
]
EXTREMES = (*_INTEGERS, *_FLOATS)
"""Numbers as headers hold them, at the ends of their ranges."""

_WORDS = b"0 -1 -0 1 2 99999 32768 2147483648 9223372036854775807 18446744073709551616 1e999 -1e999 1e-320 nan inf 0.5"
_ODD = (b"9" * 5000, b"", b"1 " * 300, b'"', b"\\u0000", b"[[[[", b"\x00", b"null", b"%s", b"../../x")
NUMERALS = (*_WORDS.split(), *_ODD)
"""What may stand in text in place of a number."""


def mutants(
    content: bytes, count: int, seed: int, *, header_bytes: int | None = None, text: bool = False
) -> Iterator[bytes]:
    """Damaged copies, the same for the same seed.

    Args:
        content: A sound file.
        count: How many.
        seed: Of the damage.
        header_bytes: Most of the damage is done in so many first bytes; None spreads it.
        text: Numbers written as text are replaced too.
    """
    rng = np.random.default_rng(seed)
    kinds = [_flip, _overwrite, _extreme, _cut_out, _insert, _splice, _truncate, *([_numeral] * 3 if text else [])]
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(int(rng.integers(1, 4))):
            reach = len(changed) if header_bytes is None or rng.random() < 0.2 else min(header_bytes, len(changed))
            kinds[int(rng.integers(len(kinds)))](changed, int(rng.integers(max(1, reach))), rng)
            if not changed:
                break
        yield bytes(changed)


def quarters(content: bytes) -> list[bytes]:
    """A file cut off after none, one, two and three quarters of its bytes, and before the last one."""
    return [content[: len(content) * part // 4] for part in range(4)] + [content[:-1]]


class Outcome(NamedTuple):
    """What became of reading many files."""

    read: int
    refused: int
    """By a `TokenSegError`."""
    slowest_s: float
    growth_mib: float
    """Of the most memory that the process ever held."""


def read_all(
    read: Callable[[bytes], object], contents: Iterable[bytes], *, limit_s: float = 5.0, limit_mib: float = 500.0
) -> Outcome:
    """Read each content in a child process; nothing but a `TokenSegError` may come out, in bounded time and memory."""
    contents = list(contents)

    def work(report: Callable[[object], None]) -> None:
        counts, slowest = [0, 0], 0.0
        before = _peak_mib()
        for number, content in enumerate(contents):
            report(number)
            begun = time.perf_counter()
            try:
                read(content)
                counts[0] += 1
            except TokenSegError as fault:
                assert str(fault)  # noqa: PT017
                counts[1] += 1
            slowest = max(slowest, time.perf_counter() - begun)
        report([*counts, slowest, _peak_mib() - before])

    reports, ended = in_child(work, timeout_s=30 + 0.2 * len(contents) + limit_s)
    last = reports[-1] if reports else None
    at = last if isinstance(last, int) else len(contents) - 1
    assert ended == "done", f"{ended}\nat {at}: {contents[at][:2000]!r}"
    assert isinstance(last, list)
    outcome = Outcome(*last)
    assert outcome.slowest_s < limit_s, outcome
    assert outcome.growth_mib < limit_mib, outcome
    return outcome


def in_child(work: Callable[[Callable[[object], None]], None], *, timeout_s: float) -> tuple[list[object], str]:
    """Do something in a forked process: what it reported, and "done", its traceback, or how it was ended."""
    reader, writer = os.pipe()
    child = _forked(reader)
    if child == 0:  # pragma: no cover - another process
        _work_and_exit(work, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        ended = _wait(child, pipe.fileno(), timeout_s, chunks := list[bytes]())
    reports = [json.loads(line) for line in b"".join(chunks).splitlines() if line]
    if reports and isinstance(reports[-1], dict):
        return reports[:-1], str(reports[-1]["fault"])
    return reports, ended


def _forked(reader: int) -> int:
    # Threads of OpenMP do not outlive a fork, and the child would wait for them.
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.close(reader)
    return child


def _work_and_exit(work: Callable[[Callable[[object], None]], None], writer: int) -> None:  # pragma: no cover
    try:
        work(lambda value: _write_all(writer, json.dumps(value).encode() + b"\n"))
        code = 0
    except BaseException:  # whatever it is, it must not go on as a second pytest
        _write_all(writer, json.dumps({"fault": traceback.format_exc()}).encode() + b"\n")
        code = 1
    os._exit(code)


def _write_all(descriptor: int, content: bytes) -> None:  # pragma: no cover - another process
    while content:
        content = content[os.write(descriptor, content) :]


def _wait(child: int, pipe: int, timeout_s: float, chunks: list[bytes]) -> str:
    """Gather what a child writes until it ends."""
    os.set_blocking(pipe, False)
    deadline, timed_out = time.monotonic() + timeout_s, False
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        try:
            while chunk := os.read(pipe, 1 << 16):
                chunks.append(chunk)
        except BlockingIOError:
            pass
        if ended:
            break
        if time.monotonic() > deadline and not timed_out:
            os.kill(child, signal.SIGKILL)
            timed_out = True
        time.sleep(0.005)
    code = os.waitstatus_to_exitcode(status)
    if timed_out:
        return f"took more than {timeout_s:.0f} s"
    return "done" if code == 0 else f"ended with {signal.Signals(-code).name if code < 0 else code}"


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


Damage = Callable[[bytearray, int, np.random.Generator], None]


def _flip(content: bytearray, at: int, rng: np.random.Generator) -> None:
    content[at] ^= 1 << int(rng.integers(8))


def _overwrite(content: bytearray, at: int, rng: np.random.Generator) -> None:
    content[at] = int(rng.integers(256))


def _extreme(content: bytearray, at: int, rng: np.random.Generator) -> None:
    number = _one_of(EXTREMES, rng)
    at -= at % min(len(number), 4) if rng.random() < 0.8 else 0  # fields are mostly aligned
    content[at : at + len(number)] = number


def _cut_out(content: bytearray, at: int, rng: np.random.Generator) -> None:
    del content[at : at + int(rng.integers(1, 40))]


def _insert(content: bytearray, at: int, rng: np.random.Generator) -> None:
    content[at:at] = rng.integers(256, size=int(rng.integers(1, 20)), dtype=np.uint8).tobytes()


def _splice(content: bytearray, at: int, rng: np.random.Generator) -> None:
    """A piece of the file once more, in another place."""
    start = int(rng.integers(len(content)))
    piece = content[start : start + int(rng.integers(1, 60))]
    content[at : at + (len(piece) if rng.random() < 0.5 else 0)] = piece


def _truncate(content: bytearray, at: int, rng: np.random.Generator) -> None:
    if rng.random() < 0.3:
        del content[max(at, 1) :]


def _numeral(content: bytearray, at: int, rng: np.random.Generator) -> None:
    found = list(re.finditer(rb"-?[0-9.]+", content[: max(at, 4096)]))
    if found:
        first, last = found[int(rng.integers(len(found)))].span()
        content[first:last] = _one_of(NUMERALS, rng)


def _one_of(choices: Sequence[bytes], rng: np.random.Generator) -> bytes:
    return choices[int(rng.integers(len(choices)))]
