"""Monte Carlo tree search over steps, as in rStar (Qi et al., 2024)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxserve.protocol import Gen, Node
from reasoning.answers import Candidate
from reasoning.tree import STEP, Aggregate, Expand, Grown, SearchPolicy, Tree, candidates, heaviest


def walk(tree: Tree, pick: Callable[[Tree, Node], Node]) -> list[Node]:
    """From the root down to a node without children, one choice after the other."""
    way = [tree.root]
    while way[-1] in tree.children:
        way.append(pick(tree, way[-1]))
    return way


def back_up(tree: Tree, way: Sequence[Node], reward: float) -> None:
    """A visit came to the end of this way, and found this there."""
    for node in way:
        tree.visits[node] = tree.visits.get(node, 0) + 1
        tree.gains[node] = tree.gains.get(node, 0.0) + reward
    tree.visited = (*tree.visited, way[-1])


def best_bound(tree: Tree, parent: Node, explore: float) -> Node:
    """UCT: the child that brought in most on average, or of which too little is known to say."""
    visits, gains = tree.visits, tree.gains
    log = math.log(visits[parent])
    found, best = parent, -math.inf
    for child in tree.children[parent]:  # a loop: predictions come by here all the time
        n = visits[child]
        bound = gains[child] / n + explore * math.sqrt(log / n)
        if bound > best:
            found, best = child, bound
    return found


@dataclass(frozen=True)
class Mcts(SearchPolicy):
    """A rollout walks down to a leaf, expanding `branch` children at once where there are none.

    Children that nobody visited come first, in their order; after that the best upper bound.

    Attributes:
        rollouts: walks to a leaf.
        explore: weight of the unknown in the upper bound.
        reward: of a rollout: the score of its leaf, or the mean of its steps' scores.
        weight: how the scores of a path's steps become its vote.
    """

    rollouts: int = 10
    branch: int = 4
    depth: int = 5
    explore: float = 2.0
    reward: Literal["leaf", "mean"] = "leaf"
    weight: Aggregate = "min"
    gen: Gen = STEP
    name: ClassVar[str] = "mcts"

    def __post_init__(self):
        if min(self.rollouts, self.branch, self.depth) < 1:
            raise ValueError(f"{self}: rollouts, branch and depth must be positive")

    def ready(self, tree: Tree) -> Sequence[Expand]:
        if tree.pending or len(tree.visited) >= self.rollouts:
            return []
        return [Expand(tree.at, i, self.gen) for i in range(self.branch)]

    def observe(self, tree: Tree, grown: Grown) -> None:
        while not tree.pending and len(tree.visited) < self.rollouts:
            way = walk(tree, self._pick)
            tree.at = way[-1]
            if not (tree.grown[tree.at].finished or len(way) > self.depth):
                break
            back_up(tree, way, self._reward(tree, way))

    def done(self, tree: Tree) -> bool:
        return len(tree.visited) >= self.rollouts

    def votes(self, tree: Tree) -> Sequence[Candidate]:
        visited = (tree.grown[node] for node in dict.fromkeys(tree.visited))
        return candidates(tree, (grown for grown in visited if grown.finished), self.weight)

    def missing(self, tree: Tree) -> int:
        return self.rollouts - len(tree.visited)

    def largest(self, tree: Tree) -> float:
        return heaviest(self, tree, self.weight)

    def _pick(self, tree: Tree, parent: Node) -> Node:
        visits = tree.visits
        for child in tree.children[parent]:
            if child not in visits:
                return child
        return best_bound(tree, parent, self.explore)

    def _reward(self, tree: Tree, way: Sequence[Node]) -> float:
        if self.reward == "leaf":
            return tree.score(way[-1])
        return sum(map(tree.score, way[1:])) / (len(way) - 1)
