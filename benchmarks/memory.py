"""Memory and time of `tokenseg segment` on large scans, as seen from outside, into memory.csv.

    python benchmarks/memory.py [--scans 256x256x160 ...] [--labels 2 5] [--limit 4GB] [--plan-mm 1] [--csv FILE]

A scan is int16 noise with voxels of 1 mm in an uncompressed NIfTI file; with a plan of 1 mm nothing is won by
resampling. The model is an untrained `small` with windows of 128 voxels, as planned for large scans; all of its answer
is foreground, which takes the most time there can be. The scan is segmented in a process of its own. `peak_gb` is the
highest resident size that the system counted, libraries included; `estimate_gb` and `slabs` are what the program
printed before it began.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from tokenseg.benchmark.rows import append
from tokenseg.benchmark.speed.networks import make_plan
from tokenseg.config import PRESETS, Label
from tokenseg.model.network import TokenSeg
from tokenseg.saved_model.checkpoint import ModelFacts, save_model
from tokenseg.segmentation.provenance import manifest

COLUMNS = (
    "date",
    "commit",
    "scan",
    "plan_mm",
    "labels",
    "limit",
    "threads",
    "slabs",
    "estimate_gb",
    "peak_gb",
    "seconds",
    "cpu",
)
MEASURE = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9)
print(done.stderr)
sys.exit(done.returncode)
"""


def main() -> None:
    """Measure each scan with each number of labels."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--scans", nargs="+", default=["256x256x160", "512x512x1000", "1024x1024x1024"])
    parser.add_argument("--labels", nargs="+", type=int, default=[2, 5])
    parser.add_argument("--limit", default="")
    parser.add_argument("--plan-mm", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "memory.csv")
    arguments = parser.parse_args()
    for scan in arguments.scans:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_scan(folder / "scan.nii", tuple(int(size) for size in scan.split("x")))
            for num_labels in arguments.labels:
                save_model_for(folder / f"model{num_labels}", num_labels, arguments.plan_mm)
                row = _measure(folder, num_labels, arguments.limit, arguments.threads)
                _append(arguments.csv, {"scan": scan, "plan_mm": f"{arguments.plan_mm:g}", "labels": num_labels, **row})


def write_scan(path: Path, shape: tuple[int, ...]) -> None:
    """Write noise."""
    noise = np.random.default_rng(0).integers(0, 1000, (64, 64, 64)).astype(np.int16)
    scan = np.tile(noise, [-(-size // 64) for size in shape])[tuple(slice(size) for size in shape)]
    nib.save(nib.Nifti1Image(scan, np.eye(4)), path)


def save_model_for(folder: Path, num_labels: int, plan_mm: float, *, window_vox: int = 128) -> None:
    """Save an untrained model."""
    labels = tuple(Label(name=f"label{n}", values=(n,), output_value=n) for n in range(1, num_labels + 1))
    size = (window_vox, window_vox, window_vox)
    changes = {"labels": labels, "window_vox": size, "whole_limit_vox": size, "spacing_mm": (plan_mm,) * 3}
    plan = make_plan(size).model_copy(update=changes)
    torch.manual_seed(0)
    save_model(
        folder,
        TokenSeg(PRESETS["small"], plan).eval(),
        ModelFacts(name="untrained", plan=plan, network=PRESETS["small"]),
    )


def _measure(folder: Path, num_labels: int, limit: str, threads: int) -> dict[str, object]:
    command = [sys.executable, "-m", "tokenseg", "segment", folder / "scan.nii", folder / "mask.nii.gz"]
    command += ["--model", folder / f"model{num_labels}", "--engine", "torch", "--threads", threads]
    command += ["--max-memory", limit or "1TB"]
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, command)], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - begun
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    peak, *rest = done.stdout.splitlines()
    found = re.search(r"about (\S+) GB in (\d+) slab", "\n".join(rest))
    if found is None:
        sys.exit(f"no estimate was printed: {rest}")
    return {
        "limit": limit,
        "threads": threads,
        "slabs": found[2],
        "estimate_gb": found[1],
        "peak_gb": f"{float(peak):.2f}",
        "seconds": f"{seconds:.0f}",
    }


def _append(path: Path, row: dict[str, object]) -> None:
    conditions = manifest(torch.device("cpu"))
    common = {name: conditions[name] for name in ("date", "commit", "cpu")}
    append(path, COLUMNS, [common | {name: str(value) for name, value in row.items()}])
    print(row)


if __name__ == "__main__":
    main()
