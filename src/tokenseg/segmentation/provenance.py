"""Provenance of results: the conditions of a measurement, and the manifest that stands beside what was segmented."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from pydantic import Field

from tokenseg.config import Settings
from tokenseg.files import is_json_with
from tokenseg.segmentation.job import SegmentJob
from tokenseg.segmentation.status import CaseStatus

MANIFEST_COLUMNS = ("date", "commit", "tokenseg", "torch", "cpu", "gpu", "os")


def manifest(device: torch.device) -> dict[str, str]:
    """Date, versions and machine, by `MANIFEST_COLUMNS`; `gpu` is empty for a CPU."""
    gpu = ""
    if device.type == "cuda":  # pragma: no cover - cuda
        gpu = torch.cuda.get_device_name(device)
    values = (
        *(
            datetime.now(tz=UTC).date().isoformat(),
            commit(),
            version("tokenseg"),
            torch.__version__.split("+")[0],
        ),
        *(_cpu(), gpu, f"{platform.system()} {platform.release()}"),
    )
    return dict(zip(MANIFEST_COLUMNS, values, strict=True))


def commit() -> str:
    """Commit of this program, `-dirty` with changes; empty where it does not run from a checkout of its own."""
    here = Path(__file__)
    try:
        # An installed package may lie in somebody else's checkout, which does not track it.
        _git("ls-files", "--error-unmatch", here.with_name("__init__.py").name)
        return _git("describe", "--always", "--dirty")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _cpu() -> str:
    """Name and logical cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x {len(names)}" if names else platform.processor()


class ModelRecord(Settings):
    """Which model segmented."""

    name: str
    weights_sha256: str
    description_sha256: str
    """Of all that `model.json` says: plan, network, training."""
    engine: str


class Manifest(Settings):
    """Contents of `manifest.json`. It names no path, and no case but by a hash, unless names were asked for."""

    notice: str = "Research software: not a medical device."
    date: str
    tokenseg: str
    commit: str
    """Of a checkout; empty for an installed package."""
    torch: str
    python: str
    cpu: str
    gpu: str
    os: str
    device: str
    threads: int
    seed: None = None
    """Segmentation draws no random numbers."""
    deterministic: bool
    """Whether the same input gives the same mask bit for bit: on a CPU, with the same threads."""
    command: str
    """As it was given, without paths; empty where the library was called."""
    options: dict[str, str | bool]
    models: tuple[ModelRecord, ...]
    cases: tuple[CaseStatus, ...] = Field(default=())
    """Of a single mask; of a folder they are in `status.jsonl`."""


def is_manifest(path: Path) -> bool:
    """Whether a file is a manifest of ours, of whatever version."""
    return is_json_with(path, {"tokenseg", "models", "options"})


def segment_manifest(job: SegmentJob, cases: Sequence[CaseStatus] = ()) -> bytes:
    """The manifest of a segmentation, as JSON."""
    device = job.ensemble.device
    conditions = manifest(device)
    made = Manifest(
        **{name: conditions[name] for name in MANIFEST_COLUMNS},
        python=platform.python_version(),
        device=device.type,
        threads=torch.get_num_threads(),
        deterministic=device.type == "cpu",
        command=job.command,
        options={key: value for key, value in asdict(job.options).items() if value},
        models=tuple(
            ModelRecord(
                name=model.facts.name,
                weights_sha256=model.facts.weights_sha256,
                description_sha256=hashlib.sha256(model.facts.model_dump_json().encode()).hexdigest(),
                engine="torch" if model.compiled is None else "openvino",
            )
            for model in job.ensemble.models
        ),
        cases=tuple(cases),
    )
    return made.model_dump_json(indent=1).encode()
