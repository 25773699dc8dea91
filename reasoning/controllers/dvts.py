"""DVTS: several greedy searches side by side, for answers that differ (Beeching et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxserve.protocol import Gen
from reasoning.answers import Candidate
from reasoning.tree import STEP, Aggregate, Expand, Grown, SearchPolicy, Tree, candidates, passed


@dataclass(frozen=True)
class Dvts(SearchPolicy):
    """`beams / branch` subtrees; each tries `branch` steps and goes on with the best of them.

    A subtree ends with the text of its best step, and what else ends beside that votes too.

    Attributes:
        depth: most steps of a path.
        weight: how the scores of a path's steps become its vote; steps are chosen by the last one.
    """

    beams: int = 16
    branch: int = 4
    depth: int = 40
    weight: Aggregate = "last"
    gen: Gen = STEP
    name: ClassVar[str] = "dvts"

    def __post_init__(self):
        if self.branch < 1 or self.beams % self.branch or self.beams < 1 or self.depth < 1:
            raise ValueError(f"{self.beams=} must be a positive multiple of {self.branch=}")

    def ready(self, tree: Tree) -> Sequence[Expand]:
        if tree.pending or tree.reach >= self.depth:
            return []
        if not tree.reach:
            return [Expand(tree.root, i, self.gen) for i in range(self.beams)]
        ways = [self._best(tree, group) for group in self._last(tree)]
        live = [way for way in ways if not way.finished and way.node.depth == tree.reach]
        return [Expand(way.node, i, self.gen) for way in live for i in range(self.branch)]

    def votes(self, tree: Tree) -> Sequence[Candidate]:
        last = [grown for group in self._last(tree) for grown in group if grown.finished]
        return candidates(tree, last, self.weight)

    def missing(self, tree: Tree) -> int | None:
        return None  # a subtree that goes on takes back the votes of the level that it leaves

    def refuted(self, tree: Tree, expand: Expand) -> bool:
        return passed(tree, expand)

    def _last(self, tree: Tree) -> list[list[Grown]]:
        """The newest steps of each subtree."""
        groups = dict[int, list[Grown]]()
        for grown in tree.grown.values():
            if not grown.node.depth:
                continue
            group = groups.setdefault(grown.node.path[0][0] // self.branch, [])
            if group and group[-1].node.depth < grown.node.depth:
                group.clear()
            group.append(grown)
        return [groups[key] for key in sorted(groups)]

    def _best(self, tree: Tree, group: Sequence[Grown]) -> Grown:
        return max(group, key=lambda grown: tree.score(grown.node))
