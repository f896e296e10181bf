"""The command `tokenseg info`: the card of a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Info:
    """Say what a model takes, gives and was trained on."""

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """Run folder or model folder, or a built-in model: hippocampus."""

    def execute(self) -> int:
        """Print the card of the model."""
        from tokenseg.saved_model.checkpoint import describe_model, load_model

        print(describe_model(load_model(self.model)), end="")
        return 0
