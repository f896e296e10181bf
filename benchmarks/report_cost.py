"""Memory and time of `tokenseg segment` with and without `--report`, in turn, into report_cost.csv.

    python benchmarks/report_cost.py [--scan 300x300x160] [--window 96] [--limit 0.9GB] [--rounds 3]

Scan and model are those of `memory.py`, with a smaller window: noise of 1 mm, an untrained `small`. Its noisy answer
is the dearest there can be for a report: nothing of it can be packed. Each call is a process of its own, seen from
outside.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from memory import MEASURE, save_model_for, write_scan

from tokenseg.benchmark.rows import append
from tokenseg.segmentation.provenance import manifest

COLUMNS = ("date", "commit", "scan", "window", "limit", "threads", "round", "report", "peak_gb", "seconds", "cpu")


def main() -> None:
    """Measure both ways in each round."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--scan", default="300x300x160")
    parser.add_argument("--window", type=int, default=96)
    parser.add_argument("--limit", default="0.9GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "report_cost.csv")
    arguments = parser.parse_args()
    threads = torch.get_num_threads()
    conditions = manifest(torch.device("cpu"))
    common = {name: conditions[name] for name in ("date", "commit", "cpu")}
    common |= {"scan": arguments.scan, "window": str(arguments.window), "limit": arguments.limit}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_scan(folder / "scan.nii", tuple(int(size) for size in arguments.scan.split("x")))
        save_model_for(folder / "model", 2, 1.0, window_vox=arguments.window)
        for number in range(arguments.rounds):
            for report in ("no", "yes"):
                peak_gb, seconds = _measure(folder, arguments.limit, report=report == "yes")
                row = {"threads": str(threads), "round": str(number), "report": report}
                row |= {"peak_gb": f"{peak_gb:.3f}", "seconds": f"{seconds:.1f}"}
                append(arguments.csv, COLUMNS, [common | row])
                print(row)


def _measure(folder: Path, limit: str, *, report: bool) -> tuple[float, float]:
    (folder / "mask.nii.gz").unlink(missing_ok=True)
    command = [sys.executable, "-m", "tokenseg", "segment", folder / "scan.nii", folder / "mask.nii.gz"]
    command += ["--model", folder / "model", "--engine", "torch", "--max-memory", limit]
    command += ["--report", folder / "report.html"] if report else []
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, command)], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - begun
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return float(done.stdout.splitlines()[0]), seconds


if __name__ == "__main__":
    main()
