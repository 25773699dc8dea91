"""Step beam: keep the best steps, continue each several times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxserve.protocol import Gen, Node
from reasoning.tree import (
    STEP,
    Aggregate,
    Expand,
    Grown,
    LevelPolicy,
    Tree,
)


@dataclass(frozen=True)
class Beam(LevelPolicy):
    """Of `beams` paths the best `beams / branch` go on, duplicated to fill the beams again.

    Paths with equal texts are one. One that ends keeps its beam.

    Attributes:
        branch: continuations of a step that is kept.
        depth: most steps of a path.
        weight: how the scores of a path's steps become its vote; paths are kept by the last one.
    """

    beams: int = 16
    branch: int = 4
    depth: int = 40
    weight: Aggregate = "last"
    gen: Gen = STEP
    name: ClassVar[str] = "beam"

    def __post_init__(self):
        if self.branch < 1 or self.beams % self.branch or self.beams < 1 or self.depth < 1:
            raise ValueError(f"{self.beams=} must be a positive multiple of {self.branch=}")

    @property
    def places(self) -> int:
        return self.beams

    def ready(self, tree: Tree) -> Sequence[Expand]:
        if tree.pending or tree.reach >= self.depth:
            return []
        beams = self.left(tree)
        kept = self._kept(tree, -(-beams // self.branch))
        # Beams are dealt out in turns, so that the better ones get what does not divide.
        counts = [len(range(i, beams, len(kept))) for i in range(len(kept))]
        return [Expand(n, i, self.gen) for n, c in zip(kept, counts, strict=True) for i in range(c)]

    def _kept(self, tree: Tree, count: int) -> list[Node]:
        """The best live paths of the deepest level, best first, equal texts once."""
        if count <= 0:
            return []
        live = [grown for grown in tree.level(tree.reach) if not grown.finished]
        different = dict[tuple[int, ...], Grown]()
        for grown in live:
            different.setdefault(tree.path_tokens(grown.node), grown)
        nodes = [grown.node for grown in different.values()]
        return sorted(nodes, key=lambda node: -tree.score(node))[:count]
