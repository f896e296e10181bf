"""The legend of axes: every name in the shape of an array, `Float[Tensor, "B C X Y Z"]`, and the common array types.

Images and masks:
    X Y Z     voxels along the three axes, in the order of the file, of the plan grid or of a window
    X2 Y2 Z2  the same image with other voxels: turned, resampled, averaged or cut into blocks
    Xp Yp Zp  voxels of the plan grid, beside those of the scan
    Xc Yc Zc  voxels of the coarse view of a scan
    C         image channels
    R         maps of reference labels: one with the index of each label, or one a region
    labels    maps of all labels or regions, one each; background has none

Images row by row; a row is a plane across the axis with most voxels:
    a b c     voxels along the axes from the one with most voxels to the one with fewest
    bp cp     the same of the plan grid, beside those of the scan
    aw bw cw  the same of a window

Network:
    B         images in a batch
    L         output channels: labels with background, or regions
    Xl Yl Zl  voxels of one pyramid level
    W         feature channels of one pyramid level
    V         channels or values beside W: after a layer, or of all voxels of a block
    T         passes over one scan: one a window
    N         candidate tokens of all levels (400)
    K         kept tokens (100), K <= N
    x y z     cells of one level (4 x 5 x 5)
    F         token width
    E         codebook entries

Lists:
    n m       any number of things, such as rows, voxels, points or cases; m of another kind, or fewer of them
    rows columns  pixels of a DICOM slice
    shape shape2  any number of axes (`*shape`); before and after a change

A number is a fixed length, `_` and `...` may be anything. Within one function a name always has the same length.
Arrays are kept in nibabel order (X, Y, Z) in RAS+, so `spacing_mm[i]` belongs to axis i and to affine column i.
Network tensors are (B, C, X, Y, Z).
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Integer
from torch import Tensor

Images: TypeAlias = Float[Tensor, "B C X Y Z"]
Logits: TypeAlias = Float[Tensor, "B L X Y Z"]
Features: TypeAlias = Float[Tensor, "B W Xl Yl Zl"]
Tokens: TypeAlias = Float[Tensor, "B N F"]
Codes: TypeAlias = Integer[Tensor, "B N"]
TokenScalars: TypeAlias = Float[Tensor, "B N"]
TokenFlags: TypeAlias = Bool[Tensor, "B N"]

ImageArray: TypeAlias = Float[np.ndarray, "C X Y Z"]
MaskArray: TypeAlias = Integer[np.ndarray, "X Y Z"]
BoolMask: TypeAlias = Bool[np.ndarray, "X Y Z"]
Affine: TypeAlias = Float[np.ndarray, "4 4"]


LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""DICOM and ITK count to the left and to the back, NIfTI and this program to the right and to the front."""
