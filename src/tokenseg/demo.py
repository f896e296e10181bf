"""The demo: the whole way on synthetic breast exams, beside a dense network that is given the same time.

OUT/
  cohort/{train,test,external}   synthetic exams: to learn from, held out, and of another centre
  tokenseg/, monai-unet/         the two runs
  masks/NETWORK/{test,external}  what they found
  demo.json                      the table
  report.html                    everything to look at

Interrupted, the same command goes on where it was. Both networks train for the same time on any computer, side by side
with one thread each; what comes out depends on how many steps that is.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tokenseg.benchmark.peers import monai_unet
from tokenseg.config import PresetName
from tokenseg.datasets.inputs import list_inputs
from tokenseg.datasets.layouts import open_dataset
from tokenseg.errors import ConfigError, TokenSegError, TrainingError
from tokenseg.evaluation.evaluate import evaluate_folders
from tokenseg.evaluation.metrics import Interval, bootstrap_interval
from tokenseg.evaluation.results import Evaluation
from tokenseg.files import check_writable, write_atomically
from tokenseg.messages import first_few
from tokenseg.options import SyntheticOptions, TrainOptions
from tokenseg.progress import Progress, Silent
from tokenseg.report.cases import boxes_by_case, evaluation_views
from tokenseg.report.curves import curves_section
from tokenseg.report.markup import Html, element, join
from tokenseg.report.page import Section, write_page
from tokenseg.report.reports import tokens_of_selected
from tokenseg.report.scores import evaluation_section, scrollable
from tokenseg.report.token_table import tokens_section
from tokenseg.report.viewer import viewer_section
from tokenseg.saved_model.checkpoint import Model, load_model
from tokenseg.saved_model.ensemble import Ensemble
from tokenseg.saved_model.run_folder import RunFolder
from tokenseg.segmentation.job import SegmentJob
from tokenseg.segmentation.results import CaseResult
from tokenseg.segmentation.segment import segment_cases
from tokenseg.synthetic.datasets import MARKER_NAME, write_datasets
from tokenseg.tokens.find import ShownTokens
from tokenseg.training.csv_log import read_log
from tokenseg.training.train import train

TOKENSEG, UNET = "tokenseg", "monai-unet"
NAMES = {TOKENSEG: "TokenSeg", UNET: "MONAI UNet"}
PARTS = {"test": "held-out exams", "external": "external centre"}
EXAMS_NAME, REPORT_NAME = "cohort", "report.html"
SYNTHETIC = "All exams are synthetic: these figures show how the tool works and say nothing about patients."
EXPLAINED = (
    "Dice: mean over the exams with a lesion, a missed one counts 0. Lesion F1: over all lesions. False positives: "
    "findings in exams without a lesion. Both networks share data, augmentation, loss, optimiser and evaluation."
)


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """How large a demo is; the defaults are what `tokenseg demo` runs."""

    exams: SyntheticOptions = field(default_factory=SyntheticOptions)
    preset: PresetName = "small"
    minutes: float = 7.0
    """Time for the training steps of each network."""
    steps: int | None = None
    """Training steps of each network, in place of the time."""


FULL = DemoSize()


@dataclass(frozen=True)
class DemoRow:
    """One network on one part of the exams."""

    network: str
    part: str
    dice: Interval
    """Over the exams with a lesion; a missed exam counts 0."""
    num_exams: int
    """Exams with a lesion."""
    num_missed: int
    """Exams with a lesion in which nothing was found."""
    lesion_f1: float
    """Over all lesions of the part, those invented in lesion-free exams included."""
    num_lesion_free: int
    """Exams without a lesion."""
    false_positives: int
    """Findings in exams without a lesion."""
    train_minutes: float


@dataclass(frozen=True)
class DemoResult:
    """What a demo came to."""

    rows: tuple[DemoRow, ...]
    """TokenSeg and UNet on the held-out exams, then on the external centre."""
    report: Path


def demo(folder: Path, progress: Progress | None = None, size: DemoSize | None = None) -> DemoResult:
    """Draw the exams, train both networks at the same time, segment, evaluate, write the report.

    Args:
        folder: Everything goes in here, so it must be new, empty, or of an earlier demo, which is gone on with.
        progress: Told about the work.
        size: Smaller for tests.

    Raises:
        TokenSegError: The folder cannot be used, or a training broke down.
    """
    progress, size = progress or Silent(), size or FULL
    exams = folder / EXAMS_NAME
    _refuse_foreign(folder)
    write_datasets(exams, size.exams, progress)
    with _unet_beside(exams / "train", folder / UNET, size):
        _train_tokenseg(exams / "train", folder / TOKENSEG, size, progress)
        progress.message("waiting for the training of MONAI UNet, which runs beside")
    models = {TOKENSEG: load_model(folder / TOKENSEG), UNET: load_model(folder / UNET, make_network=monai_unet)}
    rows, scored = [], dict[tuple[str, str], _Scored]()
    for part in PARTS:
        for network, model in models.items():
            found = _segment_and_evaluate(model, exams / part, folder / "masks" / network / part, progress)
            scored[network, part] = found
            rows.append(_row(network, part, found.evaluation, folder / network))
    write_atomically(folder / "demo.json", (json.dumps([asdict(row) for row in rows], indent=1) + "\n").encode())
    progress.message("writing the report")
    _write_report(folder, rows, scored)
    return DemoResult(tuple(rows), folder / REPORT_NAME)


def _train_tokenseg(dataset: Path, run: Path, size: DemoSize, progress: Progress) -> None:
    if not _is_finished(run):
        train(dataset, run, _options(run, size), progress)


def _refuse_foreign(folder: Path) -> None:
    """The exams are the first thing that a demo writes; other files without them are the user's."""
    check_writable(folder, folder)
    if folder.is_dir() and not (folder / EXAMS_NAME / MARKER_NAME).exists():
        foreign = sorted({path.name for path in folder.iterdir() if not path.name.startswith(".")} - {EXAMS_NAME})
        if foreign:
            raise ConfigError(
                f"{folder} holds files that are not of a demo: {first_few(foreign)}; name a new or empty folder"
            )


def _train_unet(dataset: Path, run: Path, size: DemoSize, complaints: Connection) -> None:
    """Train in a process of its own, which speaks to no one but its parent."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    try:
        train(dataset, run, _options(run, size), make_network=monai_unet)
    except TokenSegError as error:
        complaints.send_bytes(str(error).encode())
        sys.exit(1)


def _end_with_parent() -> None:
    """A killed parent cannot end its daemons; going on, this one would be in the way of the next demo."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _options(run: Path, size: DemoSize) -> TrainOptions:
    resume = RunFolder(run).is_begun
    minutes = size.minutes if size.steps is None else None
    return TrainOptions(preset=size.preset, max_minutes=minutes, max_steps=size.steps, threads=1, resume=resume)


def _is_finished(run: Path) -> bool:
    return RunFolder(run).is_finished


@contextmanager
def _unet_beside(dataset: Path, run: Path, size: DemoSize) -> Iterator[None]:
    """Train the UNet in a process of its own while the body runs."""
    if _is_finished(run):
        yield
        return
    context = multiprocessing.get_context("spawn")
    complaints, sender = context.Pipe(duplex=False)
    process = context.Process(target=_train_unet, args=(dataset, run, size, sender), daemon=True)
    with _interrupts_ignored():
        process.start()
    try:
        yield
    except BaseException:
        process.terminate()
        process.join()
        raise
    process.join()
    if process.exitcode != 0:
        reason = complaints.recv_bytes().decode() if complaints.poll() else f"it ended with code {process.exitcode}"
        raise TrainingError(f"the training of MONAI UNet in {run} broke down: {reason}; run the same command again")


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """A process started in here does not hear Ctrl-C: its parent does, and ends it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Scored(NamedTuple):
    """A part of the exams that one network segmented."""

    job: SegmentJob
    results: list[CaseResult]
    evaluation: Evaluation


def _segment_and_evaluate(model: Model, dataset: Path, masks: Path, progress: Progress) -> _Scored:
    plan = model.facts.plan
    cases = list_inputs(dataset, plan)
    job = SegmentJob(Ensemble.of(model), progress=progress, tokens_of=len(cases))
    return _Scored(job, segment_cases(job, cases, masks), evaluate_folders(masks, dataset, labels=plan.labels))


def _row(network: str, part: str, evaluation: Evaluation, run: Path) -> DemoRow:
    diseased = [row for row in evaluation.rows if row.score.reference_ml > 0]
    healthy = [row for row in evaluation.rows if row.score.reference_ml == 0]
    return DemoRow(
        network=network,
        part=part,
        dice=bootstrap_interval(np.array([row.score.dice for row in diseased])),
        num_exams=len(diseased),
        num_missed=sum(row.score.status == "missed" for row in diseased),
        lesion_f1=evaluation.summaries[0].lesions.f1,
        num_lesion_free=len(healthy),
        false_positives=sum(row.score.lesions.false_positive for row in healthy),
        train_minutes=sum(float(row["seconds"]) for row in read_log(RunFolder(run).log)) / 60,
    )


def _write_report(folder: Path, rows: Sequence[DemoRow], scored: Mapping[tuple[str, str], _Scored]) -> None:
    """The comparison first, then TokenSeg's cases of both centres, scores, tokens and curves."""
    sections = [Section("comparison", "Comparison", _comparison(rows))]
    tokens: list[ShownTokens] = []
    for part, name in PARTS.items():
        dataset, shown = open_dataset(folder / EXAMS_NAME / part), scored[TOKENSEG, part]
        found = tokens_of_selected(*shown)
        views = evaluation_views(shown.evaluation, dataset, boxes_by_case(found))
        sections.append(viewer_section(views, f"cases-{part}", name.capitalize()))
        tokens += found
    for (network, part), (_, _, evaluation) in scored.items():
        title = f"{NAMES[network]}, {PARTS[part]}"
        sections.append(evaluation_section(evaluation, f"scores-{network}-{part}", title))
    if tokens:
        sections.append(tokens_section(tokens))
    for network, name in NAMES.items():
        log = read_log(RunFolder(folder / network).log)
        sections.append(curves_section(log, f"curves-{network}", f"{name}, training"))
    title = "TokenSeg demo: tumours in synthetic breast MRI"
    write_page(folder / REPORT_NAME, title, _lead(rows), sections, date.today().isoformat())


def _lead(rows: Sequence[DemoRow]) -> Html:
    ours, theirs, *outside = rows
    drops = (100 * (row.dice.mean - other.dice.mean) for row, other in zip((ours, theirs), outside, strict=True))
    sentences = (
        f"On {ours.num_exams} held-out exams with a lesion, TokenSeg reaches a mean Dice of {ours.dice.mean:.3f} after "
        f"{ours.train_minutes:.1f} minutes of training on one CPU thread; MONAI UNet {theirs.dice.mean:.3f} after "
        f"{theirs.train_minutes:.1f}. ",
        "On exams of another centre they lose {:.1f} and {:.1f} points.".format(*drops),
    )
    shown = "The pictures are of TokenSeg."
    return join((element("p", *sentences, class_="result"), element("p", f"{SYNTHETIC} {shown}")))


def _comparison(rows: Sequence[DemoRow]) -> Html:
    titles = ("Network", "Exams", "Dice (95 % interval)", "Missed", "Lesion F1", "False positives", "Training (min)")
    head = element("tr", *(element("th", title, scope="col", class_=_align(at)) for at, title in enumerate(titles)))
    body = [
        element("tr", *(element("td", cell, class_=_align(at)) for at, cell in enumerate(row_texts(row))))
        for row in rows
    ]
    table = element("table", element("thead", head), element("tbody", *body))
    return join((scrollable(table, "Both networks"), element("p", EXPLAINED, class_="help")))


def _align(column: int) -> str | None:
    return "number" if column > 1 else None


def row_texts(row: DemoRow) -> tuple[str, ...]:
    """The cells of a row as the report and the command line show them."""
    return (
        NAMES[row.network],
        PARTS[row.part],
        f"{row.dice.mean:.3f} ({row.dice.low:.3f} to {row.dice.high:.3f})",
        f"{row.num_missed} of {row.num_exams}",
        f"{row.lesion_f1:.2f}",
        f"{row.false_positives} in {row.num_lesion_free}",
        f"{row.train_minutes:.1f}",
    )
