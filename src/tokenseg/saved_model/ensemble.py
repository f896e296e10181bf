"""Models that segment together: their probabilities are averaged. One model is an ensemble of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tokenseg.config import Plan
from tokenseg.errors import ConfigError
from tokenseg.saved_model.checkpoint import Model, ModelFacts, QualityFacts


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Models of one plan, on one device.

    Attributes:
        models: At least one.

    Raises:
        ConfigError: There is none, or they differ in what they take or give; the message names those that disagree.
    """

    models: tuple[Model, ...]

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("no model given; name at least one run or model folder")
        for model in self.models[1:]:
            if _comparable(model) != _comparable(self.models[0]):
                raise ConfigError(
                    f"models {self.facts.name!r} and {model.facts.name!r} were trained with different plans; "
                    "average only folds of one plan (train the folds with the same --config)"
                )

    @classmethod
    def of(cls, models: Model | Sequence[Model]) -> Ensemble:
        """One model, or several."""
        return cls((models,) if isinstance(models, Model) else tuple(models))

    @property
    def facts(self) -> ModelFacts:
        """Facts of the first, which stand for all where they are shown: name, inputs, volumes in training."""
        return self.models[0].facts

    @property
    def plan(self) -> Plan:
        """The plan, which they share."""
        return self.facts.plan

    @property
    def device(self) -> torch.device:
        """Where they compute."""
        return self.models[0].device

    @property
    def quality(self) -> QualityFacts | None:
        """With the temperature, which is that of one model; means of several are less sure already."""
        return self.facts.quality if len(self.models) == 1 else None

    @property
    def is_compiled(self) -> bool:
        """Whether an engine other than torch computes any of them."""
        return any(model.compiled is not None for model in self.models)

    @property
    def is_saved(self) -> bool:
        """Whether all weights have a fingerprint, by which a mask is known to be theirs."""
        return all(model.facts.weights_sha256 for model in self.models)


def _comparable(model: Model) -> dict[str, object]:
    return model.facts.plan.model_dump(exclude={"reasons"})
