"""Forward passes and training steps, as they are timed and weighed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from tokenseg.benchmark.speed.networks import CHANNELS, OUTPUTS, build_network, make_plan
from tokenseg.benchmark.speed.options import PrecisionName, SpeedEngine
from tokenseg.config import TrainConfig
from tokenseg.errors import ConfigError
from tokenseg.inference.cuda_graph import Recording
from tokenseg.training.losses import training_loss

BATCH_SIZE = 2


class Setting(NamedTuple):
    """How a network is run; the same for both sides of a comparison."""

    size: int
    """Edge of the cube, voxels."""
    precision: PrecisionName
    engine: SpeedEngine
    device: str
    threads: int


class Counted(NamedTuple):
    """What a network is made of."""

    parameters_m: float
    """Millions."""
    gflop: float
    """Of one forward pass, by torch's counter: two for a multiplication with its addition."""


class Timed(NamedTuple):
    """A network that is ready to run."""

    network: nn.Module
    run: Callable[[], None]
    """One forward pass, or one training step."""


def forward_pass(name: str, setting: Setting) -> Timed:
    """A network, and its forward pass over one image of noise.

    Raises:
        ConfigError: The network or the engine is not installed, or the engine does not compute there.
    """
    device = torch.device(setting.device)
    network = build_network(name, _cube(setting.size)).to(device)
    images = torch.randn(1, CHANNELS, *_cube(setting.size), generator=torch.Generator().manual_seed(0)).to(device)
    if setting.engine == "openvino":
        return Timed(network, _openvino_pass(network, images, setting))
    computed = torch.compile(network) if setting.engine == "torch-compile" else network

    def compute(images: Tensor) -> None:
        with torch.inference_mode(), _autocast(setting, cached=False):
            computed(images)

    started: Callable[[Tensor], None] = compute
    if setting.engine == "cuda-graph":  # pragma: no cover - cuda
        compute(images)  # what it keeps may not be made while it is recorded
        started = Recording(compute, images)

    def run() -> None:
        started(images)
        _wait_for(device)

    return Timed(network, run)


def training_step(name: str, setting: Setting) -> Timed:
    """A network, and its training step over a batch of two images of noise, with this project's loss and AdamW.

    The optimiser's first step belongs to what a training needs; it is made at the first run.

    Raises:
        ConfigError: The network is not installed, or the engine does not train.
    """
    if setting.engine != "torch":
        raise ConfigError(f"{setting.engine} is for inference; training steps are measured with torch")
    device, generator = torch.device(setting.device), torch.Generator().manual_seed(0)
    network = build_network(name, _cube(setting.size)).to(device).train()
    images = torch.randn(BATCH_SIZE, CHANNELS, *_cube(setting.size), generator=generator).to(device)
    labels = torch.randint(OUTPUTS, (BATCH_SIZE, 1, *_cube(setting.size)), generator=generator).to(device)
    plan, config = make_plan(_cube(setting.size)), TrainConfig()
    optimizer = torch.optim.AdamW(network.parameters())

    def run() -> None:
        with _autocast(setting):
            output = network(images)
        optimizer.zero_grad()
        loss: Tensor = training_loss(output, labels, plan=plan, config=config).total
        torch.autograd.backward(loss)
        optimizer.step()
        _wait_for(device)

    return Timed(network, run)


def count(network: nn.Module, setting: Setting) -> Counted:
    """Count parameters and operations, the latter by running the network once as it is, without an engine."""
    images = torch.zeros(1, CHANNELS, *_cube(setting.size), device=setting.device)
    # The counter does not know this form of a convolution, which ours take on a CPU.
    known = {torch.ops.aten.mkldnn_convolution: _convolution_flop}
    with FlopCounterMode(display=False, custom_mapping=known) as counter, torch.inference_mode(), _autocast(setting):
        network(images)
    parameters_m = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    return Counted(parameters_m, counter.get_total_flops() / 1e9)


def _convolution_flop(images: Sequence[int], kernel: Sequence[int], *_: object, out_shape: Sequence[int]) -> int:
    return int(conv_flop_count(list(images), list(kernel), list(out_shape)))


def load_training_libraries() -> None:
    """Make a training step of next to nothing, so that what it loads does not count as memory of the network."""
    tiny = nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(tiny.parameters())
    tiny(torch.zeros(1, 1)).sum().backward()
    optimizer.step()


def _openvino_pass(network: nn.Module, images: Tensor, setting: Setting) -> Callable[[], None]:
    from tokenseg.inference.engine import compile_openvino, is_installed

    if not is_installed():
        raise ConfigError("openvino is not installed: pip install 'tokenseg[openvino]'")
    compiled = compile_openvino(network, CHANNELS, threads=setting.threads, precision=setting.precision)

    def run() -> None:
        compiled(images)

    return run


def _autocast(setting: Setting, *, cached: bool = True) -> torch.autocast:
    """At inference not cached, as in `segment`: each weight is used once."""
    return torch.autocast(setting.device, torch.bfloat16, enabled=setting.precision == "bf16", cache_enabled=cached)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":  # pragma: no cover - cuda
        torch.cuda.synchronize(device)
    elif device.type == "mps":  # pragma: no cover - mps
        torch.mps.synchronize()


def _cube(size: int) -> tuple[int, int, int]:
    return size, size, size
