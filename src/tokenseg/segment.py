"""Segmentation of whole volumes: volume -> plan grid -> network -> mask on the input's grid.

Whether a scan runs in one pass or in windows (`windows.py`) follows from the plan and the scan alone, never from free
memory. With a model that was trained on coarse views, only those windows run that a coarse view calls for
(`steering.py`), unless all are asked for.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tokenseg.checkpoint import Model
from tokenseg.config import Label, Plan, SegmentOptions
from tokenseg.data.cases import Case, first_few
from tokenseg.data.dicom_files import DicomFile
from tokenseg.data.dicom_seg import (
    NO_FINDINGS_ENDING,
    SEG_ENDING,
    Segment,
    is_no_findings,
    write_no_findings,
    write_seg,
)
from tokenseg.data.formats import IMAGE_ENDINGS, image_ending, mask_ending
from tokenseg.data.inputs import describe_input, list_inputs, read_input
from tokenseg.data.preprocess import prepare_image, restore_logits
from tokenseg.data.suitability import check_input
from tokenseg.data.volume import Volume, write_mask
from tokenseg.errors import ConfigError, FileError, ModelError, TokenSegError
from tokenseg.files import check_writable, remove_leftovers, write_atomically
from tokenseg.progress import Progress, Silent
from tokenseg.shapes import MaskArray
from tokenseg.status import CaseStatus, append_status, case_key, file_digest, is_current, peak_mib, read_statuses
from tokenseg.steering import predict_full, predict_steered
from tokenseg.stopwatch import Stopwatch

SUMMARY_NAME, STATUS_NAME = "summary.csv", "status.jsonl"
_SUMMARIES = 100
"""How often the summary is written on the way, at most; each time as a whole."""

_NO_MEMORY = "{} needs more memory than there is; check the spacing in its header, or use a computer with more memory"


@dataclass(frozen=True)
class CaseResult:
    """What became of one case of `segment_files`."""

    case_id: str
    mask: Path | None
    """Where the mask was written; None when the case failed."""
    volumes_ml: dict[str, float]
    """Volume of each label in millilitres; a region includes the regions within it that are painted over it."""
    error: str = ""
    """Why the case failed."""
    windows_run: int = 0
    """Windows that ran at full spacing, over all models; 1 a model where the case ran whole."""
    windows_full: int = 0
    """Windows that the full sliding window takes, over all models."""
    warnings: tuple[str, ...] = ()
    """In what the scan is far from all that the (first) model was trained on; it is segmented all the same."""
    notes: tuple[str, ...] = ()
    """What of the input was used, where that was chosen: the phases of a DCE exam in DICOM."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Time of each stage: load, resample, network, resample back, save."""


def segment_volume(model: Model | Sequence[Model], volume: Volume, *, full: bool = False) -> MaskArray:
    """Segment one volume.

    Args:
        model: A model, or several of the same plan whose probabilities are averaged.
        volume: Must bring the channels that the model expects, by name.
        full: Run all windows of a large scan, also where the model was trained to choose among them.

    Returns:
        Mask (X, Y, Z) on the volume's own grid, in the dataset's label values, 0 elsewhere.

    Raises:
        DataError: A channel is missing.
        ConfigError: The models do not share labels and channels.
        ModelError: A network gives NaN or infinity.
    """
    return _segment([model] if isinstance(model, Model) else list(model), volume, Stopwatch(), full=full).mask


class _Segmented(NamedTuple):
    mask: MaskArray
    windows_run: int
    windows_full: int


def _segment(models: Sequence[Model], volume: Volume, watch: Stopwatch, *, full: bool) -> _Segmented:
    check_ensemble(models)
    plan = models[0].facts.plan
    with watch.stage("resample"):
        prepared = prepare_image(volume, plan)
    predict = predict_full if full else predict_steered
    with watch.stage("network"):
        answers = [predict(each, prepared.image) for each in models]
        logits = _average([answer.logits for answer in answers], regions=plan.regions)
        check_finite(logits, models[0])
    run, all_windows = (sum(counts) for counts in zip(*((a.windows_run, a.windows_full) for a in answers), strict=True))
    with watch.stage("resample back"):
        mask = restore_logits(logits, prepared.record, plan)
    return _Segmented(mask, run, all_windows)


def check_finite(logits: Float[Tensor, "L X Y Z"], model: Model) -> None:
    """Refuse NaN: it would come out as background, an empty mask that looks like a finding.

    Raises:
        ModelError: With the name of the model.
    """
    if not torch.isfinite(logits).all():
        raise ModelError(f"model {model.facts.name!r} gives NaN or infinity here; train it again")


def segment_files(
    models: Sequence[Model],
    input_path: Path,
    output_path: Path,
    progress: Progress | None = None,
    *,
    options: SegmentOptions | None = None,
) -> list[CaseResult]:
    """Segment a file, a folder of cases, or a dataset; write masks and, for a folder, `summary.csv`.

    A broken case is recorded in its result and does not stop the others. Masks of an earlier call are replaced; input
    images, and files that no earlier call wrote, never are.

    Args:
        models: One or several models of the same plan.
        input_path: An image file, a folder of images, a dataset folder, or DICOM (a folder, a zip archive or a file).
        output_path: A mask file for a single input file; else a folder, made if absent. For a single DICOM study
            either.
        progress: Told about each case.
        options: What else was asked for.

    Raises:
        TokenSegError: Input or output cannot be used at all.
    """
    check_ensemble(models)
    options = options or SegmentOptions()
    part, count = options.part()
    cases = list_inputs(input_path, models[0].facts.plan, options.series)
    is_dicom = cases[0].exam is not None
    endings = (*IMAGE_ENDINGS, ".dcm") if is_dicom else IMAGE_ENDINGS
    named_as_file = output_path.name.endswith(endings) and not output_path.is_dir()
    if is_dicom and input_path.is_dir() and output_path.resolve().is_relative_to(input_path.resolve()):
        raise FileError(f"output {output_path} lies among the DICOM files of {input_path}; name another place")
    if (len(cases) == 1 and named_as_file) if is_dicom else input_path.is_file():
        _check_output_file(output_path, input_path, endings)
        return [_segment_case(models, cases[0], output_path, options)]
    _check_output_folder(output_path, cases)
    cases = cases[part - 1 :: count]
    return segment_cases(models, cases, output_path, progress or Silent(), options=options)


def segment_cases(
    models: Sequence[Model],
    cases: Sequence[Case],
    folder: Path,
    progress: Progress,
    *,
    options: SegmentOptions | None = None,
) -> list[CaseResult]:
    """Segment cases into `folder`: `CASE` with the input's ending.

    Beside the masks are `status.jsonl`, a line a case as it is done, and `summary.csv`, kept up to date. Cases that an
    earlier call did from the same input with the same weights and settings are not done again.
    """
    options = options or SegmentOptions()
    status_path, summary_path = (folder / _part_name(name, options) for name in (STATUS_NAME, SUMMARY_NAME))
    plan = models[0].facts.plan
    # Cases still to come stand in the summary too, so that an interrupted run does not pass for a complete one.
    results = [CaseResult(case.case_id, None, {}, "not segmented yet") for case in cases]
    remove_leftovers(folder)
    write_atomically(summary_path, _summary(results, plan))
    earlier = read_statuses(folder)
    settings = _key_settings(models, options)
    progress.stage("segmenting", len(cases))
    for number, case in enumerate(cases):
        # Weights that were never saved have no fingerprint: with them everything is done anew.
        key = case_key(case, settings) if all(model.facts.weights_sha256 for model in models) else ""
        known = earlier.get(case.case_id)
        if known is not None and is_current(known, key, folder):
            results[number] = _known_result(known, folder)
        else:
            results[number] = _segment_into(models, case, folder, options)
            append_status(status_path, _status(results[number], key))
        if number % max(1, len(cases) // _SUMMARIES) == 0 or number == len(cases) - 1:
            write_atomically(summary_path, _summary(results, plan))
        progress.advance(case.case_id)
    return results


def _segment_into(models: Sequence[Model], case: Case, folder: Path, options: SegmentOptions) -> CaseResult:
    target = folder / _mask_name(case)
    result = _segment_case(models, case, target, options)
    if result.mask is None:
        # A mask of an earlier call would pass for a result of this one.
        target.unlink(missing_ok=True)
        if case.exam is not None:
            _no_findings_file(target).unlink(missing_ok=True)
    return result


def _key_settings(models: Sequence[Model], options: SegmentOptions) -> list[str]:
    """All that a mask depends on besides the input."""
    facts = [model.facts.model_dump_json() for model in models]  # the plan, and the fingerprint of the weights
    engines = ["torch" if model.compiled is None else "openvino" for model in models]
    wanted = [str(options.full), str(options.empty_seg), options.series]
    return [version("tokenseg"), *facts, *engines, models[0].device.type, *wanted]


def _status(result: CaseResult, key: str) -> CaseStatus:
    mask = result.mask
    return CaseStatus(
        case=result.case_id,
        state="failed" if mask is None else "done",
        key=key,
        mask="" if mask is None else mask.name,
        mask_sha256="" if mask is None else file_digest([DicomFile(mask)]),
        volumes_ml=result.volumes_ml,
        windows_run=result.windows_run,
        windows_full=result.windows_full,
        warnings=result.warnings,
        notes=result.notes,
        error=result.error,
        seconds={stage: round(seconds, 3) for stage, seconds in result.seconds.items()},
        peak_mib=peak_mib(),
    )


def _known_result(status: CaseStatus, folder: Path) -> CaseResult:
    windows = status.windows_run, status.windows_full
    mask = folder / status.mask
    return CaseResult(status.case, mask, status.volumes_ml, "", *windows, status.warnings, status.notes)


def _part_name(name: str, options: SegmentOptions) -> str:
    number, count = options.part()
    stem, ending = name.split(".")
    return name if count == 1 else f"{stem}.{number}-of-{count}.{ending}"


def check_ensemble(models: Sequence[Model]) -> None:
    """Refuse an empty ensemble, or one whose models differ in what they take or give.

    Raises:
        ConfigError: With the names of the models that disagree.
    """
    if not models:
        raise ConfigError("no model given; name at least one run or model folder")
    first = models[0].facts
    for model in models[1:]:
        if model.facts.plan.model_dump(exclude={"reasons"}) != first.plan.model_dump(exclude={"reasons"}):
            raise ConfigError(
                f"models {first.name!r} and {model.facts.name!r} were trained with different plans; "
                "average only folds of one plan (train the folds with the same --config)"
            )


def _segment_case(models: Sequence[Model], case: Case, target: Path, options: SegmentOptions) -> CaseResult:
    plan, watch = models[0].facts.plan, Stopwatch()
    try:
        with watch.stage("load"):
            notes = describe_input(case, plan)
            volume = read_input(case, plan)
        segmented = _segment(models, volume, watch, full=options.full)
        mask = segmented.mask
        with watch.stage("save"):
            written = _write(target, mask, volume, models[0], options)
    except TokenSegError as error:
        return CaseResult(case.case_id, None, {}, str(error))
    except (MemoryError, RuntimeError) as error:
        if not _is_memory_error(error):
            raise
        return CaseResult(case.case_id, None, {}, _NO_MEMORY.format(case.case_id))
    voxel_ml = abs(float(np.linalg.det(volume.affine[:3, :3]))) / 1000
    volumes_ml = {label.name: np.isin(mask, _painted_values(label, plan)).sum() * voxel_ml for label in plan.labels}
    warnings = check_input(volume, models[0].facts.inputs)
    windows = segmented.windows_run, segmented.windows_full
    return CaseResult(case.case_id, written, volumes_ml, "", *windows, warnings, notes, watch.seconds)


def _write(target: Path, mask: MaskArray, volume: Volume, model: Model, options: SegmentOptions) -> Path:
    """Write a mask in the form that its name says; where it went."""
    if not target.name.endswith(".dcm"):
        write_mask(target, mask, volume)
        return target
    plan, name = model.facts.plan, model.facts.name
    segments = [Segment(label, np.isin(mask, _painted_values(label, plan))) for label in plan.labels]
    found = [segment for segment in segments if segment.voxels.any()]
    other = _no_findings_file(target)
    if found or options.empty_seg:
        write_seg(target, found or segments, volume, model_name=name, version=version("tokenseg"))
    else:
        write_no_findings(other, plan.labels, model_name=name, version=version("tokenseg"))
        target, other = other, target
    other.unlink(missing_ok=True)  # of an earlier call
    return target


def _no_findings_file(target: Path) -> Path:
    return target.with_name(target.name.removesuffix(".dcm").removesuffix("_seg") + NO_FINDINGS_ENDING)


def _is_memory_error(error: Exception) -> bool:
    # Torch has a class of its own for devices only.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _painted_values(label: Label, plan: Plan) -> list[int]:
    """Values in a written mask that belong to a label: its own, and those of the regions within it."""
    return [other.output_value for other in plan.labels if set(other.values) <= set(label.values)]


def _mask_name(case: Case) -> str:
    if case.exam is not None:
        return case.case_id + SEG_ENDING
    # A case may have no image at all (an empty patient folder); it fails, but has a name.
    return case.case_id + (mask_ending(image_ending(case.images[0])) if case.images else IMAGE_ENDINGS[0])


def _summary(results: Iterable[CaseResult], plan: Plan) -> bytes:
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


def _check_output_file(output: Path, image: Path, endings: tuple[str, ...]) -> None:
    if output.is_dir() or not output.name.endswith(endings):
        raise FileError(f"output {output} must be a file ending in {', '.join(endings)}, since the input is one file")
    if output.exists() and output.samefile(image):
        raise FileError(f"output {output} is the input image itself; name another file")
    words = _no_findings_file(output)
    if output.name.endswith(".dcm") and words.exists() and not is_no_findings(words):
        raise FileError(f"{words} is in the way: where nothing is found, it would be overwritten; name another output")
    check_writable(output.parent, output)


def _check_output_folder(output: Path, cases: Sequence[Case]) -> None:
    if output.is_file() or output.name.endswith(IMAGE_ENDINGS):
        raise FileError(f"output {output} must be a folder, since the input is a folder")
    # Whoever names the folder of the images, or of reference masks, would lose them.
    targets = [(case.case_id, output / _mask_name(case)) for case in cases]
    targets += [(case_id, _no_findings_file(path)) for case_id, path in targets if path.name.endswith(SEG_ENDING)]
    images = {path.resolve() for case in cases for path in case.images}
    ours = _cases_in_summary(output)
    foreign = [path for case_id, path in targets if path.exists() and (path.resolve() in images or case_id not in ours)]
    if foreign:
        raise FileError(
            f"output {output} already holds {first_few([path.name for path in foreign])}, not written by "
            "`tokenseg segment`; name another folder, so that nothing is overwritten"
        )
    check_writable(output, output)


def _cases_in_summary(folder: Path) -> set[str]:
    """Cases that an earlier call wrote here; none where summaries are absent or not ours."""
    cases: set[str] = set()
    for path in folder.glob("summary*.csv"):
        try:
            with path.open(newline="", encoding="utf-8") as file:
                cases |= {row["case"] for row in csv.DictReader(file)}
        except (OSError, UnicodeDecodeError, csv.Error, KeyError):
            continue
    return cases


def _average(logits: list[Float[Tensor, "L X Y Z"]], *, regions: bool) -> Float[Tensor, "L X Y Z"]:
    """Mean of the probabilities, as logits."""
    if len(logits) == 1:
        return logits[0]
    if regions:
        return torch.stack([each.sigmoid() for each in logits]).mean(dim=0).logit(eps=1e-7)
    return torch.stack([each.softmax(dim=0) for each in logits]).mean(dim=0).clamp(min=1e-7).log()
