"""The entry point of `python -m tokenseg`: the command line."""

from __future__ import annotations

import sys

from tokenseg.cli import main

if __name__ == "__main__":
    sys.exit(main())
