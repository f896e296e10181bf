"""The whole network, token path included, exports to ONNX with dynamic shapes and gives the same logits there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jaxtyping
import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from plans import THICK_SLICES, make_plan
from tokenseg.config import PRESETS, NetworkConfig, Plan
from tokenseg.model.network import TokenSeg

EXAMPLE_SIZE = (36, 44, 40)
OTHER_SIZES = [(33, 47, 29), (64, 52, 40), (18, 19, 50)]


class LogitsOnly(nn.Module):
    """What a run-time needs of the network."""

    def __init__(self, network: TokenSeg) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).logits


@contextmanager
def without_shape_checks() -> Iterator[None]:
    """Sizes are symbols while torch traces, and no symbol is an `int` to the type checker."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def network_with_active_tokens(config: NetworkConfig, plan: Plan) -> TokenSeg:
    torch.manual_seed(0)
    network = TokenSeg(config, plan).eval()
    assert network.tokenizer is not None
    for layer in network.tokenizer.reproject.project:
        nn.init.normal_(layer.weight, std=0.3)
    return network


# torch 2.13's exporter uses what torch 2.13 deprecates.
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.long
@pytest.mark.parametrize(
    ("changes", "plan", "dynamic"),
    [
        pytest.param({}, make_plan(2, 2), "XYZ", id="vq"),
        # An axis costs the exporter ten seconds: with one dynamic axis the others are covered well enough by "vq".
        pytest.param({"quantizer": "fsq", "score": "sum"}, make_plan(1, 3, regions=True), "Z", id="fsq, sum"),
        pytest.param({"quantizer": "none"}, make_plan(strides=THICK_SLICES), "X", id="none"),
    ],
)
def test_onnx_gives_the_same_logits_at_any_size(
    changes: dict[str, str], plan: Plan, dynamic: str, tmp_path: Path
) -> None:
    network = network_with_active_tokens(PRESETS["tiny"].model_copy(update=changes), plan)
    axes = {axis: torch.export.Dim(name, min=18, max=512) for axis, name in enumerate("XYZ", 2) if name in dynamic}
    example = torch.randn(1, len(plan.channels), *EXAMPLE_SIZE)
    with without_shape_checks():
        program = torch.onnx.export(
            LogitsOnly(network).eval(), (example,), dynamo=True, dynamic_shapes={"images": axes}, verbose=False
        )
    assert program is not None
    path = tmp_path / "network.onnx"
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    for other in OTHER_SIZES:
        chosen = zip("XYZ", EXAMPLE_SIZE, other, strict=True)
        size = [changed if name in dynamic else fixed for name, fixed, changed in chosen]
        images = torch.randn(1, len(plan.channels), *size)
        with torch.inference_mode():
            expected = network(images).logits
            few_tokens = network(images, num_kept=1).logits
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        np.testing.assert_allclose(logits, expected.numpy(), atol=1e-4, rtol=0)
        assert (few_tokens - expected).abs().amax() > 0.01, "the tokens must matter for this test to mean anything"
