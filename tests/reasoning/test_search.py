"""Tree searches: the same with speculation and without, and what is said when they go wrong."""

from __future__ import annotations

import asyncio

import pytest

from reasoning.controllers.beam import Beam
from reasoning.controllers.mcts import Mcts
from reasoning.controllers.rebase import Rebase
from reasoning.search import run_search
from reasoning.simulated import Machine, SimulatedPool, Trees, question
from reasoning.speculation import Speculator

SMALL = Trees(length=6, shallowest=2, deepest=4)
POLICIES = [Beam(4, 2, depth=4), Rebase(4, depth=4), Mcts(3, branch=2, depth=4)]


def search(policy, seed, spec=None, jitter=None, **options):
    pool = SimulatedPool(SMALL, Machine(slots=8), jitter)
    return asyncio.run(run_search(policy, pool, question(seed), spec=spec, **options))


def committed(result):
    return [(p.node.path, p.tokens, p.score, p.answer) for p in result.tree if p.state != "wasted"]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
def test_speculation_changes_nothing(policy):
    for seed in range(20):
        plain, fast = search(policy, seed), search(policy, seed, Speculator(), jitter=seed)
        assert committed(fast) == committed(plain)
        assert fast.answer == plain.answer
        assert fast.ledger.committed == plain.ledger.committed
