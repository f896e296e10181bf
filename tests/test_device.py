"""Choice of device and precision."""

from __future__ import annotations

import pytest
import torch

from tokenseg.config import DeviceName
from tokenseg.device import autocast, bfloat16_helps, choose_device
from tokenseg.errors import ConfigError


def pretend(monkeypatch: pytest.MonkeyPatch, *, cuda: bool, mps: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_the_fastest_there_is(cuda: bool, mps: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda=cuda, mps=mps)
    assert choose_device("auto") == torch.device(expected)
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device(expected) == torch.device(expected)


@pytest.mark.parametrize(
    ("name", "mps", "available"), [("cuda", False, "cpu"), ("cuda", True, "mps, cpu"), ("mps", False, "cpu")]
)
def test_device_that_is_not_there(name: DeviceName, mps: bool, available: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda=False, mps=mps)
    with pytest.raises(ConfigError) as caught:
        choose_device(name)
    assert str(caught.value) == f"--device {name}: this machine has no usable {name} device; available: {available}"


@pytest.mark.parametrize("amx", [True, False])
def test_bfloat16_on_a_cpu_needs_amx(amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert bfloat16_helps(torch.device("cpu")) is amx
    values = torch.ones(2, 2)
    with autocast(torch.device("cpu")):
        assert (values @ values).dtype == (torch.bfloat16 if amx else torch.float32)


def test_bfloat16_is_off_where_torch_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert bfloat16_helps(torch.device("cpu")) is False


def test_bfloat16_is_off_on_torch_2_9_and_on_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert bfloat16_helps(torch.device("mps")) is False
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    assert bfloat16_helps(torch.device("cpu")) is False
