"""Results of segmentation: what became of each case, which deserve a look first, and the summary of a cohort."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenseg.config import Plan
from tokenseg.datasets.cases import Case
from tokenseg.inference.quality import CaseQuality
from tokenseg.inference.token_passes import ScanTokens


@dataclass(frozen=True)
class CaseResult:
    """What became of one case of `segment_files`."""

    case: Case
    """As it was listed."""
    mask: Path | None
    """Where the mask was written; None when the case failed."""
    volumes_ml: dict[str, float]
    """Volume of each label in millilitres; a region includes the regions within it that are painted over it."""
    error: str = ""
    """Why the case failed."""
    shown_error: str = ""
    """The same without names and paths, unless names were asked for."""
    windows_run: int = 0
    """Windows that ran at full spacing, over all models; 1 a model where the case ran whole."""
    windows_full: int = 0
    """Windows that the full sliding window takes, over all models."""
    warnings: tuple[str, ...] = ()
    """In what the scan is far from all that the (first) model was trained on; it is segmented all the same."""
    notes: tuple[str, ...] = ()
    """What of the input was used, where that was chosen: the phases of a DCE exam in DICOM."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Time of each stage: load, resample, network, quality, resample back, save."""
    quality: CaseQuality | None = None
    """How sure the network is and what is unusual; None when the case failed."""
    tokens: ScanTokens | None = None
    """What the tokenizers chose, where that is kept."""

    @property
    def case_id(self) -> str:
        """Name of the case."""
        return self.case.case_id


def rank(result: CaseResult) -> tuple[int, float, str]:
    """Place in `worst_results_first`, to sort by."""
    if result.quality is None:
        return 0, 0.0, result.case_id
    return 1 if result.quality.flags else 2, -(result.quality.entropy or 0.0), result.case_id


def worst_results_first(results: Iterable[CaseResult]) -> list[CaseResult]:
    """Failed cases, then those that are unusual in something, then the rest; the least sure first among each."""
    return sorted(results, key=rank)


def segmented_worst_first(results: Iterable[CaseResult]) -> list[CaseResult]:
    """`worst_results_first` of those with a mask."""
    return [result for result in worst_results_first(results) if result.mask is not None]


def summary(results: Sequence[CaseResult], plan: Plan) -> bytes:
    """Volumes of all cases as CSV, and why those failed that did."""
    text = io.StringIO()
    names = [label.name for label in plan.labels]
    writer = csv.writer(text)
    # Columns of windows only where there is a choice of windows.
    steered = plan.coarse_factor is not None
    windows = ["windows_run", "windows_full"] if steered else []
    writer.writerow(["case", *(f"{name}_ml" for name in names), *windows, "error"])
    for result in results:
        volumes = [f"{result.volumes_ml[name]:.4f}" if result.volumes_ml else "" for name in names]
        counts = ["", ""] if result.mask is None else [result.windows_run, result.windows_full]
        writer.writerow([result.case_id, *volumes, *(counts if steered else []), result.error])
    return text.getvalue().encode()
