"""The command `tokenseg benchmark`: `speed`, and `accuracy` from `benchmark_accuracy.py`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated

import tyro

from tokenseg.benchmark.speed.options import SpeedOptions
from tokenseg.commands.benchmark_accuracy import Accuracy
from tokenseg.commands.preflight import check_outputs, needs_extra, quieten_training_libraries
from tokenseg.commands.terminal import Terminal, say


@dataclass(frozen=True)
class Speed:
    """Measure time, memory and operations of networks beside each other; on a CPU each in a process of its own."""

    options: Annotated[SpeedOptions, tyro.conf.arg(name="")] = dataclasses.field(default_factory=SpeedOptions)

    def execute(self) -> int:
        """Measure, print a table, write the files asked for."""
        options = self.options
        options.check()
        needs_extra("train", "monai", "lightning_fabric")
        if options.plot is not None:
            needs_extra("plot", "matplotlib")
        check_outputs(csv=options.csv, plot=options.plot)
        quieten_training_libraries()
        from tokenseg.benchmark.frontier import read_dice, write_frontier
        from tokenseg.benchmark.rows import read_rows
        from tokenseg.benchmark.speed.rows import COLUMNS, like
        from tokenseg.benchmark.speed.run import measure_speed
        from tokenseg.benchmark.speed.table import table_text

        dice = None if options.accuracy is None else read_dice(options.accuracy)
        with Terminal() as terminal:
            rows = measure_speed(options, terminal)
        print(table_text(rows), end="")
        if options.csv is not None:
            say(f"rows: {options.csv}")
        if options.plot is not None:
            write_frontier(
                options.plot, rows if options.csv is None else like(rows, read_rows(options.csv, COLUMNS)), dice
            )
            say(f"plot: {options.plot}")
        return 0


@dataclass(frozen=True)
class Benchmark:
    """Compare TokenSeg with other networks: how fast, how large, how accurate."""

    what: Annotated[
        Annotated[Speed, tyro.conf.subcommand("speed")] | Annotated[Accuracy, tyro.conf.subcommand("accuracy")],
        tyro.conf.arg(name=""),
    ]

    def execute(self) -> int:
        """Run the comparison asked for."""
        return self.what.execute()
