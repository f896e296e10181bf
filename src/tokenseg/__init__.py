"""TokenSeg: efficient 3D medical image segmentation. Research software, not a medical device.

    from tokenseg import load_model, read_volume, segment_volume

    mask = segment_volume(load_model("run"), read_volume("scan.nii.gz", ("MRI",)))

Public names are imported on first use, so that `import tokenseg` alone costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from tokenseg.about import __version__

if TYPE_CHECKING:
    from tokenseg.errors import TokenSegError
    from tokenseg.imaging.volume import Volume, read_volume, write_mask
    from tokenseg.inference.predict import segment_volume
    from tokenseg.model.network import TokenSeg, TokenSegOutput
    from tokenseg.saved_model.checkpoint import Model, load_model

_HOME = {
    "Model": "tokenseg.saved_model.checkpoint",
    "TokenSeg": "tokenseg.model.network",
    "TokenSegError": "tokenseg.errors",
    "TokenSegOutput": "tokenseg.model.network",
    "Volume": "tokenseg.imaging.volume",
    "load_model": "tokenseg.saved_model.checkpoint",
    "read_volume": "tokenseg.imaging.volume",
    "segment_volume": "tokenseg.inference.predict",
    "write_mask": "tokenseg.imaging.volume",
}

__all__ = [
    "Model",
    "TokenSeg",
    "TokenSegError",
    "TokenSegOutput",
    "Volume",
    "__version__",
    "load_model",
    "read_volume",
    "segment_volume",
    "write_mask",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'tokenseg' has no attribute {name!r}")
