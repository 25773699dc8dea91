"""ETS: REBASE on the part of a level that is worth its share of the cache (Hooper et al., 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxserve.protocol import Gen, Node
from reasoning.controllers.rebase import quotas
from reasoning.tree import (
    STEP,
    Aggregate,
    Expand,
    LevelPolicy,
    Tree,
)


def worth_keeping(tree: Tree, gains: dict[Node, float], cost: float) -> set[Node]:
    """The leaves that maximise their gains less `cost` for each node on the ways to them.

    The integer program of the paper; on a tree, and without its term for diverse texts, dynamic
    programming solves it. The best leaf always stays.
    """
    below = dict[Node, dict[Node, None]]()  # children that lead to a leaf, each once
    for leaf in gains:
        for grown in tree.way(leaf):
            assert grown.parent is not None
            below.setdefault(grown.parent, {})[grown.node] = None

    def kept(node: Node) -> tuple[float, list[Node]]:
        own, leaves = (gains[node], [node]) if node in gains else (0.0, list[Node]())
        for child in below.get(node, ()):
            value, inside = kept(child)
            if value >= 0:
                own, leaves = own + value, [*leaves, *inside]
        return own - (0.0 if node == tree.root else cost), leaves

    return set(kept(tree.root)[1]) or {max(gains, key=lambda leaf: gains[leaf])}


@dataclass(frozen=True)
class Ets(LevelPolicy):
    """Like `Rebase`, but only leaves that are worth the nodes they hold get a share of the width.

    Gains are the shares of REBASE, so that they sum to 1, and so do the costs of all nodes times
    `sharing`.

    Attributes:
        sharing: how much retained nodes cost; 0 is REBASE.
        temperature, depth, weight: as in `Rebase`.
    """

    width: int = 16
    sharing: float = 2.0
    temperature: float = 0.2
    depth: int = 25
    weight: Aggregate = "min"
    gen: Gen = STEP
    name: ClassVar[str] = "ets"

    def __post_init__(self):
        if self.width < 1 or self.depth < 1 or self.temperature <= 0 or self.sharing < 0:
            raise ValueError(f"{self}: width, depth and temperature must be positive")

    @property
    def places(self) -> int:
        return self.width

    def ready(self, tree: Tree) -> Sequence[Expand]:
        left = self.left(tree)
        if tree.pending or tree.reach >= self.depth or left <= 0:
            return []
        frontier = [grown.node for grown in tree.level(tree.reach) if not grown.finished]
        if not frontier:
            return []
        shares = self._shares(tree, frontier, left)
        held = {grown.node for leaf in frontier for grown in tree.way(leaf)}
        gains = {leaf: share / left for leaf, share in zip(frontier, shares, strict=True)}
        keep = worth_keeping(tree, gains, self.sharing / max(len(held), 1))
        kept = [leaf for leaf in frontier if leaf in keep]
        return [
            Expand(leaf, i, self.gen)
            for leaf, share in zip(kept, self._shares(tree, kept, left), strict=True)
            for i in range(share)
        ]

    def _shares(self, tree: Tree, leaves: Sequence[Node], width: int) -> list[int]:
        return quotas([tree.score(leaf) for leaf in leaves], width, self.temperature)
