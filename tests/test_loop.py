from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from plans import make_plan
from tokenseg.config import PRESETS, Plan, TrainConfig
from tokenseg.errors import TrainingError
from tokenseg.model.network import TokenSeg, TokenSegOutput
from tokenseg.progress import Silent
from tokenseg.saved_model.run_folder import RunFolder
from tokenseg.training import loop
from tokenseg.training.augment import Window
from tokenseg.training.batches import Batch, TrainingBatches
from tokenseg.training.cache import PreparedCase
from tokenseg.training.csv_log import read_log
from tokenseg.training.loop import (
    Fit,
    build_optimizer,
    fit,
    learning_rate,
    measure_step_seconds,
    quick_dice,
    train_step,
)

CPU = torch.device("cpu")
PLAN = make_plan(window_vox=(16, 16, 16))


class Told(Silent):
    def __init__(self) -> None:
        self.messages: list[str] = []
        self.notes: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def advance(self, note: str = "") -> None:
        self.notes.append(note)


class Answer(nn.Module):
    """Gives its input as logits: what the image says is what is predicted."""

    def forward(self, images: Tensor) -> TokenSegOutput:
        return TokenSegOutput(images, (), None)


def ball(case_id: str = "ball", seed: int = 0) -> PreparedCase:
    rng = np.random.default_rng(seed)
    labels = np.zeros((1, 16, 16, 16), dtype=np.uint8)
    labels[0, 4:11, 5:12, 3:10] = 1
    image = labels + 0.3 * rng.standard_normal(labels.shape)
    places = np.argwhere(labels[0])
    points = np.column_stack([np.ones(len(places)), places]).astype(np.int32)
    return PreparedCase(case_id, image.astype(np.float32), labels, points)


def unchanged(window: Window, _: int) -> Window:
    return window


def run_of(folder: Path, cases: tuple[PreparedCase, ...] = (), **changes: object) -> Fit:
    cases = cases or (ball(),)
    run = Fit(
        fabric=Fabric(accelerator="cpu", devices=1, precision="32-true"),
        plan=PLAN,
        config=TrainConfig(),
        batches=TrainingBatches(cases, PLAN, 0.5, unchanged, (0, 0)),
        validation=cases,
        run=RunFolder(folder),
        progress=Told(),
        save_weights=lambda _: None,
    )
    return replace(run, **changes)


def tiny(seed: int = 0) -> TokenSeg:
    torch.manual_seed(seed)
    return TokenSeg(PRESETS["tiny"], PLAN)


def deeper(seed: int = 0) -> TokenSeg:
    torch.manual_seed(seed)
    return TokenSeg(PRESETS["tiny"].model_copy(update={"blocks": (1, 2, 2, 1), "stochastic_depth": 0.5}), PLAN)


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def assert_same(network: nn.Module, before: dict[str, Tensor]) -> None:
    assert [name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])] == []


# The schedule and the optimizer


def test_learning_rate_by_hand() -> None:
    config = TrainConfig(learning_rate=1.0, warmup_fraction=0.25)
    warmup = [learning_rate(config, step, 8) for step in range(2)]
    assert warmup == pytest.approx([1 / 3, 2 / 3])
    # Six steps of the cosine: cos 0, cos 30, cos 60 degrees...
    cosine = [learning_rate(config, step, 8) for step in range(2, 8)]
    root = 3**0.5 / 2
    assert cosine == pytest.approx([1, (1 + root) / 2, 0.75, 0.5, 0.25, (1 - root) / 2])


@pytest.mark.parametrize("warmup_fraction", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("total_steps", [1, 2, 37])
def test_no_step_is_without_effect_or_above_the_peak(warmup_fraction: float, total_steps: int) -> None:
    config = TrainConfig(learning_rate=0.5, warmup_fraction=warmup_fraction)
    rates = [learning_rate(config, step, total_steps) for step in range(total_steps)]
    assert all(0 < rate <= 0.5 for rate in rates)


def test_the_token_path_learns_at_a_fifth_and_vectors_do_not_decay() -> None:
    network, config = tiny(), TrainConfig(learning_rate=1e-3, weight_decay=0.04)
    optimizer = build_optimizer(network, config)
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in network.named_parameters():
        group = group_of.pop(id(parameter))
        assert group["factor"] == (0.2 if name.startswith("tokenizer.") else 1.0), name
        assert group["weight_decay"] == (0.04 if parameter.ndim > 1 else 0.0), name
    assert group_of == {}
    assert len(optimizer.param_groups) == 4


def test_the_rate_of_a_step_reaches_each_group(tmp_path: Path) -> None:
    run, network = run_of(tmp_path), tiny()
    seen = []
    original = torch.optim.AdamW.step

    def watch(optimizer: torch.optim.AdamW, *args: object) -> object:
        seen.append(sorted({group["lr"] for group in optimizer.param_groups}))
        return original(optimizer, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watch)
        fit(run, network, 2)
    rates = [learning_rate(run.config, step, 2) for step in range(2)]
    assert seen == [pytest.approx([0.2 * rate, rate]) for rate in rates]
    assert [float(row["learning_rate"]) for row in read_log(tmp_path / "log.csv")] == pytest.approx(rates)


def test_a_network_without_token_path_or_of_another_kind_has_two_groups() -> None:
    plain = TokenSeg(PRESETS["tiny"].model_copy(update={"tokens": False}), PLAN)
    for network in (plain, nn.Sequential(nn.Linear(2, 2))):
        groups = build_optimizer(network, TrainConfig()).param_groups
        assert [group["factor"] for group in groups] == [1.0, 1.0]
        assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.01]


def test_frozen_weights_are_left_out() -> None:
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    assert [len(group["params"]) for group in build_optimizer(layer, TrainConfig()).param_groups] == [1]


# Steps


def test_training_lowers_the_loss_and_finds_the_ball(tmp_path: Path) -> None:
    saved = []
    run = run_of(
        tmp_path,
        config=TrainConfig(learning_rate=1e-2),
        save_weights=lambda network: saved.append(snapshot(network)),
    )
    network = tiny()
    fit(run, network, 60)
    rows = read_log(tmp_path / "log.csv")
    assert [int(row["step"]) for row in rows] == list(range(1, 61))
    assert float(rows[-1]["loss"]) < 0.5 * float(rows[0]["loss"])
    # Validated after 50 steps and at the end, and weights are saved each time.
    assert [row["step"] for row in rows if row["val_dice"]] == ["50", "60"]
    assert float(rows[-1]["val_dice"]) > 0.85
    assert len(saved) == 2
    assert_same(network, saved[-1])
    assert run.progress.notes[-1] == f"loss {float(rows[-1]['loss']):.3f}, Dice {float(rows[-1]['val_dice']):.3f}"
    assert run.progress.messages == []
    assert 1 <= float(rows[-1]["code_perplexity"]) <= 64
    assert 0 < float(rows[-1]["code_used_fraction"]) <= 1


def test_the_total_is_the_weighted_sum_of_the_logged_parts(tmp_path: Path) -> None:
    fit(run_of(tmp_path), tiny(), 1)
    row = {key: float(value) for key, value in read_log(tmp_path / "log.csv")[0].items()}
    total = row["segmentation"] + 0.5 * row["deep"] + 0.25 * row["commitment"] + 0.1 * row["score"]
    assert row["loss"] == pytest.approx(total, rel=1e-5)


def test_other_networks_have_no_code_statistics(tmp_path: Path) -> None:
    fit(run_of(tmp_path), TokenSeg(PRESETS["tiny"].model_copy(update={"tokens": False}), PLAN), 1)
    row = read_log(tmp_path / "log.csv")[-1]
    assert (row["code_perplexity"], row["code_used_fraction"]) == ("", "")


def test_a_state_saved_between_validations_is_enough_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are skipped at random included: the draws are those of the step."""
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    straight, broken = deeper(), deeper()
    fit(run_of(tmp_path / "a"), straight, 8)

    class Interrupted(Told):
        def advance(self, note: str = "") -> None:
            super().advance(note)
            if len(self.notes) == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(run_of(tmp_path / "b", progress=Interrupted()), broken, 8)
    resumed = deeper(seed=1)
    fit(run_of(tmp_path / "b"), resumed, 8)
    assert_same(resumed, snapshot(straight))
    losses = [[row["loss"] for row in read_log(tmp_path / name / "log.csv")] for name in "ab"]
    assert losses[0] == losses[1]


def test_nothing_is_left_to_do_after_the_last_step(tmp_path: Path) -> None:
    first, second = tiny(), tiny(seed=1)
    fit(run_of(tmp_path), first, 2)
    log = (tmp_path / "log.csv").read_text()
    fit(run_of(tmp_path), second, 2)
    assert_same(second, snapshot(first))
    assert (tmp_path / "log.csv").read_text() == log


def poisoned(value: float) -> PreparedCase:
    case = ball("bad_case")
    return replace(case, image=np.full_like(case.image, value))


def batch_of(case: PreparedCase) -> Batch:
    return TrainingBatches([case], PLAN, 0.5, unchanged, (0, 0))[0]


def test_a_step_with_a_loss_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    run, network = run_of(tmp_path), tiny()
    optimizer = build_optimizer(network, run.config)
    module, wrapped = run.fabric.setup(network, optimizer)
    train_step(run, module, wrapped, batch_of(ball()))
    before = snapshot(network)
    with pytest.raises(TrainingError, match="the loss became nan on a window of bad_case; the last good weights"):
        train_step(run, module, wrapped, batch_of(poisoned(np.nan)))
    # The codebook follows its tokens in the forward pass already.
    assert_same(network, before)
    train_step(run, module, wrapped, batch_of(ball()))
    assert all(bool(tensor.isfinite().all()) for tensor in network.state_dict().values())


def test_a_gradient_that_is_not_finite_is_told_from_the_loss(tmp_path: Path) -> None:
    run, network = run_of(tmp_path), tiny()
    module, wrapped = run.fabric.setup(network, build_optimizer(network, run.config))
    weight = next(network.parameters())
    weight.register_hook(lambda gradient: gradient * torch.inf)
    before = snapshot(network)
    with pytest.raises(TrainingError, match=r"the gradient of a loss of \d\.\d+ became infinite or NaN on a window of"):
        train_step(run, module, wrapped, batch_of(ball()))
    assert_same(network, before)


def test_the_last_good_weights_are_saved_when_the_loss_breaks(tmp_path: Path) -> None:
    saved = []
    cases = (ball("a"), ball("b"), poisoned(np.inf), ball("c"))
    run = run_of(tmp_path, cases, save_weights=lambda network: saved.append(snapshot(network)))
    network = tiny()
    names = [run.batches[step].case_ids for step in range(20)]
    first_bad = next(step for step, ids in enumerate(names) if "bad_case" in ids)
    assert first_bad > 0, "the seed must give a good step first"
    with pytest.raises(TrainingError, match=f"on a window of {' or '.join(sorted(set(names[first_bad])))};"):
        fit(run, network, 20)
    assert len(saved) == 1
    assert all(bool(tensor.isfinite().all()) for tensor in saved[0].values())
    assert len(read_log(tmp_path / "log.csv")) == first_bad
    # The state stands at the step that failed, which fails again.
    with pytest.raises(TrainingError, match="the last good weights are kept"):
        fit(run_of(tmp_path, cases), tiny(seed=1), 20)
    assert len(read_log(tmp_path / "log.csv")) == first_bad


def test_timing_leaves_the_network_alone(tmp_path: Path) -> None:
    network = tiny().eval()
    before = snapshot(network)
    seconds = measure_step_seconds(run_of(tmp_path), network)
    assert 0 < seconds < 5
    assert_same(network, before)
    assert not network.training
    assert list(tmp_path.iterdir()) == []


def test_timing_takes_the_median_and_stops_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 50.0, 59.0, 60.0, 63.0, 65.0, 65.5])
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(clock))
    steps = []
    monkeypatch.setattr(loop, "train_step", lambda *_: steps.append(1))
    monkeypatch.setattr(loop, "TIMED_SECONDS", 64.0)
    # Fetching the first batch takes 50 s, the first step 9 s; then steps take 1, 3 and 2 s.
    assert measure_step_seconds(run_of(tmp_path), tiny()) == 2.0
    assert len(steps) == 4


class ClaimsCuda(Fabric):
    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0)


# Python 3.12 warns of forks; a worker that runs under coverage warns that it measured nothing new.
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning", "ignore:Module tokenseg was previously imported")
def test_worker_processes_make_the_same_batches(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    cuda = replace(run, fabric=ClaimsCuda(accelerator="cpu", devices=1))
    here, there = list(loop._steps(run, 2, 7)), list(loop._steps(cuda, 2, 7))
    assert [step for step, _ in there] == [2, 3, 4, 5, 6]
    for (_, one), (_, other) in zip(here, there, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert one.case_ids == other.case_ids


# Validation


def answered(labels: np.ndarray, scores: np.ndarray, case_id: str = "case") -> PreparedCase:
    return PreparedCase(case_id, scores.astype(np.float32), labels.astype(np.uint8), np.zeros((0, 4), dtype=np.int32))


def exclusive(reference: list[int], predicted: list[int]) -> PreparedCase:
    scores = np.eye(3)[predicted].T.reshape(3, -1, 1, 1)
    return answered(np.array(reference).reshape(1, -1, 1, 1), scores)


def plan_of(**options: object) -> Plan:
    return make_plan(labels=2, window_vox=(4, 1, 1), **options)


@pytest.mark.parametrize(
    ("reference", "predicted", "dice"),
    [
        ([0, 1, 1, 2], [0, 1, 1, 2], 1.0),
        ([0, 1, 1, 2], [0, 1, 0, 2], (2 / 3 + 1) / 2),
        ([0, 1, 1, 2], [0, 1, 1, 0], 0.5),  # the missed label counts
        ([0, 1, 1, 0], [0, 1, 1, 0], 1.0),  # the absent one does not
        ([0, 1, 1, 0], [2, 1, 1, 0], 0.5),  # a false one counts
        ([0, 0, 0, 0], [0, 0, 0, 0], 0.0),
    ],
)
def test_quick_dice_by_hand(reference: list[int], predicted: list[int], dice: float) -> None:
    assert quick_dice(Answer(), [exclusive(reference, predicted)], plan_of(), CPU) == pytest.approx(dice)


def test_quick_dice_of_overlapping_regions() -> None:
    reference = np.array([[0, 1, 1, 1], [0, 0, 1, 1]]).reshape(2, 4, 1, 1)
    scores = np.array([[-1, 1, 1, 1], [-1, 1, 1, 1]]).reshape(2, 4, 1, 1)
    dice = quick_dice(Answer(), [answered(reference, scores)], plan_of(regions=True), CPU)
    assert dice == pytest.approx((1 + 4 / 5) / 2)


def test_quick_dice_looks_at_eight_cases_from_all_over_the_list() -> None:
    right, wrong = exclusive([1, 0, 0, 0], [1, 0, 0, 0]), exclusive([1, 0, 0, 0], [0, 1, 0, 0])
    cases = [right if number % 4 == 0 else wrong for number in range(32)]
    assert quick_dice(Answer(), cases, plan_of(), CPU) == 1.0
    assert quick_dice(Answer(), cases[:7], plan_of(), CPU) == pytest.approx(2 / 7)
    assert quick_dice(Answer(), [], plan_of(), CPU) == 0.0


def test_quick_dice_sees_what_is_invented_in_cases_without_foreground() -> None:
    point = np.array([[1, 0, 0, 0]], dtype=np.int32)
    right, invented = exclusive([1, 0, 0, 0], [1, 0, 0, 0]), exclusive([0, 0, 0, 0], [1, 0, 0, 0])
    assert quick_dice(Answer(), [replace(right, points=point), invented], plan_of(), CPU) == 0.5


def test_quick_dice_of_large_cases_looks_at_few_that_have_foreground() -> None:
    def long(length: int, foreground: int, predicted: int) -> PreparedCase:
        case = exclusive([foreground] + [0] * (length - 1), [predicted] + [0] * (length - 1))
        points = np.array([[foreground, 0, 0, 0]] * (foreground > 0), dtype=np.int32)
        return replace(case, points=points.reshape(-1, 4))

    # 600 voxels in windows of 4 that overlap by half: 299 windows, so one case, and not the empty one.
    cases = [long(600, 0, 0), long(600, 1, 1), *(long(600, 1, 2) for _ in range(6))]
    assert quick_dice(Answer(), cases, plan_of(), CPU) == 1.0
    # 99 windows: two cases, the first and the one in the middle.
    cases = [long(200, 1, 1 if number % 3 == 0 else 2) for number in range(6)]
    assert quick_dice(Answer(), cases, plan_of(), CPU) == 1.0


def test_quick_dice_returns_to_training() -> None:
    network = Answer()
    quick_dice(network, [exclusive([1, 0, 0, 0], [1, 0, 0, 0])], plan_of(), CPU)
    assert network.training


@pytest.mark.parametrize(
    ("dice", "best", "done", "warned"),
    [
        (0.0, 0.0, 0.5, True),
        (0.009, 0.2, 0.1, True),
        (0.0, 0.0, 0.4, False),  # early: not learned yet
        (0.0, 0.05, 0.4, False),
        (0.02, 0.9, 1.0, False),
    ],
)
def test_a_dice_that_collapses_is_said(dice: float, best: float, done: float, warned: bool) -> None:
    told = Told()
    loop._warn_of_collapse(told, dice, best, done)
    assert bool(told.messages) == warned
    assert all("network predicts background only. Raise foreground_fraction" in text for text in told.messages)


def test_a_run_that_ends_with_background_only_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "quick_dice", lambda *_: 0.0)
    run = run_of(tmp_path)
    fit(run, tiny(), 1)
    assert run.progress.messages[0].startswith("warning: foreground Dice on validation cases is 0.000 (best so far")
