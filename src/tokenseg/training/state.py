"""State of a run, from which a killed one goes on: one safetensors file, replaced as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from tokenseg.errors import FileError
from tokenseg.files import write_atomically


class SavedStep(NamedTuple):
    """Where a saved state stands."""

    step: int
    """Steps finished."""
    best_dice: float
    """Best foreground Dice of the quick validations so far; 0 before the first."""


def save_state(path: Path, network: nn.Module, optimizer: Optimizer, saved: SavedStep) -> None:
    """Write network, optimizer moments and counters.

    Raises:
        FileError: The file cannot be written; the one before it is kept.
    """
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(contiguous, {name: repr(value) for name, value in saved._asdict().items()}))


def load_state(path: Path, network: nn.Module, optimizer: Optimizer) -> SavedStep:
    """Put a saved state into `network` and `optimizer`.

    Raises:
        FileError: The file is missing or damaged, or belongs to another network.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts: dict[str, str] = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        network.load_state_dict(_below("network.", tensors))
        optimizer.load_state_dict(_optimizer_state(optimizer, _below("optimizer.", tensors)))
        return SavedStep(int(facts["step"]), float(facts["best_dice"]))
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise FileError(f"training state {path} cannot be used: {error}; start again in a new run folder") from error


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _optimizer_state(optimizer: Optimizer, tensors: dict[str, Tensor]) -> dict[str, object]:
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".")
        # A moment keeps the memory layout of its weight, or the next step would not be bit-identical.
        moments.setdefault(int(index), {})[key] = _laid_out(tensor)
    return {"state": moments, "param_groups": optimizer.state_dict()["param_groups"]}


def _laid_out(tensor: Tensor) -> Tensor:
    return tensor.to(memory_format=torch.channels_last_3d) if tensor.ndim == 5 else tensor
