"""One volume: scan -> plan grid -> network -> mask on the scan's own grid.

All of it goes row by row, so that what is held at once follows from a window and a plane, not from the scan. Cut into
slabs, less is held and some windows run twice; the mask is the same, bit for bit.

Whether a scan runs in one pass or in windows (`windows.py`) follows from the plan and the scan alone, never from free
memory. With a model that was trained on coarse views, only those windows run that a coarse view calls for
(`steering.py`), unless all are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tokenseg.config import Plan
from tokenseg.errors import ConfigError, ModelError
from tokenseg.imaging.volume import Volume
from tokenseg.inference.quality import QualityMeter
from tokenseg.inference.steering import choose_route, logits_rows
from tokenseg.plan_grid.preprocess import GridRecord, Rows, open_scan
from tokenseg.plan_grid.probabilities import ProbabilityFile
from tokenseg.plan_grid.restore import empty_mask, restore_rows, slabs_of
from tokenseg.saved_model.checkpoint import Model
from tokenseg.shapes import MaskArray
from tokenseg.stopwatch import Stopwatch


def segment_volume(model: Model | Sequence[Model], volume: Volume, *, full: bool = False) -> MaskArray:
    """Segment one volume.

    The scan may have any spacing, isotropic or not, and any order of axes: it is resampled to the model's own grid, and
    the mask back to that of the scan. The same input gives the same mask.

    >>> import numpy as np
    >>> from tokenseg import Volume, load_model, segment_volume
    >>> noise = np.random.default_rng(0).normal(100, 20, (1, 24, 20, 16)).astype(np.float32)
    >>> scan = Volume(noise, np.diag([1.0, 1.0, 2.0, 1.0]), ("MRI",))
    >>> mask = segment_volume(load_model("hippocampus"), scan)
    >>> mask.shape, set(np.unique(mask).tolist()) <= {0, 1, 2}
    ((24, 20, 16), True)

    Args:
        model: A model, or several of the same plan whose probabilities are averaged.
        volume: Must bring the channels that the model expects, by name.
        full: Run all windows of a large scan, also where the model was trained to choose among them.

    Returns:
        Mask (X, Y, Z) on the volume's own grid, in the dataset's label values, 0 elsewhere; all 0 where nothing is
        found.

    Raises:
        DataError: A channel is missing.
        ConfigError: No model is given, or the models have different plans.
        ModelError: A network gives NaN or infinity.
    """
    return segment_in_slabs(
        [model] if isinstance(model, Model) else list(model), volume, Stopwatch(), full=full, num_slabs=1
    ).mask


class Segmented(NamedTuple):
    """A mask, and how many windows it took over all models."""

    mask: MaskArray
    windows_run: int
    windows_full: int
    record: GridRecord
    meter: QualityMeter
    """What the network's answers say of their quality."""
    probabilities: ProbabilityFile | None
    """Where they wait for their mask, if they are wanted."""


def segment_in_slabs(
    models: Sequence[Model],
    volume: Volume,
    watch: Stopwatch,
    *,
    full: bool,
    num_slabs: int,
    probabilities: Path | None = None,
) -> Segmented:
    """Segment one volume; see `segment_volume`.

    Args:
        models: One or several of the same plan.
        volume: The scan.
        watch: Told of the time of each stage.
        full: Run all windows of a large scan.
        num_slabs: How many slabs to go through one after the other.
        probabilities: Where they are to go, see `ProbabilityFile`; None without.

    Raises:
        FileError: Probabilities cannot be written.
    """
    check_ensemble(models)
    plan = models[0].facts.plan
    with watch.stage("resample"):
        scan = open_scan(volume, plan)
        rows = _timed(scan.rows, watch)
    with watch.stage("network"):
        routes = [choose_route(model, rows, full=full) for model in models]
    mask = empty_mask(scan.record, plan)
    # A temperature is that of one model; means of several are less sure already.
    meter = QualityMeter(plan, scan.record, models[0].facts.quality if len(models) == 1 else None)
    counted = 0
    with _opened(probabilities, scan.record, plan, meter.temperature) as file:
        for slab in slabs_of(scan.record, num_slabs):
            answers = [logits_rows(model, route, slab.grid) for model, route in zip(models, routes, strict=True)]
            passing = _metered(_averaged(answers, models[0], watch), meter, slab.grid, counted, watch)
            counted = slab.grid.stop
            with watch.stage("resample back"):
                restore_rows(passing, slab, scan.record, plan, mask, file)
                for _ in passing:  # that no voxel of the mask needs; the meter does
                    pass
    windows = sum(route.windows_run for route in routes), sum(route.windows_full for route in routes)
    return Segmented(mask, *windows, scan.record, meter, file)


@contextmanager
def _opened(path: Path | None, record: GridRecord, plan: Plan, temperature: float) -> Iterator[ProbabilityFile | None]:
    if path is None:
        yield None
        return
    file = ProbabilityFile(path, record, plan.num_outputs, regions=plan.regions, temperature=temperature)
    try:
        file.begin()
        yield file
        file.end()
    except BaseException:
        file.discard()
        raise


def _metered(
    rows: Iterator[Float[Tensor, "L b c"]], meter: QualityMeter, stretch: slice, counted: int, watch: Stopwatch
) -> Iterator[Float[Tensor, "L b c"]]:
    """Show rows to the meter as they pass, each voxel once: those before `counted` were in the slab before."""
    first = max(stretch.start, counted)
    for number, row in enumerate(rows):
        with watch.stage("quality"):
            if first < stretch.stop:
                meter.add(number, row[:, first - stretch.start :], first)
        yield row


def _timed(rows: Rows, watch: Stopwatch) -> Rows:
    def read(first: int, stop: int) -> Float[Tensor, "C n b c"]:
        with watch.stage("resample"):
            return rows.read(first, stop)

    return replace(rows, read=read)


def _averaged(
    answers: Sequence[Iterator[Float[Tensor, "L b c"]]], model: Model, watch: Stopwatch
) -> Iterator[Float[Tensor, "L b c"]]:
    """Rows of the mean of several models, the time counted to the network."""
    while True:
        with watch.stage("network"):
            rows = [next(answer, None) for answer in answers]
            if any(row is None for row in rows):
                return
            row = _average([row for row in rows if row is not None], regions=model.facts.plan.regions)
            check_finite(row, model)
        yield row


def check_finite(logits: Float[Tensor, "*shape"], model: Model) -> None:
    """Refuse NaN: it would come out as background, an empty mask that looks like a finding.

    Raises:
        ModelError: With the name of the model.
    """
    if not math.isfinite(float(logits.sum())):  # a sum shows each of them, and takes no memory
        raise ModelError(f"model {model.facts.name!r} gives NaN or infinity here; train it again")


def check_ensemble(models: Sequence[Model]) -> None:
    """Refuse an empty ensemble, or one whose models differ in what they take or give.

    Raises:
        ConfigError: With the names of the models that disagree.
    """
    if not models:
        raise ConfigError("no model given; name at least one run or model folder")
    first = models[0].facts
    for model in models[1:]:
        if model.facts.plan.model_dump(exclude={"reasons"}) != first.plan.model_dump(exclude={"reasons"}):
            raise ConfigError(
                f"models {first.name!r} and {model.facts.name!r} were trained with different plans; "
                "average only folds of one plan (train the folds with the same --config)"
            )


def _average(logits: list[Float[Tensor, "L b c"]], *, regions: bool) -> Float[Tensor, "L b c"]:
    """Mean of the probabilities, as logits."""
    if len(logits) == 1:
        return logits[0]
    if regions:
        return torch.stack([each.sigmoid() for each in logits]).mean(dim=0).logit(eps=1e-7)
    return torch.stack([each.softmax(dim=0) for each in logits]).mean(dim=0).clamp(min=1e-7).log()
