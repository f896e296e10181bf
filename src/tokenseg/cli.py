"""The command line: parse, call a verb, print, exit code.

Results go to stdout, progress and logs to stderr. Exit code 0: done; 1: done, but some cases failed; 2: the request
cannot be met, said in one line. Nothing heavy is imported before a command runs, so that `--help` is quick.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from tokenseg.config import DeviceName, TrainOptions
from tokenseg.errors import ConfigError, TokenSegError

if TYPE_CHECKING:
    from tokenseg.evaluate import Evaluation

NOTICE = "Research software: not a medical device."


@dataclass(frozen=True)
class Train:
    """Train on a dataset folder (Medical Segmentation Decathlon, nnU-Net v2 or MAMA-MIA layout)."""

    dataset: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATASET")]
    """Dataset folder."""
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder to make; the model will be in RUN/model."""
    options: Annotated[TrainOptions, tyro.conf.arg(name="")] = dataclasses.field(default_factory=TrainOptions)

    def execute(self) -> int:
        """Train, then print the validation table."""
        _needs_extra("train", "monai", "lightning_fabric")
        _quieten()
        from tokenseg.train import train

        with Terminal() as terminal:
            result = train(self.dataset, self.run, self.options, terminal)
        _print_evaluation(result.evaluation)
        print(f"model: {self.run / 'model'}  ({result.steps} steps)")
        print(f"next: tokenseg segment SCAN.nii.gz MASK.nii.gz --model {self.run}")
        return 0


@dataclass(frozen=True)
class Segment:
    """Segment a file, a folder of cases, or all images of a dataset folder."""

    input: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="INPUT")]
    """Image file, folder of images, or dataset folder."""
    output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUTPUT")]
    """Mask file if INPUT is a file, else a folder."""
    model: Path
    """Run folder or model folder."""
    folds: tuple[Path, ...] = ()
    """Further run folders of the same plan; probabilities are averaged."""
    device: DeviceName = "auto"
    """Where to compute."""
    threads: int | None = None
    """CPU threads; all cores if not given."""

    def execute(self) -> int:
        """Segment, print volumes, return 1 if a case failed."""
        import torch

        from tokenseg.checkpoint import load_model
        from tokenseg.device import choose_device
        from tokenseg.segment import segment_files

        if self.threads is not None:
            if self.threads < 1:
                raise ConfigError(f"--threads {self.threads}: must be at least 1")
            torch.set_num_threads(self.threads)
        device = choose_device(self.device)
        models = [load_model(path, device) for path in (self.model, *self.folds)]
        with Terminal() as terminal:
            results = segment_files(models, self.input, self.output, terminal)
        failed = [result for result in results if result.mask is None]
        single = self.input.is_file()
        if single and failed:
            raise TokenSegError(failed[0].error)
        for result in results:
            volumes = ", ".join(f"{name} {volume:.2f} ml" for name, volume in result.volumes_ml.items())
            print(f"{result.case_id}: {volumes}" if result.mask else f"{result.case_id}: FAILED")
        for result in failed:
            _say(f"error: {result.case_id}: {result.error}")
        if not single:
            print(f"{len(results) - len(failed)} of {len(results)} cases segmented; {self.output / 'summary.csv'}")
        print(NOTICE)
        return 1 if failed else 0


@dataclass(frozen=True)
class Evaluate:
    """Score masks against reference masks."""

    predictions: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PREDICTIONS")]
    """Mask file, or folder of masks."""
    references: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="REFERENCES")]
    """Reference mask file, folder of masks, or dataset folder."""
    json: Path | None = None
    """Write everything, per case and in summary, here."""
    csv: Path | None = None
    """Write one row a case and label here."""
    tolerance_mm: float = 1.0
    """Tolerance of the normalised surface Dice."""

    def execute(self) -> int:
        """Score, print the table, write the files asked for."""
        from tokenseg.evaluate import evaluate_folders, write_csv, write_json
        from tokenseg.files import check_writable

        for path in (self.json, self.csv):
            if path is not None:
                check_writable(path.parent, path)
        evaluation = evaluate_folders(self.predictions, self.references, tolerance_mm=self.tolerance_mm)
        _print_evaluation(evaluation)
        _say_not_scored(evaluation)
        if self.json is not None:
            write_json(self.json, evaluation)
        if self.csv is not None:
            write_csv(self.csv, evaluation)
        return 0


@dataclass(frozen=True)
class Info:
    """Say what a model takes, gives and was trained on."""

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """Run folder or model folder."""

    def execute(self) -> int:
        """Print the card of the model."""
        from tokenseg.checkpoint import describe_model, load_model

        print(describe_model(load_model(self.model)), end="")
        return 0


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
            _say(f"{self._name} {self._done}/{self._total}{note and ' ' + note}{self._time_left()}")

    def _time_left(self) -> str:
        seconds = self._bars.tasks[self._task].time_remaining
        return f", {timedelta(seconds=seconds)} left" if seconds else ""

    def message(self, text: str) -> None:
        """Print a line above the bars."""
        self._console.print(text, markup=False, soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--version"]:
        from tokenseg import __version__

        print(f"tokenseg {__version__}")
        return 0
    command: Any = tyro.extras.subcommand_cli_from_dict(
        {"train": Train, "segment": Segment, "evaluate": Evaluate, "info": Info},
        prog="tokenseg",
        description=f"3D medical image segmentation on the computer you have. {NOTICE} --version prints the version.",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        return int(command.execute())
    except TokenSegError as error:
        _say(f"error: {error}")
        return 2
    except OSError as error:
        # What the library does not foresee: a folder that may not be listed, an unplugged disk.
        _say(f"error: {error.filename or 'a file'}: {error.strerror or error}")
        return 2
    except KeyboardInterrupt:
        resume = "go on with the same command and --resume"
        _say(f"interrupted; {resume if isinstance(command, Train) else 'files written so far are complete'}")
        return 130


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _needs_extra(extra: str, *modules: str) -> None:
    from importlib.util import find_spec

    if any(find_spec(module) is None for module in modules):
        raise ConfigError(f"this command needs the extra {extra!r}: pip install 'tokenseg[{extra}]'")


def _quieten() -> None:
    """Keep notes of the training libraries off the user's screen; ours stay."""
    warnings.filterwarnings("ignore", module="monai")
    # Fabric sets the level of its logger when it is imported.
    import lightning_fabric  # noqa: F401

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)


def _print_evaluation(evaluation: Evaluation) -> None:
    from tokenseg.data.cases import first_few

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
        _say(f"warning: {len(missing)} reference(s) without a prediction count as missed: {first_few(missing)}")
    if evaluation.unlisted_values:
        values = first_few([str(value) for value in evaluation.unlisted_values])
        _say(f"warning: values that belong to no label count as background: {values}")


def _say_not_scored(evaluation: Evaluation) -> None:
    """Name masks that `evaluate` was given and did not use; in training these are just the other cases."""
    from tokenseg.data.cases import first_few

    if evaluation.extra_predictions:
        extra = evaluation.extra_predictions
        _say(f"note: {len(extra)} prediction(s) without a reference are not scored: {first_few(extra)}")
    if evaluation.references_left_out:
        left_out = evaluation.references_left_out
        _say(
            f"note: {len(left_out)} reference(s) are not scored, since the summary.csv of the predictions does not "
            f"name them: {first_few(left_out)}"
        )
