"""The device that computes, and in which precision."""

from __future__ import annotations

import torch

from tokenseg.config import DeviceName
from tokenseg.errors import ConfigError


def choose_device(name: DeviceName) -> torch.device:
    """Take the named device; `auto` takes CUDA, then MPS, then the CPU.

    Raises:
        ConfigError: The named device is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    if not available[name]:
        there = ", ".join(kind for kind, present in available.items() if present)
        raise ConfigError(f"--device {name}: this machine has no usable {name} device; available: {there}")
    return torch.device(name)


def bfloat16_helps(device: torch.device) -> bool:
    """Whether bf16 autocast makes the network faster here.

    True for CUDA devices with native bf16 and for CPUs with AMX. False on torch 2.9, whose 3D convolutions under
    autocast are about four times slower (pytorch issue 166122), and on MPS.
    """
    if torch.__version__.startswith("2.9."):
        return False
    if device.type == "cuda":  # pragma: no cover - cuda
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return device.type == "cpu" and has_amx is not None and bool(has_amx())


def autocast(device: torch.device) -> torch.autocast:
    """Context for a forward pass: bf16 where it helps, else full precision."""
    # A weight is used once a pass: nothing is lost without autocast's cache, with which no pass can be recorded.
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16_helps(device), cache_enabled=False)
