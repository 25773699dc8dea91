"""Early-stopping self-consistency (Li et al., 2024): sample in windows until one is unanimous."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from reasoning.answers import Answer, Candidate, vote
from reasoning.pool import Action, Fork, PoolView, Stop


@dataclass(frozen=True)
class EarlyStopping:
    """A plain vote of at most `paths` paths, `window` at a time.

    A window in which a path comes to no answer is not unanimous.
    """

    paths: int = 40
    window: int = 5
    period: int = 64
    name: ClassVar[str] = "esc"
    branching: ClassVar[bool] = False
    scored: ClassVar[bool] = False

    def __post_init__(self):
        if min(self.paths, self.window, self.period) < 1:
            raise ValueError(f"{self}: counts must be positive")

    def start(self, view: PoolView) -> Sequence[Action]:
        return [Fork(i) for i in range(min(self.window, self.paths))]

    def step(self, view: PoolView) -> Sequence[Action]:
        if view.live:
            return []
        begun = len(view.paths)
        said = {p.answer for p in view.paths[-self.window :]}
        if begun >= self.paths or (len(said) == 1 and None not in said):
            return [Stop()]
        return [Fork(i) for i in range(begun, min(begun + self.window, self.paths))]

    def aggregate(self, view: PoolView) -> Answer:
        return vote(Candidate(p.answer, node=p.node) for p in view.finished)
