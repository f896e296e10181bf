"""Options of commands that the library takes too: of segmenting, of training, of drawing synthetic exams."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenseg.config import DeviceName, PresetName
from tokenseg.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SegmentOptions:
    """How a segmentation is asked for on the command line."""

    full: bool = False
    """Run all windows of large scans, also where the model was trained to choose among them."""
    series: str = ""
    """DICOM with several series: the one to segment, by UID or a part of its description that DCE phases share."""
    empty_seg: bool = False
    """DICOM: of an exam without findings write an all-background segmentation, not a JSON file that says so."""
    shard: str = ""
    """Part of a cohort, such as 2/8: every eighth case from the second on, for as many jobs side by side."""
    show_names: bool = False
    """Call cases by name, not by a hash of it, in logs, status, manifest, quality files and report."""
    max_memory: str = ""
    """Memory that the process may take, such as 4GB; without it, what is free. The mask is the same."""
    probabilities: bool = False
    """Write CASE_probabilities.npy too: float16 (labels, X, Y, Z) in the mask's axes, background first."""

    def part(self) -> tuple[int, int]:
        """Number and count of the shard; (1, 1) without one.

        Raises:
            ConfigError: It is not of the form i/n with 1 <= i <= n.
        """
        if not self.shard:
            return 1, 1
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", self.shard)
        number, count = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 1 <= number <= count:
            raise ConfigError(f"--shard {self.shard}: must be i/n with i from 1 to n, such as 2/8")
        return number, count


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How a run is asked for on the command line."""

    preset: PresetName = "small"
    """Size of the network: tiny (for tests), small (to use), paper (of the paper's size, to compare)."""
    fold: int | Literal["all"] = 0
    """Which of the folds validates, the others train; `all` trains on every case and validates on the same."""
    max_minutes: float | None = None
    """Time for the training steps; their number follows from a timed warm-up and is saved. Validation comes on top."""
    max_steps: int | None = None
    """Number of training steps; without this and --max-minutes the plan says. With --resume, more than before extends
    the run."""
    config: Path | None = None
    """TOML file with tables [plan], [network], [train] whose values replace planned ones."""
    device: DeviceName = "auto"
    """Where to compute."""
    threads: int | None = None
    """CPU threads; all cores if not given."""
    seed: int = 0
    """Seed of weights and batches."""
    resume: bool = False
    """Go on with a run that was interrupted."""

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            ConfigError: Both limits are given, or a number is out of range.
        """
        if self.max_minutes is not None and self.max_steps is not None:
            raise ConfigError("--max-minutes and --max-steps are both given; give one of them")
        if self.max_minutes is not None and not 0 < self.max_minutes < float("inf"):
            raise ConfigError(f"--max-minutes {self.max_minutes}: must be above 0")
        for name, least in (("max_steps", 1), ("threads", 1), ("fold", 0), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, int) and not least <= value < 2**63:
                bound = f"at least {least}" if value < least else "below 2^63"
                raise ConfigError(f"--{name.replace('_', '-')} {value}: must be {bound}")


@dataclass(frozen=True, kw_only=True)
class SyntheticOptions:
    """How many synthetic exams are asked for on the command line."""

    train: int = 40
    """Exams to learn from."""
    test: int = 12
    """Held-out exams of the same centre."""
    external: int = 10
    """Exams of another centre: other field strength, contrast, noise and resolution."""
    seed: int = 0
    """Seed of everything; the first exams of a part do not depend on how many there are."""
    whole: bool = False
    """Exams of both breasts at about 1 mm, at least 320 x 320 x 96 voxels, instead of one breast at 1.5 mm."""

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            ConfigError: A number is negative, or there is no exam at all.
        """
        for name in ("train", "test", "external", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name} {getattr(self, name)}: must be at least 0")
        if self.train + self.test + self.external == 0:
            raise ConfigError("--train, --test and --external are all 0; ask for at least one exam")
