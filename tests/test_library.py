from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest

import tokenseg
from phantoms import phantom
from tokenseg.cli import main
from toy_models import save_untrained

PUBLIC = [
    *("Model", "TokenSeg", "TokenSegError", "TokenSegOutput", "Volume", "__version__"),
    *("load_model", "read_volume", "segment_volume", "write_mask"),
]

FLAGS = {
    (): {"--help", "--version"},
    ("train",): {
        *("--help", "--preset", "--fold", "--max-minutes", "--max-steps", "--config", "--device", "--threads"),
        *("--seed", "--resume"),
    },
    ("demo",): {"--help"},
    ("segment",): {
        *("--help", "--model", "--folds", "--device", "--engine", "--threads", "--full", "--report", "--profile"),
        *("--series", "--empty-seg", "--shard", "--max-memory", "--show-names", "--probabilities"),
    },
    ("check",): {"--help", "--fix", "--json", "--pictures"},
    ("evaluate",): {"--help", "--json", "--csv", "--report", "--tolerance-mm"},
    ("tokens",): {"--help", "--model", "--reference", "--json", "--picture"},
    ("info",): {"--help"},
    ("synthetic",): {"--help", "--train", "--test", "--external", "--seed", "--whole"},
    ("benchmark",): {"--help"},
    ("benchmark", "speed"): {
        *("--help", "--networks", "--sizes", "--precisions", "--engines", "--training", "--end-to-end", "--device"),
        *("--threads", "--rounds", "--csv", "--plot", "--accuracy"),
    },
    ("benchmark", "accuracy"): {
        *("--help", "--networks", "--minutes", "--steps", "--fold", "--choosing-fold", "--seeds", "--threads"),
        *("--config", "--csv"),
    },
}

POSITIONALS = {
    "demo": ["OUT"],
    "check": ["DATASET_OR_FILES"],
    "train": ["DATASET", "RUN"],
    "segment": ["INPUT", "OUTPUT"],
    "evaluate": ["PREDICTIONS", "REFERENCES"],
    "tokens": ["CASE"],
    "info": ["MODEL"],
    "synthetic": ["OUT"],
    "benchmark": [],
}


def modules_after(code: str) -> set[str]:
    """Top-level modules of a fresh Python after running `code`; its own output goes to stderr."""
    script = (
        "import contextlib, sys\n"
        "with contextlib.redirect_stdout(sys.stderr):\n"
        + "".join(f"    {line}\n" for line in code.splitlines())
        + "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    return set(result.stdout.split())


def help_of(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


# ---- the library


def test_public_names():
    assert tokenseg.__all__ == PUBLIC
    for name in PUBLIC:
        assert getattr(tokenseg, name) is not None
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", tokenseg.__version__)


def test_public_names_are_those_of_their_modules():
    from tokenseg.inference.predict import segment_volume
    from tokenseg.saved_model.checkpoint import load_model

    assert tokenseg.load_model is load_model
    assert tokenseg.segment_volume is segment_volume


def test_other_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'tokenseg' has no attribute 'segment_volumes'"):
        tokenseg.segment_volumes  # noqa: B018


def test_the_way_of_the_docstring(tmp_path):
    save_untrained(tmp_path / "run" / "model")
    image, _ = phantom(0)
    volume = tokenseg.Volume(image, np.eye(4), ("c0",))
    mask = tokenseg.segment_volume(tokenseg.load_model(tmp_path / "run"), volume)
    tokenseg.write_mask(tmp_path / "mask.nii.gz", mask, volume)
    again = tokenseg.read_volume(str(tmp_path / "mask.nii.gz"), ("mask",))
    np.testing.assert_array_equal(again.array[0], mask)


def test_errors_are_of_one_kind():
    with pytest.raises(tokenseg.TokenSegError, match="does not exist"):
        tokenseg.load_model("nowhere")
    assert issubclass(tokenseg.TokenSegError, ValueError)


# ---- what is imported when


@pytest.mark.parametrize("code", ["import tokenseg", "import tokenseg.cli"])
def test_the_package_and_the_command_line_are_light(code):
    assert not modules_after(code) & {"torch", "numpy", "scipy", "nibabel", "monai", "lightning_fabric"}


def test_help_is_quick():
    commands = [[], *([name] for name in POSITIONALS)]
    code = (
        "from tokenseg.cli import main\n"
        f"for command in {commands}:\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        main([*command, '--help'])\n"
        "main(['--version'])"
    )
    modules = modules_after(code)
    assert "tyro" in modules
    assert not modules & {"torch", "numpy", "monai", "lightning_fabric"}


def test_segmenting_needs_no_training_library():
    modules = modules_after(
        "import tokenseg.segmentation.segment, tokenseg.evaluation.evaluate, tokenseg.saved_model.checkpoint"
    )
    assert "torch" in modules
    assert not modules & {"monai", "lightning_fabric", "lightning", "tensorboard", "onnx", "sklearn"}


# ---- the command line as a contract


@pytest.mark.parametrize("command", FLAGS)
def test_flags_are_frozen(capsys, command):
    assert set(re.findall(r"--[a-z][a-z-]*", help_of(capsys, *command))) == FLAGS[command]


def test_commands_are_frozen(capsys):
    assert re.search(r"usage: tokenseg \[-h\] \{([a-z,]+)\}", help_of(capsys))[1].split(",") == list(POSITIONALS)


@pytest.mark.parametrize("command", POSITIONALS)
def test_positional_arguments_are_frozen(capsys, command):
    usage = help_of(capsys, command).split("\n\n")[0]
    assert [word for word in usage.split() if re.fullmatch("[A-Z_]+", word)] == POSITIONALS[command]


@pytest.mark.parametrize("command", FLAGS)
def test_help_explains_every_option(capsys, command):
    """Help names no internal thing, and leaves no option without a sentence."""
    text = help_of(capsys, *command)
    assert "options." not in text
    # The dots of `[INT ...]` end no sentence.
    body = " ".join(line.strip("│ ") for line in text.splitlines()).replace("...", "")
    for flag in FLAGS[command] - {"--help", "--version"}:
        assert re.search(rf"{flag}\b[^.]*[A-Z][^.]*\.", body), flag


def test_help_says_that_it_is_no_medical_device(capsys):
    assert "not a medical device" in help_of(capsys)
