"""Depth first, best step first, as in Tree of Thoughts (Yao et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxserve.protocol import Gen, Node
from reasoning.answers import Answer, Candidate, best_of
from reasoning.tree import STEP, Aggregate, Expand, SearchPolicy, Tree, candidates, ended


@dataclass(frozen=True)
class DepthFirst(SearchPolicy):
    """Goes down the best child; where nothing is good enough, back up to the next best.

    Attributes:
        answers: ended paths after which it stops; the best of them is the answer.
        branch: children of a node.
        least: score below which a node is not continued.
        nodes: most nodes that are continued.
        weight: how the scores of a path's steps say how good it is.
    """

    answers: int = 4
    branch: int = 3
    depth: int = 10
    least: float = 0.2
    nodes: int = 64
    weight: Aggregate = "last"
    gen: Gen = STEP
    name: ClassVar[str] = "dfs"

    def __post_init__(self):
        if min(self.answers, self.branch, self.depth, self.nodes) < 1:
            raise ValueError(f"{self}: answers, branch, depth and nodes must be positive")

    def ready(self, tree: Tree) -> Sequence[Expand]:
        full = len(ended(tree)) >= self.answers or len(tree.children) >= self.nodes
        if tree.pending or full:
            return []
        node = self._next(tree)
        return [] if node is None else [Expand(node, i, self.gen) for i in range(self.branch)]

    def votes(self, tree: Tree) -> Sequence[Candidate]:
        return candidates(tree, ended(tree), self.weight)

    def answer(self, tree: Tree) -> Answer:
        return best_of(self.votes(tree))

    def _next(self, tree: Tree) -> Node | None:
        """The top of the stack: of the family that came last, the best that is left."""
        if not tree.children:
            return tree.root
        for family in reversed(tree.children.values()):
            left = [node for node in family if self._goes_on(tree, node)]
            if left:
                return max(left, key=tree.score)
        return None

    def _goes_on(self, tree: Tree, node: Node) -> bool:
        done = node in tree.children or tree.grown[node].finished
        return not done and node.depth < self.depth and tree.score(node) >= self.least
