"""The command line: parse, call a verb, print, exit code.

Results go to stdout, progress and logs to stderr. Exit code 0: done; 1: done, but some cases failed; 2: the request
cannot be met, said in one line; 130: interrupted; 141: whoever read the results went away, as `head` does. Nothing
heavy is imported before a command runs, so that `--help` is quick.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import warnings
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from tokenseg import NOTICE
from tokenseg.config import CohortOptions, DeviceName, TrainOptions
from tokenseg.errors import ConfigError, FileError, TokenSegError
from tokenseg.terminal import Terminal, print_demo, print_evaluation, say, say_not_scored

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
        _refuse_file(self.run)
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
        from tokenseg.segment import segment_files

        if self.threads is not None:
            if self.threads < 1:
                raise ConfigError(f"--threads {self.threads}: must be at least 1")
            torch.set_num_threads(self.threads)
        _check_outputs(report=self.report)
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
            say(f"error: {result.case_id}: {result.error}")
        if not single:
            print(f"{len(results) - len(failed)} of {len(results)} cases segmented; {self.output / 'summary.csv'}")
        print(NOTICE)
        self._write_report(models[0], results)
        return 1 if failed else 0

    def _write_report(self, model: Model, results: list[CaseResult]) -> None:
        if self.report is None:
            return
        from tokenseg.data.inputs import list_inputs
        from tokenseg.report.reports import segmentation_report, tokens_of_largest

        plan = model.facts.plan
        cases = list_inputs(self.input, plan)
        tokens = tokens_of_largest(model, results, cases)
        segmentation_report(self.report, results, cases, plan, date.today().isoformat(), tokens=tokens)
        say(f"report: {self.report}")


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

        _check_outputs(json=self.json, csv=self.csv, report=self.report)
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
        from tokenseg.tokens import describe_tokens, tokens_of_case, write_json

        _check_outputs(json=self.json, picture=self.picture)
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

        _refuse_file(self.output)
        with Terminal() as terminal:
            facts = write_cohort(self.output, self.options, terminal)
        for part in facts.parts:
            print(f"{part.name}: {part.num_exams} exams in {part.folder}")
        if self.options.train > 1:
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
        _refuse_file(self.output)
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


_ENDINGS = {"json": ".json", "csv": ".csv", "report": ".html", "picture": ".png"}
_READ_BACK = (
    *("dataset.json", "model.json", "run.json", "splits.json", "fingerprint.json", "cohort.json", "lesions.json"),
    *("summary.csv", "log.csv"),
)
"""Files that TokenSeg itself reads; an output must not take the place of one."""
_DESCRIPTION = f"3D medical image segmentation on the computer you have. {NOTICE} --version prints the version."


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        try:
            return _run(arguments)
        finally:
            # What is still buffered would fail at exit, where nothing can be said of it.
            sys.stdout.flush()
    except TokenSegError as error:
        say(f"error: {error}")
        return 2
    except BrokenPipeError:
        _give_up_stdout()
        return 141
    except OSError as error:
        # What the library does not foresee: a folder that may not be listed, an unplugged disk.
        say(f"error: {error.filename or 'a file'}: {error.strerror or error}")
        _give_up_stdout()
        return 2
    except KeyboardInterrupt:
        say(f"interrupted; {_how_to_go_on(arguments)}")
        return 130


def _run(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        from tokenseg import __version__

        print(f"tokenseg {__version__}")
        return 0
    try:
        command: Any = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="tokenseg",
            description=_DESCRIPTION,
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except ImportError as error:
        # The parser draws completion for some shells itself, and leaves the others to a package it does not require.
        if "shtab" not in str(error):
            raise
        raise ConfigError("completion is for bash, zsh and fish; for tcsh, pip install shtab first") from error
    return int(command.execute())


def _give_up_stdout() -> None:
    """Where the results cannot be printed, keep Python from trying again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check_outputs(**paths: Path | None) -> None:
    """Refuse what cannot be written, or would take the place of something else, before the work and not after.

    Endings keep outputs apart from images and masks, and from each other.
    """
    from tokenseg.files import check_writable

    for option, path in paths.items():
        if path is None:
            continue
        given, ending = f"--{option} {path}", _ENDINGS[option]
        if path.is_dir():
            raise ConfigError(
                f"{given}: this is a folder; name a file ending in {ending}, such as {path / option}{ending}"
            )
        if path.suffix.lower() != ending:
            raise ConfigError(f"{given}: the name must end in {ending}; name it so")
        if path.name in _READ_BACK and path.exists():
            raise ConfigError(f"{given}: a file of this name is there, and TokenSeg reads it; choose another name")
        blocking = next(parent for parent in path.parents if parent.exists())
        if not blocking.is_dir():
            raise FileError(f"output {path} cannot be written: {blocking} is a file, not a folder; name another place")
        check_writable(path.parent, path)


def _refuse_file(folder: Path) -> None:
    if folder.is_file():
        raise FileError(f"{folder} is a file; name a folder, which is made if it is not there")


def _dataset_of(references: Path) -> Dataset | None:
    """The dataset that references belong to, for its images; None where they are bare masks."""
    from tokenseg.data.datasets import open_dataset

    try:
        return open_dataset(references)
    except TokenSegError:
        return None


def _how_to_go_on(arguments: list[str]) -> str:
    if arguments[:1] == ["train"]:
        return "go on with the same command and --resume"
    going_on = arguments[:1] in (["demo"], ["cohort"])
    return "go on with the same command" if going_on else "files written so far are complete"


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
