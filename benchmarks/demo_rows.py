"""Append the table of a finished `tokenseg demo` to demo.csv.

Usage: python benchmarks/demo_rows.py DEMO_FOLDER
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

import torch

from tokenseg.benchmark.rows import Row, append
from tokenseg.device import bfloat16_helps
from tokenseg.segmentation.provenance import commit

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
    found = json.loads((arguments.demo / "demo.json").read_text())
    append(arguments.csv, COLUMNS, [row_of(arguments.demo, row) for row in found])


def row_of(demo: Path, found: dict[str, Any]) -> Row:
    """A row of the demo's table, with the steps of its run."""
    mean, low, high = found["dice"]
    run = json.loads((demo / found["network"] / "run.json").read_text())
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "commit": commit(),
        "network": found["network"],
        "exams": found["part"],
        "n": str(found["num_exams"]),
        "n_missed": str(found["num_missed"]),
        "dice": f"{mean:.4f}",
        "dice_low": f"{low:.4f}",
        "dice_high": f"{high:.4f}",
        "lesion_f1": f"{found['lesion_f1']:.4f}",
        "n_lesion_free": str(found["num_lesion_free"]),
        "false_positives": str(found["false_positives"]),
        "steps": str(run["total_steps"]),
        "train_minutes": f"{found['train_minutes']:.2f}",
        "precision": "bf16" if bfloat16_helps(torch.device("cpu")) else "fp32",
    }


if __name__ == "__main__":
    sys.exit(main())
