"""Meanings of channel names: computed tomography, or a phase of a DCE exam."""

from __future__ import annotations

import re

_CT = re.compile(r"(?<![a-z])(cb|ce|ld|nc)?cta?(?![a-z])", re.IGNORECASE)


def is_ct(channel: str) -> bool:
    """Whether a channel name says computed tomography: CT, CTA, CBCT, `CT_portal`; not `subtraction`."""
    return _CT.search(channel) is not None


def phase_name(number: int) -> str:
    """Name the channel of a phase: 0 gives `phase0`, the one before contrast."""
    return f"phase{number}"
