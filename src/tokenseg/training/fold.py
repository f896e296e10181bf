"""The prepared cases of one fold: batches to train on, cases to validate on; shared by training and benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenseg.config import RunConfig
from tokenseg.datasets.cases import Dataset, Split
from tokenseg.progress import Progress
from tokenseg.training.augment import build_augmentation, leave_unchanged
from tokenseg.training.batches import TrainingBatches
from tokenseg.training.cache import PreparedCase, prepare_cases


@dataclass(frozen=True, eq=False)
class PreparedFold:
    """Cases of a fold as the network takes them."""

    train: list[PreparedCase]
    val: list[PreparedCase]

    def batches(self, config: RunConfig, seed: int, part: tuple[int, int] = (0, 1)) -> TrainingBatches:
        """Batches of windows of the training cases.

        Args:
            config: Plan, and how windows are drawn and augmented.
            seed: Of the run.
            part: Number of this process, and how many share each batch.
        """
        augment = build_augmentation(config.plan) if config.train.augment else leave_unchanged
        # The zero keeps the batches those of earlier versions.
        return TrainingBatches(self.train, config.plan, config.train.foreground_fraction, augment, (seed, 0), part=part)


def prepare_fold(dataset: Dataset, split: Split, config: RunConfig, cache: Path, progress: Progress) -> PreparedFold:
    """Prepare the cases of a fold, or take those that are prepared already.

    Raises:
        TokenSegError: A case cannot be used, or the cache cannot be written.
    """
    chosen = {*split.train, *split.val}
    cases = tuple(case for case in dataset.cases if case.case_id in chosen)
    prepared = prepare_cases(dataset, cases, config.plan, cache, progress)
    return PreparedFold([prepared[each] for each in split.train], [prepared[each] for each in split.val])
