"""Output of the command line: progress and notes on stderr, tables on stdout."""

from __future__ import annotations

import sys
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from tokenseg.about import NOTICE

if TYPE_CHECKING:
    from tokenseg.demo import DemoResult
    from tokenseg.evaluation.results import Evaluation


class Terminal:
    """Progress on stderr: bars with time left on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, emoji=False)
        self._bars = RichProgress(
            TextColumn("{task.description:>10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: Any = None
        self._name, self._total, self._done = "", 0, 0

    def __enter__(self) -> Terminal:
        """Start drawing."""
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop drawing."""
        self._bars.stop()

    def stage(self, name: str, total: int, done: int = 0) -> None:
        """Begin a stage with a bar of its own."""
        self._name, self._total, self._done = name, total, done
        self._task = self._bars.add_task(name, total=total, completed=done, note="")

    def advance(self, note: str = "") -> None:
        """Advance the bar; without a terminal print every twentieth of the way."""
        self._done += 1
        self._bars.advance(self._task)
        self._bars.update(self._task, note=note)
        due = self._done % max(1, self._total // 20) == 0 or self._done == self._total
        if due and not self._console.is_terminal:
            say(f"{self._name} {self._done}/{self._total}{note and ' ' + note}{self._time_left()}")

    def _time_left(self) -> str:
        seconds = self._bars.tasks[self._task].time_remaining
        return f", {timedelta(seconds=seconds)} left" if seconds else ""

    def message(self, text: str) -> None:
        """Print a line above the bars."""
        self._console.print(text, markup=False, soft_wrap=True)


def say(text: str) -> None:
    """Print a line on stderr, if that can be written: a log on a full disk changes no exit code."""
    with suppress(OSError):
        print(text, file=sys.stderr)


def print_evaluation(evaluation: Evaluation) -> None:
    """Print a row a label, and what was missing or unlisted."""
    from tokenseg.messages import first_few

    head = f"{'label':<20} {'Dice (95 % interval)':<24} {'IoU':>6} {'HD95 mm':>8} {'NSD':>6} {'error ml':>9}"
    print(f"{head} {'lesion F1':>9}  cases  missed  false pos.  both empty")
    for summary in evaluation.summaries:
        dice = summary.intervals["dice"]
        names = ("iou", "hd95_mm", "nsd", "volume_error_ml", "lesion_f1")
        iou, hd95_mm, nsd, error_ml, lesion_f1 = (summary.intervals[name].mean for name in names)
        interval = f"{dice.mean:.4f} ({dice.low:.4f} to {dice.high:.4f})"
        print(
            f"{summary.label.name:<20} {interval:<24} {iou:>6.3f} {hd95_mm:>8.2f} {nsd:>6.3f} {error_ml:>+9.3f} "
            f"{lesion_f1:>9.3f}  {summary.n:>5}  {summary.n_missed:>6}  {summary.n_false_positive:>10}"
            f"  {summary.n_both_empty:>10}"
        )
    print(
        f"Means over cases. NSD: surface Dice at {evaluation.tolerance_mm:g} mm. Lesions match one to one from IoU 0.1."
    )
    print(NOTICE)
    if evaluation.missing_predictions:
        missing = evaluation.missing_predictions
        say(f"warning: {len(missing)} reference(s) without a prediction count as missed: {first_few(missing)}")
    if evaluation.unlisted_values:
        values = first_few([str(value) for value in evaluation.unlisted_values])
        say(f"warning: values that belong to no label count as background: {values}")


def say_not_scored(evaluation: Evaluation) -> None:
    """Name masks that `evaluate` was given and did not use; in training these are just the other cases."""
    from tokenseg.messages import first_few

    if evaluation.extra_predictions:
        extra = evaluation.extra_predictions
        say(f"note: {len(extra)} prediction(s) without a reference are not scored: {first_few(extra)}")
    if evaluation.references_left_out:
        left_out = evaluation.references_left_out
        say(
            f"note: {len(left_out)} reference(s) are not scored, since the summary.csv of the predictions does not "
            f"name them: {first_few(left_out)}"
        )


def print_demo(result: DemoResult) -> None:
    """Print the table of a demo, where its report is, and how to do the same with own data."""
    from tokenseg.demo import EXPLAINED, SYNTHETIC, row_texts

    line = "{:<11} {:<16} {:<24} {:>8} {:>10} {:>11} {:>13}"
    print(line.format("network", "exams", "Dice (95 % interval)", "missed", "lesion F1", "false pos.", "training min"))
    for row in result.rows:
        print(line.format(*row_texts(row)))
    print(EXPLAINED)
    print(SYNTHETIC)
    print(NOTICE)
    print(f"report: {result.report}   (open it in a browser)")
    print("The same with your own data (Medical Segmentation Decathlon, nnU-Net or MAMA-MIA folder):")
    print("  tokenseg train YOUR_DATASET runs/mine --max-minutes 60")
    print("  tokenseg segment YOUR_SCAN.nii.gz MASK.nii.gz --model runs/mine")
