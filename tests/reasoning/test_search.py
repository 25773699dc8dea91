"""Tree searches: the same with speculation and without, and what is said when they go wrong."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from random import Random
from typing import ClassVar

import pytest

from jaxserve.protocol import DeadPathError, Gen, Node, Prio, SearchError
from reasoning.answers import Candidate
from reasoning.controllers.beam import Beam
from reasoning.controllers.best_first import BestFirst
from reasoning.controllers.dfs import DepthFirst
from reasoning.controllers.dvts import Dvts
from reasoning.controllers.ets import Ets
from reasoning.controllers.mcts import Mcts
from reasoning.controllers.rebase import Rebase
from reasoning.controllers.rest_mcts import RestMcts
from reasoning.result import Budget
from reasoning.search import is_likely, run_search
from reasoning.simulated import Machine, SimulatedPool, Trees, question
from reasoning.speculation import Coordinator, Speculator
from reasoning.tree import Expand, SearchPolicy, Tree

SMALL = Trees(length=6, shallowest=2, deepest=4)
POLICIES = [
    Beam(4, 2, depth=4),
    Dvts(4, 2, depth=4),
    Rebase(5, depth=4),
    Ets(5, sharing=0.5, depth=4),
    Mcts(4, branch=2, depth=4),
    Mcts(4, branch=2, depth=4, reward="mean", explore=0.5),
    RestMcts(4, branch=2, depth=4),
    DepthFirst(3, branch=2, depth=4),
    BestFirst(3, branch=2, depth=4),
    BestFirst(3, branch=2, depth=4, at_once=2),
]
every_policy = pytest.mark.parametrize(
    "policy", POLICIES, ids=[f"{p.name}-{i}" for i, p in enumerate(POLICIES)]
)


def run(policy, pool, seed, spec=None, **options):
    return asyncio.run(run_search(policy, pool, question(seed), spec=spec, **options))


def search(policy, seed, spec=None, *, jitter=None, slots=8, score=0.0, **options):
    pool = SimulatedPool(SMALL, Machine(slots, score=score), jitter)
    result = run(policy, pool, seed, spec, **options)
    assert pool.capacity().free_pages == pool.machine.pages
    assert pool.capacity().live_rows == 0
    return result


def committed(result):
    pieces = [p for p in result.tree if p.state != "wasted"]
    return [(p.node.path, p.tokens, p.score, p.answer, p.state) for p in pieces]


def found(result):
    """All that speculation and timing must not change."""
    spent = result.ledger.committed
    return committed(result), result.answer, result.distribution, spent, result.stopped


def speculators(seed):
    """Settings that a search must not notice, from cautious to reckless."""
    rng = Random(seed)
    return Speculator(
        width=rng.choice([1, 4, 32]),
        lookahead=rng.choice([1, 2, 5]),
        slack=rng.choice([1.0, 1.2]),
        floor=rng.choice([0.0, 0.3]),
        unscored=rng.random() < 0.5,
    )


def check_equality(policy, seeds):
    hits = 0
    for seed in seeds:
        plain = search(policy, seed)
        fast = search(policy, seed, speculators(seed), jitter=seed, slots=2 + seed % 13)
        assert found(fast) == found(plain)
        ledger = fast.ledger
        assert ledger.generated == ledger.committed + ledger.spec_waste
        assert 0 <= ledger.spec_hit <= ledger.committed
        assert sum(len(p.tokens) for p in fast.tree if p.state != "wasted") == ledger.committed
        hits += fast.notes["hits"]
    assert hits > 0


@every_policy
def test_speculation_changes_nothing(policy):
    check_equality(policy, range(12))


@pytest.mark.slow
@every_policy
def test_speculation_changes_nothing_on_two_hundred_trees(policy):
    check_equality(policy, range(12, 212))


def test_order_of_completion_changes_nothing():
    plain = search(Rebase(5, depth=4), 3)
    mixed = [search(Rebase(5, depth=4), 3, jitter=jitter) for jitter in range(5)]
    assert len({result.ledger.critical_steps for result in mixed}) == 5, "each has times of its own"
    assert all(found(result) == found(plain) for result in mixed)


@every_policy
def test_budgets_see_committed_tokens_only(policy):
    for seed in range(5):
        for budget in (Budget(tokens=1), Budget(tokens=90), Budget(paths=5)):
            plain = search(policy, seed, budget=budget)
            fast = search(policy, seed, Speculator(floor=0), budget=budget, jitter=seed)
            assert committed(fast) == committed(plain)
            assert fast.answer == plain.answer
            assert fast.stopped == plain.stopped
            assert plain.notes["steps"] <= budget.paths


def test_over_budget_ends_with_the_answer_so_far():
    whole = search(Mcts(6, branch=2, depth=4), 0)
    cut = search(
        Mcts(6, branch=2, depth=4), 0, budget=Budget(tokens=whole.ledger.committed * 3 // 4)
    )
    assert cut.stopped == "budget"
    assert cut.answer is not None
    assert cut.ledger.committed < whole.ledger.committed


def test_time_is_a_budget_too():
    policy = Forever()
    result = search(policy, 0, budget=Budget(seconds=0.05))
    assert result.stopped == "budget"


@every_policy
def test_safe_termination_keeps_the_answer(policy):
    for seed in range(20):
        plain = search(policy, seed)
        fast = search(policy, seed, Speculator(stop="safe"))
        assert fast.answer == plain.answer
        assert fast.stopped in ("done", "decided")
        assert fast.ledger.committed <= plain.ledger.committed


def test_safe_termination_does_stop_early():
    stops = [search(Rebase(5, depth=4), s, Speculator(stop="safe")).stopped for s in range(40)]
    assert stops.count("decided") > 5


def test_likely_winners():
    sure = [Candidate("a", 0.97)] * 4
    assert is_likely(sure, 2)
    assert not is_likely(sure, 5), "less than half of the votes are in"
    assert not is_likely([Candidate("a", 0.9)] * 4, 2), "the leader's paths are not good enough"
    assert not is_likely([*sure[:3], *[Candidate("b", 1.0)] * 3], 4)


def test_the_papers_termination_must_be_asked_for_by_its_mode():
    with pytest.raises(ValueError, match="paper"):
        Speculator(stop="paper")
    result = search(Rebase(5, depth=4), 0, Speculator(mode="paper", stop="paper"))
    assert result.mode == "paper"


def test_opportunistic_searches_count_what_they_used():
    more = 0
    for seed in range(20):
        spec = Speculator(mode="opportunistic", slack=1.5, floor=0)
        plain, extra = search(Rebase(5, depth=4), seed), search(Rebase(5, depth=4), seed, spec)
        assert committed(extra) == committed(plain)
        assert extra.mode == "opportunistic"
        assert sum(extra.distribution.values()) >= sum(plain.distribution.values()) - 1e-9
        more += extra.ledger.committed > plain.ledger.committed
    assert more


def test_a_result_names_what_became_of_each_step():
    result = search(Rebase(5, depth=4), 1, Speculator(slack=1.5, floor=0))
    states = {p.state for p in result.tree}
    assert {"finished", "wasted"} <= states
    assert result.controller == "rebase"
    assert result.mode == "lossless"
    best = next(p for p in result.tree if p.node == result.best)
    assert best.answer == result.answer
    assert result.notes["policy_seconds"] > 0
    assert search(Rebase(5, depth=4), 1).mode == "off"


# ---- policies that go wrong


@dataclass(frozen=True)
class Forever(SearchPolicy):
    """Asks for one more step, and one more."""

    name: ClassVar[str] = "forever"

    def ready(self, tree: Tree):
        return [] if tree.pending else [Expand(tree.root, len(tree.grown), Gen(4))]

    def done(self, tree):
        return False

    def votes(self, tree):
        return []


@dataclass(frozen=True)
class Raises(Forever):
    at: str = "ready"
    name: ClassVar[str] = "raises"

    def ready(self, tree):
        if self.at == "ready" and len(tree.grown) > 2:
            raise ZeroDivisionError("oops")
        return super().ready(tree)

    def observe(self, tree, grown):
        if self.at == "observe":
            raise ZeroDivisionError("oops")

    def votes(self, tree):
        raise ZeroDivisionError("oops")


@dataclass(frozen=True)
class Stalls(Forever):
    name: ClassVar[str] = "stalls"

    def ready(self, tree):
        return super().ready(tree) if len(tree.grown) < 3 else []


@dataclass(frozen=True)
class Lost(Forever):
    """Continues a node that is not there."""

    name: ClassVar[str] = "lost"

    def ready(self, tree):
        return [Expand(Node(tree.root.query, ((77, -1),)), 0)]


def test_a_policy_that_asks_forever_runs_out_of_budget():
    for spec in (None, Speculator()):
        result = search(Forever(), 0, spec, budget=Budget(tokens=200))
        assert result.stopped == "budget"
        assert result.answer is None


@pytest.mark.parametrize("at", ["ready", "observe", "votes"])
def test_a_policy_that_raises_ends_its_own_search_only(at):
    async def both(pool):
        wrong = run_search(Raises(at), pool, question(1), Budget(tokens=60), spec=Speculator())
        right = run_search(Rebase(4, depth=4), pool, question(2))
        return await asyncio.gather(wrong, right, return_exceptions=True)

    pool = SimulatedPool(SMALL, Machine(8))
    error, result = asyncio.run(both(pool))
    assert isinstance(error, SearchError)
    assert isinstance(error.__cause__, ZeroDivisionError)
    assert "raises: ZeroDivisionError: oops" in str(error)
    assert found(result) == found(search(Rebase(4, depth=4), 2))
    assert pool.capacity().free_pages == pool.machine.pages


def test_a_policy_that_neither_asks_nor_ends_is_told_so():
    with pytest.raises(SearchError, match="stalled: stalls is not done"):
        search(Stalls(), 0)


def test_a_step_of_nowhere_is_a_dead_path():
    with pytest.raises(DeadPathError, match="no node of its tree"):
        search(Lost(), 0)


def test_ended_texts_are_not_continued():
    @dataclass(frozen=True)
    class Deeper(Forever):
        def ready(self, tree):
            return [] if tree.pending else [Expand(list(tree.grown)[-1], 0)]

    with pytest.raises(DeadPathError, match="has ended"):
        search(Deeper(), 0)


def test_a_search_can_be_cancelled_in_the_middle():
    async def interrupted(pool):
        task = asyncio.create_task(
            run_search(Mcts(8, depth=4), pool, question(0), spec=Speculator())
        )
        for _ in range(60):
            await asyncio.sleep(0)
        assert pool.capacity().free_pages < pool.machine.pages
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    pool = SimulatedPool(SMALL, Machine(8))
    asyncio.run(interrupted(pool))
    assert pool.capacity().free_pages == pool.machine.pages
    assert pool.capacity().live_rows == 0


def test_a_query_that_is_closed_from_outside_ends():
    async def closed(pool, spec):
        search = run_search(Mcts(8, depth=4), pool, question(0), spec=spec, query=7_000_000)
        task = asyncio.create_task(search)
        for _ in range(30):
            await asyncio.sleep(0)
        pool.close(7_000_000)
        with pytest.raises(SearchError):
            await task

    for spec in (None, Speculator()):
        asyncio.run(closed(SimulatedPool(SMALL, Machine(8)), spec))


def test_paths_end_at_the_questions_length():
    pool = SimulatedPool(SMALL, Machine(8))
    short = replace(question(4), max_tokens=10)
    result = asyncio.run(run_search(Rebase(5, depth=4), pool, short))
    totals = {(): 0}
    for piece in result.tree:
        totals[piece.node.path] = totals[piece.parent.path if piece.parent else ()] + len(
            piece.tokens
        )
    assert max(totals.values()) <= 10


def test_a_speculative_step_that_fails_is_begun_again_when_wanted():
    class Flaky(SimulatedPool):
        """Gives speculation up now and then, as an engine that runs out of pages might."""

        failures = 0

        def extend(self, n, g, *, prio=Prio.COMMIT):
            step = super().extend(n, g, prio=prio)
            if prio == Prio.SPEC and len(self._queries[n.query].paths) % 3 == 0:
                self.cancel(n)
                self.failures += 1
            return step

    pool = Flaky(SMALL, Machine(8))
    fast = run(Mcts(4, branch=2, depth=4), pool, 5, Speculator())
    assert pool.failures > 0
    assert found(fast) == found(search(Mcts(4, branch=2, depth=4), 5))


def test_queries_of_one_pool_do_not_disturb_each_other():
    async def all_of(pool, coordinator):
        searches = (
            run_search(p, pool, question(i), spec=Speculator(), coordinator=coordinator)
            for i, p in enumerate(POLICIES)
        )
        return await asyncio.gather(*searches)

    pool = SimulatedPool(SMALL, Machine(24))
    for i, result in enumerate(asyncio.run(all_of(pool, Coordinator()))):
        assert found(result) == found(search(POLICIES[i], i))
    assert pool.capacity().free_pages == pool.machine.pages
