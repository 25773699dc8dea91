"""What speculation is promised to save, on simulated engines: the same figures everywhere."""

from __future__ import annotations

import pytest

from benchmarks.search_simulated import ARMS, Case, cases, compare, goals

PROMISED = {  # makespan ratio, waste ratio
    "mcts-10": (5.0, 0.2),
    "mcts-10 x4": (4.0, 0.2),
    "rebase-8": (1.45, 0.5),
    "rebase-16": (1.6, 0.5),
    "rebase-16 x4": (1.5, 0.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROMISED)
def test_promises_are_kept(name):
    """Lossless and without early termination: `compare` checks that every tree is the same."""
    case, spec = goals()[name]
    assert spec.mode == "lossless" and spec.stop == "never"
    found = compare(case, 16 // case.queries, spec)
    least, most = PROMISED[name]
    assert found["makespan"] >= least
    assert found["waste_ratio"] <= most
    assert found["p99"] >= 1.0, "no query waits longer than it did"


@pytest.mark.slow
def test_safe_termination_saves_a_level():
    found = compare(Case("rebase-16", queries=1, arm="T1+T2+T3"), 16)
    assert found["makespan"] >= 1.75
    assert found["waste_ratio"] <= 0.5


def test_a_full_engine_leaves_nothing_to_save_and_nothing_is_lost():
    found = compare(Case("rebase-8", slots=1.0, queries=2, linear=True), 1)
    assert found["makespan"] >= 1.0


def test_every_setting_is_visited_once():
    found = list(cases(["mcts"], ARMS, False))
    assert len(found) == len(set(found)) == 3 * 9
    assert len(list(cases(["mcts"], ARMS, True))) == 3 * 48
