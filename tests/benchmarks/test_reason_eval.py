"""The figures of a model card, on samples whose figures are known."""

import itertools
import math

import numpy as np
import pytest

from benchmarks.reason_eval import Sample, auroc, evaluate, interval, majority, pass_at, table
from reasoning.tasks import Grade


def sample(answer, right, confidence=0.0):
    return Sample(Grade(answer, right, ()), confidence)


@pytest.mark.parametrize(("right", "count", "k"), [(0, 6, 2), (1, 6, 3), (4, 6, 3), (6, 6, 1)])
def test_pass_at_is_the_share_of_all_subsets_with_a_right_one(right, count, k):
    flags = [True] * right + [False] * (count - right)
    subsets = list(itertools.combinations(flags, k))
    assert pass_at(right, count, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_majority_shares_ties_and_ignores_those_without_an_answer():
    right, wrong, none = sample("5", True), sample("7", False), sample(None, False)
    assert majority([right, right, wrong, none, none, none]) == 1
    assert majority([right, wrong]) == 0.5
    assert majority([wrong, wrong, right]) == 0
    assert majority([none]) == 0


def test_majority_of_one_answer_by_right_and_wrong_ways():
    assert majority([sample("5", True), sample("5", False), sample("5", False)]) == 1 / 3


def test_auroc_counts_pairs():
    rng = np.random.default_rng(0)
    scores, right = rng.integers(0, 5, 60).astype(float), rng.random(60) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[right] for b in scores[~right]]
    assert auroc(scores, right) == pytest.approx(np.mean(pairs))
    assert math.isnan(auroc(scores, np.ones(60, bool)))


def test_an_interval_holds_its_value_and_narrows():
    rng = np.random.default_rng(0)
    values = list(rng.random(400))
    mean, low, high = interval(values, lambda v: float(np.mean(v)))
    assert low < mean < high
    assert high - low == pytest.approx(2 * 1.96 * np.std(values) / 20, rel=0.15)


def test_a_table_of_two_models():
    groups = [[sample("5", i % 2 == 0, i % 2 - 0.5) for i in range(16)] for _ in range(3)]
    figures = evaluate(groups)
    assert figures["pass@1"] == (0.5, 0.5, 0.5)
    assert figures["confidence_auroc"][0] == 0
    text = table({"a": figures, "b": {"pass@1": (0.25, 0.2, 0.3)}})
    assert "| pass@1 | 0.500 (0.500-0.500) | 0.250 (0.200-0.300) |" in text
    assert "| majority@16 | 0.500 (0.500-0.500) |  |" in text
