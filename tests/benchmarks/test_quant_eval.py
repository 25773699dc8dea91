"""The comparison of eight bits with floats: paired, and honest about its noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.quant_eval import (
    VARIANTS,
    Outcome,
    Sizes,
    compare,
    drift,
    figures,
    held_out,
    perplexity,
    run,
    table,
)
from jaxserve.quant.config import MEASURES
from reasoning.tasks import make_task

SHIPPED = Path(__file__).parents[2] / "models"


def mean(x: np.ndarray) -> float:
    return float(x.mean())


def test_every_measure_is_left_out_once_and_the_calibrated_ones_stand_alone_once():
    assert {f"without {m}" for m in MEASURES} <= set(VARIANTS)
    assert "plain and rotations" in VARIANTS and "plain and per_channel" not in VARIANTS


def test_pairs_leave_out_what_both_share():
    rng = np.random.default_rng(0)
    base = rng.random(400)
    other = np.where(rng.random(400) < 0.02, 1 - base, base)
    found, low, high = compare(base, other, mean, rounds=300)
    assert low < found < high and high - low < 4
    assert compare(base, base, mean, rounds=10) == (0, 0, 0)


def test_perplexity_weighs_tokens_alike():
    rows = np.array([[np.log(2) * 3, 3], [np.log(8), 1]])
    assert perplexity(rows) == pytest.approx(2 ** (6 / 4))


def test_drift_sees_what_perplexity_does_not():
    base = Outcome([np.array([1.0, 2.0])] * 30, np.empty(0), np.empty(0))
    other = Outcome([np.array([1.1, 1.9])] * 30, np.empty(0), np.empty(0))
    assert drift(base, other) == pytest.approx((100, 100, 100))
    (name, value, difference), *_ = figures(base, other)
    assert (name, value) == ("perplexity", pytest.approx(np.exp(1.5)))
    assert difference == pytest.approx((0, 0, 0), abs=1e-9)


def test_a_small_split_is_used_up():
    task = make_task("countdown", {"length": 3, "largest": 6})
    problems = held_out(task, 10_000)
    assert 0 < len(problems) < 10_000
    assert len({p.key for p in problems}) == len(problems)
    assert held_out(task, 2) == problems[:2]


@pytest.mark.slow
def test_a_shipped_model_from_end_to_end():
    rows = list(run(SHIPPED / "modchain-moe", {"plain": VARIANTS["plain"]}, Sizes(20, 20, 10, 2)))
    assert [name for variant, name, *_ in rows if variant == "plain"] == [
        "perplexity", "drift", "greedy pass@1", "sampled pass@1",
    ]  # fmt: skip
    change = next(d for variant, name, _, d in rows if (variant, name) == ("plain", "perplexity"))
    assert abs(change[0]) < 0.5
    assert table(rows).count("\n") == 3
