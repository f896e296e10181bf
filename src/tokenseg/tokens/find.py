"""Token reports of a case, by segmenting it or from what was told while it was segmented."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from tokenseg.config import Plan
from tokenseg.datasets.cases import Case
from tokenseg.datasets.inputs import list_inputs, read_written_mask
from tokenseg.errors import ConfigError, DataError
from tokenseg.imaging.orientation import turn_to_ras
from tokenseg.imaging.volume import Mask, Volume, check_same_grid, read_mask
from tokenseg.inference.predict import Manner, Segmented, segment_scan
from tokenseg.inference.token_passes import ScanTokens
from tokenseg.messages import first_few
from tokenseg.options import SegmentOptions
from tokenseg.plan_grid.intensities import select_channels
from tokenseg.progress import Progress, Silent
from tokenseg.saved_model.checkpoint import Model
from tokenseg.saved_model.ensemble import Ensemble
from tokenseg.segmentation.job import SegmentJob
from tokenseg.segmentation.results import CaseResult
from tokenseg.segmentation.segment import segment_unwritten
from tokenseg.shapes import BoolMask, MaskArray
from tokenseg.tokens.boundary import boundary_distances_mm
from tokenseg.tokens.case import CaseTokens, TokenBoxes, case_tokens, check_has_tokens, token_boxes
from tokenseg.tokens.report import RADII_MM, TokenReport, TokenSummary, summarise_tokens


def tokens_of_case(
    model: Model, case: Path, reference: Path | None = None, progress: Progress | None = None
) -> TokenReport:
    """Segment a case as `tokenseg segment` does, write no mask, and say what the tokenizer did.

    Args:
        model: A model with a token path.
        case: An image file, or a folder that holds one case, such as a patient's folder of `CASE_0000.nii.gz`...
        reference: Mask file with the reference, in the label values that the model knows.
        progress: Told of what goes on.

    Raises:
        ConfigError: The folder holds several cases, or the model has no tokens.
        DataError: The model was trained to choose its windows, and none runs in this scan.
        TokenSegError: A file cannot be read or used.
    """
    check_has_tokens(model)
    ensemble = Ensemble.of(model)
    found = _only_case(case, ensemble.plan)
    mask = None if reference is None else read_mask(reference)
    job = SegmentJob(ensemble, SegmentOptions(show_names=True), progress or Silent(), tokens_of=1)
    computed = segment_unwritten(job, found)
    return _report(ensemble, computed.segmented, computed.read.volume, found.case_id, mask)


def report_tokens(model: Model, volume: Volume, case_id: str, reference: Mask | None = None) -> TokenReport:
    """Segment one volume and say what the tokenizer did.

    Args:
        model: A model with a token path.
        volume: Must bring the channels that the model expects, by name.
        case_id: How the case is called.
        reference: Reference mask on the grid of the volume; without one, the boundary is that of the prediction.

    Raises:
        ConfigError: The model has no tokens.
        DataError: A channel is missing, the reference holds none of the model's label values but others, or no window
            runs.
        GeometryError: Volume and reference are not on one grid.
        ModelError: The network gives NaN or infinity.
    """
    check_has_tokens(model)
    ensemble = Ensemble.of(model)
    return _report(ensemble, segment_scan(ensemble, volume, Manner(tokens=True)), volume, case_id, reference)


@dataclass(frozen=True, eq=False)
class ShownTokens:
    """What a page shows of the tokens that one model chose in a case; small, whatever the scan."""

    case_id: str
    model_name: str
    """Of several that segment together, with its number."""
    summary: TokenSummary
    boxes: TokenBoxes


def tokens_of_result(job: SegmentJob, result: CaseResult, reference: Path | None = None) -> list[ShownTokens]:
    """What the tokenizer of each model did in a case that was segmented.

    Args:
        job: By which it was segmented. A case whose tokens were not kept, as it was done by an earlier call, is
            segmented once more in the same way.
        result: Of the case.
        reference: Reference mask; without one, the boundary is that of the prediction.

    Returns:
        One a model that has tokens, and in which any window ran.

    Raises:
        TokenSegError: A file cannot be read any more.
    """
    if result.mask is None or not any(model.facts.network.tokens for model in job.ensemble.models):
        return []
    tokens = result.tokens or segment_unwritten(job, result.case).segmented.tokens
    mask = read_written_mask(result.case, result.mask, job.plan)
    marked = None if reference is None else _marked(read_mask(reference), mask, job.plan, result.case_id)
    shown = []
    for name, found in _tokens_by_model(job.ensemble, mask.array, tokens):
        _, summary = _measured(found, marked)
        shown.append(ShownTokens(result.case_id, name, summary, token_boxes(name, found)))
    return shown


def _report(
    ensemble: Ensemble, segmented: Segmented, volume: Volume, case_id: str, reference: Mask | None
) -> TokenReport:
    plan = ensemble.plan
    marked = None if reference is None else _marked(reference, volume, plan, case_id)
    named = next(_tokens_by_model(ensemble, segmented.mask, segmented.tokens), None)
    if named is None:
        raise DataError(f"{case_id}: the coarse view calls for no window at full spacing, so there are no tokens")
    name, tokens = named
    distance_mm, summary = _measured(tokens, marked)
    record = tokens.record
    shown = next((index for index, channel in enumerate(plan.channels) if " - " in channel), 0)
    return TokenReport(
        case_id=case_id,
        model_name=name,
        tokens=tokens,
        summary=summary,
        distance_mm=distance_mm,
        image=turn_to_ras(select_channels(volume, plan)[shown], record.axes, record.flipped),
        reference=None if marked is None else turn_to_ras(marked, record.axes, record.flipped),
    )


def _tokens_by_model(
    ensemble: Ensemble, mask: MaskArray, tokens: ScanTokens | None
) -> Iterator[tuple[str, CaseTokens]]:
    if tokens is None:
        return
    count = len(ensemble.models)
    for number, (model, passes) in enumerate(zip(ensemble.models, tokens.passes, strict=True), 1):
        if passes is not None:
            name = model.facts.name if count == 1 else f"{model.facts.name} {number} of {count}"
            yield name, case_tokens(model, passes, tokens.record, mask)


def _measured(tokens: CaseTokens, marked: BoolMask | None) -> tuple[Float[np.ndarray, "T N"] | None, TokenSummary]:
    """Distances to the boundary, of the reference's foreground as stored or else of the prediction; and the summary."""
    record = tokens.record
    mask = tokens.prediction if marked is None else turn_to_ras(marked, record.axes, record.flipped)
    distance_mm = None
    if mask.any() and not mask.all():
        distance_mm = boundary_distances_mm(tokens.boxes_vox, mask, record.spacing_mm, max(RADII_MM))
    return distance_mm, summarise_tokens(tokens, distance_mm, "prediction" if marked is None else "reference")


def _only_case(path: Path, plan: Plan) -> Case:
    cases = list_inputs(path, plan)
    if len(cases) > 1:
        raise ConfigError(
            f"{path} holds {len(cases)} cases ({first_few([case.case_id for case in cases])}); "
            "give one image file, or a folder with the files of one case"
        )
    return cases[0]


def _marked(reference: Mask, beside: Mask | Volume, plan: Plan, case_id: str) -> BoolMask:
    """Foreground of a reference, which must lie on the grid of the image or mask beside it."""
    what = (f"{'image' if isinstance(beside, Volume) else 'mask'} of {case_id}", "its reference")
    check_same_grid(beside, reference, what=what)
    names = {value: label.name for label in plan.labels for value in label.values}
    foreground: BoolMask = np.isin(reference.array, list(names))
    if reference.array.any() and not foreground.any():
        known = ", ".join(f"{value} ({name})" for value, name in sorted(names.items()))
        found = first_few([str(value) for value in np.unique(reference.array[reference.array != 0])])
        raise DataError(f"reference of {case_id} holds the values {found}; the model knows {known}. Change the values")
    return foreground
