from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import AdamW

from plans import make_plan
from tokenseg.config import PRESETS, TrainConfig
from tokenseg.errors import FileError
from tokenseg.model.network import TokenSeg
from tokenseg.training.loop import build_optimizer
from tokenseg.training.losses import training_loss
from tokenseg.training.state import SavedStep, load_state, save_state

CONFIG = TrainConfig()


def new_training(seed: int = 0, channels: int = 1) -> tuple[TokenSeg, AdamW]:
    torch.manual_seed(seed)
    network = TokenSeg(PRESETS["tiny"], make_plan(channels, window_vox=(16, 16, 16))).train()
    return network, build_optimizer(network, CONFIG)


def run_steps(network: nn.Module, optimizer: AdamW, steps: range) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(2, 1, 16, 16, 16, generator=generator)
        labels = (images > 0.5).to(torch.uint8)
        optimizer.zero_grad()
        loss = training_loss(network(images), labels, plan=make_plan(), config=CONFIG).total
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def everything(network: nn.Module, optimizer: AdamW) -> dict[str, torch.Tensor]:
    moments = optimizer.state_dict()["state"]
    return network.state_dict() | {
        f"{index}.{key}": value for index in moments for key, value in moments[index].items()
    }


def assert_identical(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert [name for name in one if one[name].dtype != other[name].dtype] == []


def test_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    network, optimizer = new_training()
    run_steps(network, optimizer, range(3))
    save_state(path, network, optimizer, SavedStep(3, 0.1 + 0.2))
    expected = run_steps(network, optimizer, range(3, 6))
    other_network, other_optimizer = new_training(seed=1)
    assert load_state(path, other_network, other_optimizer) == SavedStep(3, 0.1 + 0.2)
    assert run_steps(other_network, other_optimizer, range(3, 6)) == expected
    assert_identical(everything(network, optimizer), everything(other_network, other_optimizer))


def test_weights_and_moments_keep_their_memory_layout(tmp_path: Path) -> None:
    """Kernels choose their order of sums by layout, so that another one would cost the last bits."""
    path = tmp_path / "state.safetensors"
    network, optimizer = new_training()
    run_steps(network, optimizer, range(1))
    save_state(path, network, optimizer, SavedStep(1, 0.0))
    other_network, other_optimizer = new_training(seed=1)
    load_state(path, other_network, other_optimizer)
    strides = {name: tensor.stride() for name, tensor in everything(network, optimizer).items()}
    assert strides == {name: tensor.stride() for name, tensor in everything(other_network, other_optimizer).items()}


def test_the_state_before_the_first_step_can_be_saved(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    network, optimizer = new_training()
    save_state(path, network, optimizer, SavedStep(0, 0.0))
    other_network, other_optimizer = new_training(seed=1)
    assert load_state(path, other_network, other_optimizer) == SavedStep(0, 0.0)
    assert_identical(everything(network, optimizer), everything(other_network, other_optimizer))


def test_learning_rates_and_decay_are_those_of_the_new_optimizer(tmp_path: Path) -> None:
    """They follow from the configuration and the step, not from the file."""
    path = tmp_path / "state.safetensors"
    network, optimizer = new_training()
    optimizer.param_groups[0]["lr"] = 7.0
    save_state(path, network, optimizer, SavedStep(0, 0.0))
    other_network, other_optimizer = new_training()
    load_state(path, other_network, other_optimizer)
    assert other_optimizer.param_groups[0]["lr"] == CONFIG.learning_rate


def test_a_full_disk_keeps_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.safetensors"
    network, optimizer = new_training()
    save_state(path, network, optimizer, SavedStep(5, 0.5))

    def disk_full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(FileError, match=r"cannot write .*state\.safetensors: No space left on device"):
        save_state(path, network, optimizer, SavedStep(6, 0.6))
    monkeypatch.undo()
    assert load_state(path, network, optimizer) == SavedStep(5, 0.5)
    assert list(tmp_path.iterdir()) == [path]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def scramble(path: Path) -> None:
    path.write_bytes(os.urandom(4096))


def drop_counters(path: Path) -> None:
    save_file(load_file(path), path)


def drop_a_weight(path: Path) -> None:
    tensors = load_file(path)
    del tensors[next(name for name in tensors if name.startswith("network."))]
    save_file(tensors, path, {"step": "1", "best_dice": "0.0"})


def spoil_a_moment(path: Path) -> None:
    save_file(load_file(path) | {"optimizer.first.step": torch.zeros(())}, path, {"step": "1", "best_dice": "0.0"})


@pytest.mark.parametrize(
    "damage", [truncate, empty, scramble, drop_counters, drop_a_weight, spoil_a_moment, Path.unlink]
)
def test_a_damaged_state_is_refused_by_name(tmp_path: Path, damage: object) -> None:
    path = tmp_path / "state.safetensors"
    network, optimizer = new_training()
    save_state(path, network, optimizer, SavedStep(1, 0.0))
    damage(path)
    with pytest.raises(
        FileError, match=r"(?s)training state .*state\.safetensors cannot be used: .*; start again in a new run folder"
    ):
        load_state(path, network, optimizer)


def test_the_state_of_another_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_state(path, *new_training(), SavedStep(1, 0.0))
    with pytest.raises(FileError, match=r"(?s)size mismatch for encoder.*; start again in a new run folder"):
        load_state(path, *new_training(channels=2))
