"""Options of `tokenseg benchmark speed`; light, so that the command line can show them without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from tokenseg.config import DeviceName
from tokenseg.errors import ConfigError

PrecisionName: TypeAlias = Literal["fp32", "bf16"]
SpeedEngine: TypeAlias = Literal["torch", "torch-compile", "openvino", "cuda-graph"]

DEFAULT_NETWORKS = (
    *("tokenseg-small", "tokenseg-small-no-tokens", "tokenseg-small-no-refinement", "tokenseg-paper"),
    *("monai-unet", "monai-basicunet", "monai-segresnet", "monai-vnet", "monai-unetr", "monai-swinunetr"),
    *("monai-dynunet", "nnunet-plainconv", "nnunet-resenc-m", "nnunet-resenc-l"),
)
SIZE_MULTIPLE_VOX = 32


@dataclass(frozen=True, kw_only=True)
class SpeedOptions:
    """What is measured, and where."""

    networks: tuple[str, ...] = DEFAULT_NETWORKS
    """Networks to measure; the first is the reference, beside which all others run in turn."""
    sizes: tuple[int, ...] = (128,)
    """Edges of the cubes, voxels; multiples of 32."""
    precisions: tuple[PrecisionName, ...] = ("fp32", "bf16")
    """Precisions; the reference always runs at the same."""
    engines: tuple[SpeedEngine, ...] = ("torch",)
    """What computes; the reference always runs in the same."""
    training: bool = False
    """Measure a training step at batch 2 too (torch only)."""
    end_to_end: bool = False
    """Time the stages of a whole 256 x 256 x 160 scan too, from file to file, for the reference."""
    device: DeviceName = "auto"
    """Where to compute."""
    threads: int | None = None
    """CPU threads; all cores if not given."""
    rounds: int = 5
    """Timed passes of each network; fewer where they take more than two minutes."""
    csv: Path | None = None
    """Append rows to this file."""
    plot: Path | None = None
    """Draw time against parameters, or against Dice, into this PNG file; rows of --csv of the same kind count too."""
    accuracy: Path | None = None
    """Rows of `benchmark accuracy`, for the Dice in --plot."""

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            ConfigError: A number is out of range, a list is empty or repeats itself, or --accuracy has no --plot.
        """
        for name in ("networks", "sizes", "precisions", "engines"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                given = " ".join(map(str, values)) or "(nothing)"
                raise ConfigError(f"--{name} {given}: give one or several, each once")
        for size in self.sizes:
            if size < SIZE_MULTIPLE_VOX or size % SIZE_MULTIPLE_VOX:
                raise ConfigError(f"--sizes {size}: must be a multiple of 32, which every network takes unpadded")
        for name in ("threads", "rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name} {value}: must be at least 1")
        if self.accuracy is not None and self.plot is None:
            raise ConfigError("--accuracy is for the picture; give --plot FILE.png too")
