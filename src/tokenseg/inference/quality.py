"""Signals of quality, without a reference: how sure the network is, where it is not, and what is unusual.

They are taken from the network's answers on the plan's grid, row by row, before these become a mask. Probabilities are
those of the logits divided by the model's temperature (`temperature.py`).

The expected Dice of a label is 2 sum(p m) / (sum(p) + sum(m)) with probability p and mask m: about the Dice that the
mask would have with a reference drawn from the probabilities, if these were right. It falls where the network is
unsure; an error of which it is sure does not show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float, Shaped
from pydantic import Field
from scipy.ndimage import label
from torch import Tensor

from tokenseg.config import Plan, Settings
from tokenseg.files import is_json_with
from tokenseg.imaging.boxes import box_of, box_of_planes
from tokenseg.outputs import outputs_of
from tokenseg.plan_grid.preprocess import GridRecord
from tokenseg.plan_grid.restore import painted_values
from tokenseg.saved_model.checkpoint import ModelFacts, QualityFacts
from tokenseg.shapes import MaskArray

UNSURE = (0.1, 0.9)
"""A voxel is near the boundary, as the network sees it, where its probability of foreground lies between these."""
CANDIDATE = 0.01
"""Entropy is averaged over voxels with at least this probability of foreground; all else is sure background."""
MAX_COMPONENT_VOXELS = 1 << 26
"""Components are not counted in a larger box, where that alone would take more memory than the rest."""

Share = Annotated[float, Field(ge=0, le=1)]


class LabelQuality(Settings):
    """Of one label."""

    volume_ml: float
    training_volume_ml: tuple[float, float] | None
    """Smallest and largest of the training cases that have the label; None for models that do not tell."""
    components: int | None
    """Pieces of it (26-connected); None where they were too large to count."""
    expected_dice: Share | None
    """None where nothing of it was found or suspected."""


class CaseQuality(Settings):
    """Contents of a case's `_qc.json`."""

    case: str
    expected_dice: Share | None
    """Mean over the labels that have one."""
    near_boundary: Share | None
    """Share of the foreground's probability that lies in unsure voxels; None without any."""
    entropy: float | None
    """Mean entropy in nats over voxels that may be foreground."""
    cell_entropy: tuple[tuple[tuple[float, ...], ...], ...]
    """The same by token cell, x y z of the plan's grid laid over the whole scan; 0 where nothing may be foreground."""
    labels: dict[str, LabelQuality]
    flags: tuple[str, ...]
    """What is unusual, in words."""
    temperature: float
    calibrated: bool
    """Whether the temperature was fitted on validation cases; else it is 1."""


class QualityMeter:
    """Adds up what rows of logits say."""

    def __init__(self, plan: Plan, record: GridRecord, known: QualityFacts | None) -> None:
        """Begin a scan.

        Args:
            plan: Of the model.
            record: Of the scan.
            known: With the temperature; None where there is none.
        """
        self._outputs, self._known = outputs_of(plan), known or QualityFacts()
        self.temperature = self._known.temperature
        count = len(plan.labels)
        self._probability, self._mask, self._both = (np.zeros(count) for _ in range(3))
        self._foreground = self._unsure = 0.0
        order = record.order
        self._order, cells = order, [plan.grid[axis] for axis in order]
        self._cell_of = [
            torch.arange(record.grid_shape[axis]) * plan.grid[axis] // record.grid_shape[axis] for axis in order
        ]
        self._entropy, self._candidates = np.zeros(cells), np.zeros(cells)

    def add(self, number: int, row: Float[Tensor, "L b c"], first: int) -> None:
        """Count a row, or a stretch of it that begins at voxel `first` of the second axis."""
        logits = row / self.temperature
        box = box_of(self._outputs.may_exceed(logits, CANDIDATE).numpy())
        if box is None:  # sure background takes most of a scan, and no time
            return
        probability, found, foreground, entropy = self._outputs.certainty(logits[:, box[0], box[1]])
        candidate = foreground >= CANDIDATE
        probability = probability * candidate
        self._probability += _sums(probability)
        self._mask += _sums(found)
        self._both += _sums(probability * found)
        foreground = foreground * candidate
        low, high = UNSURE
        self._foreground += float(foreground.sum(dtype=torch.float64))
        self._unsure += float((foreground * ((foreground > low) & (foreground < high))).sum(dtype=torch.float64))
        self._add_cells(number, first, box, (entropy * candidate).double(), candidate.double())

    def _add_cells(
        self,
        number: int,
        first: int,
        box: tuple[slice, slice],
        entropy: Float[Tensor, "b c"],
        candidate: Float[Tensor, "b c"],
    ) -> None:
        along, across, deep = self._cell_of
        shape = self._entropy.shape[1:]
        b, c = across[first + box[0].start : first + box[0].stop], deep[box[1]]
        for sums, values in ((self._entropy, entropy), (self._candidates, candidate)):
            rows = torch.zeros(shape[0], values.shape[1], dtype=torch.float64).index_add_(0, b, values)
            cells = torch.zeros(shape, dtype=torch.float64).index_add_(1, c, rows)
            sums[int(along[number])] += cells.numpy()

    def quality(
        self,
        case: str,
        mask: MaskArray,
        facts: ModelFacts,
        volumes_ml: Mapping[str, float],
        warnings: Sequence[str],
    ) -> CaseQuality:
        """Put it in numbers.

        Args:
            case: What the case is called.
            mask: That came of the rows, on the scan's own grid.
            facts: Of the model.
            volumes_ml: By label.
            warnings: Of the input, from `check_input`.
        """
        plan, known = facts.plan, facts.quality or QualityFacts()
        box = box_of_planes(mask[:, :, z] != 0 for z in range(mask.shape[2]))
        labels = {
            each.name: LabelQuality(
                volume_ml=round(volumes_ml[each.name], 4),
                training_volume_ml=known.volumes_ml.get(each.name),
                components=_count_components(mask, box, painted_values(each, plan)),
                expected_dice=_rounded(2 * self._both[n], self._probability[n] + self._mask[n]),
            )
            for n, each in enumerate(plan.labels)
        }
        dice = [each.expected_dice for each in labels.values() if each.expected_dice is not None]
        back = [self._order.index(axis) for axis in range(3)]
        entropy = np.divide(
            self._entropy, self._candidates, out=np.zeros_like(self._entropy), where=self._candidates > 0
        ).transpose(back)
        return CaseQuality(
            case=case,
            expected_dice=round(float(np.mean(dice)), 4) if dice else None,
            near_boundary=_rounded(self._unsure, self._foreground),
            entropy=_rounded(float(self._entropy.sum()), float(self._candidates.sum())),
            cell_entropy=tuple(tuple(tuple(round(float(v), 4) for v in line) for line in plane) for plane in entropy),
            labels=labels,
            flags=(*warnings, *_volume_flags(labels)),
            temperature=self.temperature,
            calibrated=self._known.num_cases > 0,
        )


def is_quality(path: Path) -> bool:
    """Whether a file holds quality signals of ours, of whatever version."""
    return is_json_with(path, {"case", "expected_dice", "cell_entropy"})


def read_quality(path: Path) -> CaseQuality | None:
    """Read a case's quality signals; None where there are none, or none of this version."""
    try:
        return CaseQuality.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None


def _sums(maps: Shaped[Tensor, "n b c"]) -> Float[np.ndarray, " n"]:
    sums: Float[np.ndarray, " n"] = maps.sum(dim=(1, 2), dtype=torch.float64).numpy()
    return sums


def _rounded(part: float, whole: float) -> float | None:
    return round(min(1.0, float(part / whole)), 4) if whole > 1e-3 else None


def _volume_flags(labels: Mapping[str, LabelQuality]) -> list[str]:
    flags = []
    for name, each in labels.items():
        if each.training_volume_ml is None:
            continue
        low, high = each.training_volume_ml
        if not low <= each.volume_ml <= high:
            side = "below" if each.volume_ml < low else "above"
            flags.append(f"{name}: {each.volume_ml:.4g} ml, {side} all training cases ({low:.4g} to {high:.4g} ml)")
    return flags


def _count_components(mask: MaskArray, box: tuple[slice, ...] | None, values: Sequence[int]) -> int | None:
    if box is None:
        return 0
    inside = mask[box]
    if inside.size > MAX_COMPONENT_VOXELS:
        return None
    return int(label(np.isin(inside, values), np.ones((3, 3, 3)))[1])
