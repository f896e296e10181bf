from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tokenseg
import tokenseg.inference.predict
import tokenseg.saved_model.checkpoint
import tokenseg.synthetic.datasets
from phantoms import phantom, write_msd, write_nifti
from plans import make_plan
from tokenseg.cli import COMMANDS, main
from tokenseg.commands.terminal import Terminal
from tokenseg.imaging.volume import read_mask
from tokenseg.segmentation.privacy import shown_name
from toy_models import as_stored, labels_of, save_untrained

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:monai")

LABELS = labels_of(outer=7, inner=255)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_msd(tmp_path_factory.mktemp("data") / "phantoms", 6, labels={7: "outer", 255: "inner"}, num_test=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = as_stored(make_plan(labels=2), channels=("MRI",), source_channels=("MRI",), labels=LABELS)
    return save_untrained(tmp_path_factory.mktemp("run") / "model", plan).parent


@pytest.fixture(autouse=True)
def same_threads_after():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run_process(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


# ---- each command, as a user runs it


def test_train_segment_evaluate_info(dataset, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(["train", str(dataset), str(run), "--preset", "tiny", "--max-steps", "2", "--threads", "1"]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0].split()[0] == "label"
    assert [line.split()[0] for line in lines[1:3]] == ["outer", "inner"]
    assert lines[-3:] == [
        f"model: {run / 'model'}  (2 steps)",
        f"report: {run / 'report.html'}",
        f"next: tokenseg segment SCAN.nii.gz MASK.nii.gz --model {run}",
    ]
    assert "Medical Segmentation Decathlon: dataset.json lists 6 training pairs" in printed.err
    assert "plan: spacing_mm: median of 6 cases" in printed.err
    assert "training 2/2 loss " in printed.err
    # Notes that are of no use to the user: Fabric's, and that the training cases are not validation cases.
    assert "Automatic Mixed Precision" not in printed.err
    assert "not scored" not in printed.err

    assert main(["segment", str(dataset), str(out), "--model", str(run), "--threads", "1"]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert len(lines) == 9
    assert lines[0].startswith("case_000: outer ")
    assert lines[0].endswith(" ml")
    assert lines[-2:] == [
        f"7 of 7 cases segmented; {out / 'summary.csv'}",
        "Research software: not a medical device.",
    ]
    assert f"segmenting 7/7 {shown_name('case_006', show_names=False)}" in printed.err

    assert main(["evaluate", str(out), str(dataset)]) == 0
    assert "note: 1 prediction(s) without a reference are not scored: case_006" in capsys.readouterr().err

    assert main(["info", str(run)]) == 0
    assert "- Output: outer (7), inner (255)" in capsys.readouterr().out


def test_segment_one_file(dataset, model, tmp_path, capsys):
    scan, mask = dataset / "imagesTr" / "case_000.nii.gz", tmp_path / "mask.nii.gz"
    assert main(["segment", str(scan), str(mask), "--model", str(model / "model"), "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    array = read_mask(mask).array
    counts = [np.count_nonzero(array == value) / 1000 for value in (7, 255)]
    assert set(np.unique(array)) <= {0, 7, 255}
    assert printed.out.splitlines() == [
        f"case_000: outer {counts[0]:.2f} ml, inner {counts[1]:.2f} ml",
        "Research software: not a medical device.",
    ]
    assert printed.err in ("engine: torch, bf16, cpu\n", "engine: torch, fp32, cpu\n")


def test_folds_are_further_models(dataset, model, tmp_path, capsys):
    plan = as_stored(make_plan(labels=2), channels=("MRI",), source_channels=("MRI",), labels=LABELS)
    others = [save_untrained(tmp_path / f"fold{seed}" / "model", plan, seed=seed).parent for seed in (1, 2)]
    scan = str(dataset / "imagesTr" / "case_000.nii.gz")
    masks = {}
    for name, folds in {"one": [], "three": ["--folds", *map(str, others)]}.items():
        assert main(["segment", scan, str(tmp_path / f"{name}.nii"), "--model", str(model), *folds]) == 0
        masks[name] = read_mask(tmp_path / f"{name}.nii").array
    assert (masks["one"] != masks["three"]).any()
    save_untrained(tmp_path / "other" / "model", make_plan())
    capsys.readouterr()
    arguments = ["--model", str(model), "--folds", str(tmp_path / "other")]
    assert main(["segment", scan, str(tmp_path / "x.nii"), *arguments]) == 2
    assert "were trained with different plans" in capsys.readouterr().err


def test_a_folder_with_a_broken_case_ends_with_1(dataset, model, tmp_path, capsys):
    folder = tmp_path / "in"
    for index in range(3):
        write_nifti(folder / f"scan{index}.nii.gz", phantom(index)[0][0])
    (folder / "scan1.nii.gz").write_bytes(b"")
    assert main(["segment", str(folder), str(tmp_path / "out"), "--model", str(model)]) == 1
    printed = capsys.readouterr()
    assert "scan1: FAILED" in printed.out.splitlines()
    assert f"2 of 3 cases segmented; {tmp_path / 'out' / 'summary.csv'}" in printed.out
    hidden = shown_name("scan1", show_names=False)
    assert f"error: {hidden}: {hidden}.nii.gz is truncated or empty" in printed.err
    assert "scan1" not in printed.err
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    masks = ["scan0.nii.gz", "scan0_qc.json", "scan2.nii.gz", "scan2_qc.json"]
    assert written == ["manifest.json", *masks, "status.jsonl", "summary.csv"]
    assert main(["segment", str(folder), str(tmp_path / "out"), "--model", str(model), "--show-names"]) == 1
    assert f"error: scan1: {folder / 'scan1.nii.gz'} is truncated or empty" in capsys.readouterr().err


@pytest.fixture
def two_scans(tmp_path: Path) -> Path:
    for index in range(2):
        write_nifti(tmp_path / "in" / f"scan{index}.nii.gz", phantom(index)[0][0])
    return tmp_path / "in"


def test_the_model_is_loaded_once(two_scans, model, tmp_path, monkeypatch):
    loaded = []
    load = tokenseg.saved_model.checkpoint.load_model

    def counting(*arguments):
        loaded.append(arguments)
        return load(*arguments)

    monkeypatch.setattr(tokenseg.saved_model.checkpoint, "load_model", counting)
    assert main(["segment", str(two_scans), str(tmp_path / "out"), "--model", str(model)]) == 0
    assert len(loaded) == 1


def test_threads_are_set(dataset, model, tmp_path):
    scan = str(dataset / "imagesTr" / "case_000.nii.gz")
    main(["segment", scan, str(tmp_path / "a.nii"), "--model", str(model), "--threads", "2"])
    assert torch.get_num_threads() == 2
    main(["segment", scan, str(tmp_path / "a.nii"), "--model", str(model), "--threads", "1"])
    assert torch.get_num_threads() == 1


@pytest.fixture
def masks(tmp_path: Path) -> tuple[Path, Path]:
    """Case a is right, b is missed, c is invented, d is empty in both, e has no prediction."""
    cube, empty, other = np.zeros((3, 12, 12, 12), np.uint8)
    cube[3:9, 3:9, 3:9] = 1
    other[0, 0, 0] = 9
    pairs = {"a": (cube, cube), "b": (other, cube), "c": (cube, empty), "d": (empty, empty), "e": (None, cube)}
    for name, (prediction, reference) in pairs.items():
        if prediction is not None:
            write_nifti(tmp_path / "predictions" / f"{name}.nii.gz", prediction)
        write_nifti(tmp_path / "references" / f"{name}.nii.gz", reference)
    return tmp_path / "predictions", tmp_path / "references"


def test_evaluate_prints_counts_beside_every_mean(masks, tmp_path, capsys):
    files = {"json": tmp_path / "new" / "scores.json", "csv": tmp_path / "scores.csv"}
    options = [text for name, path in files.items() for text in (f"--{name}", str(path))]
    assert main(["evaluate", *map(str, masks), *options, "--tolerance-mm", "2"]) == 0
    printed = capsys.readouterr()
    head, row, legend, foot = printed.out.splitlines()
    assert head.split() == [
        *("label", "Dice", "(95", "%", "interval)", "IoU", "HD95", "mm", "NSD", "error", "ml", "lesion", "F1"),
        *("cases", "missed", "false", "pos.", "both", "empty"),
    ]
    # One of four right; b and e are missed, c is invented, d does not count.
    assert row.split()[:2] == ["1", "0.2500"]
    assert row.split()[-4:] == ["4", "2", "1", "1"]
    assert legend == "Means over cases. NSD: surface Dice at 2 mm. Lesions match one to one from IoU 0.1."
    assert foot == "Research software: not a medical device."
    assert printed.err.splitlines() == [
        "warning: 1 reference(s) without a prediction count as missed: e",
        "warning: values that belong to no label count as background: 9",
    ]
    scores = json.loads(files["json"].read_text())
    assert scores["tolerance_mm"] == 2
    assert scores["labels"]["1"]["n_missed"] == 2
    assert len(files["csv"].read_text().splitlines()) == 1 + 5


def test_evaluate_names_the_references_it_leaves_out(masks, capsys):
    (masks[0] / "summary.csv").write_text("case,1_ml,error\na,0.2,\nb,0.0,\nc,0.2,\nd,0.0,\n")
    assert main(["evaluate", *map(str, masks)]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[1].split()[-4:] == ["3", "1", "1", "1"]
    assert printed.err.splitlines()[-1] == (
        "note: 1 reference(s) are not scored, since the summary.csv of the predictions does not name them: e"
    )


def test_evaluate_finds_a_file_that_cannot_be_written_before_scoring(masks, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main(["evaluate", *map(str, masks), "--json", str(tmp_path / "file" / "scores.json")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: output {tmp_path / 'file' / 'scores.json'} cannot be written: ")


def test_info_prints_the_card(model, capsys):
    assert main(["info", str(model)]) == 0
    printed = capsys.readouterr()
    assert printed.out == (model / "model" / "README.md").read_text()
    assert printed.err == ""


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tokenseg {tokenseg.__version__}\n"


def test_the_script_and_the_module_are_the_same_program(tmp_path):
    script = Path(sys.executable).with_name("tokenseg")
    missing = run_process(script, "info", tmp_path / "nowhere")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr == f"error: model {tmp_path / 'nowhere'} does not exist; check the path\n"
    for program in ([script], [sys.executable, "-m", "tokenseg"]):
        version, wrong = run_process(*program, "--version"), run_process(*program, "nothing")
        assert (version.returncode, version.stdout) == (0, f"tokenseg {tokenseg.__version__}\n")
        assert (wrong.returncode, wrong.stdout) == (2, "")
        assert "Unrecognized options: nothing" in wrong.stderr


def test_synthetic_tells_what_it_made(tmp_path, capsys):
    assert main(["synthetic", str(tmp_path), "--train", "0", "--test", "1", "--external", "0"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"test: 1 exams in {tmp_path / 'test'}",
        "All exams are synthetic: figures from them say nothing about patients.",
    ]


def test_the_earlier_name_of_synthetic_works_and_says_so(tmp_path, capsys):
    options = ["--train", "0", "--test", "1", "--external", "0"]
    printed, written = {}, {}
    for name in ("synthetic", "cohort"):
        assert main([name, str(tmp_path / name), *options]) == 0
        printed[name] = capsys.readouterr()
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        written[name] = {path.relative_to(tmp_path / name): path.read_bytes() for path in files}
    note = "note: `tokenseg cohort` is now called `tokenseg synthetic`\n"
    assert written["cohort"] == written["synthetic"]
    assert printed["cohort"].err == note + printed["synthetic"].err
    assert printed["cohort"].out == printed["synthetic"].out.replace("synthetic/", "cohort/")
    assert "cohort" not in COMMANDS


# ---- wrong requests


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Expected one of {demo, check, train, segment, evaluate, tokens, info,"),
        (["segmnt", "a", "b"], "Unrecognized options: segmnt"),
        (["segment", "a", "b"], "--model PATH"),
        (["segment", "a", "--model", "m"], "OUTPUT"),
        (["segment", "a", "b", "c", "--model", "m"], "Unrecognized options: c"),
        (["segment", "a", "b", "--model", "m", "--device", "gpu"], "invalid choice 'gpu'"),
        (["segment", "a", "b", "--model", "m", "--threads", "many"], "many"),
        (["train", "a", "b", "--max-step", "3"], "--max-steps"),
        (["train", "a", "b", "--preset", "huge"], "Expected one of ('tiny',"),
        (["train", "a", "b", "--fold", "first"], "first"),
        (["evaluate", "a"], "REFERENCES"),
        (["info"], "MODEL"),
    ],
)
def test_usage_errors_end_with_2_and_say_what_is_wrong(capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err
    assert "--help" in printed.err


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--model", "m", "--model=n"], "--model"),
        (["--model", "m", "--max_memory", "1GB", "--max-memory", "2GB"], "--max-memory"),
    ],
)
def test_an_option_that_would_be_forgotten_is_refused(capsys, options, name):
    assert main(["segment", "a", "b", *options]) == 2
    assert capsys.readouterr() == ("", f"error: {name} is given 2 times; give it once\n")


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        ("segment", ["--threads", "0"], "--threads 0: must be at least 1"),
        ("train", ["--threads", "0"], "--threads 0: must be at least 1"),
        ("train", ["--fold", "-1"], "--fold -1: must be at least 0"),
        ("train", ["--fold", "5"], "--fold 5: "),
        ("train", ["--max-steps", "0"], "--max-steps 0: must be at least 1"),
        ("train", ["--max-minutes", "0"], "--max-minutes 0.0: must be above 0"),
        ("train", ["--max-minutes", "nan"], "--max-minutes nan: must be above 0"),
        ("train", ["--max-minutes", "1", "--max-steps", "1"], "--max-minutes and --max-steps are both given; give one"),
        ("evaluate", ["--tolerance-mm", "-1"], "tolerance"),
    ],
)
def test_options_out_of_range(dataset, model, tmp_path, capsys, command, options, said):
    paths = {
        "segment": [str(dataset), str(tmp_path / "out"), "--model", str(model)],
        "train": [str(dataset), str(tmp_path / "run")],
        "evaluate": [str(dataset / "labelsTr"), str(dataset)],
    }
    assert main([command, *paths[command], *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (error,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert said in error
    assert sorted(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["segment", "train"])
@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there(dataset, model, tmp_path, capsys, monkeypatch, command, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    paths = [str(dataset), str(tmp_path / "out"), *(["--model", str(model)] if command == "segment" else [])]
    assert main([command, *paths, "--device", device]) == 2
    assert capsys.readouterr().err == (
        f"error: --device {device}: this machine has no usable {device} device; available: cpu\n"
    )


def test_training_needs_its_extra(dataset, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "monai" else find(name))
    assert main(["train", str(dataset), str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == "error: this command needs the extra 'train': pip install 'tokenseg[train]'\n"


@pytest.mark.parametrize(
    ("command", "hint"),
    [
        ("segment", "interrupted; files written so far are complete"),
        ("train", "interrupted; go on with the same command and --resume"),
        ("synthetic", "interrupted; go on with the same command"),
    ],
)
def test_interrupts_end_with_130_and_a_hint(dataset, model, tmp_path, capsys, monkeypatch, command, hint):
    import tokenseg.training.setup

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenseg.inference.predict, "choose_route", interrupt)
    monkeypatch.setattr(tokenseg.training.setup, "open_dataset", interrupt)
    monkeypatch.setattr(tokenseg.synthetic.datasets, "make_exam", interrupt)
    if command == "synthetic":
        assert main([command, str(tmp_path / "out")]) == 130
        assert capsys.readouterr().err.splitlines()[-1] == hint
        return
    paths = [str(dataset), str(tmp_path / "out"), *(["--model", str(model)] if command == "segment" else [])]
    assert main([command, *paths]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == hint


def test_what_the_system_refuses_is_one_line_too(dataset, model, tmp_path, capsys, monkeypatch):
    def refuse(path: Path):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "in").mkdir()
    monkeypatch.setattr(Path, "iterdir", refuse)
    assert main(["segment", str(tmp_path / "in"), str(tmp_path / "out"), "--model", str(model)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'in'}: Permission denied\n"


def test_a_bug_is_not_passed_off_as_a_user_error(model, monkeypatch):
    def bug(*_: object) -> None:
        raise RuntimeError("bug")

    monkeypatch.setattr(tokenseg.saved_model.checkpoint, "load_model", bug)
    with pytest.raises(RuntimeError, match="bug"):
        main(["info", str(model)])


# ---- progress


def test_without_a_terminal_lines_are_few_and_on_stderr(capsys):
    with Terminal() as terminal:
        terminal.message("a line")
        terminal.stage("training", 130)
        for step in range(130):
            terminal.advance(f"loss {step}")
        terminal.stage("segmenting", 3)
        terminal.advance("case [b]1[/c] :smile:")
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert lines[0] == "a line"
    assert lines[1].startswith("training 6/130 loss 5")
    assert len([line for line in lines if line.startswith("training")]) == 22
    assert any(line.startswith("training 130/130 loss 129") for line in lines)
    assert lines[-1] == "segmenting 1/3 case [b]1[/c] :smile:"


def test_the_lines_say_how_long_it_will_take(capsys, monkeypatch):
    """Ten units at two seconds each leave 20 of 30."""
    now = [0.0]
    with Terminal() as terminal:
        monkeypatch.setattr(terminal._bars, "get_time", lambda: now[0])
        terminal.stage("training", 20)
        for _ in range(10):
            now[0] += 2
            terminal.advance()
    assert capsys.readouterr().err.splitlines()[-1] == "training 10/20, 0:00:20 left"


def test_on_a_terminal_bars_show_the_time_left(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with Terminal() as terminal:
        terminal.stage("training", 40, done=10)
        terminal.message("plan: spacing_mm [b]median[/b]")
        for _ in range(30):
            terminal.advance("loss [0.5] :smile:")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "40/40" in printed.err
    assert "left" in printed.err
    assert "0:00:00" in printed.err
    assert "loss [0.5] :smile:" in printed.err
    assert "plan: spacing_mm [b]median[/b]" in printed.err
    assert "training 40/40 " not in printed.err  # no lines beside the bars


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals are of POSIX systems")
def test_segment_on_a_real_terminal(two_scans, model, tmp_path):
    """Bars go to the terminal, results to the pipe."""
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "tokenseg", "segment", two_scans, tmp_path / "out", "--model", model]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment, text=True) as process:
        os.close(theirs)
        drawn = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # Linux says so when the other side is closed
                break
            if not piece:
                break
            drawn += piece
        out = process.stdout.read() if process.stdout else ""
    os.close(ours)
    assert process.returncode == 0
    assert "2/2" in drawn.decode()
    assert "2 of 2 cases segmented" in out
    assert "\x1b" not in out
