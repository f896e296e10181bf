"""Options of `tokenseg benchmark accuracy`; light, so that the command line can show them without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from tokenseg.errors import ConfigError

REFERENCE = "tokenseg"
DEFAULT_NETWORKS = (
    *(REFERENCE, "monai-unet", "monai-segresnet", "monai-dynunet", "nnunet-plainconv", "nnunet-resenc-m"),
    "monai-swinunetr",
)
_CHOOSING_SHARE, _CHOOSING_MINUTES = 5, 3.0
_CHOOSING_STEPS_SHARE = 4


@dataclass(frozen=True, kw_only=True)
class AccuracyOptions:
    """What is compared, and under which budget."""

    networks: tuple[str, ...] = DEFAULT_NETWORKS
    """Networks to train: variants of TokenSeg, and other packages' networks."""
    minutes: float | None = None
    """Training time of each network, turned into steps by one timing of all; 15 if --steps is not given either."""
    steps: int | None = None
    """Training steps of each network, instead of the same time."""
    fold: int = 1
    """Fold whose validation cases are reported."""
    choosing_fold: int = 0
    """Fold on which the learning rate is chosen."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of weights and batches; each is a training of its own."""
    threads: int = 1
    """CPU threads."""
    config: Path | None = None
    """TOML file as for `train`, for all networks alike."""
    csv: Path | None = None
    """Append rows to this file; OUT/accuracy.csv if not given. Dice of each case goes beside it, in `..._cases.csv`."""

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            ConfigError: Both budgets are given, a number is out of range, or a list is empty or repeats itself.
        """
        if self.minutes is not None and self.steps is not None:
            raise ConfigError("--minutes and --steps are both given; give one of them")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ConfigError(f"--minutes {self.minutes}: must be above 0")
        for name, least in (("steps", 1), ("fold", 0), ("choosing_fold", 0), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
        for name in ("networks", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                given = " ".join(map(str, values)) or "(nothing)"
                raise ConfigError(f"--{name} {given}: give one or several, each once")
        if min(self.seeds) < 0:
            raise ConfigError(f"--seeds {min(self.seeds)}: must be at least 0")

    @property
    def budget(self) -> Budget:
        """What each network gets."""
        if self.steps is not None:
            return Budget(steps=self.steps)
        return Budget(minutes=15.0 if self.minutes is None else self.minutes)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What each network gets: time or steps, one of them."""

    minutes: float | None = None
    steps: int | None = None

    @property
    def text(self) -> str:
        """As it stands in rows, such as "15 minutes"."""
        return f"{self.minutes:g} minutes" if self.steps is None else f"{self.steps} steps"

    def num_steps(self, step_seconds: float | None) -> int:
        """Steps of the reported training; at least one.

        Args:
            step_seconds: Time of one step; needed where the budget is a time.
        """
        return self._steps_of(self.minutes, step_seconds) if self.steps is None else self.steps

    def num_choosing_steps(self, step_seconds: float | None) -> int:
        """Steps of a training that tries a learning rate: a fifth of the time, three minutes at most; or a quarter."""
        if self.steps is not None:
            return max(1, self.steps // _CHOOSING_STEPS_SHARE)
        minutes = None if self.minutes is None else min(self.minutes / _CHOOSING_SHARE, _CHOOSING_MINUTES)
        return self._steps_of(minutes, step_seconds)

    @staticmethod
    def _steps_of(minutes: float | None, step_seconds: float | None) -> int:
        if minutes is None or step_seconds is None:
            raise ConfigError("a budget in minutes needs the time of a step; time the network first")
        return max(1, int(minutes * 60 / step_seconds))
