from __future__ import annotations

from pathlib import Path

import pytest
import torch

from plans import make_plan
from tokenseg.checkpoint import ModelFacts, load_model, save_model
from tokenseg.config import PRESETS
from tokenseg.errors import ModelError
from tokenseg.peers import Peer, monai_unet

SMALL = PRESETS["tiny"]


def unet(window: tuple[int, int, int] = (32, 32, 32), channels: int = 1) -> Peer:
    torch.manual_seed(0)
    network = monai_unet(SMALL, make_plan(channels=channels, labels=2, window_vox=window)).eval()
    assert isinstance(network, Peer)
    return network


def test_the_customary_size_has_19_million_parameters() -> None:
    assert sum(parameter.numel() for parameter in unet().parameters()) == pytest.approx(19.2e6, rel=0.01)


@pytest.mark.parametrize("size", [(32, 32, 32), (17, 30, 5), (1, 16, 31)])
def test_any_size_up_to_the_window_is_one_padded_pass(size: tuple[int, int, int]) -> None:
    network, images = unet(), torch.randn(1, 1, *size)
    padded = torch.zeros(1, 1, *[-(-length // 16) * 16 for length in size])
    padded[:, :, : size[0], : size[1], : size[2]] = images
    with torch.inference_mode():
        output = network(images)
        expected = network.network(padded)[:, :, : size[0], : size[1], : size[2]]
    assert output.logits.shape == (1, 3, *size)
    assert torch.equal(output.logits, expected)
    assert (output.deep_logits, output.tokens) == ((), None)


def test_a_scan_larger_than_the_window_goes_through_windows_and_never_sees_more() -> None:
    network, sizes = unet((32, 16, 16)), []
    network.network.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape[2:])))
    with torch.inference_mode():
        assert network(torch.randn(1, 1, 60, 16, 16)).logits.shape == (1, 3, 60, 16, 16)
    assert set(sizes) == {(32, 16, 16)}
    # In training a window is what it is.
    sizes.clear()
    network.train()(torch.randn(1, 1, 40, 16, 16))
    assert sizes == [(48, 16, 16)]


def test_a_saved_peer_comes_back_only_as_what_it_is(tmp_path: Path) -> None:
    network, plan = unet(), make_plan(labels=2)
    save_model(tmp_path / "model", network, ModelFacts(name="peer", plan=plan, network=SMALL))
    loaded = load_model(tmp_path / "model", make_network=monai_unet).network
    images = torch.randn(1, 1, 32, 16, 16)
    with torch.inference_mode():
        assert torch.equal(loaded(images).logits, network(images).logits)
    with pytest.raises(ModelError, match="do not fit the network"):
        load_model(tmp_path / "model")
