"""Tree controllers: what each asks for, from records written by hand."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.protocol import Node, Step
from reasoning.controllers.beam import Beam
from reasoning.controllers.best_first import BestFirst
from reasoning.controllers.dfs import DepthFirst
from reasoning.controllers.dvts import Dvts
from reasoning.controllers.ets import Ets, worth_keeping
from reasoning.controllers.mcts import Mcts
from reasoning.controllers.rebase import Rebase, quotas
from reasoning.controllers.rest_mcts import RestMcts
from reasoning.tree import Expand, Grown, Tree

ROOT = Node(0)


def at(*indices):
    return Node(0, tuple((index, -1) for index in indices))


def feed(policy, tree, scores, ends=(), texts=None):
    """Gives the policy what it asks for, with these scores; ended paths answer with their score."""
    wanted = [expand for expand in policy.ready(tree) if tree.ask(expand)]
    assert len(wanted) == len(scores)
    for i, (expand, score) in enumerate(zip(wanted, scores, strict=True)):
        done = i in ends
        tokens = (texts[i],) if texts else (len(tree.grown),)
        step = Step(tokens, "end" if done else "stop")
        answer = f"{score}" if done else None
        grown = Grown(expand.child, expand.parent, step, score, answer, done)
        tree.commit(grown)
        policy.observe(tree, grown)
    return [expand.child for expand in wanted]


def asks(policy, tree):
    """How many children of each node it wants."""
    found = dict[Node, int]()
    for expand in policy.ready(tree):
        found[expand.parent] = found.get(expand.parent, 0) + 1
    return found


rewards = st.lists(st.floats(0, 1), min_size=1, max_size=40)


@given(rewards, st.integers(0, 64), st.floats(0.01, 5))
def test_quotas_sum_to_the_width(rewards, width, temperature):
    shares = quotas(rewards, width, temperature)
    assert sum(shares) == width
    assert min(shares) >= 0
    ranked = [share for _, share in sorted(zip(rewards, shares, strict=True), key=lambda x: -x[0])]
    assert all(a >= b - 1 for a, b in itertools.pairwise(ranked)), "better ones get no less"


def test_quotas_of_the_paper():
    assert quotas([0.9, 0.1], 8, 0.2) == [8, 0]
    assert quotas([0.5, 0.5, 0.5], 8, 0.2) == [3, 3, 2]
    assert quotas([0.2, 0.5], 8, 0.2) == [1, 7]
    assert quotas([], 8, 0.2) == []


def test_rebase_shares_its_width_and_gives_it_up():
    policy, tree = Rebase(8, depth=3), Tree(ROOT)
    assert asks(policy, tree) == {ROOT: 8}
    feed(policy, tree, [0.5] * 8, ends=[3, 4])
    assert asks(policy, tree) == {at(i): 1 for i in (0, 1, 2, 5, 6, 7)}
    assert policy.missing(tree) == 6
    feed(policy, tree, [0.9, *[0.1] * 5])
    assert asks(policy, tree) == {at(0, 0): 6}
    feed(policy, tree, [0.5] * 6, ends=range(6))
    assert policy.done(tree)
    assert policy.answer(tree).answer == "0.5"


@pytest.mark.parametrize(
    "policy", [Rebase(4), Beam(4, 2), Ets(4), Dvts(4, 2)], ids=lambda p: p.name
)
def test_levels_are_waited_for(policy):
    tree = Tree(ROOT)
    wanted = [expand for expand in policy.ready(tree) if tree.ask(expand)]
    for expand in wanted:
        assert not policy.ready(tree)
        assert not policy.done(tree)
        grown = Grown(expand.child, ROOT, Step((1,), "stop"), 0.5)
        tree.commit(grown)
        policy.observe(tree, grown)
    assert policy.ready(tree)


def test_beams_keep_the_best_and_refill():
    policy, tree = Beam(4, 2, depth=3), Tree(ROOT)
    feed(policy, tree, [0.1, 0.9, 0.8, 0.2])
    assert asks(policy, tree) == {at(1): 2, at(2): 2}
    feed(policy, tree, [0.5, 0.4, 0.3, 0.2], ends=[0])
    assert asks(policy, tree) == {at(1, 1): 2, at(2, 0): 1}
    assert policy.refuted(tree, Expand(at(0), 0))
    assert not policy.refuted(tree, Expand(at(1, 1), 2))


def test_beams_take_equal_texts_once():
    policy, tree = Beam(4, 2), Tree(ROOT)
    feed(policy, tree, [0.9, 0.9, 0.5, 0.1], texts=[7, 7, 8, 9])
    assert asks(policy, tree) == {at(0): 2, at(2): 2}


def test_subtrees_of_dvts_keep_to_themselves():
    policy, tree = Dvts(4, 2, depth=3), Tree(ROOT)
    feed(policy, tree, [0.9, 0.8, 0.1, 0.2])
    assert asks(policy, tree) == {at(0): 2, at(3): 2}
    feed(policy, tree, [0.9, 0.8, 0.3, 0.4], ends=[0, 2])
    assert asks(policy, tree) == {at(3, 1): 2}, "the first one ended with its best step"
    assert {c.answer for c in policy.votes(tree)} == {"0.9", "0.3"}
    feed(policy, tree, [0.5, 0.6], ends=[0, 1])
    assert policy.done(tree)
    assert [c.answer for c in policy.votes(tree)] == ["0.9", "0.5", "0.6"]


@given(st.data())
def test_ets_keeps_what_brute_force_would(data):
    tree = Tree(ROOT)
    for depth in (1, 2, 3):
        parents = [ROOT] if depth == 1 else [g.node for g in tree.level(depth - 1)]
        for parent in parents[:4]:
            for i in range(data.draw(st.integers(1, 2))):
                expand = Expand(parent, i)
                tree.ask(expand)
                tree.commit(Grown(expand.child, parent, Step((1,), "stop"), 0.5))
    leaves = [g.node for g in tree.level(3)]
    gains = {leaf: data.draw(st.integers(0, 8)) / 8 for leaf in leaves}
    cost = data.draw(st.integers(0, 6)) / 16
    kinds = {leaf: data.draw(st.integers(0, 3)) for leaf in leaves}
    prize = data.draw(st.integers(0, 4)) / 8

    def value(kept):
        held = {g.node for leaf in kept for g in tree.way(leaf)}
        seen = {kinds[leaf] for leaf in kept}
        return sum(gains[leaf] for leaf in kept) - cost * len(held) + prize * len(seen)

    subsets = itertools.chain.from_iterable(
        itertools.combinations(leaves, n) for n in range(1, len(leaves) + 1)
    )
    kept = worth_keeping(tree, gains, cost, kinds, prize)
    assert kept
    best = max(map(value, subsets))
    assert value(kept) == pytest.approx(best) or best <= 0


def test_ets_without_a_price_is_rebase():
    free, plain, tree = Ets(6, sharing=0), Rebase(6), Tree(ROOT)
    feed(plain, tree, [0.5, 0.6, 0.4, 0.5, 0.55, 0.45])
    assert asks(free, tree) == asks(plain, tree)
    feed(plain, tree, [0.9, 0.2, 0.5, 0.5, 0.5, 0.5][: sum(asks(plain, tree).values())])
    assert asks(free, tree) == asks(plain, tree)
    assert len(asks(Ets(6, sharing=2), tree)) < len(asks(plain, tree))


def test_ets_pays_for_other_texts():
    """Two good leaves that say the same, and a worse one that says something else."""
    tree = Tree(ROOT)
    feed(Ets(3), tree, [0.9, 0.9, 0.8], texts=[7, 7, 8])
    assert set(asks(Ets(6, sharing=0.6), tree)) == {at(0), at(1)}
    assert set(asks(Ets(6, sharing=0.6, diversity=0.4), tree)) == {at(0), at(1), at(2)}
    assert set(asks(Ets(6, sharing=0.6, diversity=0.4, alike=1.0), tree)) == {at(0), at(1)}, (
        "all of one kind"
    )
    gains = {at(0): 0.6, at(1): 0.3, at(2): 0.1}
    kinds = {at(0): 0, at(1): 0, at(2): 1}
    assert worth_keeping(tree, gains, 0.4) == {at(0)}
    assert worth_keeping(tree, gains, 0.4, kinds, 0.5) == {at(0), at(2)}, "a twin brings nothing"


def test_rollouts_take_children_in_turn_and_then_the_best_bound():
    policy, tree = Mcts(rollouts=4, branch=2, depth=2, explore=0.1), Tree(ROOT)
    feed(policy, tree, [0.5, 0.5])
    assert asks(policy, tree) == {at(0): 2}
    feed(policy, tree, [0.2, 0.3], ends=[0, 1])
    assert tree.visited == (at(0, 0),)
    assert asks(policy, tree) == {at(1): 2}
    feed(policy, tree, [0.9, 0.8], ends=[0, 1])
    # The third and the fourth go to the better half; its leaves are there already.
    assert tree.visited == (at(0, 0), at(1, 0), at(1, 1), at(1, 0))
    assert tree.visits[ROOT] == 4
    assert tree.gains[at(1)] == pytest.approx(0.9 + 0.8 + 0.9)
    assert policy.done(tree)
    assert policy.answer(tree).distribution == {"0.9": 0.5, "0.8": 0.5, "0.2": 0.2}


def test_means_reward_the_whole_path():
    policy, tree = Mcts(rollouts=1, branch=1, depth=2, reward="mean"), Tree(ROOT)
    feed(policy, tree, [0.2])
    feed(policy, tree, [0.6], ends=[0])
    assert tree.gains[ROOT] == pytest.approx(0.4)


def test_process_rewards_lead_down():
    policy, tree = RestMcts(iterations=2, branch=2, depth=2, explore=0.0), Tree(ROOT)
    feed(policy, tree, [0.3, 0.8])
    assert asks(policy, tree) == {at(1): 2}
    feed(policy, tree, [0.1, 0.2], ends=[0, 1])
    assert tree.visited[0] == at(1, 1)
    assert policy.done(tree) or asks(policy, tree)


def test_depth_first_goes_back_where_nothing_is_good():
    policy, tree = DepthFirst(answers=1, branch=2, depth=3, least=0.3), Tree(ROOT)
    feed(policy, tree, [0.5, 0.9])
    assert asks(policy, tree) == {at(1): 2}
    feed(policy, tree, [0.1, 0.2])
    assert asks(policy, tree) == {at(0): 2}
    feed(policy, tree, [0.4, 0.6], ends=[1])
    assert policy.done(tree)
    assert policy.answer(tree).best == at(0, 1)


def test_depth_first_ends_when_nothing_is_left():
    policy, tree = DepthFirst(branch=2, least=0.5), Tree(ROOT)
    feed(policy, tree, [0.1, 0.2])
    assert policy.done(tree)
    assert policy.answer(tree).answer is None


def test_best_first_jumps_to_the_best():
    policy, tree = BestFirst(answers=1, branch=2, weight="last"), Tree(ROOT)
    feed(policy, tree, [0.6, 0.9])
    assert asks(policy, tree) == {at(1): 2}
    feed(policy, tree, [0.1, 0.5])
    assert asks(policy, tree) == {at(0): 2}
    both = BestFirst(answers=1, branch=2, at_once=2, weight="last")
    assert asks(both, tree) == {at(0): 2, at(1, 1): 2}


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Rebase(0),
        lambda: Beam(5, 2),
        lambda: Dvts(5, 2),
        lambda: Ets(4, sharing=-1),
        lambda: Ets(4, diversity=-1),
        lambda: Mcts(rollouts=0),
        lambda: RestMcts(branch=0),
        lambda: DepthFirst(answers=0),
        lambda: BestFirst(at_once=0),
    ],
)
def test_settings_without_meaning_are_refused(wrong):
    with pytest.raises(ValueError, match="must"):
        wrong()
