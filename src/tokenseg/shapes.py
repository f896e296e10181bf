"""The one legend of axes, and the array types built from it.

    B  volumes in a batch              N  candidate tokens of all levels (400)
    C  image channels                  K  kept tokens (100), K <= N
    X Y Z  voxels along RAS+           F  token width
    x y z  cells of one level (4x5x5)  E  codebook entries
    L  output channels of the network  W  feature channels of one pyramid level

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
