"""A search over steps: what it has been told, and what a policy decides from that.

The tree is the committed record. A policy sees nothing else, so what it decides is a function of
committed results in their canonical order, whatever ran ahead of time and whenever it ended. That
is why speculation is a matter of the runner (`reasoning.search`) and of no policy.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from jaxserve.protocol import Gen, Node, Step
from reasoning.answers import Answer, Candidate, vote

Aggregate = Literal["min", "prod", "mean", "last"]
"""How the scores of a path's steps become one."""

STEP = Gen(max_tokens=256)
"""The extension that policies ask for unless told otherwise; the runner adds where steps end."""


@dataclass(frozen=True)
class Expand:
    """Asks for child `index` of a node: one step more.

    Asked twice, it is the same child. The runner ends it at the question's step tokens and at what
    is left of its path.
    """

    parent: Node
    index: int
    gen: Gen = STEP

    @property
    def child(self) -> Node:
        return self.parent.fork(self.index)


@dataclass(frozen=True)
class Grown:
    """A node with all that is known of it.

    Attributes:
        parent: None for the root.
        score: in [0, 1]; None where nobody was asked, or has not answered yet.
        answer: of a finished path.
        finished: the text has ended, or its room has.
        total: tokens of the whole path.
    """

    node: Node
    parent: Node | None
    step: Step
    score: float | None = None
    answer: Hashable | None = None
    finished: bool = False
    total: int = 0


class Tree:
    """Committed nodes in canonical order, and what is asked for and not here yet.

    Everything in its tables is immutable, so a clone is a copy of the tables.

    Attributes:
        grown: committed nodes, the root first, in canonical order.
        children: committed children of each node that has any, in canonical order.
        pending: asked for and not committed, in the order in which it was asked for, which is the
            canonical one.
        ahead: steps that ended before their turn; only clones made for predictions have any.
        visits, gains: times that a policy came through a node, and what that brought in all.
        visited: where each of its visits ended.
        at: where it stands; the root at first.
        tokens: of the committed nodes.
        reach: depth of the deepest node that was ever asked for.
    """

    def __init__(self, root: Node):
        self.root = root
        self.grown: dict[Node, Grown] = {root: Grown(root, None, Step((), "stop"))}
        self.children: dict[Node, tuple[Node, ...]] = {}
        self.pending: dict[Node, Expand] = {}
        self.ahead: Mapping[Node, Grown] = {}
        self.visits: dict[Node, int] = {}
        self.gains: dict[Node, float] = {}
        self.visited: tuple[Node, ...] = ()
        self.at = root
        self.tokens = 0
        self.reach = 0

    def clone(self, ahead: Mapping[Node, Grown] | None = None) -> Tree:
        """A tree that can be changed without this one noticing."""
        new = Tree(self.root)
        new.grown, new.children = self.grown.copy(), self.children.copy()
        new.pending = self.pending.copy()
        new.ahead = self.ahead if ahead is None else ahead
        new.visits, new.gains, new.visited = self.visits.copy(), self.gains.copy(), self.visited
        new.at, new.tokens, new.reach = self.at, self.tokens, self.reach
        return new

    def ask(self, expand: Expand) -> bool:
        """Notes that a policy wants this; False if it had asked before."""
        child = expand.child
        if child in self.pending or child in self.grown:
            return False
        self.pending[child] = expand
        if len(child.path) > self.reach:
            self.reach = len(child.path)
        return True

    def commit(self, grown: Grown) -> None:
        """Makes a pending node part of the record."""
        assert grown.parent is not None
        del self.pending[grown.node]
        self.grown[grown.node] = grown
        self.children[grown.parent] = (*self.children.get(grown.parent, ()), grown.node)
        self.tokens += len(grown.step.tokens) + grown.step.passes

    def look(self, node: Node) -> Grown | None:
        """The node, be it committed or ahead of its turn."""
        return self.grown.get(node) or self.ahead.get(node)

    def way(self, node: Node) -> list[Grown]:
        """From the first step to the node; the root, which has no step, is left out."""
        found = list[Grown]()
        while (grown := self.look(node)) and grown.parent is not None:
            found.append(grown)
            node = grown.parent
        return found[::-1]

    def path_tokens(self, node: Node) -> tuple[int, ...]:
        """All tokens from the root to here."""
        return tuple(token for grown in self.way(node) for token in grown.step.tokens)

    def weight(self, node: Node, how: Aggregate) -> float:
        """The scores of a path's steps as one number in [0, 1]; 1 if nobody was asked."""
        scores = [grown.score for grown in self.way(node) if grown.score is not None]
        if not scores:
            return 1.0
        if how == "prod":
            return math.prod(scores)
        if how == "mean":
            return sum(scores) / len(scores)
        return min(scores) if how == "min" else scores[-1]

    def score(self, node: Node) -> float:
        """What was thought of the node; a half of those that nobody was asked about."""
        score = self.grown[node].score
        return 0.5 if score is None else score

    def level(self, depth: int) -> list[Grown]:
        """The committed nodes of one depth, in canonical order."""
        return [grown for grown in self.grown.values() if grown.node.depth == depth]

    def leaves(self) -> Iterator[Grown]:
        """Committed nodes that have no child, committed or asked for."""
        parents = {expand.parent for expand in self.pending.values()}
        for grown in self.grown.values():
            if grown.node not in self.children and grown.node not in parents:
                yield grown


class SearchPolicy(Protocol):
    """Decides which steps to ask for. The same committed results give the same decisions.

    A policy keeps what it must remember in the tree (`visits`, `gains`, `visited`, `at`) or derives
    it from there, so that the runner may ask it what it would do with another tree.
    """

    name: ClassVar[str]

    def ready(self, tree: Tree) -> Sequence[Expand]:
        """What it wants now. It may repeat what is pending or done; that changes nothing."""
        ...

    def observe(self, tree: Tree, grown: Grown) -> None:
        """A node was committed: its step has ended, and its score is here if one was wanted."""

    def done(self, tree: Tree) -> bool:
        """Whether it has come to its end; then it wants nothing either."""
        return not tree.pending and not self.ready(tree)

    def votes(self, tree: Tree) -> Sequence[Candidate]:
        """Paths that have a say in the answer, whatever the tree has come to."""
        ...

    def answer(self, tree: Tree) -> Answer:
        return vote(self.votes(tree))

    def wants_score(self, grown: Grown) -> bool:
        return True

    def missing(self, tree: Tree) -> int | None:
        """Most votes that are still to come; None if votes do not decide."""
        return None

    def largest(self, tree: Tree) -> float:
        """The most that one of the missing votes can weigh."""
        return 1.0

    def refuted(self, tree: Tree, expand: Expand) -> bool:
        """Whether it will certainly never ask for this, whatever comes.

        Nor then for any larger index of the same parent.
        """
        return False


class LevelPolicy(SearchPolicy, Protocol):
    """Goes level by level, until so many paths have ended; each takes its place along.

    Attributes:
        weight: how the scores of a path's steps become its vote.
    """

    weight: Aggregate

    @property
    def places(self) -> int:
        """Paths to end with."""
        ...

    def left(self, tree: Tree) -> int:
        """Places of paths that go on."""
        return max(self.places - len(ended(tree)), 0)

    def votes(self, tree: Tree) -> Sequence[Candidate]:
        return candidates(tree, ended(tree), self.weight)

    def missing(self, tree: Tree) -> int | None:
        return self.left(tree)

    def largest(self, tree: Tree) -> float:
        return heaviest(self, tree, self.weight)

    def refuted(self, tree: Tree, expand: Expand) -> bool:
        return passed(tree, expand)


def ended(tree: Tree) -> list[Grown]:
    """Committed paths whose text has ended."""
    return [grown for grown in tree.grown.values() if grown.finished]


def candidates(tree: Tree, paths: Iterable[Grown], how: Aggregate) -> list[Candidate]:
    """Paths as a vote sees them, in the order given."""
    return [Candidate(g.answer, tree.weight(g.node, how), g.node) for g in paths]


def heaviest(policy: SearchPolicy, tree: Tree, how: Aggregate) -> float:
    """The most that a path can weigh which has no vote yet.

    A path's least score, or their product, only falls as it goes on; so no later path weighs more
    than the heaviest beginning that may still be continued.
    """
    if how not in ("min", "prod"):
        return 1.0
    voted = {candidate.node for candidate in policy.votes(tree)}
    open_ends = [
        grown.node
        for grown in tree.leaves()
        if grown.node not in voted and not policy.refuted(tree, Expand(grown.node, 0))
    ]
    open_ends += {expand.parent for expand in tree.pending.values()}
    return max((tree.weight(node, how) for node in open_ends), default=0.0)


def passed(tree: Tree, expand: Expand) -> bool:
    """Whether a search that goes level by level has left the level where this would belong."""
    return expand.parent in tree.grown and expand.parent.depth < tree.reach
