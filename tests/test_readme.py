"""The README's commands run, and its figures are those of the committed rows."""

from __future__ import annotations

import csv
import importlib
import re
import shlex
import shutil
import sys
from pathlib import Path
from statistics import median
from types import ModuleType

import pytest
from PIL import Image
from scipy.stats import spearmanr

from phantoms import write_msd
from tokenseg.benchmark.frontier import read_dice
from tokenseg.cli import main
from tokenseg.saved_model.checkpoint import load_model

ROOT = Path(__file__).parents[1]
NEAR = ("share", "base_rate", "ceiling")
PEERS = ("nnunet-plainconv", "monai-unet")
README = (ROOT / "README.md").read_text(encoding="utf-8")
MEASUREMENTS = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
DEMO_TIME = "about 12 minutes"


def flat(text: str) -> str:
    return " ".join(text.split())


def commands() -> list[list[str]]:
    """Every `tokenseg` command in a shell block, without its comment."""
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("tokenseg ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def test_first_command_stands_early() -> None:
    assert next(number for number, line in enumerate(README.splitlines(), 1) if line.startswith("make ")) <= 25
    assert len(README.splitlines()) <= 90
    assert max(map(len, README.splitlines())) <= 120
    assert "**Research software: not a medical device.**" in README.splitlines()[:12]


def test_every_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [command[0] for command in commands()]
    assert names == ["check", "train", "segment", "evaluate", "tokens", "segment"]
    write_msd(tmp_path / "DATASET", 5)
    shutil.copytree(tmp_path / "DATASET" / "imagesTr", tmp_path / "SCANS")
    monkeypatch.chdir(tmp_path)
    places = {"REFERENCES": "DATASET", "60": "0.02", "SCAN.nii.gz": "SCANS/case_000.nii.gz"}
    for command in commands():
        tiny = ["--preset", "tiny", "--threads", "1"] if command[0] == "train" else []
        assert main([places.get(word, word) for word in command] + tiny) == 0
    assert len(list((tmp_path / "masks").glob("*.nii.gz"))) == 5
    assert all((tmp_path / name).is_file() for name in ("scores.json", "scores.html", "tokens.png"))


@pytest.fixture(name="tables")
def _tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module("tables")
    monkeypatch.delitem(sys.modules, "tables")
    return module


def test_tables_come_from_the_rows(tables: ModuleType) -> None:
    assert tables.fill(README) == README
    synthetic = (ROOT / "docs" / "synthetic.md").read_text(encoding="utf-8")
    assert tables.fill(synthetic) == synthetic
    memory = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert tables.fill(memory) == memory
    assert all(float(row["peak_gb"]) < float(row["limit"].removesuffix("GB")) for row in tables.rows_of("memory.csv"))
    assert tables.fill(MEASUREMENTS) == MEASUREMENTS
    for table in (
        tables.openvino_table,
        tables.gpu_table,
        tables.earlier_table,
        tables.equal_steps_table,
        tables.steering_table,
    ):
        assert table() in MEASUREMENTS
    assert tables.speed_table("bf16") in MEASUREMENTS
    assert tables.accuracy_table("ablation") in MEASUREMENTS
    assert tables.presets_table() in MEASUREMENTS
    assert tables.amx_table() in MEASUREMENTS
    builtin = (ROOT / "docs" / "hippocampus.md").read_text(encoding="utf-8")
    assert tables.fill(builtin) == builtin
    assert tables.hippocampus_table() in builtin
    assert tables.threshold_table() in synthetic
    assert tables.speed_table("fp32") in MEASUREMENTS
    assert tables.accuracy_table("accuracy_fp32") in MEASUREMENTS
    assert tables.demo_table() in MEASUREMENTS
    assert tables.front_table() in README


def test_the_built_in_models_figure_is_that_of_its_card() -> None:
    publication = load_model("hippocampus").facts.publication
    assert publication is not None
    assert f"five-fold Dice {publication.figures.mean_dice.mean:.3f}" in README
    with (ROOT / "benchmarks" / "hippocampus_folds.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["case"] for row in rows}) == publication.figures.cases
    for label in publication.figures.labels:
        own = [float(row["dice"]) for row in rows if row["label"] == label.label]
        assert sum(own) / len(own) == pytest.approx(label.dice.mean, abs=1e-4)


def test_the_sentence_under_the_table_follows_the_rows(tables: ModuleType) -> None:
    said = flat(README)
    columns = {name: tables.results(table()) for name, table in tables.COMPARED.items()}
    xeon = columns["hippocampus, Xeon"]
    ours, nnunet = xeon["tokenseg"], xeon["nnunet-plainconv"]
    more, low, high = (f"{points:.2f}" for points in nnunet.less_ours)
    assert f"no difference from nnU-Net's network was shown (that one had {more} points more, 95 % interval" in said
    assert f"interval {low} to {high})" in said
    # Rounded as in the table; a difference is shown where the interval is above 0.
    assert (low, ours.seeds, nnunet.seeds) == ("-0.00", 2, 2)
    steps = {
        row["network"]: f"{float(row['dice']):.3f}"
        for row in tables.rows_of("accuracy_0016.csv")
        if row["budget"] == "600 steps"
    }
    assert f"is ahead, {steps['nnunet-plainconv']} against {steps['tokenseg']} after 600 steps" in said
    assert steps["nnunet-plainconv"] > steps["tokenseg"]
    # The same minutes: the seconds of a step are as the steps, the other way round.
    assert round(ours.steps / nnunet.steps) == 5
    assert "takes it about five times as long" in said
    for found in columns.values():
        assert max(found, key=lambda name: found[name].steps) == "tokenseg"
    speed = tables.speed_rows("fp32")
    assert all(float(speed["tokenseg-small"]["median_ms"]) < float(speed[name]["median_ms"]) for name in PEERS)
    for name, budget in (("accuracy_fp32.csv", "15"), ("accuracy_left_atrium.csv", "25")):
        assert {row["budget"] for row in tables.rows_of(name)} == {f"{budget} minutes"}
    assert "after the same minutes (hippocampus 15, left atrium 25) on one thread" in said
    # So the networks of one column are not all of one size.
    pass_m = float(speed["nnunet-plainconv"]["parameters_m"])
    assert pass_m > float(tables.rows_of("accuracy_fp32.csv")[-1]["parameters_m"])
    # "No time": its steps would have been few.
    assert "nnunet-plainconv" not in columns["left atrium, EPYC"]


def test_the_picture_is_drawn_from_the_rows(tables: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tables", tables)
    chart = importlib.import_module("chart")
    monkeypatch.delitem(sys.modules, "chart")
    panels = chart.panels()
    with Image.open(ROOT / "docs" / "pictures" / "accuracy.png") as image:
        notes = image.info
    assert notes["Points"] == chart.told(panels), "python benchmarks/chart.py draws it again"
    files = notes["Rows"].split(", ")
    assert files == chart.ROWS.split(", ")
    rows = [row for name in files for row in tables.rows_of(name.removeprefix("benchmarks/"))]
    drawn = {(point.network, point.ms) for panel in panels for point in panel.points}
    told = {
        (chart.NAMES[row["network"]], round(15 * 60 / int(row["steps"]), 3))
        for row in rows
        if row["budget"] == "15 minutes"
    }
    assert drawn == told
    assert {point.value for point in panels[0].points} == {float(row["dice"]) for row in tables.rows_of(files[0][11:])}
    assert {row["n"] for row in rows} == {"40"}
    assert {(row["budget"], row["threads"]) for row in rows if row["budget"] != "600 steps"} == {("15 minutes", "1")}
    assert "Hippocampus, 40 validation cases. Each network after the same 15 minutes of training" in flat(README)
    assert chart.picture()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_demos_time_is_the_same_everywhere(tables: ModuleType) -> None:
    longest = max(float(row["minutes"]) for row in tables.rows_of("demo_times.csv"))
    assert f"about {longest:.0f} minutes" == DEMO_TIME
    for place in ("README.md", "Makefile", "docs/quickstart.md", "src/tokenseg/commands/demo.py"):
        lines = flat((ROOT / place).read_text(encoding="utf-8"))
        assert re.findall(r"about \w+ minutes", lines) == [DEMO_TIME], place


def test_the_gaps_named_follow_the_rows(tables: ModuleType) -> None:
    # The same reading as for a plot of accuracy against time, which takes one dataset, fold and budget.
    measured = flat(MEASUREMENTS)
    dice = read_dice(ROOT / "benchmarks" / "accuracy_fp32.csv")
    assert "TokenSeg is ahead of both" in measured
    assert max(dice, key=dice.__getitem__) == "tokenseg-small"
    assert len(dice) == 3
    with_amx = tables.results(tables.amx_table())
    assert [with_amx[name].seeds for name in ("tokenseg", "monai-unet", "nnunet-plainconv")] == [2] * 3
    unet, nnunet = (with_amx[name].less_ours for name in ("monai-unet", "nnunet-plainconv"))
    assert f"two seeds each, TokenSeg is {-unet[0]:.2f} points ahead of `UNet`" in measured
    middle, low, high = (f"{points:.2f}" for points in nnunet)
    assert f"and `PlainConvUNet` {middle} ahead of it ({low} to {high})" in measured
    atrium = read_dice(ROOT / "benchmarks" / "accuracy_left_atrium.csv")
    gap = 100 * (atrium["tokenseg-small"] - atrium["monai-unet"])
    assert f"TokenSeg is {gap:.1f} points ahead of `UNet`" in measured
    atrium = read_dice(ROOT / "benchmarks" / "accuracy_left_atrium_amx.csv")
    atrium_unet, atrium_nnunet = (100 * (atrium["tokenseg-small"] - atrium[name]) for name in ("monai-unet", PEERS[0]))
    assert f"with AMX {atrium_unet:.1f}, and {atrium_nnunet:.1f} ahead of `PlainConvUNet`" in measured
    assert max(atrium, key=atrium.__getitem__) == "tokenseg-small"


def test_what_is_said_of_steered_windows_follows_the_rows(tables: ModuleType) -> None:
    rows = [row for row in tables.rows_of("steering.csv") if row["case"] == "all" and row["dataset"] == "whole/test"]
    full, steered = ({row["mode"]: row for row in rows}[mode] for mode in ("full", "steered"))
    assert "network time of whole synthetic breast exams to a fifth, with no lesion lost" in flat(MEASUREMENTS)
    assert 0.18 < float(steered["network_s"]) / float(full["network_s"]) < 0.2
    assert steered["lost"] == "0"


def test_the_claims_table_follows_the_rows(tables: ModuleType) -> None:
    claims = (ROOT / "docs" / "paper-claims.md").read_text(encoding="utf-8")
    near = {row["dataset"]: row for row in tables.rows_of("near_boundary.csv") if float(row["radius_mm"]) == 2}
    share, base_rate, ceiling = (f"{100 * float(near['SyntheticBreast'][name]):.1f} %" for name in NEAR)
    assert f"synthetic breast tumours: {share}, base rate {base_rate}, ceiling {ceiling}" in claims
    share, base_rate, ceiling = (100 * float(near["Task04_Hippocampus"][name]) for name in NEAR)
    assert f"hippocampus: {share:.1f} %, base rate {base_rate:.0f} %, ceiling {ceiling:.0f} %" in claims
    share, base_rate, ceiling = (100 * float(near["LeftAtrium"][name]) for name in NEAR)
    assert f"left atrium: {share:.1f} %, base rate {base_rate:.1f} %, ceiling {ceiling:.0f} %" in claims
    dice = {
        row["exams"]: 100 * float(row["dice"]) for row in tables.rows_of("demo.csv") if row["network"] == "tokenseg"
    }
    assert f"{dice['external']:.1f} %, {dice['test'] - dice['external']:.1f} points less" in claims
    for what, column in (("the time falls", "median_ms"), ("memory falls", "peak_mib")):
        nnunet, unet = (tables.reduction(column, name) for name in ("nnunet-plainconv", "monai-unet"))
        assert f"{what} by {nnunet} against nnU-Net's network and by {unet} against `UNet` (fp32)" in claims


def test_what_is_said_of_a_gpu_follows_the_rows(tables: ModuleType) -> None:
    recorded, plain = tables.gpu_rows(128, "cuda-graph"), tables.gpu_rows(128, "torch")
    assert {row["gpu"] for row in (*recorded.values(), *plain.values())} == {"NVIDIA H100 80GB HBM3"}
    small = recorded["tokenseg-small"]["median_ms"]
    nnunet, unet = (float(recorded[name]["ratio"]) for name in ("nnunet-plainconv", "monai-unet"))
    said = f"takes {small} ms, nnU-Net's `PlainConvUNet` {nnunet:.1f} and `UNet` {unet:.1f} times as long"
    assert f"a window of 128 cubed {said}" in flat(MEASUREMENTS)
    claims = (ROOT / "docs" / "paper-claims.md").read_text(encoding="utf-8")
    less = [f"{100 * (1 - 1 / times):.0f} % less" for times in (nnunet, unet)]
    assert f"passes recorded: {small} ms, {less[0]} than nnU-Net's network and {less[1]} than `UNet`" in claims
    ours, theirs, other = (float(plain[name]["peak_mib"]) for name in ("tokenseg-small", *PEERS))
    memory = f"{100 * (1 - ours / theirs):.0f} % less than nnU-Net's network and {100 * (ours / other - 1):.0f} % more"
    assert f"on that GPU, not recorded, {ours / 1024:.1f} GB, {memory} than `UNet`" in claims
    full = {
        row["network"]: row
        for row in tables.rows_of("speed.csv")
        if (row["engine"], row["precision"], row["size"]) == ("cuda-graph", "fp32", "128")
    }
    times = [full[name]["median_ms"] for name in ("tokenseg-small", "nnunet-plainconv")]
    assert f"recorded, `small` takes {times[0]} ms and `PlainConvUNet` {times[1]}" in MEASUREMENTS
    assert float(plain["monai-unet"]["ratio"]) < 1
    # Training as it is said: slower than UNet there.
    steps = {row["network"]: row for row in tables.rows_of("speed.csv") if row["gpu"] and row["training_median_ms"]}
    assert float(steps["tokenseg-small"]["training_median_ms"]) > float(steps["monai-unet"]["training_median_ms"])


def test_the_temperature_of_the_built_in_model_is_that_which_is_said() -> None:
    quality = load_model("hippocampus").facts.quality
    assert quality is not None
    assert quality.calibration_error is not None
    without, with_it = quality.calibration_error
    page = " ".join((ROOT / "docs" / "hippocampus.md").read_text(encoding="utf-8").split())
    assert f"a temperature of {quality.temperature:.2f}" in page
    assert f"of {quality.num_cases} of the cases" in page
    assert f"is {without:.3f} without and {with_it:.3f} with it" in page


def test_what_is_said_of_very_small_lesions_comes_from_the_row() -> None:
    with (ROOT / "benchmarks" / "tiny_lesions.csv").open(newline="") as file:
        row = list(csv.DictReader(file))[-1]
    page = " ".join((ROOT / "docs" / "own-dataset.md").read_text(encoding="utf-8").split())
    dice, low, high = (f"{float(row[name]):.3f}" for name in ("dice", "dice_low", "dice_high"))
    assert f"{row['steps']} steps on one thread give a Dice of {dice} ({low} to {high})" in page
    assert (f"{float(row['foreground_percent']):.2f}", row["threads"], row["missed"]) == ("0.01", "1", "0")
    assert float(row["lesion_f1"]) == 1


def test_what_is_said_of_quality_signals_comes_from_the_rows() -> None:
    with (ROOT / "benchmarks" / "quality.csv").open(newline="") as file:
        every = list(csv.DictReader(file))
    page = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    rows, longer = ([row for row in every if row["model"].endswith(model)] for model in ("Hippocampus", "3000-steps"))

    def correlation(of: list[dict[str, str]], signal: str) -> str:
        found = spearmanr([float(row["dice"]) for row in of], [float(row[signal]) for row in of]).statistic
        return f"{found:.2f}"

    named = re.findall(r"(-?0\.\d\d) for `(\w+)`", page)
    assert [correlation(rows, signal) for _, signal in named] == [figure for figure, _ in named]
    assert len(named) == 3
    entropy, boundary, expected = (correlation(longer, signal) for _, signal in named)
    assert f"it is {entropy}, {boundary} and {expected}" in " ".join(page.split())
    dice = [float(row["dice"]) for row in rows]
    assert f"{len(rows)} validation cases" in " ".join(page.split())
    assert f"between {min(dice):.2f} and {max(dice):.2f}" in " ".join(page.split())
    with (ROOT / "benchmarks" / "quality_spoiled.csv").open(newline="") as file:
        spoiled = list(csv.DictReader(file))
    assert {row["case"] for row in spoiled} == {row["case"] for row in rows}
    assert f"{len(spoiled)} scans" in page
    failed = [row for row in spoiled if float(row["dice"]) < 0.7]
    others = [row for row in spoiled if float(row["dice"]) >= 0.7]
    for signal, sign in (("entropy", 1), ("near_boundary", 1), ("expected_dice", -1)):
        pairs = [sign * (float(bad[signal]) - float(good[signal])) for bad in failed for good in others]
        told = (sum(pair > 0 for pair in pairs) + 0.5 * pairs.count(0)) / len(pairs)
        assert f"| `{signal}` | {correlation(spoiled, signal)} | {100 * told:.0f} % |" in page
    flagged = [sum(row["flags"] != "0" for row in some) for some in (failed, others)]
    assert flagged[0] == 0
    assert f"None of the {len(failed)} failures had a flag, {flagged[1]} other scans had" in page


def test_a_report_keeps_the_limit_as_the_rows_say(tables: ModuleType) -> None:
    rows = tables.rows_of("report_cost.csv")
    peaks = {way: max(float(row["peak_gb"]) for row in rows if row["report"] == way) for way in ("no", "yes")}
    assert all(peak < float(row["limit"].removesuffix("GB")) for row in rows for peak in peaks.values())
    seconds = {(row["round"], row["report"]): float(row["seconds"]) for row in rows}
    ratio = median(seconds[number, "yes"] / seconds[number, "no"] for number in {row["round"] for row in rows})
    memory = " ".join((ROOT / "docs" / "memory.md").read_text(encoding="utf-8").split())
    assert f"at most {peaks['no']:.2f} GB without `--report` and {peaks['yes']:.2f} GB with it" in memory
    assert f"in {ratio:.2f} times the time (median of three rounds" in memory
