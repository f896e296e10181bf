"""Output files of `segment`: masks in the form of their inputs, a cohort's summary; and what may not be overwritten."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from tokenseg.datasets.cases import Case
from tokenseg.errors import FileError
from tokenseg.files import check_writable, writing
from tokenseg.imaging.dicom.seg import (
    NO_FINDINGS_ENDING,
    SEG_ENDING,
    Segment,
    is_no_findings,
    write_no_findings,
    write_seg,
)
from tokenseg.imaging.formats import IMAGE_ENDINGS, image_ending, image_stem, is_named_as_image, mask_ending
from tokenseg.imaging.volume import Volume, write_mask
from tokenseg.inference.quality import is_quality
from tokenseg.messages import first_few
from tokenseg.options import SegmentOptions
from tokenseg.plan_grid.probabilities import is_probabilities
from tokenseg.plan_grid.restore import painted_values
from tokenseg.saved_model.checkpoint import ModelFacts
from tokenseg.segmentation.privacy import shown_name
from tokenseg.segmentation.provenance import is_manifest
from tokenseg.segmentation.status import read_statuses
from tokenseg.shapes import MaskArray

SUMMARY_NAME, STATUS_NAME, MANIFEST_NAME = "summary.csv", "status.jsonl", "manifest.json"
_QUALITY_ENDING, _MANIFEST_ENDING, _PROBABILITIES_ENDING = "_qc.json", "_manifest.json", "_probabilities.npy"


def write_output(target: Path, mask: MaskArray, volume: Volume, facts: ModelFacts, options: SegmentOptions) -> Path:
    """Write a mask in the form that its name says; where it went."""
    if not target.name.endswith(".dcm"):
        write_mask(target, mask, volume)
        return target
    plan, name = facts.plan, facts.name
    segments = [Segment(label, np.isin(mask, painted_values(label, plan))) for label in plan.labels]
    found = [segment for segment in segments if segment.voxels.any()]
    other = no_findings_file(target)
    if found or options.empty_seg:
        write_seg(target, found or segments, volume, model_name=name, version=version("tokenseg"))
    else:
        write_no_findings(other, plan.labels, model_name=name, version=version("tokenseg"))
        target, other = other, target
    other.unlink(missing_ok=True)  # of an earlier call
    return target


def no_findings_file(target: Path) -> Path:
    """Where it is said that nothing was found, in place of a DICOM SEG."""
    return target.with_name(target.name.removesuffix(".dcm").removesuffix("_seg") + NO_FINDINGS_ENDING)


def quality_file(mask: Path) -> Path:
    """Where the quality signals of a mask are."""
    return mask.with_name(_stem(mask) + _QUALITY_ENDING)


def manifest_file(mask: Path) -> Path:
    """Where the manifest of a single mask is."""
    return mask.with_name(_stem(mask) + _MANIFEST_ENDING)


def probabilities_file(mask: Path) -> Path:
    """Where the probabilities behind a mask are, if they are asked for."""
    return mask.with_name(_stem(mask) + _PROBABILITIES_ENDING)


def _stem(mask: Path) -> str:
    if mask.name.endswith(IMAGE_ENDINGS):
        return image_stem(mask)
    return mask.name.removesuffix(NO_FINDINGS_ENDING).removesuffix(".dcm").removesuffix("_seg")


def mask_name(case: Case) -> str:
    """File name of the mask of a case: the form of its input."""
    if case.exam is not None:
        return case.case_id + SEG_ENDING
    # A case may have no image at all (an empty patient folder); it fails, but has a name.
    # So has one whose file is missing and is named as no image.
    is_image = bool(case.images) and is_named_as_image(case.images[0])
    return case.case_id + (mask_ending(image_ending(case.images[0])) if is_image else IMAGE_ENDINGS[0])


def check_output_file(output: Path, image: Path, endings: tuple[str, ...], *, wanted: bool) -> None:
    """Refuse an output file that cannot be written, is of another form, or is the input itself.

    `wanted` says whether probabilities are to be written.

    Raises:
        FileError: With the reason.
    """
    if output.is_dir() or not output.name.endswith(endings):
        raise FileError(f"output {output} must be a file ending in {', '.join(endings)}, since the input is one file")
    if output.exists() and output.samefile(image):
        raise FileError(f"output {output} is the input image itself; name another file")
    # One of them is enough: a call may have been killed before it wrote the other.
    if output.exists() and not (is_quality(quality_file(output)) or is_manifest(manifest_file(output))):
        raise FileError(
            f"{output} is there already, without a manifest of `tokenseg segment`; remove it, or name another output"
        )
    words = no_findings_file(output)
    if output.name.endswith(".dcm") and words.exists() and not is_no_findings(words):
        raise FileError(f"{words} is in the way: where nothing is found, it would be overwritten; name another output")
    beside = [quality_file(output), manifest_file(output)]
    foreign = [path for path in beside if path.exists() and not is_manifest(path) and not is_quality(path)]
    numbers = probabilities_file(output)
    foreign += [numbers] if _is_foreign(numbers, known=is_quality(quality_file(output)), wanted=wanted) else []
    if foreign:
        raise FileError(f"{foreign[0]} is in the way, not written by `tokenseg segment`; name another output")
    check_writable(output.parent, output)


def check_output_folder(output: Path, cases: Sequence[Case], *, wanted: bool) -> None:
    """Refuse an output folder that cannot be written, or where files that are not ours would be overwritten.

    `wanted` says whether probabilities are to be written.

    Raises:
        FileError: With the reason.
    """
    if output.is_file() or output.name.endswith(IMAGE_ENDINGS):
        raise FileError(f"output {output} must be a folder, since the input is a folder")
    # Whoever names the folder of the images, or of reference masks, would lose them.
    targets = [(case.case_id, output / mask_name(case)) for case in cases]
    numbers = [(case_id, probabilities_file(path)) for case_id, path in targets]
    targets += [(case_id, quality_file(path)) for case_id, path in targets]
    targets += [(case_id, no_findings_file(path)) for case_id, path in targets if path.name.endswith(SEG_ENDING)]
    # Path.resolve raises where links make a loop.
    images = {os.path.realpath(path) for case in cases for path in case.images}
    ours = _cases_written(output, cases)
    foreign = [
        path for case_id, path in targets if path.exists() and (os.path.realpath(path) in images or case_id not in ours)
    ]
    foreign += [path for case_id, path in numbers if _is_foreign(path, known=case_id in ours, wanted=wanted)]
    manifest = output / MANIFEST_NAME
    foreign += [manifest] if manifest.exists() and not is_manifest(manifest) else []
    if foreign:
        raise FileError(
            f"output {output} already holds {first_few([path.name for path in foreign])}, not written by "
            "`tokenseg segment`; name another folder, so that nothing is overwritten"
        )
    # Segmentations in DICOM are told from scans.
    scans = {os.path.realpath(path.parent) for case in cases if case.exam is None for path in case.images}
    if os.path.realpath(output) in scans:
        raise FileError(
            f"output {output} is where the scans lie, and the next call would take masks for scans; name another folder"
        )
    check_writable(output, output)


def _is_foreign(numbers: Path, *, known: bool, wanted: bool) -> bool:
    """Whether a file of somebody else would be overwritten, or removed as probabilities of an earlier mask."""
    if not numbers.exists():
        return False
    return not known if is_probabilities(numbers) else wanted


def remove_probabilities(mask: Path) -> None:
    """Remove what an earlier call wrote: it would pass for that of a new mask.

    Raises:
        FileError: It cannot be removed.
    """
    path = probabilities_file(mask)
    if is_probabilities(path):
        with writing(path):
            path.unlink()


def _cases_written(folder: Path, asked: Iterable[Case]) -> set[str]:
    """Cases that an earlier call wrote here; none where summaries and statuses are absent or not ours.

    A summary is of the last call alone; the status tells of all, by names or by what stands for them, which only those
    `asked` for can be told from.
    """
    known = read_statuses(folder)
    names = {case.case_id for case in asked}
    cases = {name for name in names if name in known or shown_name(name, show_names=False) in known}
    for path in folder.glob("summary*.csv"):
        try:
            with path.open(newline="", encoding="utf-8") as file:
                cases |= {row["case"] for row in csv.DictReader(file)}
        except (OSError, UnicodeDecodeError, csv.Error, KeyError):
            continue
    return cases


def part_name(name: str, options: SegmentOptions) -> str:
    """Name of a file that each part of a cohort writes for itself."""
    number, count = options.part()
    stem, ending = name.split(".")
    return name if count == 1 else f"{stem}.{number}-of-{count}.{ending}"
