"""OpenVINO, an optional engine: the same forward pass on a CPU, several times faster than in torch.

A network is traced, converted by OpenVINO's own reader of torch, and compiled. Tracing instead of `torch.export`: the
latter reasons about every size as a symbol, half a minute for what takes seconds here. Tracing would take a size for a
constant without a word, so a converted model is compared with torch at other sizes before it is used.

What `choose_engine` converts is kept in the user's cache folder, as data (graph and weights). Nothing leaves the
computer: OpenVINO reports each import and each conversion to its makers unless told not to (`_import_openvino`).
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import nn

from tokenseg.about import __version__
from tokenseg.config import EngineName
from tokenseg.device import bfloat16_helps
from tokenseg.errors import ConfigError, FileError, ModelError
from tokenseg.files import remove_leftovers, write_atomically
from tokenseg.model.passes import Forward, Parts, Pass, joined, parts_of
from tokenseg.saved_model.checkpoint import Model
from tokenseg.shapes import Images

Precision: TypeAlias = Literal["fp32", "bf16"]
Size: TypeAlias = tuple[int, int, int]
Converted: TypeAlias = Any
"""An `openvino.Model`; OpenVINO brings no types."""
Compiled: TypeAlias = Any
"""An `openvino.CompiledModel`."""
Core: TypeAlias = Any
"""An `openvino.Core`."""

CACHED_MODELS = 5
_COMPILED_SIZES = 4
_EXAMPLE_VOX, _CHECKED_VOX = (36, 44, 40), ((18, 30, 52), (47, 33, 21))
_SHA256_BYTES, _LENGTH_BYTES = 32, 8


class EngineChoice(NamedTuple):
    """What is to compute, and in which precision."""

    models: list[Model]
    engine: Literal["torch", "openvino"]
    precision: Precision
    problem: str
    """Why OpenVINO is installed and yet not used; else empty."""


def is_installed() -> bool:
    """Whether the extra `openvino` is there."""
    return find_spec("openvino") is not None


def choose_engine(models: Sequence[Model], engine: EngineName, *, threads: int | None = None) -> EngineChoice:
    """Give models the engine to segment with.

    Args:
        models: Of one device.
        engine: `auto` is OpenVINO on a CPU where it is installed and can take the models, else torch.
        threads: CPU threads for OpenVINO; None takes as many as torch.

    Raises:
        ConfigError: `openvino` is asked for without the extra, or with a GPU.
        ModelError: `openvino` is asked for and cannot take a model.
    """
    device = models[0].device
    precision: Precision = "bf16" if bfloat16_helps(device) else "fp32"
    as_they_are = EngineChoice(list(models), "torch", precision, "")
    if engine == "openvino":
        _check_usable(device)
    elif engine == "torch" or device.type != "cpu" or not is_installed():
        return as_they_are
    try:
        compiled = [replace(model, compiled=_forward_of(model, threads, precision)) for model in models]
    except Exception as error:  # whatever a tracer, a converter and a compiler may raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        problem = f"OpenVINO cannot take this model ({reason})"
        if engine == "openvino":
            raise ModelError(f"{problem}; use --engine torch") from error
        return as_they_are._replace(problem=problem)
    return EngineChoice(compiled, "openvino", precision, "")


def compile_openvino(network: nn.Module, channels: int, *, threads: int | None, precision: Precision) -> Forward:
    """Make a forward pass of any network, converted and compiled anew for each size that it meets.

    Args:
        network: On the CPU, in evaluation mode; returns logits (B, L, X, Y, Z) or a `TokenSegOutput`.
        channels: C of the images.
        threads: CPU threads; None takes as many as torch.
        precision: Of the computation; what goes in and comes out is float32.

    Returns:
        A function of images whose first call at a size takes seconds. The last few sizes stay compiled.
    """
    parts = parts_of(network)

    def compile_for(size: Size) -> Compiled:
        return _compile(_convert(parts, channels, size), threads, precision)

    return _by_size(parts, compile_for)


def _check_usable(device: torch.device) -> None:
    if not is_installed():
        raise ConfigError("--engine openvino needs the extra 'openvino': pip install 'tokenseg[openvino]'")
    if device.type != "cpu":
        raise ConfigError(f"--engine openvino computes on the CPU, not on {device.type}; add --device cpu")


def _forward_of(model: Model, threads: int | None, precision: Precision) -> Forward:
    """One pass of a model. Windows have a compilation of their own, which is faster; all other sizes share one.

    Which of the two computes depends on the size alone, so that a scan gives the same mask whatever came before it.
    """
    parts, plan = parts_of(model.network), model.facts.plan
    if not parts.any_size:
        return compile_openvino(model.network, len(plan.channels), threads=threads, precision=precision)
    content = _stored_conversion(model)
    any_size = _compile(_unpack(content), threads, precision)
    window = _padded_size(parts, plan.window_vox)

    def compile_for(size: Size) -> Compiled:
        if size != window:
            return any_size
        converted = _unpack(content)
        converted.reshape([1, len(plan.channels), *size])
        return _compile(converted, threads, precision)

    return _by_size(parts, compile_for)


def _by_size(parts: Parts, compile_for: Callable[[Size], Compiled]) -> Forward:
    """A forward pass that keeps what was compiled for the last few sizes."""
    compiled: dict[Size, Any] = {}

    def forward_one(image: Images) -> Pass:
        x, y, z = image.shape[2:]
        padding = parts.padding((x, y, z))
        padded = nn.functional.pad(image, padding) if any(padding) else image
        size = (padded.shape[2], padded.shape[3], padded.shape[4])
        # The size used last stands last.
        request = compiled.pop(size, None) or compile_for(size).create_infer_request()
        compiled[size] = request
        if len(compiled) > _COMPILED_SIZES:
            del compiled[next(iter(compiled))]
        results = request.infer({0: padded.contiguous().numpy()}, share_inputs=True, share_outputs=True)
        found = parts.finished([torch.from_numpy(results[number]) for number in range(len(results))], (x, y, z))
        return found._replace(logits=found.logits[:, :, :x, :y, :z])

    def forward(images: Images) -> Pass:
        passes = [forward_one(image) for image in torch.split(images, 1)]
        return passes[0] if len(passes) == 1 else joined(passes)

    return forward


# ---- conversion


def _import_openvino() -> ModuleType:
    """Import OpenVINO without its telemetry.

    Without a file in the home folder that forbids it, `openvino` takes consent for granted: it writes an identifier to
    `~/intel`, and sends each import and each conversion to Google Analytics. While the telemetry package cannot be
    imported, OpenVINO puts an empty stand-in of its own in its place, for as long as the process lives. Where somebody
    imported OpenVINO before, nothing is sent on our account either, as the readers used here do not report.
    """
    name = "openvino_telemetry"
    before = {name: sys.modules[name]} if name in sys.modules else {}
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        openvino = import_module("openvino")
        import_module("openvino.frontend.pytorch.ts_decoder")
    finally:
        del sys.modules[name]
        sys.modules.update(before)
    return openvino


@cache
def _core() -> Core:
    """The only one of the process, never dropped.

    Each core's CPU plugin gives the thread that loads it a stack for signal handlers, and on its way out restores the
    one before. That may belong to a core dropped earlier, and be unmapped: the next signal that Python handles, Ctrl-C
    say, would then be a segmentation fault.
    """
    return _import_openvino().Core()


def _convert(parts: Parts, channels: int, size: Size) -> Converted:
    """Trace at a size and convert for this size."""
    openvino = _import_openvino()
    example = torch.zeros(1, channels, *size)
    with torch.no_grad(), warnings.catch_warnings():
        # The tracer warns of every Python number made from a size.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(parts, example, check_trace=False)  # type: ignore[no-untyped-call]
    decoder = openvino.frontend.pytorch.ts_decoder.TorchScriptPythonDecoder(traced, shared_memory=False)
    reader = openvino.frontend.FrontEndManager().load_by_framework("pytorch")
    converted = reader.convert(reader.load(decoder))
    converted.reshape([1, channels, *size])
    return converted


def _compile(converted: Converted, threads: int | None, precision: Precision) -> Compiled:
    settings = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
        "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        # Several processes would be pinned to the same cores.
        "ENABLE_CPU_PINNING": False,
    }
    return _core().compile_model(converted, "CPU", settings)


def _convert_any_size(model: Model) -> bytes:
    """Convert for any size of at least the network's padding, and compare with torch at other sizes.

    Raises:
        ModelError: The results differ.
    """
    parts, channels = parts_of(model.network), len(model.facts.plan.channels)
    converted = _convert(parts, channels, _padded_size(parts, _EXAMPLE_VOX))
    converted.reshape([1, channels, -1, -1, -1])
    content = _pack(converted)
    compiled = _compile(_unpack(content), None, "fp32")
    forward = _by_size(parts, lambda _: compiled)
    generator = torch.Generator().manual_seed(0)
    for vox in _CHECKED_VOX:
        images = torch.randn(1, channels, *_padded_size(parts, vox), generator=generator)
        with torch.inference_mode():
            expected = model.network(images).logits
        off = (forward(images).logits - expected).abs() > 1e-3 * expected.abs().amax()
        # Not none at all: two tokens or blocks of the same score may come in another order.
        if off.float().mean() > 0.1:
            raise ModelError("its result differs from torch's")
    return content


def _padded_size(parts: Parts, size: Size) -> Size:
    # Padding comes as torch's pad takes it, the last axis first.
    padding = parts.padding(size)
    return size[0] + padding[5], size[1] + padding[3], size[2] + padding[1]


# ---- cache


def _stored_conversion(model: Model) -> bytes:
    """What was converted once, from the cache folder; without one that can be used, converted anew."""
    path = _cache_path(model)
    content = _read_stored(path) if path else None
    if content is None:
        content = _convert_any_size(model)
        if path:
            _store(path, content)
    return content


def _cache_path(model: Model) -> Path | None:
    """Place of a saved model's conversion; None for weights that were never saved, or without a home folder."""
    if not model.facts.weights_sha256:
        return None
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    versions = [__version__, version("openvino"), torch.__version__]
    facts = model.facts
    parts = [facts.weights_sha256, facts.plan.model_dump_json(), facts.network.model_dump_json(), *versions]
    # Sources too: in a checkout the network changes while the version stays.
    sources = [Path(__file__), *sorted((Path(__file__).parents[1] / "model").glob("*.py"))]
    digest = hashlib.sha256("\n".join([*parts, *(source.read_text("utf-8") for source in sources)]).encode())
    return root / "tokenseg" / "openvino" / f"{digest.hexdigest()}.ir"


def _read_stored(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if hashlib.sha256(content[_SHA256_BYTES:]).digest() != content[:_SHA256_BYTES]:
        return None
    with suppress(OSError):
        os.utime(path)
    return content


def _store(path: Path, content: bytes) -> None:
    # A cache that cannot be written is none; the conversion at hand is good.
    with suppress(OSError, FileError):
        write_atomically(path, content)
        remove_leftovers(path.parent)
        newest_first = sorted(path.parent.glob("*.ir"), key=lambda other: other.stat().st_mtime, reverse=True)
        for old in newest_first[CACHED_MODELS:]:
            old.unlink(missing_ok=True)


def _pack(converted: Converted) -> bytes:
    """SHA-256 of the rest, length of the graph, graph (XML), weights."""
    with tempfile.TemporaryDirectory() as folder:
        graph, weights = Path(folder) / "graph.xml", Path(folder) / "graph.bin"
        _import_openvino().serialize(converted, str(graph), str(weights))
        xml = graph.read_bytes()
        rest = len(xml).to_bytes(_LENGTH_BYTES, "little") + xml + weights.read_bytes()
    return hashlib.sha256(rest).digest() + rest


def _unpack(content: bytes) -> Converted:
    openvino = _import_openvino()
    start = _SHA256_BYTES + _LENGTH_BYTES
    stop = start + int.from_bytes(content[_SHA256_BYTES:start], "little")
    weights = openvino.Tensor(np.frombuffer(content, dtype=np.uint8, offset=stop).copy())
    return _core().read_model(content[start:stop], weights)
