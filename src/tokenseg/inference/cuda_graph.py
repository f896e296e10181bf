"""A pass that is repeated on an NVIDIA GPU: recorded once as a CUDA graph, then replayed.

A pass of `small` is hundreds of kernels of a few microseconds. To start them one by one takes the CPU several times as
long as the GPU computes; a graph is started as a whole. The values are the same to the last bit
(docs/decisions/0025-recorded-passes.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

ResultT = TypeVar("ResultT")


class Recording(Generic[ResultT]):  # pragma: no cover - cuda
    """A pass over images of one shape, recorded.

    Args:
        compute: The pass. It may not wait for the GPU, and must have run once, so that what it keeps is not made in the
            memory of the graph.
        images: On the GPU; gives the shape.

    Raises:
        RuntimeError: It cannot be recorded, or there is no memory for it.
    """

    def __init__(self, compute: Callable[[Tensor], ResultT], images: Tensor) -> None:
        self._images = images.clone()
        stream = torch.cuda.Stream(images.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(stream):
            compute(self._images)  # libraries set themselves up for each stream anew
        torch.cuda.current_stream(images.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            self._result = compute(self._images)

    def __call__(self, images: Tensor) -> ResultT:
        """The result for images of that shape; the next call writes over it."""
        self._images.copy_(images)
        self._graph.replay()
        return self._result


def repeated(
    compute: Callable[[Tensor], ResultT],
) -> Callable[[Tensor], ResultT]:
    """A pass that is recorded as soon as a shape follows itself, as windows do; others run as they are.

    Args:
        compute: The pass, from images on the GPU to a result there.

    Returns:
        The same function; its result is to be used before the next call.
    """
    shape: torch.Size | None = None
    recorded: Callable[[Tensor], ResultT] | None = None

    def run(images: Tensor) -> ResultT:
        nonlocal shape, recorded
        if images.shape != shape:
            shape, recorded = images.shape, None
            return compute(images)
        if recorded is None:
            try:
                recorded = Recording(compute, images)
            except RuntimeError:
                recorded = compute  # it costs time only
        return recorded(images)

    return run
