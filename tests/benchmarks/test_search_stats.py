"""Curves and intervals: exact on constructed runs, calibrated on drawn ones."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import search_stats as stats
from benchmarks.search_stats import Runs


def runs(accuracy: list[float], tokens: list[float], questions: int = 100, seeds: int = 1) -> Runs:
    """The first so many of the questions are right, at every budget."""
    place = (np.arange(questions) + 0.5) / questions
    right = np.array([(place < a).astype(float) for a in accuracy])
    cost = np.array(tokens)[:, None]
    shape = (len(tokens), questions, seeds)
    return Runs(np.broadcast_to(right[..., None], shape), np.broadcast_to(cost[..., None], shape))


def test_curves_are_means():
    tokens, accuracy = stats.curve(runs([0.5, 0.7], [100, 200]))
    assert list(tokens) == [100, 200] and list(accuracy) == [0.5, 0.7]


def test_interpolation_is_linear_in_log_tokens():
    curves = np.array([[[100.0, 400.0], [0.5, 0.7]]])
    assert stats.accuracy_at(curves, 200) == pytest.approx([0.6])
    assert stats.accuracy_at(curves, 4000) == pytest.approx([0.7]), "it keeps what it has"
    assert np.isnan(stats.accuracy_at(curves, 50)).all()
    assert stats.tokens_at(curves, np.array([0.6])) == pytest.approx([200])
    assert stats.tokens_at(curves, np.array([0.4])) == pytest.approx([100])
    assert np.isinf(stats.tokens_at(curves, np.array([0.8]))).all()


def test_area_of_a_straight_line_is_its_middle():
    curves = np.array([[[100.0, 400.0], [0.5, 0.7]], [[100.0, 400.0], [0.3, 0.3]]])
    assert stats.area(curves, 100, 400) == pytest.approx([0.6, 0.3])


def test_methods_are_paired():
    """Where one is right on all that the other is, and on ten more, it shows just that."""
    a, b = runs([0.6, 0.6], [100, 200]), runs([0.5, 0.5], [100, 200])
    ours, theirs = stats.bootstrap([a, b], rounds=2000)
    found = stats.more_accurate(ours, theirs, 150)
    assert found.value == pytest.approx(0.1)
    assert 0.03 < found.low < 0.06 and 0.14 < found.high < 0.18, "sqrt(.1 * .9 / 100) is .03"
    assert found.p < 0.01
    same = stats.more_accurate(ours, ours, 150)
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_tokens_saved_at_matched_accuracy():
    a, b = runs([0.5, 0.9], [100, 200]), runs([0.4, 0.5], [100, 400])
    ours, theirs = stats.bootstrap([a, b], rounds=500)
    saved = stats.fewer_tokens(ours, theirs, budget=1)
    assert saved.value == pytest.approx(0.75)
    never = stats.fewer_tokens(theirs, ours, budget=1)
    assert never.value == -np.inf, "it never gets there"


def test_seeds_are_nested_in_questions():
    """Five equal seeds are no more questions: the interval stays as wide."""
    rng = np.random.default_rng(0)
    right = rng.random((1, 200, 1)) < 0.5
    cost = np.full((1, 200, 1), 100.0)
    one = Runs(right.astype(float), cost)
    five = Runs(right.repeat(5, 2).astype(float), cost.repeat(5, 2))
    widths = []
    for r in (one, five):
        (curves,) = stats.bootstrap([r], rounds=2000)
        low, high = np.quantile(curves[1:, 1, 0], [0.025, 0.975])
        widths.append(high - low)
    assert widths[0] == pytest.approx(widths[1], rel=0.15)
    assert widths[0] == pytest.approx(2 * 1.96 * 0.5 / 200**0.5, rel=0.15)


def test_intervals_cover_what_they_should():
    rng, covered = np.random.default_rng(1), 0
    for i in range(100):
        a, b = (rng.random((1, 80, 2)) < p for p in (0.6, 0.5))
        cost = np.full((1, 80, 2), 100.0)
        curves = stats.bootstrap([Runs(x.astype(float), cost) for x in (a, b)], 300, seed=i)
        found = stats.more_accurate(curves[0], curves[1], 100)
        covered += found.low <= 0.1 <= found.high
    assert covered >= 89


def test_holm_steps_down():
    adjusted = stats.holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert stats.holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_compare_looks_at_every_cost_and_the_area():
    methods = {"hyper": runs([0.6, 0.8], [100, 400]), "sc": runs([0.5, 0.6], [100, 400])}
    table = stats.compare(methods, "hyper", [100, 400], rounds=300)
    found = table["sc"]
    assert list(table) == ["sc"] and len(found) == 3
    assert found["accuracy at 400 tokens"].value == pytest.approx(0.2)
    assert found["area"].value == pytest.approx(0.15)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"\[B, Q, S\]"):
        Runs(np.zeros((2, 3)), np.zeros((2, 3)))
    with pytest.raises(ValueError, match="paired"):
        stats.bootstrap([runs([0.5], [1]), runs([0.5], [1], questions=7)], rounds=1)
