"""Forward pass of TokenSeg beside its peers: time in one interleaved run, memory in a process each.

    python benchmarks/speed.py [--size 128] [--threads 2] [--rounds 5] [--csv benchmarks/speed.csv]

Peers: MONAI `UNet` (32..512, two residual units) and nnU-Net's `PlainConvUNet` in its default 3D configuration
(32..320, six stages). The latter's package replaces torch through its dependencies; install it without them:

    pip install --no-deps dynamic-network-architectures

Time: median over rounds in which every network runs once, after one warm-up each, so that drift of the machine meets
all alike. Memory: highest resident size during a forward pass, above that before it (libraries and weights loaded).
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from tokenseg.config import PRESETS, ChannelNormalisation, Label, Plan
from tokenseg.model.network import TokenSeg
from tokenseg.peers import bare_monai_unet

COLUMNS = (
    *("date", "commit", "network", "parameters_m", "precision", "size", "threads", "rounds", "median_ms", "min_ms"),
    *("max_ms", "peak_mib", "torch", "cpu"),
)


def main() -> None:
    """Parse, measure, append rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_name("speed.csv"))
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--precision", default="fp32", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    images = torch.randn(1, 1, *[arguments.size] * 3, generator=torch.Generator().manual_seed(0))
    if arguments.memory_of:
        print(peak_mib(NETWORKS[arguments.memory_of]().eval(), images, arguments.precision))
        return
    rows = [row for precision in ("fp32", "bf16") for row in measure(images, precision, arguments)]
    new = not arguments.csv.exists()
    with arguments.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def measure(images: Tensor, precision: str, arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Time all networks in turn, then weigh each in its own process."""
    networks = {name: make().eval() for name, make in NETWORKS.items()}
    times: dict[str, list[float]] = {name: [] for name in networks}
    for round_number in range(arguments.rounds + 1):
        for name, network in networks.items():
            started = time.perf_counter()
            forward(network, images, precision)
            if round_number:
                times[name].append(1000 * (time.perf_counter() - started))
    rows = []
    for name, network in networks.items():
        row = {
            "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
            "commit": _output("git", "describe", "--always", "--dirty"),
            "network": name,
            "parameters_m": f"{sum(parameter.numel() for parameter in network.parameters()) / 1e6:.2f}",
            "precision": precision,
            "size": arguments.size,
            "threads": arguments.threads,
            "rounds": arguments.rounds,
            "median_ms": f"{statistics.median(times[name]):.1f}",
            "min_ms": f"{min(times[name]):.1f}",
            "max_ms": f"{max(times[name]):.1f}",
            "peak_mib": _weigh(name, precision, arguments),
            "torch": torch.__version__.split("+")[0],
            "cpu": _cpu(),
        }
        rows.append(row)
        print({key: row[key] for key in ("network", "precision", "median_ms", "peak_mib")}, flush=True)
    return rows


def forward(network: nn.Module, images: Tensor, precision: str) -> None:
    """One forward pass without gradients."""
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        network(images)


def peak_mib(network: nn.Module, images: Tensor, precision: str) -> str:
    """Highest resident memory of a forward pass above that before it (Linux)."""
    before = _status_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    forward(network, images, precision)
    return f"{(_status_kib('VmHWM') - before) / 1024:.0f}"


def tokenseg(tokens: bool = True) -> nn.Module:
    """Preset `small` on an isotropic one-channel plan with two labels."""
    labels = tuple(Label(name=str(value), values=(value,), output_value=value) for value in (1, 2))
    plan = Plan(
        channels=("MRI",),
        source_channels=("MRI",),
        normalisation=(ChannelNormalisation(kind="zscore"),),
        labels=labels,
        spacing_mm=(1, 1, 1),
        window_vox=(128, 128, 128),
        whole_limit_vox=(256, 256, 256),
        strides=((2, 2, 2),) * 4,
        grid=(4, 5, 5),
        batch_size=2,
        steps=1000,
    )
    return TokenSeg(PRESETS["small"].model_copy(update={"tokens": tokens}), plan)


def nnunet() -> nn.Module:
    """nnU-Net's default 3D network: six stages, widths 32 to 320."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    return PlainConvUNet(
        input_channels=1,
        n_stages=6,
        features_per_stage=(32, 64, 128, 256, 320, 320),
        conv_op=nn.Conv3d,
        kernel_sizes=3,
        strides=(1, 2, 2, 2, 2, 2),
        n_conv_per_stage=2,
        num_classes=3,
        n_conv_per_stage_decoder=2,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=False,
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "tokenseg-small": tokenseg,
    "tokenseg-small-off": lambda: tokenseg(tokens=False),
    "monai-unet": lambda: bare_monai_unet(1, 3),
    "nnunet-plainconv": nnunet,
}


def _weigh(name: str, precision: str, arguments: argparse.Namespace) -> str:
    command = [sys.executable, __file__, "--memory-of", name, "--precision", precision]
    return _output(*command, "--size", str(arguments.size), "--threads", str(arguments.threads))


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _status_kib(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key + ":")).split()[1])


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} x {len(names)}"


if __name__ == "__main__":
    sys.exit(main())
