"""One call of `segment`: which models, what was asked for, and who is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version

from tokenseg.config import Plan
from tokenseg.options import SegmentOptions
from tokenseg.progress import Progress, Silent
from tokenseg.saved_model.ensemble import Ensemble


@dataclass(frozen=True, eq=False)
class SegmentJob:
    """What is the same for all cases of a call."""

    ensemble: Ensemble
    options: SegmentOptions = field(default_factory=SegmentOptions)
    progress: Progress = field(default_factory=Silent)
    command: str = ""
    """For the manifest."""
    tokens_of: int = 0
    """Of how many cases, the least sure, the tokens are kept, for a report."""

    @property
    def plan(self) -> Plan:
        """The models' plan."""
        return self.ensemble.plan

    @cached_property
    def settings(self) -> tuple[str, ...]:
        """All that a mask depends on besides the input."""
        ensemble, options = self.ensemble, self.options
        # The plan, and the fingerprint of the weights.
        facts = [model.facts.model_dump_json() for model in ensemble.models]
        engines = ["torch" if model.compiled is None else "openvino" for model in ensemble.models]
        wanted = [str(options.full), str(options.empty_seg), options.series]
        return (version("tokenseg"), *facts, *engines, ensemble.device.type, *wanted)
