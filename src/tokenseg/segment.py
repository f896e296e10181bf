"""Segmentation of whole volumes: volume -> plan grid -> network -> mask on the input's grid.

A scan that fits the plan's limit runs in one pass; a larger one in Gaussian-weighted sliding windows. Which of the two
follows from the plan and the scan alone, never from free memory.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenseg.checkpoint import Model
from tokenseg.config import Label, Plan
from tokenseg.data.cases import Case, first_few
from tokenseg.data.inputs import list_inputs, read_input
from tokenseg.data.preprocess import prepare_image, restore_logits
from tokenseg.data.volume import IMAGE_ENDINGS, Volume, image_ending, image_stem, write_mask
from tokenseg.device import autocast
from tokenseg.errors import ConfigError, FileError, ModelError, TokenSegError
from tokenseg.files import check_writable, remove_leftovers, write_atomically
from tokenseg.progress import Progress, Silent
from tokenseg.shapes import ImageArray, MaskArray

SUMMARY_NAME = "summary.csv"

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


def segment_volume(model: Model | Sequence[Model], volume: Volume) -> MaskArray:
    """Segment one volume.

    Args:
        model: A model, or several of the same plan whose probabilities are averaged.
        volume: Must bring the channels that the model expects, by name.

    Returns:
        Mask (X, Y, Z) on the volume's own grid, in the dataset's label values, 0 elsewhere.

    Raises:
        DataError: A channel is missing.
        ConfigError: The models do not share labels and channels.
        ModelError: A network gives NaN or infinity.
    """
    models = [model] if isinstance(model, Model) else list(model)
    check_ensemble(models)
    plan = models[0].facts.plan
    prepared = prepare_image(volume, plan)
    logits = _average(
        [predict_logits(each.network, prepared.image, plan, each.device) for each in models], regions=plan.regions
    )
    check_finite(logits, models[0])
    return restore_logits(logits, prepared.record, plan)


def predict_logits(network: nn.Module, image: ImageArray, plan: Plan, device: torch.device) -> Float[Tensor, "L X Y Z"]:
    """Run the network over a prepared image, whole or in windows as the plan says.

    Args:
        network: In evaluation mode, on `device`.
        image: On the plan's grid, normalised.
        plan: Gives the window and the limit up to which an image runs whole.
        device: Where to compute; the result is on the CPU, float32.
    """
    size = image.shape[1:]
    padded, start = pad_to_window(torch.from_numpy(image), plan.window_vox)
    corners = window_corners((padded.shape[1], padded.shape[2], padded.shape[3]), plan)
    with torch.inference_mode():
        if corners is None:
            logits = _forward(network, padded, device)
        else:
            logits = _sliding_windows(network, padded, plan.window_vox, corners, device)
    return logits[(slice(None), *(slice(first, first + length) for first, length in zip(start, size, strict=True)))]


def check_finite(logits: Float[Tensor, "L X Y Z"], model: Model) -> None:
    """Refuse NaN: it would come out as background, an empty mask that looks like a finding.

    Raises:
        ModelError: With the name of the model.
    """
    if not torch.isfinite(logits).all():
        raise ModelError(f"model {model.facts.name!r} gives NaN or infinity here; train it again")


def segment_files(
    models: Sequence[Model], input_path: Path, output_path: Path, progress: Progress | None = None
) -> list[CaseResult]:
    """Segment a file, a folder of cases, or a dataset; write masks and, for a folder, `summary.csv`.

    A broken case is recorded in its result and does not stop the others. Masks of an earlier call are replaced; input
    images, and files that no earlier call wrote, never are.

    Args:
        models: One or several models of the same plan.
        input_path: An image file, a folder of images, or a dataset folder.
        output_path: A mask file for a single input file; else a folder, made if absent.
        progress: Told about each case.

    Raises:
        TokenSegError: Input or output cannot be used at all.
    """
    check_ensemble(models)
    cases = list_inputs(input_path, models[0].facts.plan)
    if input_path.is_file():
        _check_output_file(output_path, input_path)
        return [_segment_case(models, cases[0], output_path)]
    _check_output_folder(output_path, cases)
    return segment_cases(models, cases, output_path, progress or Silent())


def segment_cases(models: Sequence[Model], cases: Sequence[Case], folder: Path, progress: Progress) -> list[CaseResult]:
    """Segment cases into `folder`: `CASE` with the input's ending, and `summary.csv` kept up to date."""
    # Cases still to come stand in the summary too, so that an interrupted run does not pass for a complete one.
    results = [CaseResult(case.case_id, None, {}, "not segmented yet") for case in cases]
    remove_leftovers(folder)
    write_atomically(folder / SUMMARY_NAME, _summary(results, models[0].facts.plan))
    progress.stage("segmenting", len(cases))
    for number, case in enumerate(cases):
        target = folder / _mask_name(case)
        results[number] = _segment_case(models, case, target)
        if results[number].mask is None:
            # A mask of an earlier call would pass for a result of this one.
            target.unlink(missing_ok=True)
        write_atomically(folder / SUMMARY_NAME, _summary(results, models[0].facts.plan))
        progress.advance(case.case_id)
    return results


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


def _segment_case(models: Sequence[Model], case: Case, target: Path) -> CaseResult:
    plan = models[0].facts.plan
    try:
        volume = read_input(case, plan)
        mask = segment_volume(models, volume)
        write_mask(target, mask, volume)
    except TokenSegError as error:
        return CaseResult(case.case_id, None, {}, str(error))
    except (MemoryError, RuntimeError) as error:
        if not _is_memory_error(error):
            raise
        return CaseResult(case.case_id, None, {}, _NO_MEMORY.format(case.case_id))
    voxel_ml = abs(float(np.linalg.det(volume.affine[:3, :3]))) / 1000
    volumes_ml = {label.name: np.isin(mask, _painted_values(label, plan)).sum() * voxel_ml for label in plan.labels}
    return CaseResult(case.case_id, target, volumes_ml)


def _is_memory_error(error: Exception) -> bool:
    # Torch has a class of its own for devices only.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _painted_values(label: Label, plan: Plan) -> list[int]:
    """Values in a written mask that belong to a label: its own, and those of the regions within it."""
    return [other.output_value for other in plan.labels if set(other.values) <= set(label.values)]


def _mask_name(case: Case) -> str:
    # A case may have no image at all (an empty patient folder); it fails, but has a name.
    return case.case_id + (image_ending(case.images[0]) if case.images else IMAGE_ENDINGS[0])


def _summary(results: Iterable[CaseResult], plan: Plan) -> bytes:
    text = io.StringIO()
    names = [label.name for label in plan.labels]
    writer = csv.writer(text)
    writer.writerow(["case", *(f"{name}_ml" for name in names), "error"])
    for result in results:
        volumes = [f"{result.volumes_ml[name]:.4f}" if result.volumes_ml else "" for name in names]
        writer.writerow([result.case_id, *volumes, result.error])
    return text.getvalue().encode()


def _check_output_file(output: Path, image: Path) -> None:
    if output.is_dir() or not output.name.endswith(IMAGE_ENDINGS):
        raise FileError(
            f"output {output} must be a file ending in {' or '.join(IMAGE_ENDINGS)}, since the input is one file"
        )
    if output.exists() and output.samefile(image):
        raise FileError(f"output {output} is the input image itself; name another file")
    check_writable(output.parent, output)


def _check_output_folder(output: Path, cases: Sequence[Case]) -> None:
    if output.is_file() or output.name.endswith(IMAGE_ENDINGS):
        raise FileError(f"output {output} must be a folder, since the input is a folder")
    # Whoever names the folder of the images, or of reference masks, would lose them.
    existing = [path for path in (output / _mask_name(case) for case in cases) if path.exists()]
    images = {path.resolve() for case in cases for path in case.images}
    ours = _cases_in_summary(output)
    foreign = [path for path in existing if path.resolve() in images or image_stem(path) not in ours]
    if foreign:
        raise FileError(
            f"output {output} already holds {first_few([path.name for path in foreign])}, not written by "
            "`tokenseg segment`; name another folder, so that nothing is overwritten"
        )
    check_writable(output, output)


def _cases_in_summary(folder: Path) -> set[str]:
    """Cases that an earlier call wrote here; none where the summary is absent or not ours."""
    try:
        with (folder / SUMMARY_NAME).open(newline="", encoding="utf-8") as file:
            return {row["case"] for row in csv.DictReader(file)}
    except (OSError, UnicodeDecodeError, csv.Error, KeyError):
        return set()


def _average(logits: list[Float[Tensor, "L X Y Z"]], *, regions: bool) -> Float[Tensor, "L X Y Z"]:
    """Mean of the probabilities, as logits."""
    if len(logits) == 1:
        return logits[0]
    if regions:
        return torch.stack([each.sigmoid() for each in logits]).mean(dim=0).logit(eps=1e-7)
    return torch.stack([each.softmax(dim=0) for each in logits]).mean(dim=0).clamp(min=1e-7).log()


def _forward(network: nn.Module, image: Float[Tensor, "C X Y Z"], device: torch.device) -> Float[Tensor, "L X Y Z"]:
    with autocast(device):
        logits: Tensor = network(image[None].to(device)).logits
    return logits[0].float().cpu()


def pad_to_window(
    image: Float[Tensor, "C X Y Z"], window: tuple[int, int, int]
) -> tuple[Float[Tensor, "C Xp Yp Zp"], list[int]]:
    """Centre an image that is smaller than the training window in one, as training does."""
    missing = [max(0, length - size) for length, size in zip(window, image.shape[1:], strict=True)]
    start = [length // 2 for length in missing]
    padding = [side for first, total in zip(start, missing, strict=True) for side in (total - first, first)]
    return nn.functional.pad(image, padding[::-1]), start


def _sliding_windows(
    network: nn.Module,
    image: Float[Tensor, "C X Y Z"],
    window: tuple[int, int, int],
    corners: Sequence[tuple[int, int, int]],
    device: torch.device,
) -> Float[Tensor, "L X Y Z"]:
    weight = _gaussian(window)
    total: Tensor | None = None
    norm = torch.zeros(image.shape[1:])
    for corner in corners:
        place = tuple(slice(first, first + length) for first, length in zip(corner, window, strict=True))
        logits = _forward(network, image[(slice(None), *place)], device)
        if total is None:
            total = torch.zeros(logits.shape[0], *image.shape[1:])
        total[(slice(None), *place)] += logits * weight
        norm[place] += weight
    if total is None:
        raise ValueError("an image has at least one window")
    return total.div_(norm)


def window_corners(size: tuple[int, int, int], plan: Plan) -> list[tuple[int, int, int]] | None:
    """First voxels of the sliding windows over a padded image of this size, in the order in which they run.

    None where the image runs whole.
    """
    if all(length <= limit for length, limit in zip(size, plan.whole_limit_vox, strict=True)):
        return None
    x, y, z = (window_starts(length, window) for length, window in zip(size, plan.window_vox, strict=True))
    return list(product(x, y, z))


def window_starts(size: int, window: int) -> list[int]:
    """First voxels of evenly spread windows that overlap by at least half and cover `size` voxels."""
    steps = -(-(size - window) // max(1, window // 2)) if size > window else 0
    return [round(step * (size - window) / steps) for step in range(steps + 1)] if steps else [0]


def _gaussian(window: tuple[int, int, int]) -> Float[Tensor, "X Y Z"]:
    """Weight of each voxel of a window: a Gaussian of sigma 1/8 window, at least a thousandth."""
    axes = []
    for length in window:
        distance = (torch.arange(length) - (length - 1) / 2) / (length / 8)
        axes.append(torch.exp(-0.5 * distance.square()))
    weight = axes[0][:, None, None] * axes[1][None, :, None] * axes[2][None, None, :]
    return weight.clamp(min=1e-3)
