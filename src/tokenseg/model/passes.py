"""One pass of a network at inference: what goes in and comes out, whatever computes it, and what an engine is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor, nn

from tokenseg.config import Plan
from tokenseg.model.cells import cell_boxes_vox
from tokenseg.model.network import TokenRecord, TokenSeg, TokenSegOutput, padding_of
from tokenseg.shapes import Codes, Images, Logits, TokenFlags, TokenScalars

Size: TypeAlias = tuple[int, int, int]


class TokenChoice(NamedTuple):
    """What the tokenizer made of the N candidates of a pass."""

    boxes_vox: Int[Tensor, "N 2 3"]
    """Corners of the cells that they were pooled from, in voxels of the input: first voxel, one past the last."""
    level: Int[Tensor, " N"]
    """Pyramid level, 0 = 1/2."""
    kept: TokenFlags
    boundary: TokenScalars
    semantic: TokenScalars
    diversity: TokenScalars
    score: TokenScalars
    codes: Codes
    """-1 without a codebook."""


class Pass(NamedTuple):
    """What a pass gives."""

    logits: Logits
    """At full resolution, float32, on the CPU."""
    tokens: TokenChoice | None
    """None of a network without tokens. To be used before the next pass, which may write over it."""


Forward: TypeAlias = Callable[[Images], Pass]
"""One pass, from float32 images on the CPU."""


def pass_of(output: TokenSegOutput) -> Pass:
    """Of what a network gives, what a pass at inference keeps."""
    return Pass(output.logits, None if output.tokens is None else _choice(output.tokens))


def joined(passes: Sequence[Pass]) -> Pass:
    """Passes of single volumes as one of a batch."""
    tokens = [each.tokens for each in passes if each.tokens is not None]
    logits = torch.cat([each.logits for each in passes])
    if not tokens:
        return Pass(logits, None)
    cells, terms = tokens[0][:2], [each[2:] for each in tokens]
    return Pass(logits, TokenChoice(*cells, *(torch.cat(values) for values in zip(*terms, strict=True))))


def candidates_of(plan: Plan, size: Size) -> tuple[Int[Tensor, "N 2 3"], Int[Tensor, " N"]]:
    """Corners of the cells that a network pools its candidates from, in voxels of its input, and their levels.

    They follow from the plan and the size of the input alone.
    """
    padded = [length + more for length, more in zip(size, padding_of(plan, size)[5::-2], strict=True)]
    sizes = [
        tuple(-(-length // stride) for length, stride in zip(padded, strides, strict=True))
        for strides in plan.total_strides
    ]
    boxes = cell_boxes_vox([(x, y, z) for x, y, z in sizes], list(plan.total_strides), plan.grid, size)
    return boxes, torch.arange(len(sizes)).repeat_interleave(len(boxes) // len(sizes))


@runtime_checkable
class Parts(Protocol):
    """A network as an engine is given it: what is traced, and what is done before and after."""

    any_size: bool
    """Whether what was traced at one size is known to be right at others; else each size is traced."""

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """What is traced."""

    def padding(self, size: Size) -> list[int]:
        """What `torch.nn.functional.pad` has to add before."""

    def finished(self, results: Sequence[Tensor], size: Size) -> Pass:
        """The pass over an input of a size, from results whose memory may be written over."""


def parts_of(network: nn.Module) -> Parts:
    """A network as an engine is given it; any that gives logits or a `TokenSegOutput`."""
    return _TokenSegParts(network) if isinstance(network, TokenSeg) else _PlainParts(network)


class _TokenSegParts(nn.Module):
    """Logits come in blocks: torch takes them apart faster, and in the copy that has to be made anyway."""

    any_size = True

    def __init__(self, network: TokenSeg) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        output = self.network.blocks(images)
        # Cells follow from the size, and are none of an engine's business.
        return (output.logits, *(() if output.tokens is None else _choice(output.tokens)[2:]))

    def padding(self, size: Size) -> list[int]:
        return self.network.padding(size)

    def finished(self, results: Sequence[Tensor], size: Size) -> Pass:
        blocks, *terms = results
        logits = _unshared(self.network.voxels(blocks), blocks)
        if not terms:
            return Pass(logits, None)
        return Pass(logits, TokenChoice(*candidates_of(self.network.plan, size), *(each.clone() for each in terms)))


class _PlainParts(nn.Module):
    """Logits, and nothing else."""

    any_size = False

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        output: Tensor | TokenSegOutput = self.network(images)
        return (output if isinstance(output, Tensor) else output.logits,)

    def padding(self, size: Size) -> list[int]:
        del size
        return [0] * 6

    def finished(self, results: Sequence[Tensor], size: Size) -> Pass:
        del size
        return Pass(results[0].clone(), None)


def _choice(record: TokenRecord) -> TokenChoice:
    importance = record.importance
    terms = importance.boundary, importance.semantic, importance.diversity, importance.score
    return TokenChoice(record.boxes_vox, record.level, record.kept, *terms, record.codes)


def _unshared(values: Tensor, origin: Tensor) -> Tensor:
    return values.clone() if values.data_ptr() == origin.data_ptr() else values
