"""Self-consistency (Wang et al., 2022): so many paths, and the answer that most of them give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from reasoning.answers import Answer, Candidate, vote
from reasoning.pool import Action, Fork, PoolView


@dataclass(frozen=True)
class SelfConsistency:
    """A plain vote of paths 0 to `paths` - 1."""

    paths: int = 16
    period: int = 64
    name: ClassVar[str] = "self-consistency"
    branching: ClassVar[bool] = False
    scored: ClassVar[bool] = False

    def __post_init__(self):
        if self.paths < 1 or self.period < 1:
            raise ValueError(f"{self}: at least one path and one token a round")

    def start(self, view: PoolView) -> Sequence[Action]:
        return [Fork(i) for i in range(self.paths)]

    def step(self, view: PoolView) -> Sequence[Action]:
        return []

    def aggregate(self, view: PoolView) -> Answer:
        return vote(Candidate(p.answer, node=p.node) for p in view.finished)
