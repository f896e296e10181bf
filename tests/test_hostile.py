"""Files made to do harm: none is run, none leads out of its folder, none takes memory or time without end."""

from __future__ import annotations

import gzip
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from pydicom import dcmread

from dicom_phantoms import write_enhanced, write_series
from faults import hashes
from mutants import quarters, read_all
from phantoms import change_json, phantom, write_msd, write_nifti, write_nnunet
from readable import KINDS, PLAN, read_inputs
from test_checkpoint import Bomb
from test_itk import META, NRRD, save
from tokenseg.cli import main
from tokenseg.datasets.inputs import list_inputs
from tokenseg.errors import FileError, GeometryError, TokenSegError
from tokenseg.imaging.dicom.exam import list_exams
from tokenseg.imaging.dicom_files import find_dicom
from tokenseg.imaging.volume import read_volume
from tokenseg.segmentation.segment import segment_files
from tokenseg.training.state import load_state
from toy_models import constant, job_of, save_untrained, toy_model, untrained

pytestmark = pytest.mark.skipif(os.name != "posix", reason="links, pipes and forks are of POSIX systems")

SMALL = (6, 6, 6)
MIB = 1 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("model") / "model", PLAN)


def read_one(path: Path, limit_mib: float = 100) -> None:
    """Read what is there once, in a process of its own; it must be refused."""
    assert read_all(lambda _: read_inputs(path), [b""], limit_s=20, limit_mib=limit_mib).refused == 1


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line that a command is refused with."""
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert printed.err.splitlines()[-1].startswith("error: ")
    return printed.err


# ---- cut off


@pytest.mark.parametrize("kind", KINDS)
def test_cut_off_at_each_quarter(tmp_path, kind):
    readable = KINDS[kind](tmp_path)
    parts = quarters(readable.content)
    outcome = read_all(readable.read, parts)
    assert outcome.refused == len(parts) or readable.forgiving


# ---- programs


@pytest.mark.parametrize("protocol", [2, 3, 4, 5, "zip"])
def test_a_pickle_for_a_training_state(tmp_path, protocol):
    path, network = tmp_path / "state.safetensors", untrained().network
    if protocol == "zip":
        torch.save(Bomb(tmp_path / "exploded"), path)
    else:
        path.write_bytes(pickle.dumps(Bomb(tmp_path / "exploded"), protocol=protocol))
    with pytest.raises(FileError, match=r"state\.safetensors cannot be used"):
        load_state(path, network, torch.optim.AdamW(network.parameters()))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("form", ["pickle", "array", "archive"])
def test_a_pickle_for_a_prepared_case(tmp_path, form):
    readable, bomb = KINDS["cache-image"](tmp_path), Bomb(tmp_path / "exploded")
    if form == "pickle":
        content = pickle.dumps(bomb)
    else:
        objects = np.array([bomb], dtype=object)
        with (tmp_path / "made").open("wb") as file:
            (np.save if form == "array" else np.savez)(file, objects)
        content = (tmp_path / "made").read_bytes()
    with pytest.raises(FileError, match="is damaged"):
        readable.read(content)
    assert not (tmp_path / "exploded").exists()


# ---- archives


def zip_of(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_bomb_within_one_member(tmp_path, method):
    """A slice of 300 MiB that is nearly all zeros."""
    content = write_series(tmp_path / "exam", heights_mm=[0.0])[0].read_bytes()
    path = zip_of(tmp_path / "bomb.zip", {"slice": content + bytes(300 * MIB)}, method)
    assert path.stat().st_size < MIB
    with pytest.raises(FileError, match="over 200 times its size"):
        find_dicom(path)
    read_one(path)


def test_a_zip_bomb_of_many_members(tmp_path):
    content = write_series(tmp_path / "exam", heights_mm=[0.0])[0].read_bytes()
    path = zip_of(tmp_path / "bomb.zip", {f"{number}": content + bytes(2 * MIB) for number in range(60)})
    read_one(path)


def test_a_member_that_is_more_than_it_says(tmp_path):
    """Of a member no more is read than its entry declares."""
    series = write_series(tmp_path / "exam", heights_mm=[0.0, 3.0])
    members = {path.name: path.read_bytes() + bytes(100 * MIB) for path in series}
    content = zip_of(tmp_path / "lying.zip", members).read_bytes()
    size = len(members[series[0].name])
    (tmp_path / "lying.zip").write_bytes(content.replace(size.to_bytes(4, "little"), (3000).to_bytes(4, "little")))
    assert read_all(lambda _: read_inputs(tmp_path / "lying.zip"), [b""], limit_s=20, limit_mib=100)


def test_archives_in_archives_and_of_nothing(tmp_path):
    zip_of(tmp_path / "inner.zip", {"a": bytes(10 * MIB)})
    zip_of(tmp_path / "outer.zip", {f"{n}.zip": (tmp_path / "inner.zip").read_bytes() for n in range(50)})
    zip_of(tmp_path / "empty.zip", {})
    zip_of(tmp_path / "many.zip", {f"{n:05d}": b"" for n in range(20000)})
    for name in ("outer", "empty", "many"):
        read_one(tmp_path / f"{name}.zip")


@pytest.mark.parametrize("start", ["../../", "/", "a/../../../", "..\\..\\"])
def test_members_named_to_escape(tmp_path, model, start, capsys):
    """Two studies, so that their folders would name the masks."""
    members = {}
    for study in ("one", "two"):
        paths = write_series(tmp_path / study, tags={"StudyInstanceUID": f"1.2.{len(members)}"})
        members |= {f"{start}{study}/{path.name}": path.read_bytes() for path in paths}
    (tmp_path / "in").mkdir()
    path, before = zip_of(tmp_path / "in" / "slip.zip", members), hashes(tmp_path)
    main(["segment", str(path), str(tmp_path / "in" / "deep" / "out"), "--model", str(model), "--engine", "torch"])
    assert "Traceback" not in capsys.readouterr().err
    new = hashes(tmp_path).keys() - before.keys()
    assert all(name.startswith("in/deep/out/") for name in new)


# ---- datasets that name other files


@pytest.fixture(params=["msd", "nnunet"])
def dataset(request, tmp_path) -> Path:
    return (write_msd if request.param == "msd" else write_nnunet)(tmp_path / "in" / "dataset", 2, shape=SMALL)


NAMES = [
    "../secret.nii.gz",
    "imagesTr/../../secret.nii.gz",
    "/etc/passwd",
    "a\0b.nii.gz",
    "\ud800.nii.gz",
    "x" * 300 + ".nii.gz",
    "a/" * 3000 + "b.nii.gz",
    "",
    ".",
    "C:\\x.nii.gz",
]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
@pytest.mark.parametrize("field", ["image", "label"])
def test_paths_that_lead_out(tmp_path, model, name, field, capsys):
    dataset = write_msd(tmp_path / "in" / "dataset", 2, shape=SMALL)
    write_nifti(tmp_path / "in" / "secret.nii.gz", phantom(0, shape=SMALL)[0][0])
    pairs = [{"image": f"imagesTr/case_00{n}.nii.gz", "label": f"labelsTr/case_00{n}.nii.gz"} for n in range(2)]
    change_json(dataset / "dataset.json", training=[pairs[0], pairs[1] | {field: name}])
    before = hashes(tmp_path)
    refused(capsys, "train", dataset, tmp_path / "run", "--preset", "tiny", "--max-steps", "1")
    code = main(["segment", str(dataset), str(tmp_path / "out"), "--model", str(model), "--engine", "torch"])
    assert code in (0, 1, 2)  # who only segments needs no labels
    assert "Traceback" not in capsys.readouterr().err
    left = {path: digest for path, digest in hashes(tmp_path).items() if not path.startswith("out/")}
    assert left == before
    assert not any("secret" in path.name for path in (tmp_path / "out").rglob("*"))


@pytest.mark.parametrize("case_id", ["../x", "a/b", "..", "a\0b", "x" * 300, "", ".hidden", "a\nb"])
def test_case_ids_that_are_paths(tmp_path, model, case_id, capsys):
    dataset = write_nnunet(tmp_path / "dataset", 2, shape=SMALL)
    files = {"images": ["imagesTr/case_000_0000.nii.gz"], "label": "labelsTr/case_000.nii.gz"}
    change_json(dataset / "dataset.json", dataset={case_id: files, "sound": files})
    before = hashes(tmp_path)
    refused(capsys, "train", dataset, tmp_path / "run", "--preset", "tiny", "--max-steps", "1")
    refused(capsys, "segment", dataset, tmp_path / "out", "--model", model, "--engine", "torch")
    assert hashes(tmp_path) == before


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"a":' * 100_000, b'{"modality": ' + b"9" * 5000 + b"}", b'"', b"\xff\xfe{}", b"{" + b" " * MIB],
    ids=["lists", "objects", "digits", "open", "encoding", "spaces"],
)
def test_absurd_json(dataset, model, tmp_path, content, capsys):
    (dataset / "dataset.json").write_bytes(content)
    assert "dataset.json" in refused(capsys, "train", dataset, tmp_path / "run", "--preset", "tiny")
    assert "dataset.json" in refused(capsys, "segment", dataset, tmp_path / "out", "--model", model)


@pytest.mark.parametrize("content", ["a = " + "[" * 100_000, "a = " + "9" * 5000, "[plan]\nsteps = " + "9" * 5000])
def test_absurd_configurations(dataset, tmp_path, content, capsys):
    (tmp_path / "config.toml").write_text(content)
    said = refused(capsys, "train", dataset, tmp_path / "run", "--config", tmp_path / "config.toml")
    assert "config.toml is not valid TOML" in said


@pytest.mark.parametrize("changes", [{"blocks": [10**9, 1, 1, 1]}, {"widths": [10**12] * 4}, {"mixer_layers": 10**9}])
def test_a_model_of_absurd_size(model, tmp_path, changes):
    readable = KINDS["model.json"](tmp_path)
    facts = tmp_path / "model" / "model.json"
    change_json(facts, network=untrained().facts.network.model_dump() | changes)
    content = facts.read_bytes()
    assert read_all(readable.read, [content], limit_mib=100).refused == 1


# ---- headers that declare what is not there


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_terabytes_of_nifti(tmp_path, kind, ending):
    path, size = tmp_path / f"scan{ending}", 32767 if kind is nib.Nifti1Image else 2**61
    image = kind(np.zeros(SMALL, np.int16), np.eye(4))
    image.header["dim"][1:4] = size
    content = image.header.binaryblock + bytes(4 + 2000)
    path.write_bytes(gzip.compress(content) if ending == ".nii.gz" else content)
    read_one(path)


@pytest.mark.parametrize("where", ["before", "behind"])
def test_a_gzip_bomb_beside_the_voxels(tmp_path, where):
    image = nib.Nifti1Image(np.zeros(SMALL, np.int16), np.eye(4))
    content, aside = image.to_bytes(), bytes(300 * MIB)
    if where == "before":
        image.header["vox_offset"] = 352 + len(aside)
        content = image.header.binaryblock + aside + content[348:]
    path = tmp_path / "bomb.nii.gz"
    path.write_bytes(gzip.compress(content + (aside if where == "behind" else b""), 1))
    with pytest.raises(FileError, match="over 256 MiB that are no voxels"):
        read_volume(path, ("MRI",))
    read_one(path)


@pytest.mark.parametrize("encoding", ["raw", "gzip"])
def test_more_voxels_than_a_nrrd_or_mha_can_hold(tmp_path, encoding):
    """SimpleITK would take the memory before it finds the file too short."""
    head = NRRD.replace(b"short", b"double").replace(b"raw", encoding.encode())
    (tmp_path / "a.nrrd").write_bytes(head + b"dimension: 3\nsizes: 2000 1000 300\n\n" + bytes(300_000))
    packed = b"CompressedData = True\n" if encoding == "gzip" else b""
    size = b"DimSize = 2000 1000 300\nElementType = MET_DOUBLE\n"
    (tmp_path / "a.mha").write_bytes(META + packed + size + b"ElementDataFile = LOCAL\n" + bytes(300_000))
    for name in ("a.nrrd", "a.mha"):
        read_one(tmp_path / name)


@pytest.mark.parametrize(
    "line",
    [
        b"sizes: 2 2 " + b"2" * 5000,
        b"space origin: (0,0," + b"1" * 5000 + b")",
        b"k" * 5000,
        b"kinds: " + b"x" * 5000 + b":=",
        b"content: " + b"x" * 5000,
    ],
    ids=range(5),
)
def test_long_lines_in_a_nrrd_header(tmp_path, line):
    """They overrun a buffer of SimpleITK, which would take this process down."""
    (tmp_path / "a.nrrd").write_bytes(NRRD + b"dimension: 3\nsizes: 2 2 2\n" + line + b"\n\n" + bytes(16))
    with pytest.raises(FileError, match="a line of more than 512 bytes"):
        read_volume(tmp_path / "a.nrrd", ("MRI",))


def test_long_comments_and_own_keys_in_a_nrrd_header_are_fine(tmp_path):
    lines = b"# " + b"c" * 5000 + b"\nkey:=" + b"v" * 2000 + b": " + b"v" * 2000
    (tmp_path / "a.nrrd").write_bytes(NRRD + b"dimension: 3\nsizes: 2 2 2\n" + lines + b"\n\n" + bytes(16))
    assert read_volume(tmp_path / "a.nrrd", ("MRI",)).array.shape == (1, 2, 2, 2)


@pytest.mark.parametrize("axes", [b"5", b"100", b"99999999999", b"-1", b"three"])
def test_axes_of_a_mha_header(tmp_path, axes):
    content = save(tmp_path / "a.mha", np.zeros(SMALL, np.int16)).read_bytes()
    (tmp_path / "a.mha").write_bytes(content.replace(b"NDims = 3", b"NDims = " + axes))
    with pytest.raises(FileError, match=r"declares a number of axes \(NDims\) that is not 1 to 4"):
        read_volume(tmp_path / "a.mha", ("MRI",))


@pytest.mark.parametrize("name", ["LIST", "LIST 3", "%d.raw 1 3 1", "loop.raw"])
def test_lists_and_loops_for_the_voxels_of_a_mhd(tmp_path, name):
    """A list beside the header would name files anywhere."""
    content = save(tmp_path / "a.mha", np.zeros(SMALL, np.uint8), compressed=False).read_bytes()
    (tmp_path / "secret").write_bytes(bytes(1000))
    if name == "loop.raw":
        (tmp_path / name).symlink_to(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(bytes(1000))
    head = content[: content.index(b"LOCAL")] + name.encode() + b"\n" + bytes(tmp_path / "secret") * 6
    (tmp_path / "a.mhd").write_bytes(head)
    with pytest.raises(FileError):
        read_volume(tmp_path / "a.mhd", ("MRI",))


def test_a_negative_spacing_in_a_mha_header(tmp_path):
    content = save(tmp_path / "a.mha", np.zeros(SMALL, np.int16)).read_bytes()
    (tmp_path / "a.mha").write_bytes(content.replace(b"ElementSpacing = ", b"ElementSpacing = -"))
    with pytest.raises(GeometryError, match="must be positive"):
        read_volume(tmp_path / "a.mha", ("MRI",))


@pytest.mark.parametrize("spacing_mm", [1e-30, 1e30, 1e200, 100.0])
def test_absurd_spacings(tmp_path, spacing_mm):
    """At the plan's spacing, a scan of a few voxels would be one of many gigabytes, or of none."""
    image = nib.Nifti2Image(np.zeros((9, 9, 9), np.int16), np.eye(4))
    for axis, field in enumerate(("srow_x", "srow_y", "srow_z")):
        image.header[field][axis] = spacing_mm
    image.header["sform_code"] = 1
    (tmp_path / "scan.nii").write_bytes(image.header.binaryblock + bytes(4 + 2 * 9**3))

    def segment(_: bytes) -> None:
        (result,) = segment_files(
            job_of([toy_model(constant(0.0, 1.0), PLAN)]), tmp_path / "scan.nii", tmp_path / "mask.nii"
        )
        if result.error:
            raise TokenSegError(result.error)

    assert read_all(segment, [b""], limit_s=20, limit_mib=200).refused == 1


def test_names_that_are_no_text(tmp_path, model, capsys):
    folder = tmp_path / "in"
    path = write_nifti(folder / "scan.nii.gz", phantom(0, shape=SMALL)[0][0])
    os.rename(path, bytes(folder) + b"/scan\xff.nii.gz")  # noqa: PTH104 - a name of bytes
    assert "case ids must be usable" in refused(capsys, "segment", folder, tmp_path / "out", "--model", model)


@pytest.mark.parametrize(
    "changes",
    [
        {"NumberOfFrames": 2**31 - 1},
        {"NumberOfFrames": -5},
        {"Rows": 8192, "Columns": 8192},
        {"Rows": 0},
        {"BitsAllocated": 65535},
        {"SamplesPerPixel": 65535},
    ],
    ids=str,
)
@pytest.mark.parametrize("enhanced", [False, True])
def test_terabytes_of_dicom(tmp_path, changes, enhanced):
    path = write_enhanced(tmp_path / "a.dcm") if enhanced else write_series(tmp_path / "exam")[0]
    dataset = dcmread(path)
    for name, value in changes.items():
        setattr(dataset, name, value)
    dataset.save_as(path)
    read_one(path if enhanced else tmp_path / "exam", limit_mib=300)


# ---- nesting


def nested_items(depth: int, *, explicit: bool) -> bytes:
    """PerFrameFunctionalGroupsSequence within itself, in implicit VR."""
    if not explicit:
        return (bytes.fromhex("00523092ffffffff") + bytes.fromhex("feff00e0ffffffff")) * depth
    inner = b""
    for _ in range(depth):
        item = bytes.fromhex("feff00e0") + len(inner).to_bytes(4, "little") + inner
        inner = bytes.fromhex("00523092") + len(item).to_bytes(4, "little") + item
    return inner


@pytest.mark.parametrize("explicit", [False, True])
def test_sequences_nested_thousands_deep(tmp_path, explicit):
    path = write_series(tmp_path / "exam", heights_mm=[0.0])[0]
    dataset = dcmread(path)
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2"
    del dataset.PixelData
    dataset.save_as(path, implicit_vr=True, little_endian=True)
    path.write_bytes(path.read_bytes() + nested_items(5000, explicit=explicit))
    read_one(path)


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[Path]:
    """The deepest of folders nested deeper than Python calls; taken away again without recursion."""
    folders = [tmp_path / "deep"]
    while len(str(folders[-1])) < 3900 and len(folders) < 1500:
        folders.append(folders[-1] / "a")
    for folder in folders:
        folder.mkdir()
    yield folders[-1]
    for folder in reversed(folders):
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def test_folders_nested_deep(tmp_path, deep):
    assert len(deep.parts) > 1100
    paths = write_series(tmp_path / "exam", heights_mm=[0.0, 3.0])
    for path in paths:
        path.rename(deep / path.name)
    assert [file.path.name for file in find_dicom(tmp_path / "deep")[0]] == [path.name for path in paths]


# ---- links, pipes and devices


def test_links_that_make_loops(tmp_path):
    folder = tmp_path / "exam"
    paths = write_series(folder, heights_mm=[0.0, 3.0])
    (folder / "inner").mkdir()
    links = {"self": ".", "inner/up": "..", "inner/other": "../inner", "dangling": "nowhere", "own": "own"}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    assert len(find_dicom(folder)[0]) == len(paths)
    (exam,) = list_exams(folder)
    assert len(exam.series[0].frames) == len(paths)


def test_links_that_make_loops_in_a_dataset(tmp_path, model, capsys):
    dataset = write_msd(tmp_path / "dataset", 2, shape=SMALL)
    image = dataset / "imagesTr" / "case_001.nii.gz"
    image.unlink()
    image.symlink_to(image)
    assert "are missing" in refused(capsys, "train", dataset, tmp_path / "run", "--preset", "tiny")
    assert main(["segment", str(dataset), str(tmp_path / "out"), "--model", str(model), "--engine", "torch"]) == 1
    assert "case_001: FAILED" in capsys.readouterr().out


def test_an_output_that_is_a_loop(tmp_path, model, capsys):
    scan = write_nifti(tmp_path / "in" / "scan.nii.gz", phantom(0, shape=SMALL)[0][0])
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(capsys, "segment", scan.parent, tmp_path / "loop", "--model", model)
    refused(capsys, "segment", scan, tmp_path / "loop" / "mask.nii.gz", "--model", model)


@pytest.mark.parametrize("name", ["scan.nii.gz", "scan.nii", "scan.mha", "scan.nrrd", "scan.dcm", "scan.zip"])
def test_pipes_are_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    read_one(tmp_path / name)
    with pytest.raises(FileError, match="is a pipe or a device"):
        list_inputs(tmp_path / name, PLAN)


@pytest.mark.parametrize("target", ["pipe", "/dev/zero"])
def test_pipes_and_devices_in_a_dataset(tmp_path, target):
    """Neither waited for nor hashed without end."""
    dataset = write_msd(tmp_path / "dataset", 2, shape=SMALL)
    image = dataset / "imagesTr" / "case_001.nii.gz"
    image.unlink()
    if target == "pipe":
        os.mkfifo(image)
    else:
        image.symlink_to(target)

    def segment(_: bytes) -> None:
        results = segment_files(job_of([toy_model(constant(0.0, 1.0), PLAN)]), dataset, tmp_path / "out")
        assert [bool(result.error) for result in results] == [False, True]
        raise TokenSegError(results[1].error)

    assert read_all(segment, [b""], limit_s=20, limit_mib=100).refused == 1
