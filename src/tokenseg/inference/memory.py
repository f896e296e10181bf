"""Memory of a segmentation: how much it will take, and in how many slabs to compute so that a limit is kept.

An estimate is the sum of what is held at once in the three phases of a case: while its files are read, while it is
computed, and while its mask is written. Slabs make the second smaller, nothing else. Shares that no arithmetic gives
were measured (decision 0022).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tokenseg.config import NetworkConfig, Plan
from tokenseg.datasets.inputs import InputSize
from tokenseg.errors import ConfigError
from tokenseg.imaging.orientation import in_row_order, row_order, shape3
from tokenseg.inference.windows import window_corners
from tokenseg.plan_grid.preprocess import grid_shape

_PROCESS, _MEMINFO, _CGROUP = Path("/proc/self"), Path("/proc/meminfo"), Path("/sys/fs/cgroup")

MAX_SLABS = 64
_FLOAT_BYTES = 4
_NETWORK_BYTES = 3.6
"""Of a pass, a voxel and a feature channel of the first level."""
_ENGINE_MIB = 300
"""What converting a network for OpenVINO leaves behind, and its buffers."""
_UNKNOWN_RESIDENT_MIB = 600
"""Libraries and weights, where the system does not say."""
_ONCE_MIB = 130
"""What the first pass of a network and late imports leave behind."""
_ALLOWANCE = 1.05
"""Memory that was freed and not yet given back."""


class MemoryPlan(NamedTuple):
    """In how many slabs a case is computed, and about how much memory the process then takes at most."""

    num_slabs: int
    peak_mib: float

    def __str__(self) -> str:
        plural = "" if self.num_slabs == 1 else "s"
        return f"about {_gb(self.peak_mib)} in {self.num_slabs} slab{plural}"


def plan_memory(
    size: InputSize, plan: Plan, networks: Sequence[NetworkConfig], *, limit_mib: float | None, compiled: bool
) -> MemoryPlan:
    """Choose the fewest slabs that keep a limit.

    Args:
        size: Of the scan, from its header.
        plan: Of the models.
        networks: Sizes of the models, one each.
        limit_mib: Resident memory of the process; None for what the machine has free, where that is known.
        compiled: Whether OpenVINO computes.

    Raises:
        ConfigError: A limit was given that cannot be kept; the message says the least that would do.
    """
    resident = resident_mib() or _UNKNOWN_RESIDENT_MIB
    limit = limit_mib
    if limit is None:
        free = available_mib()
        limit = math.inf if free is None else resident + free
    plans = [MemoryPlan(n, _peak_mib(size, plan, networks, n, compiled=compiled) + resident) for n in _counts()]
    fitting = next((each for each in plans if each.peak_mib <= limit), None)
    least = min(plans, key=lambda each: each.peak_mib)
    if fitting is None and limit_mib is not None:
        raise ConfigError(
            f"--max-memory {_gb(limit_mib)} is too little for this scan: at least {_gb(least.peak_mib, up=True)} is "
            "needed; raise the limit"
        )
    return fitting or least


def parse_memory(text: str) -> float | None:
    """Turn `4GB`, `4GiB`, `800MB` into MiB; None for nothing.

    Raises:
        ConfigError: It is none of these.
    """
    if not text:
        return None
    units = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "mib": 2**20, "gib": 2**30, "tib": 2**40}
    lowered = text.strip().casefold()
    for unit, size in sorted(units.items(), key=lambda each: -len(each[0])):
        with suppress(ValueError):
            if lowered.endswith(unit) and 0 < (number := float(lowered.removesuffix(unit))) < math.inf:
                return number * size / 2**20
    raise ConfigError(f"--max-memory {text}: must be a size such as 4GB, 4GiB or 800MB")


def resident_mib() -> float | None:
    """Memory that this process holds now; None where the system does not say."""
    try:
        return status_kib(_PROCESS, "VmRSS") / 1024
    except (OSError, StopIteration):
        return None


def available_mib() -> float | None:
    """Memory that a new process could use without pushing out another: of the machine, or of its container."""
    try:
        lines = _MEMINFO.read_text().splitlines()
        free = int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) / 1024
    except (OSError, StopIteration):
        return None
    with suppress(OSError, ValueError):
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, (limit - used + _cached_bytes()) / 2**20)
    return free


def _cached_bytes() -> int:
    """What a container has read of files and can drop at once."""
    with suppress(OSError, ValueError, StopIteration):
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("inactive_file ")).split()[1])
    return 0


def status_kib(process: Path, key: str) -> int:
    """A figure of `/proc/PID/status`.

    Raises:
        OSError: The system has none.
        StopIteration: It has others only.
    """
    lines = (process / "status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


def _counts() -> list[int]:
    return [*range(1, 9), *(2**n for n in range(4, int(math.log2(MAX_SLABS)) + 1))]


def _peak_mib(
    size: InputSize, plan: Plan, networks: Sequence[NetworkConfig], num_slabs: int, *, compiled: bool
) -> float:
    """Highest memory above what the process holds before it reads the scan."""
    voxels = math.prod(size.shape)
    scan = voxels * size.num_channels * _FLOAT_BYTES
    mask = voxels * (1 if max(label.output_value for label in plan.labels) < 256 else 4)
    reading = scan + voxels * size.bytes_while_read
    writing = scan + 2 * mask
    computing = scan + mask + _computing_bytes(size, plan, networks, num_slabs) + compiled * _ENGINE_MIB * 2**20
    return max(reading, writing, computing) * _ALLOWANCE / 2**20 + _ONCE_MIB


def _computing_bytes(size: InputSize, plan: Plan, networks: Sequence[NetworkConfig], num_slabs: int) -> float:
    grid = grid_shape(size.ras_shape, size.ras_spacing_mm, plan)
    padded = shape3(np.maximum(grid, plan.window_vox))
    order = row_order(grid)
    rows, across, deep = in_row_order(padded, order)
    whole = window_corners(padded, plan) is None
    passes = padded if whole else plan.window_vox
    width = max(network.widths[0] for network in networks)
    network = math.prod(passes) * width * _NETWORK_BYTES
    channels, outputs = len(plan.channels), plan.num_outputs
    if whole:
        return network + math.prod(padded) * (2 * channels + 2 * outputs * len(networks)) * _FLOAT_BYTES
    window = in_row_order(plan.window_vox, order)
    stretch = across / num_slabs + 2
    seen = min(across, stretch + 2 * window[1])
    image = 1.5 * channels * min(rows, window[0]) * seen * deep
    sums = len(networks) * (outputs + 1) * window[0] * stretch * deep
    planes = 6 * len(networks) * (outputs + 1) * stretch * deep
    planes += 6 * channels * math.prod(sorted(size.shape)[1:]) + 3 * outputs * math.prod(sorted(size.shape)[1:])
    coarse = 0 if plan.coarse_factor is None else math.prod(padded) / math.prod(plan.coarse_factor)
    return network + (image + sums + planes + coarse * (2 * channels + 2 * outputs)) * _FLOAT_BYTES + coarse * width * 4


def _gb(mib: float, *, up: bool = False) -> str:
    gb = mib * 2**20 / 1e9
    return f"{math.ceil(gb * 10) / 10 if up else round(gb, 1):g} GB"
