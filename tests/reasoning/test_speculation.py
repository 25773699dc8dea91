"""Speculation: predictions that touch nothing, and rows that go where they are worth most."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.protocol import Capacity, Node, Step
from reasoning.answers import Candidate, is_decided, tally, winner
from reasoning.controllers.beam import Beam
from reasoning.controllers.best_first import BestFirst
from reasoning.controllers.dfs import DepthFirst
from reasoning.controllers.dvts import Dvts
from reasoning.controllers.ets import Ets
from reasoning.controllers.mcts import Mcts
from reasoning.controllers.rebase import Rebase
from reasoning.controllers.rest_mcts import RestMcts
from reasoning.search import run_search
from reasoning.simulated import Machine, SimulatedPool, Trees, question
from reasoning.speculation import (
    Coordinator,
    Guess,
    Speculator,
    Trust,
    affordable,
    pays,
    price,
    shadow_predict,
)
from reasoning.tree import Expand, Grown, Tree

TREES = Trees(shallowest=3, deepest=5)
POLICIES = [
    Beam(4, 2), Dvts(4, 2), Rebase(5), Ets(5), Mcts(6, 2), RestMcts(6, 2), DepthFirst(), BestFirst()
]  # fmt: skip


def made(expand, seed):
    step = TREES.made_up(seed, expand.child.path)
    done = step.answer is not None
    ended = Step((0,) * step.length, "end" if done else "stop")
    return Grown(expand.child, expand.parent, ended, step.score, step.answer, done)


def half_way(policy, seed, steps):
    """A tree after so many commits, and what of its pending steps has ended early."""
    tree = Tree(Node(0))
    for expand in policy.ready(tree):
        tree.ask(expand)
    while tree.pending and len(tree.grown) <= steps:
        grown = made(next(iter(tree.pending.values())), seed)
        tree.commit(grown)
        policy.observe(tree, grown)
        for expand in policy.ready(tree):
            tree.ask(expand)
    early = [made(expand, seed) for expand in list(tree.pending.values())[1::2]]
    return tree, {grown.node: grown for grown in early}


def guesses(policy, tree, ahead, spec=None):
    flying = {*tree.pending, *ahead}
    return list(shadow_predict(policy, tree.clone(ahead), flying, spec or Speculator()))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
def test_predictions_touch_nothing(policy):
    found = 0
    for seed in range(6):
        for steps in range(0, 30, 3):
            tree, ahead = half_way(policy, seed, steps)
            before = {name: repr(value) for name, value in vars(tree).items()}
            new = guesses(policy, tree, ahead)
            assert {name: repr(value) for name, value in vars(tree).items()} == before
            found += len(new)
            children = [guess.expand.child for guess in new]
            assert len(set(children)) == len(children)
            for guess in new:
                parent = tree.grown.get(guess.expand.parent) or ahead.get(guess.expand.parent)
                assert parent is not None and not parent.finished
                assert guess.expand.child not in {*tree.grown, *tree.pending, *ahead}
    assert found


def test_what_is_known_is_predicted_exactly():
    """With every reward in, the next level is no guess."""
    policy = Rebase(5)
    tree = Tree(Node(0))
    for expand in policy.ready(tree):
        tree.ask(expand)
    ahead = {grown.node: grown for grown in (made(e, 1) for e in tree.pending.values())}
    first = [g.expand for g in guesses(policy, tree, ahead) if g.distance == 1]
    for grown in ahead.values():
        tree.commit(grown)
        policy.observe(tree, grown)
    assert first == list(policy.ready(tree))


def test_lookahead_is_a_chain_of_steps_that_nobody_asked_for():
    policy = Mcts(4, branch=2, depth=5)
    tree, ahead = half_way(policy, 0, 0)
    node = next(iter(tree.pending))
    for lookahead in (1, 2, 3):
        found = guesses(policy, tree, ahead, Speculator(lookahead=lookahead))
        deepest = max((g.expand.child.depth for g in found), default=0)
        assert deepest <= node.depth + lookahead


def test_slack_gives_finished_nodes_more():
    policy = Rebase(8)
    tree, ahead = half_way(policy, 2, 0)
    some = guesses(policy, tree, ahead, Speculator(slack=1.0, lookahead=1))
    more = guesses(policy, tree, ahead, Speculator(slack=1.5, lookahead=1))
    assert len(more) > len(some) > 0


def test_a_price_for_each_load():
    assert price(Capacity(2, 8, 4, 0), 0) == 0.0, "padding is free"
    assert price(Capacity(2, 8, 4, 0), 2) == 6 / 8
    assert price(Capacity(0, 8, 8, 0), 0) == float("inf")


def test_a_measured_price_is_the_share_that_rows_add():
    half = Capacity(0, 64, 16, 0, doubles=16.0, step=1e-3)
    assert price(half, 0) == 0.5
    assert price(half, 16) == pytest.approx(2 / 3)
    assert price(Capacity(0, 64, 16, 0, doubles=float("inf")), 8) == 0.0, "rows cost nothing"
    assert price(Capacity(8, 64, 0, 0, doubles=16.0), 0) == 0.0
    assert price(half, 48) == float("inf"), "there is no row"


def test_rows_that_may_be_begun():
    assert affordable(Capacity(2, 8, 4, 0)) == 4
    assert affordable(Capacity(3, 8, 9, 0)) == 3
    assert affordable(Capacity(0, 8, 9, 0)) == 0


def test_thinking_pays_while_few_rows_bear_a_step():
    """A thousandth of a second for eight rows of six tokens each."""
    few = Capacity(0, 64, 4, 0, doubles=16.0, step=1e-3)
    many = Capacity(0, 64, 48, 0, doubles=16.0, step=4e-3)
    assert pays(few, 8, 6.0, 1e-3)
    assert not pays(many, 8, 6.0, 1e-3)
    assert not pays(few, 0.1, 6.0, 1e-3), "it usually begins next to nothing"
    assert pays(Capacity(0, 64, 48, 0), 8, 6.0, 1e-3), "nothing is known of the cost"
    assert pays(Capacity(0, 64, 48, 0), 0.1, 6.0, 1e-3), "nor of time"
    timed = Capacity(0, 64, 48, 0, step=1.0)
    assert pays(timed, 8, 6.0, 1e-3) and not pays(timed, 0.1, 6.0, 0.0), "if any come of it"
    assert not pays(Capacity(0, 64, 48, 0, doubles=4.0, step=1.0), 8, 6.0, 0.0, hit=0.5), (
        "rows that miss cost more than those that hit spare"
    )


def test_vain_guessing_is_given_up_and_taken_up_again():
    policy, trust = Rebase(4), Trust()
    few = Capacity(0, 64, 16, 0, doubles=16.0, step=1e-3)

    def worth() -> bool:
        return pays(few, trust.usual(policy), 6.0, 3e-4)

    assert worth()
    for _ in range(12):
        trust.tried(policy, 0)
    assert not worth()
    for _ in range(400):
        trust.spared(policy)
    assert worth()
    assert trust.usual(Mcts()) == Trust.USUAL


def test_kinds_that_are_never_tried_are_forgotten():
    search, coordinator = Search(), Coordinator()
    guess = Guess(Expand(Node(0), 0), 1, 0)
    for _ in range(60):
        coordinator.learn(search.policy, guess, False)
    spec = Speculator(floor=0.25)
    coordinator.offer(search, [guess], spec)
    assert not coordinator.offered(search)
    for _ in range(200):
        coordinator.offer(search, [guess], spec)
    assert coordinator.offered(search) == [guess]


def test_hits_raise_trust_and_old_ones_fade():
    policy, coordinator = Rebase(4), Coordinator()
    guess = Guess(Expand(Node(0), 0), 1, 0)
    before = coordinator.probability(policy, guess)
    for _ in range(50):
        coordinator.learn(policy, guess, False)
    low = coordinator.probability(policy, guess)
    for _ in range(100):
        coordinator.learn(policy, guess, True)
    assert low < 0.2 < before < coordinator.probability(policy, guess)
    far = Guess(Expand(Node(0), 0), 9, 0)
    assert coordinator.probability(policy, far) == before, "other kinds are another matter"


class Search:
    """A seeker that only counts."""

    def __init__(self, policy=POLICIES[2]):
        self.policy, self.begun = policy, list[Guess]()

    def flying(self):
        return len(self.begun)

    def begin(self, guess):
        self.begun.append(guess)
        return True


def offers(query, count, distance=1):
    return [Guess(Expand(Node(query), i), distance, i) for i in range(count)]


def test_the_likeliest_gains_are_dealt_first():
    near, far = Search(), Search()
    coordinator, spec = Coordinator(), Speculator(floor=0.0)
    coordinator.offer(far, offers(0, 5, distance=4), spec)
    coordinator.offer(near, offers(1, 5), spec)
    coordinator.deal(Capacity(6, 6, 0, 0))
    assert len(near.begun) + len(far.begun) == 6
    assert len(near.begun) > len(far.begun)


def test_nobody_starves_beside_a_greedy_query():
    greedy, poor = Search(), Search()
    coordinator, spec = Coordinator(), Speculator(floor=0.0)
    coordinator.offer(greedy, offers(0, 30), spec)
    coordinator.offer(poor, offers(1, 1, distance=8), spec)
    coordinator.deal(Capacity(3, 3, 0, 0))
    assert len(poor.begun) == 1
    assert len(greedy.begun) == 2


def test_unlikely_steps_get_no_row_even_for_free():
    search, coordinator = Search(), Coordinator(prior=(1, 9))
    coordinator.offer(search, offers(0, 4), Speculator(floor=0.25))
    coordinator.deal(Capacity(8, 8, 0, 0))
    assert not search.begun


def test_whoever_leaves_takes_its_offers_along():
    search, coordinator = Search(), Coordinator()
    coordinator.offer(search, offers(0, 4), Speculator())
    coordinator.leave(search)
    coordinator.deal(Capacity(8, 8, 0, 0))
    assert not search.begun


def test_a_query_of_high_utility_leaves_rows_to_others():
    """Beside a search that could fill every row, a small one is not slower than alone."""

    async def both(pool, coordinator):
        big = run_search(
            Mcts(40, branch=4), pool, question(0), spec=Speculator(width=64),
            coordinator=coordinator,
        )  # fmt: skip
        small = run_search(Rebase(4), pool, question(1), spec=Speculator(), coordinator=coordinator)
        return await asyncio.gather(big, small)

    def alone(spec):
        pool = SimulatedPool(Trees(), Machine(slots=16))
        return asyncio.run(run_search(Rebase(4), pool, question(1), spec=spec))

    pool = SimulatedPool(Trees(), Machine(slots=16))
    _, small = asyncio.run(both(pool, Coordinator()))
    assert small.notes["speculated"] > 0
    assert small.ledger.critical_steps <= alone(None).ledger.critical_steps


votes = st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1)), max_size=8)


@given(votes, votes)
def test_safe_termination_never_changes_a_vote(now, later):
    so_far = [Candidate(answer, weight) for answer, weight in now]
    whole = [*so_far, *(Candidate(answer, weight) for answer, weight in later)]
    if is_decided(tally(so_far), len(later)):
        assert winner(tally(so_far)) == winner(tally(whole))


@pytest.mark.parametrize("wrong", [{"width": -1}, {"lookahead": 0}, {"slack": 0.5}])
def test_settings_without_meaning_are_refused(wrong):
    with pytest.raises(ValueError, match="or more"):
        Speculator(**wrong)
