"""The tables of README and docs, made from the rows beside this file.

Usage: python benchmarks/tables.py [README.md benchmarks/README.md docs/synthetic-cohort.md]

With files it replaces the text between their table markers.
"""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

from tokenseg.benchmark.accuracy_table import accuracy_table as printed

HERE = Path(__file__).parent
SPEED_NAMES = {
    "tokenseg-small": "TokenSeg `small`",
    "monai-unet": "MONAI `UNet` (32..512)",
    "nnunet-plainconv": "nnU-Net `PlainConvUNet`",
}
DEMO_NAMES = {"tokenseg": "TokenSeg `small`", "monai-unet": "MONAI `UNet`"}
EARLIER = {
    ("LeftAtrium", "20 minutes"): "LeftAtrium, 16 scans of fold 0",
    ("Task99_Brain", "6500 steps"): "two BraTS cases, four labels",
    ("Dataset099_Brain", "1800 steps"): "the same, three regions",
}


def rows_of(name: str) -> list[dict[str, str]]:
    """Rows of a CSV, oldest first."""
    with (HERE / name).open(newline="") as file:
        return list(csv.DictReader(file))


def speed_rows() -> dict[tuple[str, str], dict[str, str]]:
    """Newest row of each network and precision at 128 voxels with torch on two threads of a CPU."""
    conditions = {"stage": "forward", "size": "128", "engine": "torch", "device": "cpu", "threads": "2"}
    rows = [row for row in rows_of("speed.csv") if row["median_ms"] and conditions.items() <= row.items()]
    return {(row["network"], row["precision"]): row for row in rows}


def speed_table() -> str:
    """Time and memory of the networks in `SPEED_NAMES`."""
    newest = speed_rows()
    lines = ["| network | parameters | fp32 | bf16 | memory fp32 |", "| --- | --- | --- | --- | --- |"]
    for network, name in SPEED_NAMES.items():
        fp32, bf16 = newest[network, "fp32"], newest[network, "bf16"]
        lines.append(
            f"| {name} | {fp32['parameters_m']} M | {_seconds(fp32)} s | {_seconds(bf16)} s | {fp32['peak_mib']} MiB |"
        )
    return "\n".join(lines)


def reduction(column: str, baseline: str) -> str:
    """By how many per cent TokenSeg `small` is below a baseline, in fp32: the form of the paper's claims."""
    newest = speed_rows()
    ours, theirs = (float(newest[name, "fp32"][column]) for name in ("tokenseg-small", baseline))
    return f"{100 * (1 - ours / theirs):.0f} %"


def accuracy_table() -> str:
    """Networks after the same time on the reported fold, as `tokenseg benchmark accuracy` prints it."""
    return printed(rows_of("accuracy.csv"), rows_of("accuracy_cases.csv"))


def earlier_table() -> str:
    """What the network reached before its refinement on data other than the hippocampus; labels averaged."""
    lines = ["| data | training | Dice | HD95 |", "| --- | --- | --- | --- |"]
    for (dataset, budget), name in EARLIER.items():
        rows = [row for row in rows_of("accuracy_earlier.csv") if (row["dataset"], row["budget"]) == (dataset, budget)]
        dice, hd95 = (sum(float(row[column]) for row in rows) / len(rows) for column in ("dice", "hd95_mm"))
        lines.append(f"| {name} | {budget}, one thread | {dice:.4f} | {hd95:.2f} mm |")
    return "\n".join(lines)


def demo_table() -> str:
    """Newest row of each network on each part of the synthetic cohort."""
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
    """How hard the synthetic cohort is for a threshold."""
    lines = ["| part | stored intensities | z-scored over all phases, as for the network |", "|---|---|---|"]
    for row in rows_of("threshold.csv"):
        stored, zscored = (f"{float(row[name]):.2f}" for name in ("dice_stored", "dice_zscored"))
        lines.append(f"| {row['part']} | {stored} | {zscored} |")
    return "\n".join(lines)


def fill(text: str) -> str:
    """Put the tables between their markers, `<!-- table: NAME -->` and `<!-- end -->`."""
    tables = {
        "speed": speed_table,
        "accuracy": accuracy_table,
        "earlier": earlier_table,
        "demo": demo_table,
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
        print(speed_table(), accuracy_table(), earlier_table(), demo_table(), threshold_table(), sep="\n\n")
