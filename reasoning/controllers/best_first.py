"""Best first: always continues the most promising path, however deep it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxserve.protocol import Gen, Node
from reasoning.answers import Answer, Candidate, best_of
from reasoning.tree import STEP, Aggregate, Expand, SearchPolicy, Tree, candidates, ended


@dataclass(frozen=True)
class BestFirst(SearchPolicy):
    """Keeps all open paths in order of their worth, and continues the best.

    Attributes:
        answers: ended paths after which it stops; the best of them is the answer.
        branch: children of a node.
        at_once: paths that are continued together.
        least: worth below which a path is not continued.
        nodes: most nodes that are continued.
        weight: how the scores of a path's steps become its worth.
    """

    answers: int = 4
    branch: int = 3
    at_once: int = 1
    depth: int = 10
    least: float = 0.0
    nodes: int = 64
    weight: Aggregate = "mean"
    gen: Gen = STEP
    name: ClassVar[str] = "best-first"

    def __post_init__(self):
        if min(self.answers, self.branch, self.at_once, self.depth, self.nodes) < 1:
            raise ValueError(f"{self}: all numbers must be positive")

    def ready(self, tree: Tree) -> Sequence[Expand]:
        room = min(self.at_once, self.nodes - len(tree.children))
        if tree.pending or room <= 0 or len(ended(tree)) >= self.answers:
            return []
        best = sorted(self._open(tree), key=lambda node: -tree.weight(node, self.weight))[:room]
        return [Expand(node, i, self.gen) for node in best for i in range(self.branch)]

    def votes(self, tree: Tree) -> Sequence[Candidate]:
        return candidates(tree, ended(tree), self.weight)

    def answer(self, tree: Tree) -> Answer:
        return best_of(self.votes(tree))

    def _open(self, tree: Tree) -> list[Node]:
        return [
            node
            for node, grown in tree.grown.items()
            if node not in tree.children
            and not grown.finished
            and node.depth < self.depth
            and (node == tree.root or tree.weight(node, self.weight) >= self.least)
        ]
