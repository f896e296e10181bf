"""Sparse refinement: the logits of the most uncertain blocks of voxels, again and from the raw intensities.

Beyond the paper, in its spirit: most voxels are homogeneous, so full resolution is computed only where the answer is
open. A block is what one voxel at 1/2 covers, 2 x 2 x 2 voxels. The blocks whose best label is least certain are
gathered: raw intensities of the block and of the six at its faces, features, logits. A small perceptron gives a change
of the logits, and the blocks are put back. Cost follows the number of blocks; nothing is sorted at full resolution.
(PointRend, Kirillov 2020, does so in 2D for single points and interpolated features.)
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenseg.model import traced
from tokenseg.model.traced import traced_as
from tokenseg.outputs import Outputs
from tokenseg.shapes import Features

BlockLogits: TypeAlias = Float[Tensor, "B Xl Yl Zl _"]
"""Logits of the S voxels of every block, voxel by voxel: S L values."""
Intensities: TypeAlias = Float[Tensor, "B _ Xl Yl Zl"]
"""Raw voxels of every block, as `space_to_depth` gives them: C S values."""


class SparseRefiner(nn.Module):
    """Perceptron on the most uncertain blocks; starts at no change.

    Args:
        image_channels: C, channels of the image.
        width: W of the features at 1/2; the perceptron is four times as wide.
        block_vox: S, voxels of a block.
        num_outputs: L, output channels of the network.
        meaning: Of these outputs.
        fraction: Share of the blocks that are refined, above 0; 1 refines all.
    """

    averaging: Tensor

    def __init__(
        self, image_channels: int, width: int, block_vox: int, num_outputs: int, *, meaning: Outputs, fraction: float
    ) -> None:
        super().__init__()
        self.one_in, self.meaning = max(1, round(1 / fraction)), meaning
        self.register_buffer("averaging", torch.eye(num_outputs).repeat(1, block_vox) / block_vox, persistent=False)
        hidden = 4 * width
        self.near = nn.Linear(7 * block_vox * image_channels, hidden)
        self.here = nn.Linear(width + block_vox * num_outputs, hidden, bias=False)
        self.middle = nn.Linear(hidden, hidden)
        self.change = nn.Linear(hidden, block_vox * num_outputs)
        nn.init.zeros_(self.change.weight)
        nn.init.zeros_(self.change.bias)

    def forward(self, intensities: Intensities, features: Features, logits: BlockLogits) -> BlockLogits:
        """Return the logits with those of the most uncertain blocks changed.

        Args:
            intensities: Stored channels-last.
            features: Of the decoder at 1/2, stored channels-last.
            logits: Of every block.
        """
        size = logits.shape[1:4]
        rows = logits.flatten(0, 3)
        chosen = self._most_uncertain(rows, logits.shape[0])
        before = rows.index_select(0, chosen)
        around = _neighbours(chosen, (size[0], size[1], size[2]))
        near = _rows(intensities.to(features.dtype)).index_select(0, around.flatten())
        near = near.reshape(-1, self.near.in_features)
        here = torch.cat([_rows(features).index_select(0, chosen), before.to(features.dtype)], dim=1)
        hidden = nn.functional.leaky_relu(self.near(near) + self.here(here), 0.01)
        hidden = nn.functional.leaky_relu(self.middle(hidden), 0.01)
        after = before + self.change(hidden).to(before.dtype)
        return _replaced(rows, chosen, after).reshape(logits.shape)

    def _most_uncertain(self, rows: Float[Tensor, "n _"], batch: int) -> Int[Tensor, " m"]:
        """Places of the blocks to refine; as many in each volume."""
        # One label after the other, since reductions over a last axis of two or three are several times slower.
        averages = torch.matmul(self.averaging.to(rows.dtype), rows.detach().t()).float()
        lead = self.meaning.lead(averages).reshape(batch, -1)
        count = lead.shape[1]
        take = (count + self.one_in - 1) // self.one_in
        places = lead.topk(take, dim=1, largest=False, sorted=False).indices
        return (places + count * torch.arange(batch, device=places.device)[:, None]).flatten()


@traced_as(traced.replaced)
def _replaced(
    rows: Float[Tensor, "n V"], places: Int[Tensor, " m"], values: Float[Tensor, "m V"]
) -> Float[Tensor, "n V"]:
    return rows.index_put((places,), values)


def _rows(blocks: Float[Tensor, "B W Xl Yl Zl"]) -> Float[Tensor, "_ W"]:
    return blocks.permute(0, 2, 3, 4, 1).flatten(0, 3)


def _neighbours(places: Int[Tensor, " m"], size: tuple[int, int, int]) -> Int[Tensor, "m 7"]:
    """Places of each block and of the six at its faces; beyond the edge, the block itself."""
    x, y, z = size
    # Quotient and remainder without `%`, which exporters do not know for sizes that are found at run time.
    lines, column = _divided(places, z)
    planes, line = _divided(lines, y)
    _, plane = _divided(planes, x)
    near = [places]
    for at, length, step in ((plane, x, y * z), (line, y, z), (column, z, 1)):
        near += [places - step * (at > 0).to(places.dtype), places + step * (at < length - 1).to(places.dtype)]
    return torch.stack(near, dim=1)


def _divided(places: Int[Tensor, " m"], size: int) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
    quotient = torch.div(places, size, rounding_mode="floor")
    return quotient, places - quotient * size
