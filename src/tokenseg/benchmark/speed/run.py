"""The work of `tokenseg benchmark speed`: every network on every cube, a row as soon as it is known.

What is compared is always under the same conditions: the reference network runs in turn with the other one, in the same
process, at the same precision, in the same engine.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch

from tokenseg.benchmark.rows import Row, append, read_rows
from tokenseg.benchmark.speed.end_to_end import SCAN_VOX, STAGES
from tokenseg.benchmark.speed.latency import ratio, summarise
from tokenseg.benchmark.speed.memory import run_limited
from tokenseg.benchmark.speed.networks import check_names
from tokenseg.benchmark.speed.options import PrecisionName, SpeedOptions
from tokenseg.benchmark.speed.passes import Setting
from tokenseg.benchmark.speed.rows import COLUMNS, FORWARD
from tokenseg.benchmark.speed.worker import Job, Result, do, fault_text, to_json
from tokenseg.device import bfloat16_helps, choose_device
from tokenseg.errors import ConfigError
from tokenseg.inference.memory import available_mib
from tokenseg.messages import times
from tokenseg.progress import Progress, Silent
from tokenseg.segmentation.provenance import manifest

_SHARE_OF_MEMORY = 0.9
_COMPUTES_ON = {"openvino": "cpu", "cuda-graph": "cuda"}
"""Engines that are not for every device."""


@dataclass(frozen=True)
class _Cell:
    """One row to measure."""

    network: str
    reference: str | None
    """Network to run in turn with; None for the reference itself, or where it cannot run."""
    setting: Setting


def measure_speed(options: SpeedOptions, progress: Progress | None = None) -> list[Row]:
    """Measure what is asked for.

    A network that does not fit into memory, or is not installed, becomes a row whose note says so.

    Args:
        options: Networks, sizes and conditions; rows go to its `csv` one by one.
        progress: Told about each row.

    Returns:
        The rows, texts by `COLUMNS`.

    Raises:
        ConfigError: The options cannot be meant, an engine is not of the device, or the file has other columns.
        FileError: The file cannot be read or written.
    """
    options.check()
    check_names(options.networks)
    if options.csv is not None:
        read_rows(options.csv, COLUMNS)
    device, progress = choose_device(options.device), progress or Silent()
    for engine, kind in _COMPUTES_ON.items():
        if engine in options.engines and device.type != kind:
            raise ConfigError(f"--engines {engine}: computes on {kind}, not on {device.type}; give --device {kind}")
    conditions = manifest(device)
    settings = [
        Setting(size, precision, engine, device.type, options.threads or torch.get_num_threads())
        for size, precision, engine in product(options.sizes, options.precisions, options.engines)
    ]
    progress.stage("measuring", len(settings) * len(options.networks) + options.end_to_end)
    rows = []
    for new in _measured(options, settings):
        found = [dict.fromkeys(COLUMNS, "") | row | conditions for row in new]
        if options.csv is not None:
            append(options.csv, COLUMNS, found)
        rows.extend(found)
        progress.advance(_note(found[-1]))
    return rows


def _measured(options: SpeedOptions, settings: list[Setting]) -> Iterator[list[Row]]:
    reference = options.networks[0]
    for setting in settings:
        row = _row(_Cell(reference, None, setting), options)
        yield [row]
        beside = reference if row.get("median_ms") else None
        for network in options.networks[1:]:
            yield [_row(_Cell(network, beside, setting), options)]
    if options.end_to_end:
        yield _end_to_end(reference, settings[0], options)


def _row(cell: _Cell, options: SpeedOptions) -> Row:
    """Times beside the reference, then memory; nothing further once it does not fit."""
    row = _identity(FORWARD, cell.network, cell.setting, options)
    latency = _latency(cell, options)
    result = _run(latency)
    if result.fault:
        return row | {"note": result.fault}
    # These prepare at the first pass and then keep their buffers: what a pass needs cannot be told from the rest.
    weighed = cell.setting.engine not in ("openvino", "cuda-graph")
    memory = _run(replace(latency, task="memory", networks=(cell.network,))) if weighed else Result()
    is_reference = cell.network == options.networks[0]
    row |= {
        "parameters_m": _text(result.parameters_m, 2),
        "gflop": _text(result.gflop, 1),
        "reference": cell.network if is_reference else cell.reference or "",
        "peak_mib": _text(memory.peak_mib, 0),
        "note": memory.fault,
        **_times(result, ""),
    }
    return row | _training(cell, options) if options.training else row


def _training(cell: _Cell, options: SpeedOptions) -> Row:
    latency = replace(_latency(cell, options), training=True)
    result = _run(latency)
    if result.fault and cell.reference:
        # It may be the reference whose training does not fit beside it.
        result = _run(replace(latency, networks=(cell.network,)))
    if result.fault:
        return {"note": f"training: {result.fault}"}
    memory = _run(replace(latency, task="memory", networks=(cell.network,)))
    return {"training_peak_mib": _text(memory.peak_mib, 0), **_times(result, "training_")}


def _latency(cell: _Cell, options: SpeedOptions) -> Job:
    in_turn = (cell.network, cell.reference) if cell.reference else (cell.network,)
    return Job("latency", in_turn, cell.setting, options.rounds)


def _end_to_end(network: str, setting: Setting, options: SpeedOptions) -> list[Row]:
    """A row for each stage, and one for their sum."""
    precision: PrecisionName = "bf16" if bfloat16_helps(torch.device(setting.device)) else "fp32"
    setting = setting._replace(precision=precision, engine="torch")
    result = _run(Job("end-to-end", (network,), setting, options.rounds))
    size = {"size": times(SCAN_VOX)}
    if result.fault:
        return [_identity("end to end", network, setting, options) | size | {"note": result.fault}]
    stages = dict(zip(STAGES, result.seconds, strict=True))
    stages["end to end"] = [sum(values) for values in zip(*result.seconds, strict=True)]
    return [
        _identity(stage, network, setting, options) | size | _times(Result(seconds=[values]), "")
        for stage, values in stages.items()
    ]


def _identity(stage: str, network: str, setting: Setting, options: SpeedOptions) -> Row:
    return {
        "stage": stage,
        "network": network,
        "device": setting.device,
        "engine": setting.engine,
        "precision": setting.precision,
        "size": str(setting.size),
        "threads": str(setting.threads),
    }


def _times(result: Result, prefix: str) -> Row:
    """Of the first of the result's networks; the ratio is to the second, if there is one."""
    own, *others = result.seconds
    summary = summarise(own)
    return {
        f"{prefix}rounds": str(summary.rounds),
        f"{prefix}median_ms": _text(summary.median_ms, 1),
        f"{prefix}min_ms": _text(summary.min_ms, 1),
        f"{prefix}max_ms": _text(summary.max_ms, 1),
        f"{prefix}ratio": _text(ratio(own, others[0]), 3) if others else "",
    }


def _run(job: Job) -> Result:
    """Do a job in a child process that ends once it holds most of the memory that is free now.

    On a GPU in this process: its allocator tells works apart, and says when there is no memory. To load all libraries
    anew takes far longer than to measure.
    """
    if job.setting.device == "cuda":  # pragma: no cover - cuda
        try:
            result = do(job)
        except Exception as error:  # of another package's network: in a process of its own it would be a row too
            result = Result(fault=fault_text(error))
        gc.collect()
        torch.cuda.empty_cache()
        return result
    free_mib = available_mib()
    limit_mib = None if free_mib is None else _SHARE_OF_MEMORY * free_mib
    with tempfile.TemporaryDirectory() as folder:
        job_path, result_path = Path(folder) / "job.json", Path(folder) / "result.json"
        job_path.write_text(to_json(job), encoding="utf-8")
        command = [sys.executable, "-P", "-m", "tokenseg.benchmark.speed.worker", str(job_path), str(result_path)]
        ended = run_limited(command, limit_mib)
        if ended.over_limit:
            return Result(fault=f"does not fit into the {limit_mib:.0f} MiB that it may use")
        if ended.code:
            last = ended.errors.strip().splitlines()[-1:]
            return Result(fault=f"ended with code {ended.code}: {''.join(last) or 'without a word'}")
        return Result(**json.loads(result_path.read_text(encoding="utf-8")))


def _text(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _note(row: Row) -> str:
    what = f"{row['network']} {row['size']} {row['precision']}"
    return f"{what} {row['median_ms']} ms" if row["median_ms"] else f"{what}: {row['note']}"
