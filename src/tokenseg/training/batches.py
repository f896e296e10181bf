"""Batches of windows.

A batch is a pure function of seed and step: that is what makes a run resumable exactly. Of several processes each draws
all of it and cuts its share, so that together they see what one would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from tokenseg.config import Plan
from tokenseg.training.augment import Augmentation
from tokenseg.training.cache import PreparedCase

COARSE_EVERY = 4


class Batch(NamedTuple):
    """Windows of one training step, or one process's share of them."""

    images: Float[Tensor, "B C X Y Z"]
    labels: UInt8[Tensor, "B R X Y Z"]
    case_ids: tuple[str, ...]
    """Cases of all windows of the step, those of other processes included."""
    coarse: bool = False
    """Whether the windows are coarse views of whole cases."""


class TrainingBatches(TorchDataset[Batch]):
    """Batch number `step` of a run.

    Where the plan has a `coarse_factor`, every fourth batch holds coarse views of whole cases: the network learns to
    answer both. They are not mixed, since coarse views have another loss.

    Args:
        cases: Prepared training cases.
        plan: Gives window and batch size.
        foreground_fraction: Share of windows centred on a foreground voxel; each label of the case is as likely.
        augment: Applied to each window.
        seed: Of the run.
        part: Number of this process, from 0, and how many there are; the batch size must be a multiple.
    """

    def __init__(
        self,
        cases: Sequence[PreparedCase],
        plan: Plan,
        foreground_fraction: float,
        augment: Augmentation,
        seed: tuple[int, ...],
        *,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self.cases, self.plan, self.augment, self.seed = cases, plan, augment, seed
        self.foreground_fraction = foreground_fraction
        share = plan.batch_size // part[1]
        self.own = range(part[0] * share, (part[0] + 1) * share)

    def __getitem__(self, step: int) -> Batch:
        """Draw, cut and augment the windows of one step."""
        rng = np.random.default_rng([*self.seed, step])
        num_foreground, is_coarse = self.num_foreground(step), self.is_coarse(step)
        windows, names = [], []
        for number in range(self.plan.batch_size):
            case = self.cases[int(rng.integers(len(self.cases)))]
            if is_coarse and case.coarse is not None:
                case = case.coarse
            start = draw_window(rng, case, self.plan.window_vox, on_foreground=number < num_foreground)
            seed = int(rng.integers(2**32, dtype=np.uint64))
            names.append(case.case_id)
            if number in self.own:
                arrays = {"image": case.image, "labels": case.labels}
                window = {key: cut_window(array, start, self.plan.window_vox) for key, array in arrays.items()}
                windows.append(self.augment(window, seed))
        images, labels = (torch.stack([window[key] for window in windows]) for key in ("image", "labels"))
        return Batch(images, labels, tuple(names), is_coarse)

    def num_foreground(self, step: int) -> int:
        """Windows of a step that are centred on foreground: the share exactly over many steps, batches of one too."""
        share = self.plan.batch_size * self.foreground_fraction
        return math.floor((step + 1) * share) - math.floor(step * share)

    def is_coarse(self, step: int) -> bool:
        """Whether a step's windows are coarse views; never where the plan has none."""
        return self.plan.coarse_factor is not None and step % COARSE_EVERY == COARSE_EVERY - 1


def draw_window(
    rng: np.random.Generator, case: PreparedCase, window_vox: tuple[int, int, int], *, on_foreground: bool
) -> tuple[int, int, int]:
    """Draw the first voxel of a window.

    It stays within the image where the image is larger, and is centred (a negative start) where it is smaller.
    A case without foreground gives a uniform window.
    """
    size = case.image.shape[1:]
    if on_foreground and len(case.points):
        label = rng.choice(np.unique(case.points[:, 0]))
        points = case.points[case.points[:, 0] == label, 1:]
        wanted = points[rng.integers(len(points))] - np.array(window_vox) // 2
    else:
        wanted = np.array([rng.integers(max(1, s - w + 1)) for s, w in zip(size, window_vox, strict=True)])
    start = [
        int(np.clip(first, 0, s - w)) if s > w else -((w - s) // 2)
        for first, s, w in zip(wanted, size, window_vox, strict=True)
    ]
    return start[0], start[1], start[2]


def cut_window(array: np.ndarray, start: tuple[int, int, int], window_vox: tuple[int, int, int]) -> Tensor:
    """Copy a window out of (C, X, Y, Z); what lies outside the array is zero."""
    window = np.zeros((array.shape[0], *window_vox), dtype=array.dtype)
    source, target = [slice(None)], [slice(None)]
    for first, length, size in zip(start, window_vox, array.shape[1:], strict=True):
        source.append(slice(max(0, first), min(size, first + length)))
        target.append(slice(max(0, -first), max(0, -first) + source[-1].stop - source[-1].start))
    window[tuple(target)] = array[tuple(source)]
    return torch.from_numpy(window)
