"""The command `tokenseg synthetic`: simulated breast DCE-MRI exams, to try things on without data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tokenseg.commands.preflight import refuse_file
from tokenseg.commands.terminal import Terminal
from tokenseg.options import SyntheticOptions


@dataclass(frozen=True)
class Synthetic:
    """Draw synthetic breast DCE-MRI exams in the MAMA-MIA layout, to try things on without data."""

    output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder to make; OUT/train, OUT/test and OUT/external will be datasets."""
    options: Annotated[SyntheticOptions, tyro.conf.arg(name="")] = dataclasses.field(default_factory=SyntheticOptions)

    def execute(self) -> int:
        """Draw, then say where the exams are."""
        from tokenseg.synthetic.datasets import write_datasets

        refuse_file(self.output)
        with Terminal() as terminal:
            written = write_datasets(self.output, self.options, terminal)
        for part in written.parts:
            print(f"{part.name}: {part.num_exams} exams in {part.folder}")
        if self.options.train > 1:
            print(f"next: tokenseg train {self.output / 'train'} RUN --max-minutes 10")
        print("All exams are synthetic: figures from them say nothing about patients.")
        return 0
