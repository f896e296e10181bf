"""The coarse view of a large scan: blocks of voxels averaged, so that the network sees all of it in one pass.

A block at the upper edge of the scan may be incomplete; it counts the voxels that it has.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, UInt8
from numpy.typing import NDArray
from scipy.ndimage import convolve1d

from tokenseg.config import Vox3
from tokenseg.shapes import ImageArray


def coarse_image(image: ImageArray, factor: Vox3) -> Float[np.ndarray, "C Xc Yc Zc"]:
    """Average blocks of voxels, channel by channel.

    Args:
        image: Normalised intensities on the plan's grid.
        factor: Voxels of a block along each axis.

    Returns:
        Float32, ceil(size / factor) voxels along each axis.
    """
    blocks = np.asarray(image, dtype=np.float32)
    for axis, count in enumerate(factor, start=1):
        blocks = _summed(blocks, count, axis)
        sizes = _block_sizes(image.shape[axis], count)
        blocks /= sizes.reshape([-1 if other == axis else 1 for other in range(4)])
    return blocks


def coarse_labels(labels: UInt8[np.ndarray, "R X Y Z"], factor: Vox3) -> UInt8[np.ndarray, "R Xc Yc Zc"]:
    """Label blocks by the foreground in them and in the 26 around them, however little.

    A lesion smaller than a block must stay in sight, and must not weigh next to nothing in a loss beside a large one:
    what a coarse view is asked is where to look, and there every lesion counts.

    Args:
        labels: Label indices 0..n in one map, or a 0/1 map a region.
        factor: Voxels of a block along each axis.

    Returns:
        In each map the most frequent foreground label of the 27 blocks, the first in a tie; 0 where they have none.
    """
    most = _count(labels == 1, factor)
    best = (most > 0).astype(np.uint8)
    for label in range(2, int(labels.max(initial=0)) + 1):
        count = _count(labels == label, factor)
        best[count > most] = label
        most = np.maximum(most, count)
    return best


def _count(present: Bool[np.ndarray, "R X Y Z"], factor: Vox3) -> Float[np.ndarray, "R Xc Yc Zc"]:
    """Voxels in each block and its 26 neighbours: whole numbers, exact in float32."""
    counts = present.astype(np.float32)
    for axis, count in enumerate(factor, start=1):
        counts = convolve1d(_summed(counts, count, axis), np.ones(3), axis=axis, mode="constant")
    return counts


def _summed(values: NDArray[np.float32], count: int, axis: int) -> NDArray[np.float32]:
    return np.add.reduceat(values, np.arange(0, values.shape[axis], count), axis=axis)


def _block_sizes(size: int, count: int) -> Float[np.ndarray, " n"]:
    starts = np.arange(0, size, count)
    return np.minimum(count, size - starts).astype(np.float32)
