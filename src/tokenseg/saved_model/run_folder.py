"""The run folder of `tokenseg train`: all its file names, in one place.

RUN/
  config.toml        plan, network and training settings; edit and pass back with --config
  run.json           how the run was asked for, and the number of steps
  fingerprint.json   the dataset in numbers
  splits.json        the folds
  cache/             prepared cases; may be deleted
  log.csv            one row a step
  tensorboard/       the same as curves, where the extra `tensorboard` is installed
  state.safetensors  what a resumed run starts from
  model/             all that `tokenseg segment` needs
  validation/        masks of the fold's validation cases, their quality, how they were made, and their scores
  report.html        all of it to look at, in a browser
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenseg.errors import ConfigError
from tokenseg.messages import first_few


@dataclass(frozen=True)
class RunFolder:
    """A run, begun or not, and where its files are."""

    path: Path

    @property
    def config(self) -> Path:
        """Plan, network and training settings."""
        return self.path / "config.toml"

    @property
    def facts(self) -> Path:
        """How the run was asked for."""
        return self.path / "run.json"

    @property
    def fingerprint(self) -> Path:
        """The dataset in numbers."""
        return self.path / "fingerprint.json"

    @property
    def splits(self) -> Path:
        """The folds."""
        return self.path / "splits.json"

    @property
    def cache(self) -> Path:
        """Folder of prepared cases."""
        return self.path / "cache"

    @property
    def log(self) -> Path:
        """A row a step."""
        return self.path / "log.csv"

    @property
    def tensorboard(self) -> Path:
        """Folder of curves."""
        return self.path / "tensorboard"

    @property
    def state(self) -> Path:
        """What a resumed run starts from."""
        return self.path / "state.safetensors"

    @property
    def model(self) -> Path:
        """The model folder."""
        return self.path / "model"

    @property
    def validation(self) -> Path:
        """Folder of the masks of validation cases."""
        return self.path / "validation"

    @property
    def scores_json(self) -> Path:
        """Scores of validation, all that is known."""
        return self.validation / "scores.json"

    @property
    def scores_csv(self) -> Path:
        """Scores of validation, a row a case and label."""
        return self.validation / "scores.csv"

    @property
    def report(self) -> Path:
        """The page to look at; written last."""
        return self.path / "report.html"

    @property
    def is_begun(self) -> bool:
        """Whether there is something to resume."""
        return self.facts.exists() or self.state.exists()

    @property
    def is_finished(self) -> bool:
        """Whether the run was validated, and its report written."""
        return self.scores_json.exists() and self.report.exists()

    def refuse_foreign(self) -> None:
        """Let a new run start where an earlier one died early, but not in a folder of the user's.

        Raises:
            ConfigError: There are files that are not a run's.
        """
        early = {path.name for path in (self.config, self.fingerprint, self.splits, self.cache)}
        names = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()
        foreign = sorted(name for name in names - early if not name.startswith("."))
        if foreign:
            raise ConfigError(
                f"run folder {self.path} holds files that are not a run's: {first_few(foreign)}; "
                "name a new or empty folder"
            )
