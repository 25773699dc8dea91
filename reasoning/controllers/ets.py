"""ETS: REBASE on the part of a level that is worth its share of the cache (Hooper et al., 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxserve.protocol import Gen, Node
from reasoning.clusters import clusters
from reasoning.controllers.rebase import quotas
from reasoning.tree import (
    STEP,
    Aggregate,
    Expand,
    LevelPolicy,
    Tree,
)

Kept = tuple[float, frozenset[int], tuple[Node, ...]]
"""Leaves, what they are worth, and the kinds among them."""


def worth_keeping(
    tree: Tree,
    gains: Mapping[Node, float],
    cost: float,
    kinds: Mapping[Node, int] | None = None,
    prize: float = 0.0,
) -> set[Node]:
    """The leaves that maximise their gains, less `cost` for each node on the ways to them, and with
    `prize` for each kind of text among them.

    The integer program of the paper; on a tree dynamic programming solves it. Under each node it
    keeps one set of leaves for every set of kinds, unless another one is worth more whatever other
    kinds are still to come. The best leaf always stays.
    """
    below = dict[Node, dict[Node, None]]()  # children that lead to a leaf, each once
    for leaf in gains:
        for grown in tree.way(leaf):
            assert grown.parent is not None
            below.setdefault(grown.parent, {})[grown.node] = None

    def kept(node: Node) -> list[Kept]:
        found: list[Kept] = [(0.0, frozenset(), ())]
        if node in gains:
            own = frozenset([kinds[node]]) if kinds and prize else frozenset[int]()
            found = [(gains[node] + prize * len(own), own, (node,))]
        for child in below.get(node, ()):
            more = kept(child)
            found = _best([_joined(a, b, prize) for a in found for b in more] + found, prize)
        price = 0.0 if node == tree.root else cost
        return [(value - price, seen, leaves) for value, seen, leaves in found if leaves]

    best = max(kept(tree.root), key=lambda one: one[0], default=(-1.0, frozenset[int](), ()))
    return set(best[2]) if best[0] >= 0 else {max(gains, key=lambda leaf: gains[leaf])}


def _joined(a: Kept, b: Kept, prize: float) -> Kept:
    """Both; what is of a kind with something of the other brings that prize no second time."""
    return a[0] + b[0] - prize * len(a[1] & b[1]), a[1] | b[1], (*a[2], *b[2])


def _best(found: list[Kept], prize: float) -> list[Kept]:
    """Without what another one beats even if the kinds that only it has are all still to come."""
    ahead = list[Kept]()
    for one in sorted(found, key=lambda one: -one[0]):
        if all(other[0] < one[0] + prize * len(other[1] - one[1]) for other in ahead):
            ahead.append(one)
    return ahead


@dataclass(frozen=True)
class Ets(LevelPolicy):
    """Like `Rebase`, but only leaves that are worth the nodes they hold get a share of the width.

    Gains are the shares of REBASE, so that they sum to 1, and so do the costs of all nodes times
    `sharing`.

    Attributes:
        sharing: how much retained nodes cost; 0 is REBASE.
        diversity: what all kinds of last steps together are worth beside the gains; each that is
            kept brings its part. 0, as in SPEX's artifact: kinds do not matter.
        alike: last steps within this cosine distance of each other, on average, are of one kind.
        temperature, depth, weight: as in `Rebase`.
    """

    width: int = 16
    sharing: float = 2.0
    diversity: float = 0.0
    alike: float = 0.05
    temperature: float = 0.2
    depth: int = 25
    weight: Aggregate = "min"
    gen: Gen = STEP
    name: ClassVar[str] = "ets"

    def __post_init__(self):
        if self.width < 1 or self.depth < 1 or self.temperature <= 0:
            raise ValueError(f"{self}: width, depth and temperature must be positive")
        if min(self.sharing, self.diversity, self.alike) < 0:
            raise ValueError(f"{self}: sharing, diversity and alike must not be negative")

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
        kinds, prize = None, 0.0
        if self.diversity:
            texts = [tree.grown[leaf].step.tokens for leaf in frontier]
            kinds = dict(zip(frontier, clusters(texts, self.alike), strict=True))
            prize = self.diversity / len(set(kinds.values()))
        keep = worth_keeping(tree, gains, self.sharing / max(len(held), 1), kinds, prize)
        kept = [leaf for leaf in frontier if leaf in keep]
        return [
            Expand(leaf, i, self.gen)
            for leaf, share in zip(kept, self._shares(tree, kept, left), strict=True)
            for i in range(share)
        ]

    def _shares(self, tree: Tree, leaves: Sequence[Node], width: int) -> list[int]:
        return quotas([tree.score(leaf) for leaf in leaves], width, self.temperature)
