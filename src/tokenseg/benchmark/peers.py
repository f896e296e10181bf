"""Other people's networks behind TokenSeg's output type, so that all go through the same pipeline.

All come from their packages, in the size that is customary for them: MONAI's, and nnU-Net's from
`dynamic-network-architectures`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import TypeAlias, cast

import torch
from monai.inferers.utils import sliding_window_inference
from monai.networks.nets.basic_unet import BasicUNet
from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.segresnet import SegResNet
from monai.networks.nets.swin_unetr import SwinUNETR
from monai.networks.nets.unet import UNet
from monai.networks.nets.unetr import UNETR
from monai.networks.nets.vnet import VNet
from torch import Tensor, nn

from tokenseg.config import NetworkConfig, Plan
from tokenseg.errors import ConfigError
from tokenseg.model.network import TokenSegOutput
from tokenseg.shapes import Images

Window: TypeAlias = tuple[int, int, int]
BuildPeer: TypeAlias = Callable[[int, int, Window], nn.Module]
"""Builds a bare network from input channels, output channels and the training window in voxels."""

_NNUNET_LEAST_VOX = 4
_NNUNET_BLOCKS = (1, 3, 4, 6, 6, 6, 6, 6, 6, 6)
_RESENC_L_SCALE = 3 ** (1 / 3)


class Peer(nn.Module):
    """A plain segmentation network: pads to multiples of what it needs, returns logits only.

    Scans larger than the training window go through MONAI's own sliding windows. Whole, they would reach into what was
    always padding in training, where nothing was ever supervised, and the network invents foreground there.
    """

    def __init__(self, network: nn.Module, window_vox: Window, multiple_vox: Window = (16, 16, 16)) -> None:
        super().__init__()
        self.network, self.window_vox, self.multiple_vox = network, window_vox, multiple_vox
        self._second_names = _second_names(self)
        self.register_state_dict_post_hook(_drop_second_names)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_give_second_names)  # type: ignore[no-untyped-call]

    def forward(self, images: Images) -> TokenSegOutput:
        """Segment a batch of any size."""
        larger = any(size > window for size, window in zip(images.shape[2:], self.window_vox, strict=True))
        if not larger or self.training:
            return TokenSegOutput(self._padded(images), (), None)
        logits = sliding_window_inference(images, self.window_vox, 1, self._padded, overlap=0.5, mode="gaussian")
        return TokenSegOutput(cast("Tensor", logits), (), None)

    def _padded(self, images: Tensor) -> Tensor:
        size = images.shape[2:]
        missing = [-length % multiple for length, multiple in zip(size, self.multiple_vox, strict=True)]
        padding = [side for amount in reversed(missing) for side in (0, amount)]
        logits: Tensor = self.network(nn.functional.pad(images, padding))
        return logits[:, :, : size[0], : size[1], : size[2]]


def _second_names(module: nn.Module) -> dict[str, str]:
    """Further names of weights that a network holds twice, each with the first name."""
    first: dict[int, str] = {}
    weights = chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    names = [(name, first.setdefault(id(weight), name)) for name, weight in weights]
    return {name: kept for name, kept in names if name != kept}


def _drop_second_names(module: nn.Module, state: dict[str, Tensor], prefix: str, _: object) -> None:
    # A safetensors file holds no tensor twice.
    for name in cast("Peer", module)._second_names:
        del state[prefix + name]


def _give_second_names(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    for name, kept in cast("Peer", module)._second_names.items():
        if prefix + kept in state:
            state[prefix + name] = state[prefix + kept]


def make_peer(name: str) -> Callable[[NetworkConfig, Plan], nn.Module]:
    """What builds the peer of that name, in a `Peer`, wherever TokenSeg itself could be built.

    The callable ignores the `NetworkConfig`, and raises `ConfigError` where the package of the network is not
    installed or the network cannot take the number of channels.

    Raises:
        ConfigError: There is no such peer.
    """
    if name not in PEERS:
        raise ConfigError(f"no peer is called {name!r}; choose from {', '.join(PEERS)}")
    return partial(_wrapped, name)


def _wrapped(name: str, _: NetworkConfig, plan: Plan) -> nn.Module:
    window = plan.window_vox
    network = PEERS[name](len(plan.channels), plan.num_outputs, window)
    return Peer(network, window, _multiple_vox(name, window))


def _multiple_vox(name: str, window_vox: Window) -> Window:
    """What each axis of an input must be a multiple of."""
    if name in _STRIDES:
        return _product(_STRIDES[name](window_vox))
    if name == "monai-unetr":
        # Its position embeddings are those of one size.
        return _unetr_size(window_vox)
    return (32, 32, 32) if name == "monai-swinunetr" else (16, 16, 16)


def _monai_unet(channels: int, outputs: int, _: Window) -> nn.Module:
    """Widths 32 to 512, two residual units: the customary configuration."""
    network: nn.Module = UNet(
        3, channels, outputs, channels=(32, 64, 128, 256, 512), strides=(2, 2, 2, 2), num_res_units=2
    )
    return network


def _monai_basicunet(channels: int, outputs: int, _: Window) -> nn.Module:
    network: nn.Module = BasicUNet(3, channels, outputs)
    return network


def _monai_segresnet(channels: int, outputs: int, _: Window) -> nn.Module:
    """16 first filters and blocks (1, 2, 2, 4): as in MONAI's brain tumour model; 8, MONAI's default, is a toy."""
    network: nn.Module = SegResNet(3, 16, channels, outputs)
    return network


def _monai_vnet(channels: int, outputs: int, _: Window) -> nn.Module:
    if 16 % channels:
        raise ConfigError(
            f"monai-vnet repeats its {channels} input channels to 16 and takes 1, 2, 4, 8 or 16; leave it out here"
        )
    network: nn.Module = VNet(3, channels, outputs)
    return network


def _monai_unetr(channels: int, outputs: int, window_vox: Window) -> nn.Module:
    network: nn.Module = UNETR(channels, outputs, _unetr_size(window_vox))
    return network


def _unetr_size(window_vox: Window) -> Window:
    x, y, z = (-(-length // 16) * 16 for length in window_vox)
    return x, y, z


def _monai_swinunetr(channels: int, outputs: int, _: Window) -> nn.Module:
    # It reads numbers off tensors while it is built, which those without memory (the meta device) do not have.
    with torch.device("cpu"):
        network: nn.Module = SwinUNETR(channels, outputs, feature_size=48)
    return network


def _monai_dynunet(channels: int, outputs: int, window_vox: Window) -> nn.Module:
    """MONAI's rebuilding of nnU-Net, with nnU-Net's kernels, strides and widths."""
    strides = _nnunet_strides(window_vox)
    network: nn.Module = DynUNet(
        3,
        channels,
        outputs,
        kernel_size=[(3, 3, 3)] * len(strides),
        strides=strides,
        upsample_kernel_size=strides[1:],
        filters=_nnunet_widths(len(strides)),
    )
    return network


def _nnunet_plainconv(channels: int, outputs: int, window_vox: Window) -> nn.Module:
    """nnU-Net's default: two convolutions a stage, in the encoder and the decoder."""
    strides = _nnunet_strides(window_vox)
    arguments = _nnunet_arguments(channels, outputs, strides)
    network: nn.Module = _nnunet_class("PlainConvUNet")(
        **arguments, n_conv_per_stage=2, n_conv_per_stage_decoder=2, deep_supervision=False
    )
    return network


def _nnunet_resenc_m(channels: int, outputs: int, window_vox: Window) -> nn.Module:
    """nnU-Net's residual encoder, planned for the window."""
    return _resenc(channels, outputs, _nnunet_strides(window_vox))


def _nnunet_resenc_l(channels: int, outputs: int, window_vox: Window) -> nn.Module:
    """The L preset, which differs from M only by a memory target of 24 instead of 8 GB: by window and batch.

    Its planner takes a larger window of the same scans, so that an axis may be pooled once more. Here it has the
    stages of a window of three times the voxels, over the window given. Where those are as many as M's (at 128 voxels
    they are), the two are one and the same network.
    """
    return _resenc(channels, outputs, _resenc_l_strides(window_vox))


def _resenc(channels: int, outputs: int, strides: list[Window]) -> nn.Module:
    arguments = _nnunet_arguments(channels, outputs, strides)
    network: nn.Module = _nnunet_class("ResidualEncoderUNet")(
        **arguments,
        n_blocks_per_stage=_NNUNET_BLOCKS[: len(strides)],
        n_conv_per_stage_decoder=1,
        deep_supervision=False,
    )
    return network


def _nnunet_class(name: str) -> Callable[..., nn.Module]:
    try:
        from dynamic_network_architectures.architectures import unet
    except ImportError as error:
        raise ConfigError(
            "nnU-Net's networks are not installed: pip install --no-deps dynamic-network-architectures"
        ) from error
    return cast("Callable[..., nn.Module]", getattr(unet, name))


def _nnunet_arguments(channels: int, outputs: int, strides: list[Window]) -> dict[str, object]:
    """What nnU-Net's plans say of both its networks."""
    return {
        "input_channels": channels,
        "n_stages": len(strides),
        "features_per_stage": _nnunet_widths(len(strides)),
        "conv_op": nn.Conv3d,
        "kernel_sizes": [(3, 3, 3)] * len(strides),
        "strides": strides,
        "num_classes": outputs,
        "conv_bias": True,
        "norm_op": nn.InstanceNorm3d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
    }


def _nnunet_strides(window_vox: Window) -> list[Window]:
    """Strides of the stages for a window of even spacing: an axis is halved while at least 4 voxels remain of it."""
    size, strides = list(window_vox), [(1, 1, 1)]
    while any(length >= 2 * _NNUNET_LEAST_VOX for length in size):
        x, y, z = (2 if length >= 2 * _NNUNET_LEAST_VOX else 1 for length in size)
        strides.append((x, y, z))
        size = [-(-length // step) for length, step in zip(size, (x, y, z), strict=True)]
    return strides


def _resenc_l_strides(window_vox: Window) -> list[Window]:
    x, y, z = (round(length * _RESENC_L_SCALE) for length in window_vox)
    return _nnunet_strides((x, y, z))


def _nnunet_widths(num_stages: int) -> list[int]:
    return [min(32 * 2**stage, 320) for stage in range(num_stages)]


def _product(strides: list[Window]) -> Window:
    x, y, z = 1, 1, 1
    for step in strides:
        x, y, z = x * step[0], y * step[1], z * step[2]
    return x, y, z


_STRIDES: dict[str, Callable[[Window], list[Window]]] = {
    "monai-dynunet": _nnunet_strides,
    "nnunet-plainconv": _nnunet_strides,
    "nnunet-resenc-m": _nnunet_strides,
    "nnunet-resenc-l": _resenc_l_strides,
}

PEERS: dict[str, BuildPeer] = {
    "monai-unet": _monai_unet,
    "monai-basicunet": _monai_basicunet,
    "monai-segresnet": _monai_segresnet,
    "monai-vnet": _monai_vnet,
    "monai-unetr": _monai_unetr,
    "monai-swinunetr": _monai_swinunetr,
    "monai-dynunet": _monai_dynunet,
    "nnunet-plainconv": _nnunet_plainconv,
    "nnunet-resenc-m": _nnunet_resenc_m,
    "nnunet-resenc-l": _nnunet_resenc_l,
}
"""Builders of bare networks, by name."""

monai_unet = make_peer("monai-unet")
"""The peer that the demo trains beside TokenSeg."""
