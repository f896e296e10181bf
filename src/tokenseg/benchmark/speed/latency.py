"""Times of several works in turn, so that a drift of the machine meets all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

_MAX_SECONDS = 120.0


class Times(NamedTuple):
    """How long one work took."""

    rounds: int
    """Rounds that were timed."""
    median_ms: float
    min_ms: float
    max_ms: float


def interleave(
    works: Sequence[Callable[[], None]],
    rounds: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    max_seconds: float = _MAX_SECONDS,
) -> list[list[float]]:
    """Do the works in turn, A B A B, and time each.

    Args:
        works: What to time; done before at least once each, so that nothing is built or loaded within a round.
        rounds: How often.
        clock: Seconds.
        max_seconds: After this long no further round begins; one is always finished.

    Returns:
        For each work its seconds, round by round.
    """
    seconds: list[list[float]] = [[] for _ in works]
    begun = clock()
    for round_number in range(rounds):
        if round_number and clock() - begun > max_seconds:
            break
        for work, taken in zip(works, seconds, strict=True):
            started = clock()
            work()
            taken.append(clock() - started)
    return seconds


def summarise(seconds: Sequence[float]) -> Times:
    """Median and range, in milliseconds."""
    milliseconds = [1000 * value for value in seconds]
    return Times(len(milliseconds), statistics.median(milliseconds), min(milliseconds), max(milliseconds))


def ratio(seconds: Sequence[float], reference: Sequence[float]) -> float:
    """How many times as long as the reference: the median over rounds of the ratio within the round."""
    return statistics.median(own / other for own, other in zip(seconds, reference, strict=True))
