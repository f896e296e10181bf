"""Words of messages: lists that stay short, sizes as people write them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_NUM_SHOWN = 5


def first_few(items: Sequence[str]) -> str:
    """Join the first five items for a message and say how many more there are."""
    more = len(items) - _NUM_SHOWN
    return ", ".join(items[:_NUM_SHOWN]) + (f" and {more} more" if more > 0 else "")


def times(sizes: Iterable[int | float]) -> str:
    """Sizes as messages show them: `35 x 50 x 36`, `0.7 x 0.7 x 2.5`."""
    return " x ".join(f"{float(size):g}" for size in sizes)
