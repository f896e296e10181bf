"""Models for tests: networks whose output is known by hand, and untrained TokenSegs in model folders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from plans import make_plan
from tokenseg.config import PRESETS, ChannelNormalisation, Label, NetworkConfig, Plan
from tokenseg.datasets.cases import Case
from tokenseg.model.network import TokenSeg, TokenSegOutput
from tokenseg.saved_model.checkpoint import Model, ModelFacts, save_model
from tokenseg.saved_model.ensemble import Ensemble
from tokenseg.segmentation.job import SegmentJob

AS_STORED = ChannelNormalisation(kind="window", low=-1e6, high=1e6, mean=0, std=1)


class Toy(nn.Module):
    """A network that is one function of its input, and remembers the shapes it saw."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> TokenSegOutput:
        self.seen.append(tuple(images.shape))
        return TokenSegOutput(self.function(images), (), None)


def nearest_level(num_outputs: int) -> Toy:
    """Exclusive outputs: the first channel's value, rounded, is the output that wins."""
    return Toy(lambda images: torch.cat([-((images[:, :1] - level) ** 2) for level in range(num_outputs)], dim=1))


def above_level(num_outputs: int) -> Toy:
    """Regions: output n is on where the first channel is at least n + 1."""
    return Toy(lambda images: torch.cat([images[:, :1] - level - 0.5 for level in range(num_outputs)], dim=1))


def mixing(num_outputs: int = 3) -> Toy:
    """Outputs that depend on all voxels of a pass, so that another window gives another answer."""
    return Toy(
        lambda images: torch.cat(
            [images.mean(1, keepdim=True) * (n + 1) + images.mean() for n in range(num_outputs)], dim=1
        )
    )


def constant(*logits: float) -> Toy:
    """The same logits everywhere."""
    return Toy(lambda images: torch.tensor(logits).view(1, -1, 1, 1, 1).expand(1, -1, *images.shape[2:]))


def as_stored(plan: Plan, **changes: object) -> Plan:
    """A plan without normalisation, so that a toy network sees the stored values."""
    return Plan.model_validate(plan.model_dump() | {"normalisation": [AS_STORED] * len(plan.channels)} | changes)


def labels_of(**values: int) -> tuple[Label, ...]:
    return tuple(Label(name=name, values=(value,), output_value=value) for name, value in values.items())


def toy_model(network: nn.Module, plan: Plan, name: str = "toy") -> Model:
    return Model(network.eval(), ModelFacts(name=name, plan=plan, network=PRESETS["tiny"]), torch.device("cpu"))


def untrained(plan: Plan | None = None, seed: int = 0, config: NetworkConfig = PRESETS["tiny"]) -> Model:
    plan = make_plan() if plan is None else plan
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = TokenSeg(config, plan)
        # Heads start small; without this all voxels would be alike.
        for parameter in network.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    facts = ModelFacts(name="phantom", plan=plan, network=config, training={"training_cases": 4, "fold": 0})
    return Model(network.eval(), facts, torch.device("cpu"))


def save_untrained(folder: Path, plan: Plan | None = None, seed: int = 0) -> Path:
    model = untrained(plan, seed)
    save_model(folder, model.network, model.facts)
    return folder


def job_of(models: Model | Sequence[Model], **asked: object) -> SegmentJob:
    """A call of `segment`: by one model or several, with what else is asked for by the names of `SegmentJob`."""
    return SegmentJob(Ensemble.of(models), **asked)


def case_named(name: str, *images: Path) -> Case:
    return Case(name, name, images)
