"""Trees: the record of what was committed, and copies that leave it alone."""

import pytest

from jaxserve.protocol import Gen, Node, Step
from reasoning.tree import Expand, Grown, Tree, candidates, ended, passed

ROOT = Node(0)


def grow(tree, parent, index, score=None, tokens=(7,), **more):
    expand = Expand(parent, index)
    assert tree.ask(expand)
    grown = Grown(expand.child, parent, Step(tokens, "stop"), score, **more)
    tree.commit(grown)
    return grown.node


def test_a_child_is_the_fork_of_its_index():
    assert Expand(ROOT, 3).child == Node(0, ((3, -1),))
    assert Expand(Expand(ROOT, 3).child, 1, Gen(4)).child == Node(0, ((3, -1), (1, -1)))


def test_asking_twice_is_asking_once():
    tree = Tree(ROOT)
    assert tree.ask(Expand(ROOT, 0))
    assert not tree.ask(Expand(ROOT, 0))
    tree.commit(Grown(Expand(ROOT, 0).child, ROOT, Step((1,), "stop")))
    assert not tree.ask(Expand(ROOT, 0))
    assert not tree.pending


def test_the_record_keeps_its_order():
    tree = Tree(ROOT)
    a, b = grow(tree, ROOT, 0, 0.5, (1, 2)), grow(tree, ROOT, 1, 0.8, (3,))
    c = grow(tree, a, 0, 0.4, (4, 5))
    assert list(tree.grown) == [ROOT, a, b, c]
    assert tree.children == {ROOT: (a, b), a: (c,)}
    assert tree.path_tokens(c) == (1, 2, 4, 5)
    assert tree.tokens == 5
    assert tree.reach == 2
    assert [g.node for g in tree.level(1)] == [a, b]
    assert [g.node for g in tree.way(c)] == [a, c]


def test_scores_of_a_path_become_one():
    tree = Tree(ROOT)
    node = grow(tree, grow(tree, grow(tree, ROOT, 0, 0.5), 0, 0.8), 0, 0.6)
    weights = {how: tree.weight(node, how) for how in ("min", "prod", "mean", "last")}
    assert weights == pytest.approx({"min": 0.5, "prod": 0.24, "mean": 1.9 / 3, "last": 0.6})
    unscored = grow(tree, ROOT, 1)
    assert tree.weight(unscored, "min") == 1.0


def test_a_clone_is_nobody_elses():
    tree = Tree(ROOT)
    a = grow(tree, ROOT, 0)
    tree.ask(Expand(ROOT, 1))
    before = {name: repr(value) for name, value in vars(tree).items()}
    clone = tree.clone({Expand(a, 0).child: Grown(Expand(a, 0).child, a, Step((5,), "stop"))})
    clone.commit(Grown(Expand(ROOT, 1).child, ROOT, Step((9,), "stop")))
    grow(clone, a, 1)
    clone.visits[a] = 3
    clone.gains[a] = 0.5
    clone.visited = (a,)
    clone.at = a
    assert {name: repr(value) for name, value in vars(tree).items()} == before


def test_what_is_ahead_can_be_looked_at():
    tree = Tree(ROOT)
    a = grow(tree, ROOT, 0, tokens=(1,))
    early = Grown(Expand(a, 0).child, a, Step((2,), "end"), finished=True)
    view = tree.clone({early.node: early})
    assert view.path_tokens(early.node) == (1, 2)
    assert view.look(early.node) is early
    assert early.node not in view.grown


def test_only_ended_paths_vote():
    tree = Tree(ROOT)
    a = grow(tree, ROOT, 0, 0.5, finished=True, answer="x")
    grow(tree, ROOT, 1, 0.9)
    (one,) = candidates(tree, ended(tree), "min")
    assert (one.answer, one.weight, one.node) == ("x", 0.5, a)


def test_levels_that_were_left():
    tree = Tree(ROOT)
    a, b = grow(tree, ROOT, 0), grow(tree, ROOT, 1)
    assert passed(tree, Expand(ROOT, 2))
    assert not passed(tree, Expand(b, 0))
    tree.ask(Expand(a, 0))
    assert passed(tree, Expand(b, 0))
    assert not passed(tree, Expand(Expand(a, 0).child, 0)), "its parent is not committed"


def test_a_fork_is_the_same_handle_each_time():
    node = Node(3).fork(1).fork(2, 7)
    assert node == Node(3, ((1, -1), (2, 7)))
    assert hash(node) == hash(Node(3, ((1, -1), (2, 7))))
    root = Node(3)
    assert root.fork(1) is root.fork(1) is Expand(root, 1).child
    assert root.fork(1) is not root.fork(1, 0)
    assert repr(root.fork(1)) == "Node(query=3, path=((1, -1),))"
