"""Equal forms of single operations for a network that is traced for another engine.

While a network is traced, an operation that is marked with `traced_as` is computed by its equal form: the same values
by operations that OpenVINO has rules for and keeps channels-last. In torch these forms are slower. The parts of the
network know nothing else of engines.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")


def is_recorded() -> bool:
    """Whether operations are written down instead of done, and sizes may be symbols: then nothing may be kept."""
    return _is_traced() or torch.compiler.is_compiling()


def traced_as(form: Callable[P, R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Mark a function: while a network is traced, `form` computes in its place."""

    def mark(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def either(*args: P.args, **kwargs: P.kwargs) -> R:
            return (form if _is_traced() else function)(*args, **kwargs)

        return either

    return mark


def _is_traced() -> bool:
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def padded(images: Tensor, padding: list[int]) -> Tensor:
    """Padding by sizes that are found at run time is dear, also where there is nothing to pad."""
    return nn.functional.pad(images, padding) if any(padding) else images


def space_to_depth(images: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """A convolution whose kernels pick single voxels."""
    depth = int(images.shape[1]) * stride[0] * stride[1] * stride[2]
    return nn.functional.conv3d(images, torch.eye(depth).reshape(depth, -1, *stride), stride=stride)


def upsampled(features: Tensor, layer: nn.Module, stride: tuple[int, int, int]) -> Tensor:
    """A transposed convolution, in place of a permutation that costs as much as a convolution."""
    weight: Tensor = layer.get_parameter("weight")
    kernel = weight.reshape(*stride, -1, weight.shape[1]).permute(4, 3, 0, 1, 2)
    return nn.functional.conv_transpose3d(features, kernel, stride=stride)


def instance_norm(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Instance norm under its own name."""
    return nn.functional.instance_norm(features, weight=weight, bias=bias)


def nearest(distance: Tensor) -> Tensor:
    """As argmin, several times as fast there. NaN is nearest to nothing, and gets the last code."""
    last = distance.shape[-1] - 1
    is_nearest = distance <= distance.amin(dim=-1, keepdim=True)
    return torch.where(is_nearest, torch.arange(last + 1), last).amin(dim=-1)


def replaced(rows: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """A scatter; OpenVINO has no rule for `index_put`."""
    return rows.scatter(0, places[:, None].expand_as(values), values)


def matrix_for(matrix: Tensor, like: Tensor) -> Tensor:
    """A matrix times one, by way of what is only known at run time.

    OpenVINO multiplies by a constant in full precision always, and converting the finest map for that takes longer than
    the product.
    """
    one = like[:1, :1, :1, :1, :1].reshape(1).isinf().to(like.dtype) * 0 + 1
    return matrix * one
