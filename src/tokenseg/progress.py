"""Progress of long work: the library calls, the command line shows.

Durations, counts and warnings go through this one interface, so that the library stays silent by itself.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Receiver of progress."""

    def stage(self, name: str, total: int, done: int = 0) -> None:
        """A new stage of `total` units begins, `done` of them already finished."""

    def advance(self, note: str = "") -> None:
        """One unit of the stage is finished; `note` says something current, such as the loss."""

    def message(self, text: str) -> None:
        """A line that the user should see."""


class Silent:
    """Receives and drops everything."""

    def stage(self, name: str, total: int, done: int = 0) -> None:
        """Drop it."""

    def advance(self, note: str = "") -> None:
        """Drop it."""

    def message(self, text: str) -> None:
        """Drop it."""
