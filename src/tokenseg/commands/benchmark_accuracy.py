"""The command `tokenseg benchmark accuracy`: networks trained under one budget, compared on held-out cases."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tokenseg.benchmark.accuracy.budget import AccuracyOptions
from tokenseg.commands.preflight import check_outputs, needs_extra, quieten_training_libraries, refuse_file
from tokenseg.commands.terminal import Terminal, say


@dataclass(frozen=True)
class Accuracy:
    """Train networks through one pipeline, under the same budget, and compare them on held-out cases."""

    dataset: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATASET")]
    """Dataset folder."""
    output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder for all runs; the same command goes on with an interrupted benchmark."""
    options: Annotated[AccuracyOptions, tyro.conf.arg(name="")] = dataclasses.field(default_factory=AccuracyOptions)

    def execute(self) -> int:
        """Train what is not trained yet, print the table; return 1 if a network failed."""
        needs_extra("train", "monai", "lightning_fabric")
        refuse_file(self.output)
        check_outputs(csv=self.options.csv)
        quieten_training_libraries()
        from tokenseg.benchmark.accuracy.run import benchmark_accuracy

        with Terminal() as terminal:
            result = benchmark_accuracy(self.dataset, self.output, self.options, terminal)
        print(result.table)
        say(f"rows: {result.csv}")
        return 1 if any(not row["dice"] for row in result.rows) else 0
