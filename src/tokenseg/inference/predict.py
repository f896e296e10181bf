"""One scan: scan -> plan grid -> networks -> mask on the scan's own grid.

All of it goes row by row, so that what is held at once follows from a window and a plane, not from the scan. Cut into
slabs, less is held and some windows run twice; the mask is the same, bit for bit.

Whether a scan runs in one pass or in windows (`windows.py`) follows from the plan and the scan alone, never from free
memory. With a model that was trained on coarse views, only those windows run that a coarse view calls for
(`steering.py`), unless all are asked for.

There is no other way from a scan to an answer: quality, probabilities and tokens are told of the same passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from tokenseg.errors import ModelError
from tokenseg.imaging.volume import Volume
from tokenseg.inference.quality import QualityMeter
from tokenseg.inference.steering import choose_route, logits_rows
from tokenseg.inference.token_passes import ScanTokens, TokenListener
from tokenseg.outputs import outputs_of
from tokenseg.plan_grid.preprocess import GridRecord, Rows, open_scan
from tokenseg.plan_grid.probabilities import ProbabilityFile
from tokenseg.plan_grid.restore import empty_mask, restore_rows, slabs_of
from tokenseg.saved_model.checkpoint import Model
from tokenseg.saved_model.ensemble import Ensemble
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
    return segment_scan(Ensemble.of(model), volume, Manner(full=full)).mask


class Manner(NamedTuple):
    """How a scan is segmented; but for `full`, it does not show in the mask."""

    full: bool = False
    """Run all windows of a large scan."""
    num_slabs: int = 1
    """How many slabs to go through one after the other."""
    probabilities: Path | None = None
    """Where they are to go, see `ProbabilityFile`."""
    tokens: bool = False
    """Keep what the tokenizers make of their candidates."""


class Segmented(NamedTuple):
    """A mask, and what was told on the way to it."""

    mask: MaskArray
    windows_run: int
    """Passes at full spacing, over all models."""
    windows_full: int
    """Passes that full sliding windows take."""
    record: GridRecord
    meter: QualityMeter
    """What the networks' answers say of their quality."""
    probabilities: ProbabilityFile | None
    """Where they wait for their mask, if they are wanted."""
    tokens: ScanTokens | None
    """If they are wanted."""


def segment_scan(
    ensemble: Ensemble, volume: Volume, manner: Manner | None = None, watch: Stopwatch | None = None
) -> Segmented:
    """Segment one volume; see `segment_volume`.

    Args:
        ensemble: The models.
        volume: The scan.
        manner: How; as it is without options if not given.
        watch: Told of the time of each stage.

    Raises:
        FileError: Probabilities cannot be written.
    """
    plan, manner, watch = ensemble.plan, manner or Manner(), watch or Stopwatch()
    with watch.stage("resample"):
        scan = open_scan(volume, plan)
        rows = _timed(scan.rows, watch)
    with watch.stage("network"):
        routes = [choose_route(model, rows, full=manner.full) for model in ensemble.models]
    mask = empty_mask(scan.record, plan)
    meter = QualityMeter(plan, scan.record, ensemble.quality)
    listeners = [TokenListener(route.windows_run, plan) if manner.tokens else None for route in routes]
    counted = 0
    with _opened(manner.probabilities, ensemble, scan.record, meter.temperature) as file:
        for slab in slabs_of(scan.record, manner.num_slabs):
            answers = [
                logits_rows(model, route, slab.grid, listener)
                for model, route, listener in zip(ensemble.models, routes, listeners, strict=True)
            ]
            passing = _metered(_averaged(answers, ensemble, watch), meter, slab.grid, counted, watch)
            counted = slab.grid.stop
            with watch.stage("resample back"):
                restore_rows(passing, slab, scan.record, plan, mask, file)
                for _ in passing:  # that no voxel of the mask needs; the meter does
                    pass
    windows = sum(route.windows_run for route in routes), sum(route.windows_full for route in routes)
    heard = tuple(listener.heard(scan.record) for listener in listeners if listener is not None)
    return Segmented(
        mask, *windows, scan.record, meter, file, ScanTokens(scan.record, heard) if manner.tokens else None
    )


@contextmanager
def _opened(
    path: Path | None, ensemble: Ensemble, record: GridRecord, temperature: float
) -> Iterator[ProbabilityFile | None]:
    if path is None:
        yield None
        return
    file = ProbabilityFile(path, record, ensemble.plan.num_outputs, outputs_of(ensemble.plan), temperature)
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
    answers: Sequence[Iterator[Float[Tensor, "L b c"]]], ensemble: Ensemble, watch: Stopwatch
) -> Iterator[Float[Tensor, "L b c"]]:
    """Rows of the mean of several models, the time counted to the network."""
    outputs = outputs_of(ensemble.plan)
    while True:
        with watch.stage("network"):
            rows = [next(answer, None) for answer in answers]
            if any(row is None for row in rows):
                return
            row = outputs.mean_logits([row for row in rows if row is not None])
            _check_finite(row, ensemble)
        yield row


def _check_finite(logits: Float[Tensor, "L b c"], ensemble: Ensemble) -> None:
    """Refuse NaN: it would come out as background, an empty mask that looks like a finding."""
    if not math.isfinite(float(logits.sum())):  # a sum shows each of them, and takes no memory
        raise ModelError(f"model {ensemble.facts.name!r} gives NaN or infinity here; train it again")
