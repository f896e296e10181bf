"""Other people's networks behind TokenSeg's output type, so that all go through the same pipeline."""

from __future__ import annotations

from typing import cast

from monai.inferers.utils import sliding_window_inference
from monai.networks.nets.unet import UNet
from torch import Tensor, nn

from tokenseg.config import NetworkConfig, Plan
from tokenseg.model.network import TokenSegOutput
from tokenseg.shapes import Images


class Peer(nn.Module):
    """A plain segmentation network: pads to multiples of 16, returns logits only.

    Scans larger than the training window go through MONAI's own sliding windows. Whole, they would reach into what was
    always padding in training, where nothing was ever supervised, and the network invents foreground there.
    """

    def __init__(self, network: nn.Module, window_vox: tuple[int, int, int]) -> None:
        super().__init__()
        self.network, self.window_vox = network, window_vox

    def forward(self, images: Images) -> TokenSegOutput:
        """Segment a batch of any size."""
        larger = any(size > window for size, window in zip(images.shape[2:], self.window_vox, strict=True))
        if not larger or self.training:
            return TokenSegOutput(self._padded(images), (), None)
        logits = sliding_window_inference(images, self.window_vox, 1, self._padded, overlap=0.5, mode="gaussian")
        return TokenSegOutput(cast("Tensor", logits), (), None)

    def _padded(self, images: Tensor) -> Tensor:
        size = images.shape[2:]
        padding = [amount for length in reversed(size) for amount in (0, -length % 16)]
        logits: Tensor = self.network(nn.functional.pad(images, padding))
        return logits[:, :, : size[0], : size[1], : size[2]]


def monai_unet(_: NetworkConfig, plan: Plan) -> nn.Module:
    """MONAI `UNet`, widths 32 to 512, two residual units: the customary configuration."""
    return Peer(bare_monai_unet(len(plan.channels), plan.num_outputs), plan.window_vox)


def bare_monai_unet(channels: int, outputs: int) -> nn.Module:
    """The same without the wrapper, for timing."""
    network: nn.Module = UNet(
        3, channels, outputs, channels=(32, 64, 128, 256, 512), strides=(2, 2, 2, 2), num_res_units=2
    )
    return network
