"""Why maps are channels-last and instance norm has its own backward: times of single operations, appended to a CSV.

Usage: python benchmarks/kernels.py [--threads 2] [--csv benchmarks/kernels.csv]
"""

from __future__ import annotations

import argparse
import csv
import datetime
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from tokenseg.model.blocks import InstanceNorm

COLUMNS = ("date", "operation", "layout", "precision", "shape", "threads", "median_ms")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last_3d}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Measure everything, append rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_name("kernels.csv"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    new = not arguments.csv.exists()
    with arguments.csv.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        for operation, layout, precision, maps, work in _cases():
            shape = "x".join(map(str, maps.shape))
            today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
            row = [today, operation, layout, precision, shape, arguments.threads, f"{_median_ms(work):.2f}"]
            writer.writerow(row)
            print(row)


def _cases() -> Iterator[tuple[str, str, str, Tensor, Callable[[], object]]]:
    for layout, memory_format in LAYOUTS.items():
        for precision, dtype in PRECISIONS.items():
            maps = torch.randn(1, 32, 64, 64, 64).to(dtype).to(memory_format=memory_format)
            kernel = torch.randn(32, 32, 3, 3, 3).to(dtype).to(memory_format=memory_format)
            yield "conv3d 3x3x3", layout, precision, maps, _bind(nn.functional.conv3d, maps, kernel, padding=1)
            yield "InstanceNorm3d forward", layout, precision, maps, _bind(nn.functional.instance_norm, maps)
            yield "group norm forward", layout, precision, maps, _bind(nn.functional.group_norm, maps, 32)
            small = torch.randn(4, 32, 20, 28, 20).to(dtype).to(memory_format=memory_format).requires_grad_()
            for name, norm in (("torch", nn.GroupNorm(32, 32)), ("ours", InstanceNorm(32))):
                result = norm(small)
                slope = torch.randn_like(result)
                work = _bind(torch.autograd.grad, result, small, slope, retain_graph=True)
                yield f"group norm backward, {name}", layout, precision, small, work


def _bind(function: Callable[..., object], *arguments: object, **options: object) -> Callable[[], object]:
    return lambda: function(*arguments, **options)


def _median_ms(work: Callable[[], object], rounds: int = 9) -> float:
    work()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())
