"""Convolution blocks, and the lossless moves between space and channels.

Feature maps are stored channels-last: on a CPU that makes a 3x3x3 convolution 1.5 (fp32) to 5 (bf16) times faster.
"""

from __future__ import annotations

import platform
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenseg.model import traced
from tokenseg.model.traced import is_recorded, traced_as
from tokenseg.processes import num_processes, own_rows
from tokenseg.shapes import Features

Stride: TypeAlias = tuple[int, int, int]
Pyramid: TypeAlias = list[Float[Tensor, "B _ _ _ _"]]
"""Features of the levels, finest first; each has its own width and size."""
Resized: TypeAlias = Float[Tensor, "B V X2 Y2 Z2"]
"""Features whose width or size differ from those that went in."""


class Convolution(nn.Conv3d):
    """3x3x3 convolution without bias, by oneDNN at inference on an x86 CPU whatever the size.

    In full precision torch gives a single volume with few voxels (W X Y up to 20480) to a loop of its own, which takes
    several times as long: all levels of a hippocampus crop, the deep ones of a scan of 128 voxels.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: Stride = (1, 1, 1)) -> None:
        super().__init__(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)

    def forward(self, features: Features) -> Resized:
        """Map (B, W, X, Y, Z) to (B, channels_out, ceil(X / sx), ceil(Y / sy), ceil(Z / sz))."""
        is_plain = features.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        is_own_case = features.device.type == "cpu" and is_plain and not is_recorded() and not torch.is_grad_enabled()
        if not is_own_case or not _has_onednn():
            return super().forward(features)
        return torch.mkldnn_convolution(features, self.weight, None, (1, 1, 1), self.stride, (1, 1, 1), 1)


def _has_onednn() -> bool:
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    # On other processors nobody measured which of the two is faster.
    return bool(available and torch.backends.mkldnn.enabled and platform.machine() in ("x86_64", "AMD64"))


class ConvBlock(nn.Module):
    """3x3x3 convolution, instance norm, LeakyReLU. A stride of 2 halves an axis, rounding up."""

    def __init__(self, channels_in: int, channels_out: int, stride: Stride = (1, 1, 1)) -> None:
        super().__init__()
        self.conv = Convolution(channels_in, channels_out, stride)
        self.norm = InstanceNorm(channels_out)

    def forward(self, features: Features) -> Resized:
        """Map (B, W, X, Y, Z) to (B, channels_out, ceil(X / sx), ceil(Y / sy), ceil(Z / sz))."""
        return nn.functional.leaky_relu(self.norm(self.conv(features)), 0.01, inplace=True)


class ResidualBlock(nn.Module):
    """Two 3x3x3 convolutions with instance norm around an identity.

    Args:
        channels: W, kept.
        skipped: Probability with which the convolutions are skipped for a volume in training (stochastic depth, Huang
            2016); what is left is scaled up, so that its mean stays.
    """

    def __init__(self, channels: int, skipped: float = 0.0) -> None:
        super().__init__()
        self.skipped = skipped
        self.first = ConvBlock(channels, channels)
        self.conv = Convolution(channels, channels)
        self.norm = InstanceNorm(channels)

    def forward(self, features: Features) -> Features:
        """Keep the shape (B, W, X, Y, Z)."""
        change = self.norm(self.conv(self.first(features)))
        if self.training and self.skipped:
            # Drawn for the whole batch, of which a process may hold a share: that does not decide which volume skips.
            batch = change.shape[0] * num_processes()
            taken = own_rows(torch.rand(batch, 1, 1, 1, 1, device=change.device)) >= self.skipped
            change = change * (taken.to(change.dtype) / (1 - self.skipped))
        return nn.functional.leaky_relu(change + features, 0.01, inplace=True)


class InstanceNorm(nn.Module):
    """Instance norm with learned scale and shift, fast on channels-last maps.

    Computed as group norm of one channel a group. torch's own backward of that is about twelve times slower than need
    be on channels-last maps in bf16, and about twice in fp32 (`benchmarks/kernels.csv`); training on a CPU
    therefore takes `_InstanceNormOnCpu`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, features: Features) -> Features:
        """Keep the shape; each channel of each volume gets mean 0 and deviation 1, then scale and shift."""
        if features.requires_grad and features.device.type == "cpu":
            normalised: Tensor = _InstanceNormOnCpu.apply(  # type: ignore[no-untyped-call]
                features, self.weight, self.bias
            )
            return normalised
        return _normalised(features, self.weight, self.bias)


@traced_as(traced.instance_norm)
def _normalised(features: Features, weight: Tensor, bias: Tensor) -> Features:
    return nn.functional.group_norm(features, weight.numel(), weight, bias)


class _InstanceNormOnCpu(torch.autograd.Function):
    """Group norm's forward; a backward of two matrix products for the sums and one fused pass for the gradient."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        batch, channels = features.shape[:2]
        voxels = features[0, 0].numel()
        result, mean, rstd = torch.native_group_norm(features, weight, bias, batch, channels, voxels, channels, 1e-5)
        ctx.save_for_backward(features, weight, mean, rstd)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features, weight, mean, rstd = ctx.saved_tensors
        rows, slopes = (values.permute(0, 2, 3, 4, 1).flatten(1, 3) for values in (features, gradient))
        voxels = rows.shape[1]
        ones = rows.new_ones(1, 1, 1).expand(rows.shape[0], 1, voxels)
        # Sums over voxels: of the gradient, and of the gradient times the normalised features. Both (B, W).
        total = torch.bmm(ones, slopes)[:, 0].float()
        aligned = (torch.bmm(ones, slopes * rows)[:, 0].float() - mean.float() * total) * rstd.float()
        by_slope = weight * rstd.float()
        by_row = -by_slope * rstd.float() * aligned / voxels
        constant = -by_slope * total / voxels - by_row * mean.float()
        by_slope, by_row, constant = (values.to(rows.dtype)[:, None] for values in (by_slope, by_row, constant))
        change = torch.addcmul(constant, slopes, by_slope).addcmul_(rows, by_row)
        return change.reshape(features.movedim(1, -1).shape).movedim(-1, 1), aligned.sum(0), total.sum(0)


def pointwise(features: Features, layer: nn.Module) -> Float[Tensor, "B Xl Yl Zl V"]:
    """Apply a linear layer to the channels of every voxel; the result has its channels last."""
    result: Tensor = layer(features.permute(0, 2, 3, 4, 1))
    return result


@traced_as(traced.upsampled)
def upsampled(features: Features, layer: nn.Module, stride: Stride) -> Resized:
    """Upsample by sub-pixels: (B, W, X, Y, Z) to (B, V, X sx, Y sy, Z sz); `layer` has sx sy sz V outputs, no bias."""
    return depth_to_space(pointwise(features, layer), stride)


@traced_as(traced.space_to_depth)
def space_to_depth(images: Features, stride: Stride) -> Resized:
    """Move blocks of `stride` voxels into channels: (B, C, X, Y, Z) to (B, C sx sy sz, X / sx, Y / sy, Z / sz).

    Sizes must be multiples of the stride.
    """
    batch, channels, *size = images.shape
    sx, sy, sz = stride
    x, y, z = (length // factor for length, factor in zip(size, stride, strict=True))
    blocks = images.reshape(batch, channels, x, sx, y, sy, z, sz).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return blocks.reshape(batch, x, y, z, channels * sx * sy * sz).permute(0, 4, 1, 2, 3)


def depth_to_space(values: Float[Tensor, "B X2 Y2 Z2 V"], stride: Stride) -> Features:
    """Move channels back into blocks of `stride` voxels: (B, X2, Y2, Z2, sx sy sz W) to (B, W, X2 sx, Y2 sy, Z2 sz)."""
    batch, x, y, z, depth = values.shape
    sx, sy, sz = stride
    width = depth // (sx * sy * sz)
    blocks = values.reshape(batch, x, y, z, sx, sy, sz, width)
    blocks = blocks.permute(0, 1, 4, 2, 5, 3, 6, 7)
    return blocks.reshape(batch, x * sx, y * sy, z * sz, width).permute(0, 4, 1, 2, 3)


def full_precision(device: torch.device) -> torch.autocast:
    """Context in which autocast is off: nearest codes, top-K and log-likelihoods need all 24 bits."""
    return torch.autocast(device.type, enabled=False)
