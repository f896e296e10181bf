"""Convolution blocks and the moves between space and channels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenseg.model.blocks import (
    ConvBlock,
    Convolution,
    InstanceNorm,
    ResidualBlock,
    depth_to_space,
    full_precision,
    pointwise,
    space_to_depth,
)

Triple = tuple[int, int, int]
STRIDES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
COUNTS = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))


@pytest.mark.parametrize("size", [(20, 28, 20), (5, 7, 6), (2, 2, 2)])
@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 1)])
def test_a_convolution_gives_the_same_at_inference_and_in_training(size: Triple, stride: Triple) -> None:
    torch.manual_seed(0)
    layer = Convolution(32, 16, stride).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    features = torch.randn(1, 32, *size).to(memory_format=torch.channels_last_3d)
    expected = torch.nn.functional.conv3d(features, layer.weight, stride=stride, padding=1)
    torch.testing.assert_close(layer(features), expected)
    with torch.inference_mode():
        torch.testing.assert_close(layer(features), expected, rtol=1e-4, atol=1e-5)


def test_a_single_small_volume_is_left_to_onednn_at_inference() -> None:
    layer = Convolution(8, 8).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    features = torch.randn(1, 8, 16, 16, 16).to(memory_format=torch.channels_last_3d)
    with torch.profiler.profile() as profile, torch.inference_mode():
        layer(features)
    names = {event.name for event in profile.events()}
    assert "aten::mkldnn_convolution" in names
    assert "aten::slow_conv3d_forward" not in names


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_without_onednn_torch_convolves() -> None:
    layer, features = Convolution(2, 3), torch.randn(1, 2, 6, 6, 6)
    with torch.profiler.profile() as profile, torch.inference_mode(), torch.backends.mkldnn.flags(enabled=False):
        result = layer(features)
    assert "aten::mkldnn_convolution" not in {event.name for event in profile.events()}
    torch.testing.assert_close(result, layer(features).detach())


def norm_gradients(norm: InstanceNorm, features: Tensor, slope: Tensor, *, reference: bool) -> list[Tensor]:
    """Result and gradients with respect to features, weight and bias, by the norm itself or by torch's group norm."""
    features = features.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    if reference:
        result = torch.nn.functional.group_norm(features, norm.weight.numel(), norm.weight, norm.bias)
    else:
        result = norm(features)
    return [result, *torch.autograd.grad(result, (features, norm.weight, norm.bias), slope)]


def random_norm(dtype: torch.dtype = torch.float32) -> tuple[InstanceNorm, Tensor, Tensor]:
    """A norm with weights that matter, features with an offset, and a slope from above."""
    torch.manual_seed(0)
    norm = InstanceNorm(5)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    features = (torch.randn(2, 5, 6, 7, 4) * 3 + 1).to(dtype, memory_format=torch.channels_last_3d)
    return norm, features, torch.randn(2, 5, 6, 7, 4).to(dtype, memory_format=torch.channels_last_3d)


def test_norm_has_mean_zero_and_deviation_one_in_each_channel_of_each_volume() -> None:
    result = InstanceNorm(3)(torch.randn(2, 3, 8, 8, 8) * 7 + 100)
    torch.testing.assert_close(result.mean(dim=(2, 3, 4)), torch.zeros(2, 3), atol=1e-4, rtol=0)
    torch.testing.assert_close(result.std(dim=(2, 3, 4), correction=0), torch.ones(2, 3), atol=1e-4, rtol=0)


def test_norm_is_torchs_instance_norm() -> None:
    norm, features, _ = random_norm()
    expected = torch.nn.functional.instance_norm(features, weight=norm.weight, bias=norm.bias)
    torch.testing.assert_close(norm(features), expected)


def test_norm_with_gradient_gives_the_same_numbers_as_without() -> None:
    norm, features, _ = random_norm()
    assert torch.equal(norm(features.clone().requires_grad_()), norm(features))


@pytest.mark.parametrize("contiguous", [True, False], ids=["channels first", "channels last"])
def test_norm_gradients_are_those_of_group_norm(contiguous: bool) -> None:
    norm, features, slope = random_norm()
    if contiguous:
        features, slope = features.contiguous(), slope.contiguous()
    ours = norm_gradients(norm, features, slope, reference=False)
    torchs = norm_gradients(norm, features, slope, reference=True)
    torch.testing.assert_close(ours, torchs, atol=2e-5, rtol=1e-4)


def test_norm_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    norm = InstanceNorm(2).double()
    features = torch.randn(2, 2, 3, 2, 2, dtype=torch.float64, requires_grad=True)

    def by_all(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (features,))

    weight = torch.tensor([0.7, -1.4], dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([0.2, 0.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(by_all, (features, weight, bias), atol=1e-5, rtol=1e-4)


def test_norm_gradients_in_bfloat16_are_near_those_in_full_precision() -> None:
    norm, features, slope = random_norm(torch.bfloat16)
    ours = norm_gradients(norm, features, slope, reference=False)
    exact = norm_gradients(norm, features.float(), slope.float(), reference=True)
    for value, truth in zip(ours, exact, strict=True):
        assert (value.float() - truth).norm() < 0.02 * truth.norm()
    assert [value.dtype for value in ours] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]


def test_norm_gradient_of_a_constant_map_is_finite() -> None:
    features = torch.full((1, 2, 3, 3, 3), 4.0, requires_grad=True)
    result = InstanceNorm(2)(features)
    (gradient,) = torch.autograd.grad(result.square().sum() + result.sum(), features)
    assert gradient.isfinite().all()
    assert torch.equal(result, torch.zeros_like(result))


@settings(deadline=None)
@given(
    size=st.tuples(st.integers(2, 9), st.integers(2, 9), st.integers(2, 9)),
    stride=st.tuples(st.sampled_from([1, 2]), st.sampled_from([1, 2]), st.sampled_from([1, 2])),
)
def test_strided_block_rounds_sizes_up(size: Triple, stride: Triple) -> None:
    result = ConvBlock(2, 3, stride)(torch.zeros(1, 2, *size))
    expected = [-(-length // factor) for length, factor in zip(size, stride, strict=True)]
    assert list(result.shape) == [1, 3, *expected]


def test_blocks_are_convolution_norm_and_leaky_relu() -> None:
    torch.manual_seed(0)
    block, images = ResidualBlock(3), torch.randn(1, 3, 5, 6, 4)

    def convolved(weight: Tensor, values: Tensor) -> Tensor:
        return torch.nn.functional.instance_norm(torch.nn.functional.conv3d(values, weight, padding=1))

    first = torch.where((inner := convolved(block.first.conv.weight, images)) > 0, inner, 0.01 * inner)
    total = convolved(block.conv.weight, first) + images
    torch.testing.assert_close(block(images), torch.where(total > 0, total, 0.01 * total), atol=1e-5, rtol=1e-4)


def test_a_skipped_block_is_its_identity_and_what_is_left_makes_up_for_it() -> None:
    torch.manual_seed(0)
    always, often = ResidualBlock(3), ResidualBlock(3, skipped=0.25)
    often.load_state_dict(always.state_dict())
    images = torch.rand(400, 3, 2, 2, 2)  # not negative: the last activation leaves the identity as it is
    result = often(images)
    skipped = (result == images).flatten(1).all(dim=1)
    assert 0.15 < skipped.float().mean() < 0.35
    change = always.norm(always.conv(always.first(images))) / 0.75
    expected = torch.nn.functional.leaky_relu(images + change, 0.01)
    torch.testing.assert_close(result[~skipped], expected[~skipped])
    torch.testing.assert_close(often.eval()(images), always(images))


@settings(deadline=None)
@given(stride=STRIDES, count=COUNTS, width=st.integers(1, 3))
def test_depth_to_space_undoes_space_to_depth(stride: Triple, count: Triple, width: int) -> None:
    size = [cells * factor for cells, factor in zip(count, stride, strict=True)]
    images = torch.randn(2, width, *size)
    blocks = space_to_depth(images, stride)
    assert list(blocks.shape) == [2, width * stride[0] * stride[1] * stride[2], *count]
    # Channels are the outer index on the way in and the inner one on the way out.
    inner = blocks.unflatten(1, (width, -1)).transpose(1, 2).flatten(1, 2)
    assert torch.equal(depth_to_space(inner.permute(0, 2, 3, 4, 1), stride), images)


def test_space_to_depth_gathers_the_voxels_of_a_block() -> None:
    images = torch.arange(2 * 4 * 2 * 2.0).reshape(1, 2, 4, 2, 2)
    blocks = space_to_depth(images, (2, 2, 2))
    assert sorted(blocks[0, :, 1, 0, 0].tolist()) == sorted(images[0, :, 2:4].flatten().tolist())


def test_pointwise_applies_the_layer_to_every_voxel() -> None:
    layer, features = torch.nn.Linear(3, 2), torch.randn(1, 3, 2, 4, 5)
    torch.testing.assert_close(pointwise(features, layer)[0, 1, 3, 2], layer(features[0, :, 1, 3, 2]))


def test_full_precision_switches_autocast_off() -> None:
    values = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (values @ values).dtype == torch.bfloat16
        with full_precision(values.device):
            assert (values @ values).dtype == torch.float32
