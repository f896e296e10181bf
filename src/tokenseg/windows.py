"""The network over an image of any size: in one pass, or in Gaussian-weighted sliding windows.

What computes a pass is a function of the caller: torch (`torch_forward`), or an engine. Which windows run is a list of
corners, so that a caller may run some of them only.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenseg.checkpoint import Model
from tokenseg.config import Plan
from tokenseg.device import autocast
from tokenseg.shapes import Forward, ImageArray, Images, Logits


class WindowSum(NamedTuple):
    """Logits of overlapping windows before division; where no window lies, both are 0."""

    weighted: Float[Tensor, "L X Y Z"]
    """Sum of the windows' logits, each times the weight of the voxel in its window."""
    weight: Float[Tensor, "X Y Z"]
    """Sum of these weights."""


def forward_of(model: Model) -> Forward:
    """One pass of a model, in the engine that it was given."""
    return model.compiled or torch_forward(model.network, model.device)


def torch_forward(network: nn.Module, device: torch.device) -> Forward:
    """The network's own forward pass, in bf16 where that helps; takes and gives float32 on the CPU.

    Args:
        network: In evaluation mode, on `device`; returns a `TokenSegOutput`.
        device: Where to compute.
    """

    def forward(images: Images) -> Logits:
        with torch.inference_mode(), autocast(device):
            logits: Tensor = network(images.to(device)).logits
        return logits.float().cpu()

    return forward


def predict_logits(forward: Forward, image: ImageArray, plan: Plan) -> Float[Tensor, "L X Y Z"]:
    """Run the network over a prepared image, whole or in windows as the plan says.

    Args:
        forward: One pass of the network.
        image: On the plan's grid, normalised.
        plan: Gives the window and the limit up to which an image runs whole.
    """
    size = image.shape[1:]
    padded, start = pad_to_window(torch.from_numpy(image), plan.window_vox)
    corners = window_corners((padded.shape[1], padded.shape[2], padded.shape[3]), plan)
    with torch.inference_mode():
        if corners is None:
            logits = forward(padded[None])[0]
        else:
            total = sum_windows(forward, padded, plan.window_vox, corners)
            logits = total.weighted.div_(total.weight)
    return unpad(logits, start, size)


def pad_to_window(
    image: Float[Tensor, "C X Y Z"], window: tuple[int, int, int]
) -> tuple[Float[Tensor, "C Xp Yp Zp"], list[int]]:
    """Centre an image that is smaller than the training window in one, as training does."""
    missing = [max(0, length - size) for length, size in zip(window, image.shape[1:], strict=True)]
    start = [length // 2 for length in missing]
    padding = [side for first, total in zip(start, missing, strict=True) for side in (total - first, first)]
    return nn.functional.pad(image, padding[::-1]), start


def unpad(logits: Float[Tensor, "L Xp Yp Zp"], start: Sequence[int], size: Sequence[int]) -> Float[Tensor, "L X Y Z"]:
    """Cut an image of `size` out of the window that `pad_to_window` put it in."""
    return logits[(slice(None), *(slice(first, first + length) for first, length in zip(start, size, strict=True)))]


def window_corners(size: tuple[int, int, int], plan: Plan) -> list[tuple[int, int, int]] | None:
    """First voxels of the sliding windows over a padded image of this size, in the order in which they run.

    None where the image runs whole.
    """
    if all(length <= limit for length, limit in zip(size, plan.whole_limit_vox, strict=True)):
        return None
    x, y, z = (window_starts(length, window) for length, window in zip(size, plan.window_vox, strict=True))
    return list(product(x, y, z))


def num_windows(image: ImageArray, plan: Plan) -> int:
    """Passes that `predict_logits` takes over an image."""
    x, y, z = (max(length, window) for length, window in zip(image.shape[1:], plan.window_vox, strict=True))
    corners = window_corners((x, y, z), plan)
    return 1 if corners is None else len(corners)


def window_starts(size: int, window: int) -> list[int]:
    """First voxels of evenly spread windows that overlap by at least half and cover `size` voxels."""
    steps = -(-(size - window) // max(1, window // 2)) if size > window else 0
    return [round(step * (size - window) / steps) for step in range(steps + 1)] if steps else [0]


def sum_windows(
    forward: Forward,
    image: Float[Tensor, "C X Y Z"],
    window: tuple[int, int, int],
    corners: Sequence[tuple[int, int, int]],
) -> WindowSum:
    """Run the windows at `corners`, one after the other, and add up their logits by the weight of each voxel.

    Args:
        forward: One pass of the network.
        image: At least as large as the window.
        window: Size of every window, voxels.
        corners: First voxels of the windows; at least one.
    """
    weight = window_weight(window)
    total: Tensor | None = None
    norm = torch.zeros(image.shape[1:])
    for corner in corners:
        place = tuple(slice(first, first + length) for first, length in zip(corner, window, strict=True))
        logits = forward(image[(slice(None), *place)][None])[0]
        if total is None:
            total = torch.zeros(logits.shape[0], *image.shape[1:])
        total[(slice(None), *place)] += logits * weight
        norm[place] += weight
    if total is None:
        raise ValueError("an image has at least one window")
    return WindowSum(total, norm)


def window_weight(window: tuple[int, int, int]) -> Float[Tensor, "X Y Z"]:
    """Weight of each voxel of a window: a Gaussian of sigma 1/8 window, at least a thousandth."""
    axes = []
    for length in window:
        distance = (torch.arange(length) - (length - 1) / 2) / (length / 8)
        axes.append(torch.exp(-0.5 * distance.square()))
    weight = axes[0][:, None, None] * axes[1][None, :, None] * axes[2][None, None, :]
    return weight.clamp(min=1e-3)
