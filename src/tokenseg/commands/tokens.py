"""The command `tokenseg tokens`: the tokens that a model kept in one case, and how near to a boundary they lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tokenseg.about import NOTICE
from tokenseg.commands.preflight import check_outputs


@dataclass(frozen=True)
class Tokens:
    """Show which tokens a model kept in a case, and how near they lie to the boundary."""

    case: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CASE")]
    """Image file, or folder with the files of one case."""
    model: Path
    """Run folder or model folder, or a built-in model: hippocampus."""
    reference: Path | None = None
    """Reference mask; without one, nearness is to the boundary of the prediction."""
    json: Path | None = None
    """Write everything, every candidate token included, here."""
    picture: Path | None = None
    """Draw the kept cells over slices in three planes into this PNG file."""

    def execute(self) -> int:
        """Find the tokens, print a table, write the files asked for."""
        from tokenseg.inference.engine import choose_engine
        from tokenseg.saved_model.checkpoint import load_model
        from tokenseg.tokens.find import tokens_of_case
        from tokenseg.tokens.report import describe_tokens, write_json

        check_outputs(json=self.json, picture=self.picture)
        if self.picture is not None:
            from tokenseg.tokens.picture import check_can_draw

            check_can_draw(self.picture)
        model = choose_engine([load_model(self.model)], "auto").models[0]
        report = tokens_of_case(model, self.case, self.reference)
        print(describe_tokens(report), end="")
        print(NOTICE)
        if self.json is not None:
            write_json(self.json, report)
        if self.picture is not None:
            from tokenseg.tokens.picture import write_picture

            write_picture(self.picture, report)
        return 0
