"""Other people's networks behind TokenSeg's output type, so that all go through the same pipeline."""

from __future__ import annotations

from collections.abc import Callable

from monai.networks.nets import UNet
from torch import Tensor, nn

from tokenseg.config import NetworkConfig, Plan
from tokenseg.model.network import TokenSegOutput


class Peer(nn.Module):
    """A plain segmentation network: pads to multiples of 16, returns logits only."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> TokenSegOutput:
        """Segment a batch of any size."""
        size = images.shape[2:]
        padding = [amount for length in reversed(size) for amount in (0, -length % 16)]
        logits = self.network(nn.functional.pad(images, padding))
        return TokenSegOutput(logits[:, :, : size[0], : size[1], : size[2]], (), None)


def monai_unet(_: NetworkConfig, plan: Plan) -> nn.Module:
    """MONAI `UNet`, widths 32 to 512, two residual units: the customary configuration."""
    return Peer(bare_monai_unet(len(plan.channels), plan.num_outputs))


def bare_monai_unet(channels: int, outputs: int) -> nn.Module:
    """The same without the wrapper, for timing."""
    return UNet(3, channels, outputs, channels=(32, 64, 128, 256, 512), strides=(2, 2, 2, 2), num_res_units=2)


PEERS: dict[str, Callable[[NetworkConfig, Plan], nn.Module]] = {"monai-unet": monai_unet}
