"""The pages for users: every command runs, at tiny size, in the order in which it stands; links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import tokenseg.demo
from dicom_phantoms import write_series
from phantoms import phantom, write_msd, write_nifti
from plans import make_plan
from test_demo import TINY
from test_segment_dicom import DCE, write_dce
from tokenseg.cli import COMMANDS, main
from tokenseg.config import Plan, read_overrides
from tokenseg.imaging.dicom.series import PHASE_TAGS
from tokenseg.imaging.volume import read_volume, write_volume
from toy_models import save_untrained

ROOT = Path(__file__).parents[1]
INDEX = ROOT / "docs" / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
MASK = "DATASET/labelsTr/case_0.nii.gz"
TINY_TRAINING = ["--preset", "tiny", "--threads", "1"]

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:monai")


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(page: str) -> list[str]:
    return [line for block in blocks(page, "sh") for line in block.splitlines() if line.startswith("tokenseg ")]


def run(command: str, replaced: dict[str, str]) -> None:
    words = [replaced.get(word, word) for word in shlex.split(command, comments=True)[1:]]
    if words[0] == "train" and "--resume" not in words:
        words += TINY_TRAINING
    assert main(words) == 0, command


@pytest.mark.long
def test_the_quickstart_works_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tokenseg.demo, "FULL", TINY)
    completion, *rest = commands("quickstart.md")
    binaries = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]
    subprocess.run(completion, shell=True, check=True, env=os.environ | {"PATH": binaries})
    assert "complete" in (tmp_path / "tokenseg-completion.bash").read_text()
    for command in rest:
        run(command, {"2": "0.02"} if "train" in command.split() else {})
    assert [command.split()[1] for command in rest] == ["demo", "synthetic", "train", "segment", "evaluate", "tokens"]
    pages = ["tokenseg-demo/report.html", "run/report.html", "masks.html", "scores.html", "tokens.png"]
    assert all((tmp_path / page).stat().st_size > 10_000 for page in pages)
    # Where a figure comes from synthetic exams, its page says so.
    for page in ("tokenseg-demo/report.html", "run/report.html", "scores.html"):
        assert "exams are synthetic" in (tmp_path / page).read_text()


def test_an_own_dataset_made_as_described_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (manifest,) = blocks("own-dataset.md", "json")
    for number in range(5):
        image, mask = phantom(number)
        write_nifti(Path(f"DATASET/imagesTr/case_{number}_0000.nii.gz"), image[0])
        write_nifti(Path(f"DATASET/labelsTr/case_{number}.nii.gz"), mask)
    Path("DATASET/dataset.json").write_text(json.dumps(json.loads(manifest) | {"numTraining": 5}))
    shutil.copytree("DATASET/imagesTr", "SCANS")
    listed = commands("own-dataset.md")
    assert [command.split()[1] for command in listed] == ["train", "train", "segment", "evaluate", "info"]
    for command in listed:
        run(command, {"60": "0.02", "REFERENCES": "DATASET"})
    assert len(list(Path("masks").glob("*.nii.gz"))) == 5
    for command in commands("tokens.md"):
        run(command, {"SCAN.nii.gz": "SCANS/case_0_0000.nii.gz", "RUN": "run", "MASK.nii.gz": MASK})
    assert {"tokens.json", "tokens.png"} <= {path.name for path in Path().iterdir()}
    shutil.copy("SCANS/case_0_0000.nii.gz", "scan.nii.gz")
    (code,) = blocks("own-dataset.md", "python")
    exec(compile(code, "own-dataset.md", "exec"), {})
    assert Path("mask.nii.gz").is_file()


def test_the_built_in_model_works_as_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_nifti(Path("scan.nii.gz"), phantom(0)[0][0])
    (command,) = commands("hippocampus.md")
    run(command, {})
    assert Path("mask.nii.gz").is_file()
    assert re.search(r"^scan: Anterior .* ml, Posterior .* ml$", capsys.readouterr().out, flags=re.MULTILINE)
    script = next(block for block in blocks("hippocampus.md", "sh") if block.startswith("scripts/"))
    assert (ROOT / script.split()[0]).is_file()


def test_formats_and_dicom_work_as_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_untrained(Path("run"))
    write_series(Path("STUDY"), tags={"SeriesDescription": "T1 axial"})
    shutil.make_archive("STUDY", "zip", "STUDY")
    for command in commands("dicom.md"):
        shutil.rmtree("masks", ignore_errors=True)
        run(command, {})
        assert Path("MASK.nii.gz" if "MASK.nii.gz" in command else "masks/STUDY_seg.dcm").is_file(), command
    volume = read_volume(write_nifti(Path("scan.nii"), phantom(0)[0][0]), ("c0",))
    write_volume(Path("SCAN.nrrd"), volume)
    for command in commands("formats.md"):
        run(command, {})
    assert Path("MASK.nrrd").is_file()
    (labels,) = blocks("dicom.md", "toml")
    Path("labels.toml").write_text(labels)
    assert read_overrides(Path("labels.toml"))["plan"]["labels"][0]["coding"]["type"]["meaning"] == "Neoplasm"
    plan = make_plan().model_dump() | read_overrides(Path("labels.toml"))["plan"]
    assert Plan.model_validate(plan).labels[0].coding is not None


def test_cohorts_work_as_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_untrained(Path("run"))
    for number in range(3):
        write_nifti(Path(f"SCANS/scan{number}.nii.gz"), phantom(number)[0][0])
    (table,) = blocks("cohorts.md", "csv")
    Path("cohort.csv").write_text(
        table.replace("../clinic-a/scan", "SCANS/scan0").replace("/data/clinic-b/study-17", "STUDY")
    )
    write_series(Path("STUDY"))
    for command in commands("cohorts.md"):
        run(command, {})
    assert {"anna.nii.gz", "bert_seg.dcm"} <= {path.name for path in Path("masks-of-table").iterdir()}
    names = {path.name for path in Path("masks").iterdir()}
    assert {"summary.csv", "status.jsonl", "summary.1-of-2.csv", "scan2.nii.gz"} <= names


def test_memory_quality_and_privacy_work_as_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_untrained(Path("run"))
    for number in range(2):
        write_nifti(Path(f"SCANS/ANNA{number}.nii.gz"), phantom(number)[0][0])
    write_nifti(Path("SCAN.nii.gz"), phantom(0)[0][0])
    for page in ("memory.md", "quality.md", "privacy.md"):
        for command in commands(page):
            run(command, {})
    quality = json.loads(Path("masks/ANNA0_qc.json").read_text())
    fields = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", (ROOT / "docs" / "quality.md").read_text(), flags=re.MULTILINE)
    assert set(quality) - {"case"} == set(re.findall(r"\w+", " ".join(fields)))
    assert Path("MASK_manifest.json").is_file()
    assert "ANNA0" not in Path("report.html").read_text() + Path("masks/status.jsonl").read_text()
    assert "ANNA0" in Path("named.html").read_text()


def test_checking_works_as_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_msd(Path("DATASET"), 3)
    write_nifti(Path("DATASET/labelsTr/case_001.nii.gz"), phantom(1)[1] * np.float32(0.999))
    for name in ("A", "B"):
        write_nifti(Path(f"{name}.nii.gz"), phantom(0)[0][0])
    codes = [main(shlex.split(command)[1:]) for command in commands("check.md")]
    assert codes == [1, 1, 0]  # errors, errors that are mended, files on one grid
    assert [finding["case_id"] for finding in json.loads(Path("findings.json").read_text())] == ["case_001"]
    assert Path("pictures/case_001.png").is_file()
    assert main(["check", "MENDED"]) == 0


def test_a_dce_exam_works_as_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_untrained(Path("run"), DCE)
    write_dce(Path("EXAM"))
    (command,) = commands("dce.md")
    run(command, {})
    assert "case-bb86f6ac8798: phase1: series 8 (dyn 1), 8 slices, 60 s after the first" in capsys.readouterr().err
    listed = (ROOT / "docs" / "dce.md").read_text(encoding="utf-8")
    assert all(tag in listed for tag in PHASE_TAGS)


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_pages_name_only_commands_and_options_that_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = set(re.findall(r"`tokenseg ([a-z]+)", page.read_text(encoding="utf-8")))
    assert named <= set(COMMANDS)
    for command in commands(page.name):
        name, *words = shlex.split(command, comments=True)[1:]
        if name in COMMANDS:
            with pytest.raises(SystemExit):
                main([name, "--help"])
            told = capsys.readouterr().out
            assert all(word in told for word in words if word.startswith("--")), command


@pytest.mark.parametrize("page", [*DOCS, ROOT / "README.md"], ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [t for t in targets if not t.startswith("http") and not (page.parent / t).exists()]
    assert missing == []


def test_the_architecture_page_names_every_wing_in_the_order_of_imports() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    package = ROOT / "src" / "tokenseg"
    named = re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)
    assert sorted(named) == sorted(path.parent.name for path in package.glob("*/__init__.py"))
    inner = {path.parent.name for path in package.glob("*/*/__init__.py")}
    assert {name for name in inner if f"`{name}`" not in page} == set()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (layers,) = (each["layers"] for each in settings["contracts"] if each["name"] == "Imports only go down")
    order = [name.split(".")[1] for layer in layers for name in layer.split(" | ")]
    assert named == [name for name in order if name in named]


def test_the_architecture_page_names_each_file_by_its_path() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    links = re.findall(r"\[([\w/]+\.py)\]\(([^)]+)\)", page)
    assert len(links) > 50
    assert [name for name, target in links if target != f"../src/tokenseg/{name}"] == []
    words = re.findall(r"^\| ([\w, ]+) \|", page.split("## Words")[1].split("## Where")[0], flags=re.MULTILINE)
    assert len(words) == len(set(words))


def test_the_index_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w-]+\.md)", INDEX.read_text(encoding="utf-8")))
    assert linked == {page.name for page in DOCS if page != INDEX}
    assert "docs/README.md" in (ROOT / "README.md").read_text(encoding="utf-8")
