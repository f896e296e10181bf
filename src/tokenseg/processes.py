"""Several processes that train one network together, each on its share of every batch.

A process that works alone is the first of one; all of these then hand back what they were given. Shares are equal and
in the order of the processes, so that the volumes of all of them, one share after the other, are the global batch.
"""

from __future__ import annotations

import torch
from jaxtyping import Shaped
from torch import Tensor, distributed


def num_processes() -> int:
    """How many processes train together; 1 where this one works alone."""
    return distributed.get_world_size() if _are_several() else 1


def process_number() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if _are_several() else 0


def own_rows(rows: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "m ..."]:
    """This process's rows of what belongs to the whole batch."""
    return rows.chunk(num_processes())[process_number()]


def gather_rows(rows: Shaped[Tensor, "m ..."]) -> Shaped[Tensor, "n ..."]:
    """Rows of the whole batch, in its order; without gradient."""
    if not _are_several():
        return rows
    rows = rows.detach().contiguous()
    shares = [torch.empty_like(rows) for _ in range(num_processes())]
    distributed.all_gather(shares, rows)
    return torch.cat(shares)


def sum_over_processes(values: Tensor) -> Tensor:
    """Sums over the whole batch from sums over this process's share, for a loss that each process computes from them.

    The gradient is right after gradients have been averaged over the processes, as in data-parallel training.
    """
    total: Tensor = _Sum.apply(values) if _are_several() else values  # type: ignore[no-untyped-call]
    return total


def mean_over_processes(values: Tensor) -> Tensor:
    """Means over the whole batch from means over this process's share; without gradient where there are several."""
    if not _are_several():
        return values
    total = values.detach().clone()
    distributed.all_reduce(total)
    return total / num_processes()


class _Sum(torch.autograd.Function):
    """Sum over processes; each computes the same loss from it, and their gradients are averaged, not added."""

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        del ctx
        total = values.detach().clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        del ctx
        return gradient * num_processes()


def _are_several() -> bool:
    return distributed.is_available() and distributed.is_initialized()
