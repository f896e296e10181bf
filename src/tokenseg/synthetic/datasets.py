"""Datasets of synthetic exams on disk: up to three folders in the MAMA-MIA layout, from one seed.

An exam depends on the seed, its part and its number alone, so a small part is the beginning of a larger one, and an
interrupted call goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from tokenseg.datasets.dataset_json import read_json
from tokenseg.datasets.mamamia import LESIONS_NAME
from tokenseg.errors import ConfigError, FileError
from tokenseg.files import check_writable, remove_leftovers, write_atomically
from tokenseg.imaging.volume import Volume, write_mask, write_volume
from tokenseg.messages import first_few
from tokenseg.options import SyntheticOptions
from tokenseg.progress import Progress, Silent
from tokenseg.synthetic.exam import NUM_PHASES, Exam, make_exam
from tokenseg.synthetic.scanner import CentreName

PartName: TypeAlias = Literal["train", "test", "external"]

MARKER_NAME = "cohort.json"
"""Seed and version of the exams in a folder. The name is older than the command's, and stays for older folders."""
README_NAME = "README.txt"
VERSION = 1
"""Of the exams: another number means other images from the same seed."""
NOTICE = "Synthetic images, simulated by TokenSeg; not of any patient, not for any clinical conclusion."

_WITHOUT_LESION, _WITH_TWO = 0.1, 0.12
_GOLDEN = (5**0.5 - 1) / 2


class _Part(NamedTuple):
    """Where and as what the exams of a part are made."""

    prefix: str
    centre: CentreName
    stream: int


_PARTS: dict[PartName, _Part] = {
    "train": _Part("SYN", "internal", 0),
    "test": _Part("TST", "internal", 1),
    "external": _Part("EXT", "external", 2),
}


@dataclass(frozen=True, kw_only=True)
class WrittenPart:
    """One dataset: the exams of one part."""

    name: PartName
    folder: Path
    num_exams: int
    num_made: int
    """Of these, how many were made now; the others were there."""
    num_lesions: int
    num_without_lesion: int


@dataclass(frozen=True, kw_only=True)
class WrittenDatasets:
    """The datasets of one folder; parts that were asked for with no exam are left out."""

    folder: Path
    seed: int
    parts: tuple[WrittenPart, ...]


def write_datasets(folder: Path, options: SyntheticOptions, progress: Progress | None = None) -> WrittenDatasets:
    """Write synthetic exams: datasets `train`, `test` and `external` with images, reference masks and `lesions.json`.

    Exams that are there already, from the same seed, are kept as they are. Each exam takes about half a second, a whole
    one about ten.

    Args:
        folder: Where to; made if absent.
        options: How many exams, from which seed.
        progress: Told of every exam.

    Raises:
        ConfigError: A number is out of range, or the folder holds exams of another seed or version.
        FileError: The folder holds files that are not of these exams, or cannot be written.
    """
    options.check()
    progress = progress or Silent()
    check_writable(folder, folder)
    _claim(folder, options)
    counts = {name: getattr(options, name) for name in _PARTS if getattr(options, name)}
    progress.stage("synthetic exams", sum(counts.values()))
    parts = [_write_part(folder, name, count, options, progress) for name, count in counts.items()]
    return WrittenDatasets(folder=folder, seed=options.seed, parts=tuple(parts))


def count_lesions(seed: int, part: PartName, number: int) -> int:
    """Number of lesions of an exam: 0 in about 10 % of a part's exams, 2 in about 12 %, else 1.

    Multiples of the golden ratio spread the rare ones evenly over the numbers, so short runs have them in proportion.
    """
    start = np.random.default_rng((seed, _PARTS[part].stream)).random()
    place = (start + number * _GOLDEN) % 1
    if place < _WITHOUT_LESION:
        return 0
    return 2 if place > 1 - _WITH_TWO else 1


def _claim(folder: Path, options: SyntheticOptions) -> None:
    """Check that the folder is empty or holds some of these very exams, and mark it as ours."""
    marker = folder / MARKER_NAME
    is_ours = marker.is_file()
    if is_ours:
        _check_same(marker, options)
    for inner in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        remove_leftovers(inner)
    foreign = sorted(_visible_files(folder) - (set(_expected_files(options)) if is_ours else set()))
    if foreign:
        raise FileError(
            f"{folder} holds files that are not of these exams: {first_few(foreign)}; "
            "name an empty folder, or ask for at least as many exams as it has"
        )
    write_atomically(marker, _json({"notice": NOTICE, "seed": options.seed, "version": VERSION} | _kind(options)))
    write_atomically(folder / README_NAME, _readme(options.seed).encode())


def _kind(options: SyntheticOptions) -> dict[str, bool]:
    return {"whole": True} if options.whole else {}


def _check_same(marker: Path, options: SyntheticOptions) -> None:
    found = read_json(marker)
    is_whole = isinstance(found, dict) and found.get("whole", False)
    if is_whole != options.whole:
        raise ConfigError(
            f"{marker.parent} holds exams of {'both breasts' if is_whole else 'one breast'}, asked for are exams of "
            f"{'both' if options.whole else 'one'}; name another folder, or {'leave out' if options.whole else 'add'} "
            "--whole"
        )
    for key, wanted in (("seed", options.seed), ("version", VERSION)):
        given = found.get(key) if isinstance(found, dict) else None
        if given != wanted:
            raise ConfigError(
                f"{marker.parent} holds exams of {key} {given}, asked for is {key} {wanted}; name another folder"
            )


def _visible_files(folder: Path) -> set[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return {path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)}


def _expected_files(options: SyntheticOptions) -> Iterator[str]:
    yield from (MARKER_NAME, README_NAME)
    for part in _PARTS:
        yield from (f"{part}/{name}" for name in (README_NAME, LESIONS_NAME))
        for number in range(getattr(options, part)):
            paths = _exam_paths(Path(part), _exam_id(part, number))
            yield from (path.as_posix() for path in (*paths.phases, paths.mask, paths.record))


class _ExamPaths(NamedTuple):
    """Files of an exam; the record is written last, so where it is the exam is complete."""

    phases: tuple[Path, ...]
    mask: Path
    record: Path


def _exam_id(part: PartName, number: int) -> str:
    return f"{_PARTS[part].prefix}_{number:03d}"


def _exam_paths(root: Path, exam_id: str) -> _ExamPaths:
    return _ExamPaths(
        phases=tuple(root / "images" / exam_id / f"{exam_id}_{phase:04d}.nii.gz" for phase in range(NUM_PHASES)),
        mask=root / "segmentations" / "expert" / f"{exam_id}.nii.gz",
        record=root / "patient_info_files" / f"{exam_id}.json",
    )


def _write_part(folder: Path, name: PartName, count: int, options: SyntheticOptions, progress: Progress) -> WrittenPart:
    root, seed = folder / name, options.seed
    records: list[dict[str, Any]] = []
    num_made = 0
    for number in range(count):
        exam_id = _exam_id(name, number)
        paths = _exam_paths(root, exam_id)
        is_there = all(path.is_file() for path in (*paths.phases, paths.mask, paths.record))
        if not is_there:
            _write_exam(paths, exam_id, _draw_exam(name, number, options))
            num_made += 1
        records.append(_read_record(paths.record))
        progress.advance(f"{name}/{exam_id}")
    head = {"notice": NOTICE, "seed": seed, "version": VERSION}
    write_atomically(root / LESIONS_NAME, _json(head | _kind(options) | {"exams": records}))
    write_atomically(root / README_NAME, _readme(seed).encode())
    num_lesions = [len(record["lesions"]) for record in records]
    return WrittenPart(
        name=name,
        folder=root,
        num_exams=count,
        num_made=num_made,
        num_lesions=sum(num_lesions),
        num_without_lesion=num_lesions.count(0),
    )


def _draw_exam(part: PartName, number: int, options: SyntheticOptions) -> Exam:
    rng = np.random.default_rng((options.seed, _PARTS[part].stream, number))
    num_lesions = count_lesions(options.seed, part, number)
    return make_exam(rng, _PARTS[part].centre, num_lesions, whole=options.whole)


def _write_exam(paths: _ExamPaths, exam_id: str, exam: Exam) -> None:
    phases = [Volume(phase[np.newaxis].astype(np.float32), exam.affine, ("phase",)) for phase in exam.phases]
    for path, phase in zip(paths.phases, phases, strict=True):
        write_volume(path, phase)
    write_mask(paths.mask, exam.mask, phases[0])
    write_atomically(paths.record, _json(_record(exam, exam_id)))


def _record(exam: Exam, exam_id: str) -> dict[str, object]:
    sequence = exam.protocol.sequence
    return {
        "id": exam_id,
        "synthetic": True,
        "centre": exam.protocol.centre,
        "field_strength_t": sequence.field_strength_t,
        "post_contrast_s": [round(time, 1) for time in sequence.post_contrast_s],
        "shape_vox": exam.protocol.grid.shape_vox,
        "spacing_mm": exam.protocol.grid.spacing_mm,
        "lesions": [asdict(lesion) for lesion in exam.lesions],
    }


def _read_record(path: Path) -> dict[str, Any]:
    record = read_json(path)
    if not isinstance(record, dict) or not isinstance(record.get("lesions"), list):
        raise FileError(f"{path} is not the record of a synthetic exam; remove it, and the exam is made again")
    return record


def _json(content: object) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def _readme(seed: int) -> str:
    return f"""SYNTHETIC DATA

{NOTICE}

Breast DCE-MRI exams simulated by TokenSeg, version {VERSION}, seed {seed}, in the folder layout of MAMA-MIA:
images/ID/ID_0000.nii.gz before contrast agent, _0001 and _0002 after it, segmentations/expert/ID.nii.gz the lesions.
{LESIONS_NAME} lists the lesions of every exam; diameters are of the ball of the same volume.
What is simulated, from which sources, and what is not: docs/synthetic.md of TokenSeg.
"""
