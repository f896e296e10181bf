"""Append the table of a finished `tokenseg demo` to demo.csv.

Usage: python benchmarks/demo_rows.py DEMO_FOLDER
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import subprocess
import sys
from pathlib import Path

import torch

from tokenseg.device import bfloat16_helps

COLUMNS = (
    *("date", "commit", "network", "exams", "n", "n_missed", "dice", "dice_low", "dice_high", "lesion_f1"),
    *("n_lesion_free", "false_positives", "steps", "train_minutes", "precision"),
)


def main() -> None:
    """Read demo.json, append a row a network and part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_name("demo.csv"))
    arguments = parser.parse_args()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    new = not arguments.csv.exists()
    with arguments.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        for row in json.loads((arguments.demo / "demo.json").read_text()):
            mean, low, high = row["dice"]
            run = json.loads((arguments.demo / row["network"] / "run.json").read_text())
            writer.writerow(
                {
                    "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
                    "commit": commit.stdout.strip(),
                    "network": row["network"],
                    "exams": row["part"],
                    "n": row["num_exams"],
                    "n_missed": row["num_missed"],
                    "dice": f"{mean:.4f}",
                    "dice_low": f"{low:.4f}",
                    "dice_high": f"{high:.4f}",
                    "lesion_f1": f"{row['lesion_f1']:.4f}",
                    "n_lesion_free": row["num_lesion_free"],
                    "false_positives": row["false_positives"],
                    "steps": run["total_steps"],
                    "train_minutes": f"{row['train_minutes']:.2f}",
                    "precision": "bf16" if bfloat16_helps(torch.device("cpu")) else "fp32",
                }
            )


if __name__ == "__main__":
    sys.exit(main())
