"""ReST-MCTS*: a tree search in which process rewards lead, and answers correct them.

After Zhang et al., 2024. Each iteration goes down step by step: it tries several, and goes on with
the one that the scorer likes best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxserve.protocol import Gen, Node
from reasoning.answers import Candidate
from reasoning.controllers.mcts import back_up, walk
from reasoning.tree import STEP, Aggregate, Expand, Grown, SearchPolicy, Tree, candidates


@dataclass(frozen=True)
class RestMcts(SearchPolicy):
    """Nodes are worth what the scorer says until a visit has brought something in.

    Attributes:
        iterations: ways down to the end of a text, or of its depth.
        branch: steps that are tried at once.
        explore: weight of the unknown in the choice among children.
        weight: how the scores of a path's steps become its vote, and what a visit brings in.
    """

    iterations: int = 10
    branch: int = 4
    depth: int = 5
    explore: float = 0.3
    weight: Aggregate = "mean"
    gen: Gen = STEP
    name: ClassVar[str] = "rest-mcts"

    def __post_init__(self):
        if min(self.iterations, self.branch, self.depth) < 1:
            raise ValueError(f"{self}: iterations, branch and depth must be positive")

    def ready(self, tree: Tree) -> Sequence[Expand]:
        if tree.pending or self.done(tree):
            return []
        return [Expand(tree.at, i, self.gen) for i in range(self.branch)]

    def observe(self, tree: Tree, grown: Grown) -> None:
        while not tree.pending and not self.done(tree):
            way = walk(tree, self._pick)
            tree.at = way[-1]
            if not (tree.grown[tree.at].finished or len(way) > self.depth):
                break
            back_up(tree, way, tree.weight(tree.at, self.weight))

    def done(self, tree: Tree) -> bool:
        return len(tree.visited) >= self.iterations

    def votes(self, tree: Tree) -> Sequence[Candidate]:
        visited = (tree.grown[node] for node in dict.fromkeys(tree.visited))
        return candidates(tree, (grown for grown in visited if grown.finished), self.weight)

    def missing(self, tree: Tree) -> int:
        return self.iterations - len(tree.visited)

    def _pick(self, tree: Tree, parent: Node) -> Node:
        log = math.log(1 + tree.visits.get(parent, 0))

        def bound(child: Node) -> float:
            visits = tree.visits.get(child, 0)
            value = tree.gains[child] / visits if visits else tree.score(child)
            return value + self.explore * math.sqrt(log / (1 + visits))

        return max(tree.children[parent], key=bound)
