"""The command `tokenseg demo`: synthetic exams, training, segmentation, evaluation and report in one go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tokenseg.commands.preflight import needs_extra, quieten_training_libraries, refuse_file
from tokenseg.commands.terminal import Terminal, print_demo


@dataclass(frozen=True)
class Demo:
    """See it work without data, in about 12 minutes: synthetic breast exams, training, evaluation, report."""

    output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")] = Path("tokenseg-demo")
    """Folder for everything; the same command goes on with an interrupted demo."""

    def execute(self) -> int:
        """Run the demo, print its table and how to go on."""
        needs_extra("train", "monai", "lightning_fabric")
        refuse_file(self.output)
        quieten_training_libraries()
        from tokenseg.demo import demo

        with Terminal() as terminal:
            result = demo(self.output, terminal)
        print_demo(result)
        return 0
