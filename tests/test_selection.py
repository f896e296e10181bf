"""Top-K selection against brute force."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenseg.model.selection import gather_tokens, scatter_tokens, select_tokens


def brute_force(scores: list[float], num_kept: int, num_levels: int) -> set[int]:
    """Best of each level first, then the best of the rest; ties to the lower index."""
    num_kept = min(num_kept, len(scores))
    by_importance = sorted(range(len(scores)), key=lambda position: (-scores[position], position))
    per_level = len(scores) // num_levels
    chosen: set[int] = set()
    for level in range(num_levels):
        own = [position for position in by_importance if position // per_level == level]
        chosen |= set(own[: num_kept // (4 * num_levels)])
    rest = [position for position in by_importance if position not in chosen]
    return chosen | set(rest[: num_kept - len(chosen)])


@st.composite
def score_lists(draw: st.DrawFn) -> tuple[list[list[float]], int, int]:
    """Scores of two volumes in steps of 1/100, so that many are equal; K; levels."""
    num_levels, per_level = draw(st.integers(1, 4)), draw(st.integers(1, 30))
    count = num_levels * per_level
    one = st.lists(st.integers(0, 100).map(lambda step: step / 100), min_size=count, max_size=count)
    return [draw(one), draw(one)], draw(st.integers(1, 2 * count)), num_levels


@settings(deadline=None)
@given(case=score_lists())
def test_selection_is_that_of_brute_force(case: tuple[list[list[float]], int, int]) -> None:
    scores, num_kept, num_levels = case
    selection = select_tokens(torch.tensor(scores), num_kept=num_kept, num_levels=num_levels)
    for volume, own_scores in enumerate(scores):
        expected = brute_force(own_scores, num_kept, num_levels)
        assert set(selection.positions[volume].tolist()) == expected
        assert set(selection.kept[volume].nonzero().flatten().tolist()) == expected
    assert selection.positions.shape[1] == min(num_kept, len(scores[0]))


def test_every_level_keeps_a_quarter_of_its_even_share() -> None:
    score = torch.full((1, 400), 0.9)
    score[0, 100:200] = torch.linspace(0.1, 0.2, 100)
    kept = select_tokens(score, num_kept=100, num_levels=4).kept.reshape(4, 100)
    assert kept[1].sum() == 6
    assert kept[1, -6:].all()
    assert kept.sum() == 100


def test_without_a_floor_the_best_come_first() -> None:
    score = torch.tensor([[0.2, 0.9, 0.5, 0.7]])
    assert select_tokens(score, num_kept=3, num_levels=1).positions.tolist() == [[1, 3, 2]]


def test_equal_scores_go_to_the_lower_index() -> None:
    selection = select_tokens(torch.full((1, 400), 0.5), num_kept=10, num_levels=4)
    assert selection.positions.tolist() == [list(range(10))]


def test_one_and_all() -> None:
    score = torch.rand(2, 400)
    assert torch.equal(select_tokens(score, num_kept=1, num_levels=4).positions[:, 0], score.argmax(dim=1))
    everything = select_tokens(score, num_kept=1000, num_levels=4)
    assert everything.kept.all()
    assert everything.positions.sort(dim=1).values.tolist() == [list(range(400))] * 2


def test_gather_and_scatter_by_hand() -> None:
    tokens = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]])
    positions = torch.tensor([[2, 0]])
    kept = gather_tokens(tokens, positions)
    assert kept.tolist() == [[[3.0, 30.0], [1.0, 10.0]]]
    assert scatter_tokens(kept, positions, 3).tolist() == [[[1.0, 10.0], [0.0, 0.0], [3.0, 30.0]]]


def test_gradient_reaches_the_kept_tokens_only() -> None:
    tokens = torch.randn(2, 400, 3, requires_grad=True)
    selection = select_tokens(torch.rand(2, 400), num_kept=100, num_levels=4)
    scatter_tokens(gather_tokens(tokens, selection.positions), selection.positions, 400).sum().backward()
    assert tokens.grad is not None
    assert torch.equal(tokens.grad[..., 0] == 1, selection.kept)
    assert torch.equal(tokens.grad[..., 0] == 0, ~selection.kept)
