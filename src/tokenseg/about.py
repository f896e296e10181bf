"""Version and notice of the program."""

from __future__ import annotations

from importlib.metadata import version

__version__ = version("tokenseg")
NOTICE = "Research software: not a medical device."
"""Stands wherever a user sees results."""
