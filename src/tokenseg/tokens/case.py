"""The tokens of each pass of the network over one scan, in places of the scan itself; and what was segmented.

The scan is segmented as `tokenseg segment` does it, in one pass or in sliding windows; each pass has its own
candidates and keeps its own K. Everything is told in voxels of the scan turned to RAS+ axes at its own spacing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer, Shaped
from torch import Tensor, nn

from tokenseg.config import NetworkConfig, Plan
from tokenseg.errors import ConfigError
from tokenseg.imaging.orientation import turn_to_ras
from tokenseg.imaging.volume import Volume
from tokenseg.inference.predict import check_finite
from tokenseg.inference.windows import PaddedRows, in_order, pad_rows, predict_logits, torch_forward, window_corners
from tokenseg.model.network import TokenRecord, TokenSegOutput
from tokenseg.model.quantizer import FiniteScalarQuantizer
from tokenseg.plan_grid.preprocess import GridRecord, prepare_image, rows_of
from tokenseg.plan_grid.restore import restore_logits
from tokenseg.saved_model.checkpoint import Model
from tokenseg.shapes import BoolMask, Images


@dataclass(frozen=True, eq=False)
class CaseTokens:
    """The N candidate tokens of each of T passes of the network over one scan.

    Boxes are corners in voxel edges of the scan in RAS+ axes (voxel i spans i to i + 1), at its own spacing.

    Attributes:
        boxes_vox: Where the features of each token were pooled, clipped to what the network saw of the scan; empty
            for a cell wholly in padding.
        cells_vox: The even share of the scan that stands for each token in a picture: the same for all levels, trimmed
            where windows overlap, so that no two places overlap; empty where nothing is left.
        level: Pyramid level of each candidate, 0 = 1/2.
        kept: Whether each candidate was kept.
        boundary: First term of the score, the gradient of the image; 0..1 within a pass.
        semantic: Second term, the predicted chance of a boundary; 0..1 within a pass.
        diversity: Third term, how rare the code is; 0..1 within a pass, 0 without a codebook.
        score: The joined score, 0..1.
        code: Entry of the codebook; -1 without one.
        num_codes: Entries of the codebook; 0 without one.
        prediction: Foreground that the same passes segmented, in RAS+ axes.
        record: The way from the scan as stored.
    """

    boxes_vox: Float[np.ndarray, "T N 2 3"]
    cells_vox: Float[np.ndarray, "T N 2 3"]
    level: Integer[np.ndarray, " N"]
    kept: Bool[np.ndarray, "T N"]
    boundary: Float[np.ndarray, "T N"]
    semantic: Float[np.ndarray, "T N"]
    diversity: Float[np.ndarray, "T N"]
    score: Float[np.ndarray, "T N"]
    code: Integer[np.ndarray, "T N"]
    num_codes: int
    prediction: BoolMask
    record: GridRecord

    @property
    def in_scan(self) -> Bool[np.ndarray, "T N"]:
        """Whether each cell holds any of the scan; False is a cell wholly in padding."""
        real: Bool[np.ndarray, "T N"] = np.all(self.boxes_vox[:, :, 1] > self.boxes_vox[:, :, 0], axis=2)
        return real


def find_tokens(model: Model, volume: Volume) -> CaseTokens:
    """Segment a volume and keep what the tokenizer did in each pass.

    Args:
        model: A model with a token path.
        volume: Must bring the channels that the model expects, by name.

    Raises:
        ConfigError: The model has no tokens.
        DataError: A channel is missing.
        ModelError: The network gives NaN or infinity.
    """
    check_has_tokens(model)
    plan = model.facts.plan
    prepared = prepare_image(volume, plan)
    record = prepared.record
    listening = _Listening(model.network)
    logits = predict_logits(torch_forward(listening, model.device), prepared.image, plan)
    check_finite(logits, model)
    passes = _find_passes(pad_rows(rows_of(prepared.image), plan.window_vox), plan)
    records = listening.records
    level = records[0].level.cpu().numpy()
    boxes = [each.boxes_vox.cpu().numpy() + where.corner for each, where in zip(records, passes, strict=True)]
    cells = [np.tile(where.cells, (len(level) // len(where.cells), 1, 1)) for where in passes]
    importance = [each.importance for each in records]
    return CaseTokens(
        boxes_vox=_to_scan(boxes, record),
        cells_vox=_to_scan(cells, record),
        level=level,
        kept=_stacked([each.kept for each in records]),
        boundary=_stacked([each.boundary for each in importance]),
        semantic=_stacked([each.semantic for each in importance]),
        diversity=_stacked([each.diversity for each in importance]),
        score=_stacked([each.score for each in importance]),
        code=_stacked([each.codes for each in records]),
        num_codes=_num_codes(model.facts.network),
        prediction=turn_to_ras(restore_logits(logits, record, plan) != 0, record.axes, record.flipped),
        record=record,
    )


def check_has_tokens(model: Model) -> None:
    """Refuse a model without a token path.

    Raises:
        ConfigError: With the name of the model.
    """
    if not model.facts.network.tokens:
        raise ConfigError(
            f"model {model.facts.name!r} was trained without tokens (tokens = false), so there are none to show; "
            "use a model trained with them"
        )


class _Pass(NamedTuple):
    """Where one pass of the network lies, in voxels of the prepared image."""

    corner: tuple[int, int, int]
    """First voxel of its input; negative where that is padding."""
    cells: Float[np.ndarray, "n 2 3"]
    """Its even shares, trimmed to the part of the image that is nearer to its centre than to another's."""


class _Listening(nn.Module):
    """A network that remembers the token record of each of its passes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.records: list[TokenRecord] = []

    def forward(self, images: Images) -> TokenSegOutput:
        output: TokenSegOutput = self.network(images)
        if output.tokens is not None:
            self.records.append(output.tokens)
        return output


def _find_passes(image: PaddedRows, plan: Plan) -> list[_Pass]:
    size, order = image.rows.shape, image.rows.order
    corners = window_corners(size, plan)
    length = size if corners is None else plan.window_vox
    corners = in_order(corners or [(0, 0, 0)], order)
    firsts = [sorted({corner[axis] for corner in corners}) for axis in range(3)]
    start = [image.place[order.index(axis)].start for axis in range(3)]
    passes = []
    for corner in corners:
        edges = [_edges(corner[i], firsts[i], length[i], plan.grid[i]) - start[i] for i in range(3)]
        low, high = (
            np.stack(np.meshgrid(*ends, indexing="ij"), axis=-1).reshape(-1, 3)
            for ends in ([each[:-1] for each in edges], [each[1:] for each in edges])
        )
        x, y, z = (int(first - padding) for first, padding in zip(corner, start, strict=True))
        passes.append(_Pass((x, y, z), np.stack([low, high], axis=1)))
    return passes


def _edges(first: int, firsts: Sequence[int], length: int, count: int) -> Float[np.ndarray, " n"]:
    """Ends of the even shares of a window along an axis, trimmed half-way to where its neighbours begin or end."""
    place = firsts.index(first)
    low = first if place == 0 else (firsts[place - 1] + length + first) / 2
    high = first + length if place == len(firsts) - 1 else (first + length + firsts[place + 1]) / 2
    return np.linspace(first, first + length, count + 1).clip(low, high)


def _to_scan(boxes: list[Shaped[np.ndarray, "N 2 3"]], record: GridRecord) -> Float[np.ndarray, "T N 2 3"]:
    """Boxes in voxels of the prepared image as boxes in the scan, clipped to what the network saw of it."""
    scale = np.array(record.crop_shape) / np.array(record.grid_shape)
    in_scan = np.stack(boxes) * scale + np.array(record.crop_start)
    clipped: Float[np.ndarray, "T N 2 3"] = np.clip(in_scan, record.crop_start, record.crop_stop)
    return clipped


def _stacked(tensors: Sequence[Tensor]) -> np.ndarray[Any, np.dtype[Any]]:
    values = torch.cat(list(tensors)).cpu()
    return (values.float() if values.is_floating_point() else values).numpy()


def _num_codes(config: NetworkConfig) -> int:
    return {"vq": config.codebook_size, "fsq": math.prod(FiniteScalarQuantizer.levels), "none": 0}[config.quantizer]
