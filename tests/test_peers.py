from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from plans import make_plan
from tokenseg.benchmark.peers import PEERS, Peer, make_peer, monai_unet
from tokenseg.config import PRESETS
from tokenseg.errors import ConfigError, ModelError
from tokenseg.saved_model.checkpoint import ModelFacts, load_model, save_model

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


WINDOW = (24, 40, 24)


def millions(network: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in network.parameters()) / 1e6


@pytest.mark.parametrize("name", PEERS)
def test_every_peer_trains_on_a_window_runs_on_a_larger_scan_and_comes_back_from_its_file(
    name: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    plan = make_plan(channels=2, labels=2, window_vox=WINDOW)
    network = make_peer(name)(SMALL, plan)
    output = network.train()(torch.randn(1, 2, *WINDOW))
    assert output.logits.shape == (1, 3, *WINDOW)
    output.logits.square().mean().backward()
    first = next(network.parameters())
    assert first.grad is not None
    assert bool(first.grad.abs().sum() > 0)
    facts = ModelFacts(name="peer", plan=plan, network=SMALL)
    save_model(tmp_path / "model", network, facts)
    loaded = load_model(tmp_path / "model", make_network=make_peer(name)).network
    image = torch.randn(1, 2, 30, *WINDOW[1:])
    with torch.inference_mode():
        logits = network.eval()(image).logits
        assert logits.shape == (1, 3, *image.shape[2:])
        window = image[:, :, : WINDOW[0]]
        assert torch.equal(loaded(window).logits, network(window).logits)
    assert bool(torch.isfinite(logits).all())


# 128 voxels are halved to 64, 32, 16, 8, 4: six stages of 32 to 320 channels, the same for both residual presets.
@pytest.mark.parametrize(
    ("name", "parameters_m"),
    [
        ("nnunet-plainconv", 31.2),
        ("nnunet-resenc-m", 102.35),
        ("nnunet-resenc-l", 102.35),
        ("monai-segresnet", 4.7),
        ("monai-swinunetr", 62.2),
    ],
)
def test_the_customary_sizes(name: str, parameters_m: float) -> None:
    network = PEERS[name](1, 3, (128, 128, 128))
    assert millions(network) == pytest.approx(parameters_m, rel=0.005)


@pytest.mark.parametrize(
    ("window", "multiple"),
    [((128, 128, 128), (32, 32, 32)), ((40, 56, 40), (8, 8, 8)), ((16, 64, 5), (4, 16, 1)), ((9, 9, 9), (2, 2, 2))],
)
def test_nnunets_strides_leave_at_least_four_voxels(
    window: tuple[int, int, int], multiple: tuple[int, int, int]
) -> None:
    network = make_peer("nnunet-plainconv")(SMALL, make_plan(window_vox=window))
    assert isinstance(network, Peer)
    assert network.multiple_vox == multiple


def test_resenc_l_pools_as_for_three_times_the_voxels() -> None:
    networks = {size: make_peer(f"nnunet-resenc-{size}")(SMALL, make_plan(window_vox=(48, 48, 48))) for size in "ml"}
    # 48 -> 24 -> 12 -> 6, and 69 -> 35 -> 18 -> 9 -> 5.
    assert {size: network.multiple_vox[0] for size, network in networks.items()} == {"m": 8, "l": 16}
    assert millions(networks["l"]) > 2 * millions(networks["m"])


def test_unetr_always_sees_its_one_size() -> None:
    network, sizes = make_peer("monai-unetr")(SMALL, make_plan(window_vox=(20, 32, 16))).eval(), []
    network.network.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape[2:])))
    with torch.inference_mode():
        for size in ((20, 32, 16), (7, 9, 3), (25, 32, 16)):
            assert network(torch.randn(1, 1, *size)).logits.shape == (1, 2, *size)
    assert set(sizes) == {(32, 32, 16)}


def test_what_cannot_be_built_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no peer is called 'unet'; choose from monai-unet, monai-basicunet"):
        make_peer("unet")
    with pytest.raises(ConfigError, match="monai-vnet repeats its 3 input channels to 16 and takes 1, 2, 4, 8 or 16"):
        PEERS["monai-vnet"](3, 2, WINDOW)
    monkeypatch.setitem(sys.modules, "dynamic_network_architectures.architectures", None)
    with pytest.raises(ConfigError, match="pip install --no-deps dynamic-network-architectures"):
        PEERS["nnunet-plainconv"](1, 2, WINDOW)
