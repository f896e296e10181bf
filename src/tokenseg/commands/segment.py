"""The command `tokenseg segment`: masks of a scan, a folder of cases, a dataset or DICOM."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from tokenseg.about import NOTICE
from tokenseg.commands.preflight import check_outputs
from tokenseg.commands.terminal import Terminal, say
from tokenseg.config import DeviceName, EngineName
from tokenseg.errors import ConfigError, TokenSegError
from tokenseg.options import SegmentOptions

if TYPE_CHECKING:
    from tokenseg.inference.engine import EngineChoice
    from tokenseg.segmentation.job import SegmentJob
    from tokenseg.segmentation.results import CaseResult
    from tokenseg.segmentation.segment import Compute


@dataclass(frozen=True)
class Segment:
    """Segment a file, a folder of cases, or all images of a dataset folder."""

    input: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="INPUT")]
    """Image file, folder of images, dataset folder, table of cases (.csv), or DICOM: a folder, zip or enhanced file."""
    output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUTPUT")]
    """Mask file if INPUT is a file, else a folder."""
    model: Path
    """Run folder or model folder, or a built-in model: hippocampus."""
    folds: tuple[Path, ...] = ()
    """Further run folders of the same plan; probabilities are averaged."""
    device: DeviceName = "auto"
    """Where to compute."""
    engine: EngineName | Literal["ray"] = "auto"
    """What computes; auto: OpenVINO on a CPU where the extra `openvino` is installed, else torch; ray: either of them,
    on all machines of a cluster (extra `cluster`)."""
    threads: int | None = None
    """CPU threads, with ray of each worker; all cores if not given."""
    options: Annotated[SegmentOptions, tyro.conf.arg(name="")] = dataclasses.field(default_factory=SegmentOptions)
    report: Path | None = None
    """Write volumes, pictures and tokens as one HTML page here."""
    profile: bool = False
    """Print the time of each stage."""

    def execute(self) -> int:
        """Segment, print volumes, return 1 if a case failed."""
        import torch

        from tokenseg.device import choose_device
        from tokenseg.inference.engine import choose_engine
        from tokenseg.saved_model.checkpoint import load_model
        from tokenseg.saved_model.ensemble import Ensemble
        from tokenseg.segmentation.job import SegmentJob
        from tokenseg.segmentation.segment import segment_files

        if self.threads is not None:
            if self.threads < 1:
                raise ConfigError(f"--threads {self.threads}: must be at least 1")
            torch.set_num_threads(self.threads)
        check_outputs(report=self.report)
        device = choose_device(self.device)
        models = [load_model(path, device) for path in (self.model, *self.folds)]
        chosen = choose_engine(models, "auto" if self.engine == "ray" else self.engine, threads=self.threads)
        if chosen.problem:
            say(f"note: {chosen.problem}; torch computes")
        compute = self._on_cluster(chosen) if self.engine == "ray" else None
        ensemble = Ensemble.of(chosen.models)
        with Terminal() as terminal:
            job = SegmentJob(ensemble, self.options, terminal, self._command(), self._tokens_of())
            results = segment_files(job, self.input, self.output, compute)
        failed = [result for result in results if result.mask is None]
        if failed and not self.output.is_dir():  # one case, one file
            raise TokenSegError(failed[0].error)
        say(f"engine: {chosen.engine}, {chosen.precision}, {device.type}")
        self._print(results, failed)
        self._write_report(job, results)
        return 1 if failed else 0

    def _tokens_of(self) -> int:
        if self.report is None:
            return 0
        from tokenseg.report.reports import MAX_TOKENS_SHOWN

        return MAX_TOKENS_SHOWN

    def _on_cluster(self, chosen: EngineChoice) -> Compute:
        from tokenseg.segmentation.cluster import on_cluster

        return on_cluster((self.model, *self.folds), chosen)

    def _command(self) -> str:
        """As it was given, but for paths, which may name patients; the rest is among the manifest's options."""
        words = f"tokenseg segment INPUT OUTPUT --model MODEL --device {self.device} --engine {self.engine}"
        words += f" --threads {self.threads}" if self.threads else ""
        return words + (" --folds" if self.folds else "") + " FOLD" * len(self.folds)

    def _print(self, results: list[CaseResult], failed: list[CaseResult]) -> None:
        for result in results:
            _print_case(result, self._shown(result))
        for result in failed:
            say(f"error: {self._shown(result)}: {result.shown_error}")
        if self.output.is_dir():
            print(f"{len(results) - len(failed)} of {len(results)} cases segmented; {self.output / 'summary.csv'}")
        if self.profile and len(failed) < len(results):
            _print_profile(results)
        print(NOTICE)

    def _shown(self, result: CaseResult) -> str:
        from tokenseg.segmentation.privacy import shown_name

        return shown_name(result.case_id, show_names=self.options.show_names)

    def _write_report(self, job: SegmentJob, results: list[CaseResult]) -> None:
        if self.report is None:
            return
        from tokenseg.report.reports import segmentation_report, tokens_of_worst

        today, tokens = date.today().isoformat(), tokens_of_worst(job, results)
        segmentation_report(self.report, results, job.plan, today, tokens=tokens, show_names=self.options.show_names)
        say(f"report: {self.report}")


def _print_profile(results: list[CaseResult]) -> None:
    """Seconds a stage: mean over the cases that came to it, and the share of all."""
    stages = list(dict.fromkeys(stage for result in results for stage in result.seconds))
    totals = {stage: sum(result.seconds.get(stage, 0.0) for result in results) for stage in stages}
    everything = sum(totals.values())
    print(f"{'stage':<16}{'mean s':>9}{'share':>8}")
    for stage, total in totals.items():
        count = sum(stage in result.seconds for result in results)
        print(f"{stage:<16}{total / count:>9.2f}{total / everything:>8.0%}")


def _print_case(result: CaseResult, shown: str) -> None:
    volumes = ", ".join(f"{name} {volume:.2f} ml" for name, volume in result.volumes_ml.items())
    print(f"{result.case_id}: {volumes}" if result.mask else f"{result.case_id}: FAILED")
    for note in result.notes:
        say(f"{shown}: {note}")
    for warning in result.warnings:
        say(f"warning: {shown}: {warning}")
