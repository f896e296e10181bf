"""The tables of README and docs, made from the rows beside this file.

Usage: python benchmarks/tables.py [README.md benchmarks/README.md docs/synthetic.md docs/hippocampus.md
                                   docs/memory.md]

With files it replaces the text between their table markers.
"""

from __future__ import annotations

import csv
import math
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tokenseg.benchmark.accuracy.table import accuracy_table as printed
from tokenseg.saved_model.card import figures_lines
from tokenseg.saved_model.checkpoint import load_model

HERE = Path(__file__).parent
SPEED_NAMES = {
    "tokenseg-small": "TokenSeg `small`",
    "monai-unet": "MONAI `UNet` (32..512)",
    "monai-segresnet": "MONAI `SegResNet`",
    "nnunet-plainconv": "nnU-Net `PlainConvUNet`",
    "monai-swinunetr": "MONAI `SwinUNETR`",
}
FRONT_NAMES = {name: SPEED_NAMES[name] for name in ("tokenseg-small", "monai-unet", "nnunet-plainconv")}
ACCURACY_COLUMNS = 10
DEMO_NAMES = {"tokenseg": "TokenSeg `small`", "monai-unet": "MONAI `UNet`"}
STEERED = {"whole/test": "10 synthetic breast exams", "brats/Task99_Brain": "2 BraTS heads, trained on"}
WAYS = {"full": "full sliding window", "steered": "steered windows", "whole": "one pass"}
EQUAL_STEPS = (450, 800)
EARLIER = {
    ("LeftAtrium", "20 minutes"): "LeftAtrium, 16 scans of fold 0",
    ("Task99_Brain", "6500 steps"): "two BraTS cases, four labels",
    ("Dataset099_Brain", "1800 steps"): "the same, three regions",
}


def rows_of(name: str) -> list[dict[str, str]]:
    """Rows of a CSV, oldest first."""
    with (HERE / name).open(newline="") as file:
        return list(csv.DictReader(file))


def speed_rows(precision: str, engine: str = "torch", threads: int = 2) -> dict[str, dict[str, str]]:
    """Newest row of each network at 128 voxels, all on the CPU that was measured last."""
    conditions = {"stage": "forward", "size": "128", "device": "cpu", "precision": precision}
    conditions |= {"engine": engine, "threads": str(threads)}
    rows = [row for row in rows_of("speed.csv") if row["median_ms"] and conditions.items() <= row.items()]
    return {row["network"]: row for row in rows if row["cpu"] == rows[-1]["cpu"]}


def speed_table(precision: str) -> str:
    """Time and memory of those of `SPEED_NAMES` that were measured, and how much slower than `small` each is."""
    newest = speed_rows(precision)
    lines = ["| network | parameters | time | times `small` | memory |", "| --- | --- | --- | --- | --- |"]
    for network, name in SPEED_NAMES.items():
        if network in newest:
            row = newest[network]
            lines.append(
                f"| {name} | {row['parameters_m']} M | {_seconds(row)} s | {_times(row)} | {row['peak_mib']} MiB |"
            )
    return "\n".join(lines)


def openvino_table() -> str:
    """Networks through OpenVINO in half precision on one thread; nnU-Net also as its users run it."""
    newest = speed_rows("bf16", "openvino", 1)
    ours, plain = newest["tokenseg-small"], speed_rows("fp32", "torch", 1)["nnunet-plainconv"]
    lines = ["| network | engine | precision | time | times `small` |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {name} | OpenVINO | bf16 | {_seconds(newest[network])} s | {_times(newest[network])} |"
        for network, name in SPEED_NAMES.items()
        if network in newest
    ]
    # Of two runs, one after the other: no passes in turn.
    times = float(plain["median_ms"]) / float(ours["median_ms"])
    lines.append(f"| {SPEED_NAMES['nnunet-plainconv']} | torch | fp32 | {_seconds(plain)} s | {times:.0f} |")
    return "\n".join(lines)


def gpu_rows(size: int, engine: str) -> dict[str, dict[str, str]]:
    """Newest row of each network on a GPU in half precision."""
    conditions = {"stage": "forward", "size": str(size), "engine": engine, "device": "cuda", "precision": "bf16"}
    rows = [row for row in rows_of("speed.csv") if row["median_ms"] and conditions.items() <= row.items()]
    return {row["network"]: row for row in rows}


def gpu_table() -> str:
    """Passes of all networks on a GPU, as they are and recorded, and their training steps; fastest recorded first."""
    plain, recorded, large = gpu_rows(128, "torch"), gpu_rows(128, "cuda-graph"), gpu_rows(256, "cuda-graph")
    # Rows without a training step are newer for the reference.
    trained = {row["network"]: row for row in rows_of("speed.csv") if row["gpu"] and row["training_median_ms"]}
    lines = [
        "| network | recorded | times `small` | 256 cubed | times `small` | as it is | memory | training | memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for network, row in sorted(recorded.items(), key=lambda item: float(item[1]["median_ms"])):
        step, far = trained.get(network, {}), large.get(network, {})
        cells = [
            network,
            f"{row['median_ms']} ms",
            _times(row),
            f"{far['median_ms']} ms" if far else "",
            _times(far) if far else "",
            f"{plain[network]['median_ms']} ms",
            f"{plain[network]['peak_mib']} MiB",
            f"{step['training_median_ms']} ms" if step else "",
            f"{step['training_peak_mib']} MiB" if step else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _times(row: dict[str, str]) -> str:
    return f"{float(row['ratio']):.1f}" if row["ratio"] else ""


def reduction(column: str, baseline: str) -> str:
    """By how many per cent TokenSeg `small` is below a baseline, in fp32: the form of the paper's claims."""
    newest = speed_rows("fp32")
    # Times of two processes drift apart; the ratio is of passes in turn.
    ours, theirs = (float(newest[name][column]) for name in ("tokenseg-small", baseline))
    times = float(newest[baseline]["ratio"]) if column == "median_ms" else theirs / ours
    return f"{100 * (1 - 1 / times):.0f} %"


def accuracy_table(*names: str, keep: Callable[[dict[str, str]], bool] = lambda _: True) -> str:
    """Networks after the same time on the reported fold, as `tokenseg benchmark accuracy` prints it.

    Args:
        names: Of files; of the same training in several the last one counts.
        keep: Which rows.
    """
    rows = [row for name in names for row in rows_of(f"{name}.csv") if keep(row)]
    return printed(rows, [row for name in names for row in rows_of(f"{name}_cases.csv")])


def amx_table() -> str:
    """Networks after the same time on the reported fold, on a CPU with AMX: the network of decision 0016, and peers."""
    return accuracy_table("accuracy", "accuracy_0016", keep=lambda row: row["budget"].endswith("minutes"))


class Result(NamedTuple):
    """A network in a table of accuracies."""

    steps: int
    seeds: int
    dice: float
    interval: tuple[float, float]
    less_ours: tuple[float, float, float]
    """Points less TokenSeg's, with their interval; zeros for TokenSeg itself."""


def results(table: str) -> dict[str, Result]:
    """What a table of accuracies says of each network, by the name in it."""
    found = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == ACCURACY_COLUMNS and re.match(r"\d", cells[5]):
            dice, low, high = map(float, re.findall(r"\d\.\d+", cells[5]))
            less = tuple(map(float, re.findall(r"[-+]\d+\.\d+", cells[6]))) or (0.0, 0.0, 0.0)
            found[cells[0]] = Result(int(cells[2]), int(cells[4]), dice, (low, high), less)
    return found


def front_table() -> str:
    """The table of README: a pass, and Dice after the same minutes, of those networks that were measured everywhere."""
    speed = speed_rows("fp32")
    columns = {name: results(table()) for name, table in COMPARED.items()}
    titles = ("network", "a pass", "memory", *columns)
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for network, name in FRONT_NAMES.items():
        row = speed[network]
        cells = [name, f"{_seconds(row)} s", f"{row['peak_mib']} MiB"]
        for found in columns.values():
            result = found.get("tokenseg" if network == "tokenseg-small" else network)
            cells.append(f"{result.dice:.4f}" if result else "no time")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def presets_table() -> str:
    """TokenSeg `small` and `paper` after the same time on the reported fold, the CPU without AMX."""
    return accuracy_table("accuracy_fp32", "accuracy_paper", keep=lambda row: row["network"].startswith("tokenseg"))


def equal_steps_table() -> str:
    """Networks after about as many steps on the reported fold, of any day: budgets in minutes that came to that."""
    names = ("accuracy", "accuracy_0016", "accuracy_fp32", "accuracy_fp32_half")
    rows = [row for name in names for row in rows_of(f"{name}.csv") if row["steps"]]
    rows = [row for row in rows if (row["dataset"], row["fold"]) == ("Task04_Hippocampus", "1")]
    near = [row for row in rows if EQUAL_STEPS[0] <= int(row["steps"]) <= EQUAL_STEPS[1]]
    lines = ["| network | steps | precision | seed | Dice (95 % interval) |", "| --- | --- | --- | --- | --- |"]
    for row in sorted(near, key=lambda row: -float(row["dice"])):
        dice = f"{row['dice']} ({row['dice_low']} to {row['dice_high']})"
        lines.append(f"| {row['network']} | {row['steps']} | {row['precision']} | {row['seed']} | {dice} |")
    return "\n".join(lines)


def steering_table() -> str:
    """Three ways to run the same weights over whole scans: means and sums over the scans of a dataset, newest rows."""
    lines = [
        "| scans | way | windows | network | in all | Dice | lesions found | lost | false positives |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    newest = {(row["dataset"], row["mode"]): row for row in rows_of("steering.csv") if row["case"] == "all"}
    for (dataset, mode), row in newest.items():
        times = f"{float(row['network_s']):.1f} s | {float(row['total_s']):.1f} s | {float(row['dice']):.3f}"
        lesions = f"{row['found']} of {row['lesions']} | {row['lost']} | {row['false_positives']}"
        lines.append(f"| {STEERED[dataset]} | {WAYS[mode]} | {row['windows_run']} | {times} | {lesions} |")
    return "\n".join(lines)


def memory_table() -> str:
    """Highest memory of whole scans beside the limit that was given, the newest row of each."""
    newest = {(row["scan"], row["plan_mm"], int(row["labels"])): row for row in rows_of("memory.csv")}
    lines = ["| scan of 1 mm, int16 | plan | labels | highest memory | limit |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {scan.replace('x', ' x ')} | {plan_mm} mm | {labels} | {row['peak_gb']} GB | {row['limit'][:-2]} GB |"
        for (scan, plan_mm, labels), row in sorted(newest.items(), key=lambda each: (_voxels(each[0][0]), each[0][1:]))
    ]
    return "\n".join(lines)


def _voxels(scan: str) -> int:
    return math.prod(int(size) for size in scan.split("x"))


def earlier_table() -> str:
    """What the network reached before its refinement on data other than the hippocampus; labels averaged."""
    lines = ["| data | training | Dice | HD95 |", "| --- | --- | --- | --- |"]
    for (dataset, budget), name in EARLIER.items():
        rows = [row for row in rows_of("accuracy_earlier.csv") if (row["dataset"], row["budget"]) == (dataset, budget)]
        dice, hd95 = (sum(float(row[column]) for row in rows) / len(rows) for column in ("dice", "hd95_mm"))
        lines.append(f"| {name} | {budget}, one thread | {dice:.4f} | {hd95:.2f} mm |")
    return "\n".join(lines)


def demo_table() -> str:
    """Newest row of each network on each part of the synthetic exams."""
    newest = {(row["exams"], row["network"]): row for row in rows_of("demo.csv")}
    lines = [
        "| synthetic exams | network | training | Dice (95 % interval) | missed | lesion F1 | false positives |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for part, exams in (("test", "held out"), ("external", "external centre")):
        for network in ("tokenseg", "monai-unet"):
            row = newest[part, network]
            dice, low, high = (f"{float(row[name]):.3f}" for name in ("dice", "dice_low", "dice_high"))
            minutes = f"{float(row['train_minutes']):.1f}"
            lines.append(
                f"| {exams} | {DEMO_NAMES[network]} | {minutes} min | {dice} ({low} to {high}) "
                f"| {row['n_missed']} of {row['n']} | {float(row['lesion_f1']):.2f} "
                f"| {row['false_positives']} in {row['n_lesion_free']} |"
            )
    return "\n".join(lines)


def threshold_table() -> str:
    """How hard the synthetic exams are for a threshold."""
    lines = ["| part | stored intensities | z-scored over all phases, as for the network |", "|---|---|---|"]
    for row in rows_of("threshold.csv"):
        stored, zscored = (f"{float(row[name]):.2f}" for name in ("dice_stored", "dice_zscored"))
        lines.append(f"| {row['part']} | {stored} | {zscored} |")
    return "\n".join(lines)


def hippocampus_table() -> str:
    """Figures of the built-in model, as its card has them."""
    publication = load_model("hippocampus").facts.publication
    assert publication is not None
    return "\n".join(figures_lines(publication.figures))


COMPARED = {
    "hippocampus, EPYC": partial(accuracy_table, "accuracy_fp32"),
    "hippocampus, Xeon": amx_table,
    "left atrium, EPYC": partial(accuracy_table, "accuracy_left_atrium"),
    "left atrium, Xeon": partial(accuracy_table, "accuracy_left_atrium_amx"),
}
"""Columns of the README's table: networks after the same minutes of training."""


def fill(text: str) -> str:
    """Put the tables between their markers, `<!-- table: NAME -->` and `<!-- end -->`."""
    tables = {
        "front": front_table,
        "speed": partial(speed_table, "fp32"),
        "speed-bf16": partial(speed_table, "bf16"),
        "speed-gpu": gpu_table,
        "speed-openvino": openvino_table,
        "accuracy": partial(accuracy_table, "accuracy_fp32"),
        "accuracy-bf16": amx_table,
        "accuracy-left-atrium": partial(accuracy_table, "accuracy_left_atrium"),
        "accuracy-left-atrium-amx": partial(accuracy_table, "accuracy_left_atrium_amx"),
        "equal-steps": equal_steps_table,
        "presets": presets_table,
        "ablation": partial(accuracy_table, "ablation"),
        "steering": steering_table,
        "earlier": earlier_table,
        "memory": memory_table,
        "demo": demo_table,
        "hippocampus": hippocampus_table,
        "threshold": threshold_table,
    }
    for name, table in tables.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda match, table=table: match[1] + table() + "\n" + match[2], text, flags=re.DOTALL)
    return text


def _seconds(row: dict[str, str]) -> str:
    return f"{float(row['median_ms']) / 1000:.2f}"


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(fill(path.read_text()))
    if len(sys.argv) == 1:
        tables = speed_table("fp32"), accuracy_table("accuracy_fp32"), equal_steps_table(), steering_table()
        print(*tables, earlier_table(), demo_table(), threshold_table(), sep="\n\n")
