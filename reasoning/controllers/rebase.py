"""REBASE: every level shares its width out by reward (Wu et al., 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxserve.protocol import Gen
from reasoning.tree import (
    STEP,
    Aggregate,
    Expand,
    LevelPolicy,
    Tree,
)


def quotas(rewards: Sequence[float], width: int, temperature: float) -> list[int]:
    """How many children each node gets; they sum to the width, the best rewards first served."""
    order = sorted(range(len(rewards)), key=lambda i: -rewards[i])
    top = max(rewards, default=0.0)
    shares = [math.exp((rewards[i] - top) / temperature) for i in order]
    found, left = [0] * len(rewards), width
    for place, i in enumerate(order):
        total = sum(shares[place:])
        # Far below the top a share rounds to nothing, and what is left of the width is nothing too.
        share = shares[place] / total if total else 1.0
        found[i] = min(left, math.ceil(left * share - 1e-9))
        left -= found[i]
    return found


@dataclass(frozen=True)
class Rebase(LevelPolicy):
    """Breadth first. A path that ends takes its place in the width with it.

    Attributes:
        width: paths to end with.
        temperature: of the softmax over a level's rewards.
        depth: most steps of a path.
        weight: how the scores of a path's steps become its vote.
    """

    width: int = 16
    temperature: float = 0.2
    depth: int = 25
    weight: Aggregate = "min"
    gen: Gen = STEP
    name: ClassVar[str] = "rebase"

    def __post_init__(self):
        if self.width < 1 or self.depth < 1 or self.temperature <= 0:
            raise ValueError(f"{self}: width, depth and temperature must be positive")

    @property
    def places(self) -> int:
        return self.width

    def ready(self, tree: Tree) -> Sequence[Expand]:
        if tree.pending or tree.reach >= self.depth:
            return []
        frontier = [grown for grown in tree.level(tree.reach) if not grown.finished]
        shares = quotas([tree.score(g.node) for g in frontier], self.left(tree), self.temperature)
        return [
            Expand(grown.node, i, self.gen)
            for grown, share in zip(frontier, shares, strict=True)
            for i in range(share)
        ]
