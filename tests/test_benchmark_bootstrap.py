from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenseg.benchmark.accuracy.bootstrap import CaseScore, case_means, mean_interval, paired_difference


def scores(*entries: tuple[int, str, str, float]) -> list[CaseScore]:
    return [CaseScore(*entry) for entry in entries]


def test_labels_are_averaged_before_seeds() -> None:
    # Seed 1 has one label only: a mean over all three values at once would be 0.6.
    found = case_means(scores((0, "a", "x", 0.2), (0, "a", "y", 0.6), (1, "a", "x", 1.0), (0, "b", "x", 0.5)))
    assert found == pytest.approx({"a": 0.7, "b": 0.5})


def test_a_label_that_is_nowhere_does_not_count() -> None:
    nan = float("nan")
    assert case_means(scores((0, "a", "x", 0.5), (0, "a", "y", nan), (0, "b", "x", nan))) == {"a": 0.5}


def test_a_constant_difference_is_its_own_interval_however_the_cases_scatter() -> None:
    reference = {f"case{i}": value for i, value in enumerate(np.random.default_rng(0).uniform(0.2, 0.9, 20))}
    network = {case: value + 0.03 for case, value in reference.items()}
    assert tuple(paired_difference(network, reference)) == pytest.approx((3.0, 3.0, 3.0))
    assert mean_interval(reference).high - mean_interval(reference).low > 0.1


def test_symmetric_differences_give_an_interval_around_zero() -> None:
    reference = {f"case{i:02d}": 0.5 for i in range(40)}
    network = {case: 0.5 + (0.02 if i % 2 else -0.02) for i, case in enumerate(reference)}
    mean, low, high = paired_difference(network, reference)
    assert mean == pytest.approx(0)
    assert low == pytest.approx(-high, abs=0.1)
    # 40 differences of +-2 points: the mean's deviation is 2 / sqrt(40), the interval 1.96 of these on each side.
    assert high == pytest.approx(1.96 * 2 / math.sqrt(40), abs=0.1)


def test_only_common_cases_are_compared() -> None:
    assert paired_difference({"a": 0.6, "b": 0.1}, {"a": 0.5, "c": 0.9}).mean == pytest.approx(10)
    assert all(math.isnan(value) for value in paired_difference({"a": 0.6}, {"b": 0.5}))


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0, 1), min_size=1))
def test_the_order_of_cases_does_not_matter_and_swapping_the_networks_turns_the_sign(means: dict[str, float]) -> None:
    reference = dict.fromkeys(means, 0.5)
    forward, backward = paired_difference(means, reference), paired_difference(reference, means)
    assert tuple(forward) == pytest.approx((-backward.mean, -backward.high, -backward.low), abs=1e-9)
    assert paired_difference(dict(reversed(means.items())), reference) == forward
