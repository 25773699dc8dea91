"""The runner of pools: rounds, budgets, bad input, and the same search again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from traceback import extract_tb
from typing import ClassVar

import pytest

from jaxserve.protocol import DeadPathError, Gen, Node, RouteNoise, SearchError
from reasoning.answers import Answer, Candidate, vote
from reasoning.controllers.self_consistency import SelfConsistency
from reasoning.pool import (
    Action,
    Fork,
    Path,
    PoolView,
    Probe,
    Prune,
    Refine,
    Segment,
    Stop,
    run_pool,
)
from reasoning.result import Budget, Result
from tests.reasoning.fake_pool import END, QUESTION, FakePool, text


@dataclass
class Script:
    """Does as it is told, round by round; nothing once the list is through."""

    rounds: Sequence[Callable[[PoolView], list[Action]]]
    period: int = 4
    branching: bool = False
    name: ClassVar[str] = "script"
    seen: list[int] = field(default_factory=list[int])

    def start(self, view: PoolView) -> list[Action]:
        return self.rounds[0](view)

    def step(self, view: PoolView) -> list[Action]:
        self.seen.append(view.spent)
        n = view.rounds
        return self.rounds[n](view) if n < len(self.rounds) else []

    def aggregate(self, view: PoolView) -> Answer:
        return vote(Candidate(p.answer, node=p.node) for p in view.finished)


def run(policy, pool: FakePool, budget: Budget | None = None, **options) -> Result:
    return asyncio.run(
        run_pool(policy, pool, QUESTION, budget or Budget(), query=3, **options)  # pyright: ignore
    )


THREE = [text(4), text(5), text(4)]


def test_paths_grow_in_rounds_to_their_end():
    pool = FakePool(THREE)
    policy = Script([lambda v: [Fork(0), Fork(1), Fork(2)]])
    result = run(policy, pool)
    assert result.answer == 4 and result.stopped == "done"
    assert result.distribution == {4: 2, 5: 1}
    assert policy.seen == [12, 24]
    assert result.notes["spent"] == 24 == result.ledger.committed
    assert pool.closed == [3, 3], "once for the ledger, and once come what may"
    assert [p.state for p in result.tree] == ["live", "finished", "finished", "finished"]
    assert result.best == result.tree[1].node


def test_the_period_does_not_change_the_text():
    results = [run(SelfConsistency(paths=3, period=p), FakePool(THREE)) for p in (1, 3, 64)]
    assert len({r.tree for r in results}) == 1


def test_a_search_replays_whatever_finishes_first():
    results = [
        run(SelfConsistency(paths=3, period=3), FakePool(THREE, order=order))
        for order in (None, 0, 1, 2)
    ]
    assert len({(r.tree, r.answer, r.notes["spent"]) for r in results}) == 1


@pytest.mark.parametrize("tokens", range(1, 26))
def test_a_budget_is_never_exceeded(tokens: int):
    result = run(SelfConsistency(paths=3, period=3), FakePool(THREE), Budget(tokens=tokens))
    assert result.ledger.committed == result.notes["spent"] == min(tokens, 24)
    assert result.stopped == ("done" if tokens >= 24 else "budget")
    assert result.answer == (4 if tokens >= 2 * 9 + 2 else None), "the eldest are finished first"


def test_the_last_round_serves_the_eldest_first():
    result = run(SelfConsistency(paths=3, period=8), FakePool(THREE), Budget(tokens=20))
    assert [p.state for p in result.tree[1:]] == ["finished", "finished", "live"]
    assert result.distribution == {4: 1, 5: 1}


def test_paths_and_seconds_are_budgets_too():
    result = run(SelfConsistency(paths=3), FakePool(THREE), Budget(paths=2))
    assert result.stopped == "budget" and result.notes["paths"] == 2
    result = run(SelfConsistency(paths=3, period=1), FakePool(THREE), Budget(seconds=1e-9))
    assert result.stopped == "budget" and result.answer is None


def test_a_policy_that_never_stops_runs_out_of_budget():
    policy = Script([lambda v: [Fork(v.rounds)]] * 1000)
    result = run(policy, FakePool(THREE), Budget(tokens=50))
    assert result.stopped == "budget" and result.notes["spent"] == 50


def test_no_path_and_nothing_to_do_is_an_end():
    result = run(Script([lambda v: []]), FakePool(THREE))
    assert result.answer is None and result.stopped == "done" and not result.distribution


def test_stop_says_whether_the_vote_was_decided():
    for decided in (False, True):
        policy = Script([lambda v: [Fork(0)], lambda v, d=decided: [Stop(d)]])
        assert run(policy, FakePool(THREE)).stopped == ("decided" if decided else "done")


def test_a_policy_that_raises_ends_its_own_search_alone():
    def fails(view: PoolView) -> list[Action]:
        raise RuntimeError("a mistake of the controller")

    async def both() -> list[Result | BaseException]:
        return await asyncio.gather(
            run_pool(Script([lambda v: [Fork(0)], fails]), pool, QUESTION, Budget(), query=1),
            run_pool(SelfConsistency(paths=3), pool, QUESTION, Budget(), query=2),
            return_exceptions=True,
        )

    pool = FakePool(THREE)
    bad, good = asyncio.run(both())
    assert isinstance(bad, SearchError) and "RuntimeError: a mistake" in str(bad)
    assert bad.__cause__ is not None
    assert "fails" in [frame.name for frame in extract_tb(bad.__cause__.__traceback__)]
    assert isinstance(good, Result) and good.answer == 4
    assert 1 in pool.closed and 2 in pool.closed


@pytest.mark.parametrize(
    "again",
    [
        lambda v: [Prune(v.paths[0].node)],
        lambda v: [Refine(v.paths[0].node, RouteNoise())],
        lambda v: [Segment(v.paths[0].node, 2, 2)],
        lambda v: [Probe(v.paths[0].node, (6,))],
        lambda v: [Fork(0, v.paths[0].node, 2)],
        lambda v: [Prune(Node(3, ((9, -1),)))],
    ],
)
def test_dead_paths_cannot_be_acted_on(again: Callable[[PoolView], list[Action]]):
    pool = FakePool(THREE)
    rounds = [lambda v: [Fork(0), Fork(1)], lambda v: [Prune(v.paths[0].node)], again]
    with pytest.raises(DeadPathError):
        run(Script(rounds, period=2), pool)
    assert pool.closed == [3]


def test_a_path_is_begun_once():
    with pytest.raises(SearchError, match="already"):
        run(Script([lambda v: [Fork(0), Fork(0)]]), FakePool(THREE))
    with pytest.raises(SearchError, match="the parent has 4 tokens"):
        rounds = [lambda v: [Fork(0)], lambda v: [Fork(0, v.paths[0].node, 5)]]
        run(Script(rounds), FakePool(THREE))


def test_a_period_is_positive():
    with pytest.raises(SearchError, match="period=0"):
        run(Script([], period=0), FakePool(THREE))


def test_a_branch_shares_its_beginning_and_costs_the_rest():
    pool = FakePool(THREE, branches=[text(9)])
    rounds = [
        lambda v: [Fork(0)],
        lambda v: [Fork(0, v.paths[0].node, 3), Prune(v.paths[0].node)],
    ]
    result = run(Script(rounds), pool)
    assert result.answer == 9
    branch = result.tree[2]
    assert branch.parent == result.tree[1].node and branch.tokens == text(9).tokens[3:]
    assert result.notes["spent"] == 4 + 5
    assert result.tree[1].state == "pruned"


def test_a_segment_keeps_the_surest_fork_and_pays_for_all():
    pool = FakePool([text(4)], branches=[text(5, confidence=3), text(6), text(7, confidence=2)])
    rounds = [lambda v: [Fork(0)], lambda v: [Segment(v.paths[0].node, 2, 3)]]
    result = run(Script(rounds), pool)
    assert result.notes["spent"] == 4 + 3 * 2 + 2 == result.ledger.committed
    states = [p.state for p in result.tree[1:]]
    assert sorted(states) == ["finished", "finished", "pruned", "pruned"]


def test_refinement_asks_the_engine_and_its_passes_count():
    pool = FakePool(THREE)
    route = RouteNoise(K=3)
    rounds = [lambda v: [Fork(0)], lambda v: [Refine(v.paths[0].node, route)]]
    result = run(Script(rounds), pool)
    assert pool.routed == [result.tree[1].node]
    assert result.ledger.effective == 2 * 4 and result.notes["spent"] == 4 + 3 * 4
    cut = run(Script(rounds), FakePool(THREE), Budget(tokens=4 + 7))
    assert cut.notes["spent"] <= 11, "what refined tokens cost at most is kept free"


def test_probes_are_thrown_away_and_count():
    pool = FakePool(THREE)
    seen = []

    def look(view: PoolView) -> list[Action]:
        seen.extend(view.paths[0].probes)
        return []

    rounds = [lambda v: [Fork(0)], lambda v: [Probe(v.paths[0].node, (6,))], look]
    result = run(Script(rounds), pool)
    assert [p.answer for p in seen] == [5] and seen[0].at == 4
    assert result.answer == 4 and result.notes["spent"] == 8 + 2


def test_scores_come_with_the_end_of_a_path():
    pool = FakePool(THREE, scores=[0.1, 0.9, 0.2])
    result = run(SelfConsistency(paths=3), pool, scorer="prm")
    assert [p.score for p in result.tree[1:]] == [0.1, 0.9, 0.2]


def test_pages_of_finished_paths_are_given_back_unless_they_may_branch():
    for branching in (False, True):
        pool = FakePool(THREE)
        dead = []

        def look(view: PoolView, pool=pool, dead=dead) -> list[Action]:
            dead.extend(pool.dead)
            return []

        run(Script([lambda v: [Fork(0)], look, look], branching=branching), pool)
        assert bool(dead) != branching


def test_extensions_have_no_stop_so_that_periods_cut_nothing():
    asked = list[Gen]()

    class Watched(FakePool):
        async def extend(self, n, g, *, prio=0):
            asked.append(g)
            return await super().extend(n, g, prio=prio)

    run(SelfConsistency(paths=1, period=5), Watched(THREE))
    assert [g.max_tokens for g in asked] == [5, 5] and not any(g.stop for g in asked)
    assert THREE[0].tokens[-1] == END


def test_paths_are_found_where_they_went():
    """Of segments one fork goes on as the path; its old node is no path any more."""
    nodes = list[Node]()

    def look(view: PoolView) -> list[Action]:
        nodes.append(view.paths[0].node)
        assert view.find(nodes[-1]) is view.paths[0]
        assert view.has(nodes[-1])
        if len(nodes) == 3:
            with pytest.raises(DeadPathError, match="no path"):
                view.find(nodes[1])
        return [Segment(nodes[-1], 2, 2)]

    pool = FakePool([text(4, 12)], branches=[text(4, 12), text(5, 12)])
    run(Script([lambda _: [Fork(0)], look, look, look], period=2), pool)
    assert len(set(nodes)) == 3


def test_finding_a_path_takes_no_search():
    view = PoolView(QUESTION, Budget())
    for i in range(4000):
        view.add(Path(Node(0, ((i, -1),))))
    compared = list[Node]()

    class Counted(Node):
        def __eq__(self, other: object) -> bool:
            compared.append(self)
            return Node.__eq__(self, other)  # type: ignore[arg-type]

        def __hash__(self) -> int:
            return Node.__hash__(self)

    with pytest.raises(DeadPathError):
        view.find(Counted(0, ((4000, -1),)))
    assert len(compared) < 10
