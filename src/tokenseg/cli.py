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
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from tokenseg.config import CohortOptions, DeviceName, TrainOptions
from tokenseg.errors import ConfigError, TokenSegError
from tokenseg.terminal import NOTICE, Terminal, print_demo, print_evaluation, say, say_not_scored

if TYPE_CHECKING:
    from tokenseg.checkpoint import Model
    from tokenseg.data.cases import Dataset
    from tokenseg.segment import CaseResult


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
        print_evaluation(result.evaluation)
        print(f"model: {self.run / 'model'}  ({result.steps} steps)")
        print(f"report: {self.run / 'report.html'}")
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
    report: Path | None = None
    """Write volumes, pictures and tokens as one HTML page here."""

    def execute(self) -> int:
        """Segment, print volumes, return 1 if a case failed."""
        import torch

        from tokenseg.checkpoint import load_model
        from tokenseg.device import choose_device
        from tokenseg.files import check_writable
        from tokenseg.segment import segment_files

        if self.threads is not None:
            if self.threads < 1:
                raise ConfigError(f"--threads {self.threads}: must be at least 1")
            torch.set_num_threads(self.threads)
        if self.report is not None:
            check_writable(self.report.parent, self.report)
        device = choose_device(self.device)
        models = [load_model(path, device) for path in (self.model, *self.folds)]
        with Terminal() as terminal:
            results = segment_files(models, self.input, self.output, terminal)
            self._write_report(models[0], results, terminal)
        failed = [result for result in results if result.mask is None]
        single = self.input.is_file()
        if single and failed:
            raise TokenSegError(failed[0].error)
        for result in results:
            volumes = ", ".join(f"{name} {volume:.2f} ml" for name, volume in result.volumes_ml.items())
            print(f"{result.case_id}: {volumes}" if result.mask else f"{result.case_id}: FAILED")
        for result in failed:
            say(f"error: {result.case_id}: {result.error}")
        if not single:
            print(f"{len(results) - len(failed)} of {len(results)} cases segmented; {self.output / 'summary.csv'}")
        print(NOTICE)
        return 1 if failed else 0

    def _write_report(self, model: Model, results: list[CaseResult], terminal: Terminal) -> None:
        if self.report is None:
            return
        from tokenseg.data.inputs import list_inputs
        from tokenseg.report.reports import segmentation_report, tokens_of_largest

        plan = model.facts.plan
        cases = list_inputs(self.input, plan)
        tokens = tokens_of_largest(model, results, cases)
        segmentation_report(self.report, results, cases, plan, date.today().isoformat(), tokens=tokens)
        terminal.message(f"report: {self.report}")


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
    report: Path | None = None
    """Write scores and pictures as one HTML page here; images are shown where REFERENCES is a dataset folder."""
    tolerance_mm: float = 1.0
    """Tolerance of the normalised surface Dice."""

    def execute(self) -> int:
        """Score, print the table, write the files asked for."""
        from tokenseg.evaluate import evaluate_folders, write_csv, write_json
        from tokenseg.files import check_writable

        for path in (self.json, self.csv, self.report):
            if path is not None:
                check_writable(path.parent, path)
        evaluation = evaluate_folders(self.predictions, self.references, tolerance_mm=self.tolerance_mm)
        print_evaluation(evaluation)
        say_not_scored(evaluation)
        if self.json is not None:
            write_json(self.json, evaluation)
        if self.csv is not None:
            write_csv(self.csv, evaluation)
        if self.report is not None:
            from tokenseg.report.reports import evaluation_report

            title = f"Evaluation of {self.predictions.resolve().name}"
            dataset = _dataset_of(self.references)
            evaluation_report(self.report, evaluation, dataset, date.today().isoformat(), title=title)
        return 0


@dataclass(frozen=True)
class Tokens:
    """Show which tokens a model kept in a case, and how near they lie to the boundary."""

    case: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CASE")]
    """Image file, or folder with the files of one case."""
    model: Path
    """Run folder or model folder."""
    reference: Path | None = None
    """Reference mask; without one, nearness is to the boundary of the prediction."""
    json: Path | None = None
    """Write everything, every candidate token included, here."""
    picture: Path | None = None
    """Draw the kept cells over slices in three planes into this PNG file."""

    def execute(self) -> int:
        """Find the tokens, print a table, write the files asked for."""
        from tokenseg.checkpoint import load_model
        from tokenseg.files import check_writable
        from tokenseg.tokens import describe_tokens, tokens_of_case, write_json

        for path in (self.json, self.picture):
            if path is not None:
                check_writable(path.parent, path)
        if self.picture is not None:
            from tokenseg.token_picture import check_can_draw

            check_can_draw(self.picture)
        report = tokens_of_case(load_model(self.model), self.case, self.reference)
        print(describe_tokens(report), end="")
        print(NOTICE)
        if self.json is not None:
            write_json(self.json, report)
        if self.picture is not None:
            from tokenseg.token_picture import write_picture

            write_picture(self.picture, report)
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


@dataclass(frozen=True)
class Cohort:
    """Draw synthetic breast DCE-MRI exams in the MAMA-MIA layout, to try things on without data."""

    output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder to make; OUT/train, OUT/test and OUT/external will be datasets."""
    options: Annotated[CohortOptions, tyro.conf.arg(name="")] = dataclasses.field(default_factory=CohortOptions)

    def execute(self) -> int:
        """Draw, then say where the exams are."""
        from tokenseg.cohort import write_cohort

        with Terminal() as terminal:
            write_cohort(self.output, self.options, terminal)
        for part in ("train", "test", "external"):
            print(f"{part}: {getattr(self.options, part)} exams in {self.output / part}")
        print(f"next: tokenseg train {self.output / 'train'} RUN --max-minutes 10")
        print("All exams are synthetic: figures from them say nothing about patients.")
        return 0


@dataclass(frozen=True)
class Demo:
    """See it work without data, in about ten minutes: synthetic breast exams, training, evaluation, report."""

    output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")] = Path("tokenseg-demo")
    """Folder for everything; the same command goes on with an interrupted demo."""

    def execute(self) -> int:
        """Run the demo, print its table and how to go on."""
        _needs_extra("train", "monai", "lightning_fabric")
        _quieten()
        from tokenseg.demo import demo

        with Terminal() as terminal:
            result = demo(self.output, terminal)
        print_demo(result)
        return 0


COMMANDS: dict[str, Any] = {
    "demo": Demo,
    "train": Train,
    "segment": Segment,
    "evaluate": Evaluate,
    "tokens": Tokens,
    "info": Info,
    "cohort": Cohort,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--version"]:
        from tokenseg import __version__

        print(f"tokenseg {__version__}")
        return 0
    command: Any = tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="tokenseg",
        description=f"3D medical image segmentation on the computer you have. {NOTICE} --version prints the version.",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        return int(command.execute())
    except TokenSegError as error:
        say(f"error: {error}")
        return 2
    except OSError as error:
        # What the library does not foresee: a folder that may not be listed, an unplugged disk.
        say(f"error: {error.filename or 'a file'}: {error.strerror or error}")
        return 2
    except KeyboardInterrupt:
        say(f"interrupted; {_how_to_go_on(command)}")
        return 130


def _dataset_of(references: Path) -> Dataset | None:
    """The dataset that references belong to, for its images; None where they are bare masks."""
    from tokenseg.data.datasets import open_dataset

    try:
        return open_dataset(references)
    except TokenSegError:
        return None


def _how_to_go_on(command: object) -> str:
    if isinstance(command, Train):
        return "go on with the same command and --resume"
    return "go on with the same command" if isinstance(command, Demo) else "files written so far are complete"


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
