"""Adaptive consistency (Aggarwal et al., 2023): sample until the lead is likely to stay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from reasoning.answers import Answer, Candidate, tally, vote
from reasoning.pool import Action, Fork, PoolView, Stop


@dataclass(frozen=True)
class AdaptiveConsistency:
    """A plain vote of at most `paths` paths, `batch` at a time.

    Attributes:
        sure: the search ends once the probability that the leading answer beats the next one among
            all paths there could be, from counts a and b and a flat prior, is at least this.
    """

    paths: int = 40
    batch: int = 1
    sure: float = 0.95
    period: int = 64
    name: ClassVar[str] = "adaptive-consistency"
    branching: ClassVar[bool] = False
    scored: ClassVar[bool] = False

    def __post_init__(self):
        if min(self.paths, self.batch, self.period) < 1 or not 0.5 <= self.sure <= 1:
            raise ValueError(f"{self}: counts must be positive, and sure lies in [0.5, 1]")

    def start(self, view: PoolView) -> Sequence[Action]:
        return [Fork(i) for i in range(min(self.batch, self.paths))]

    def step(self, view: PoolView) -> Sequence[Action]:
        if view.live:
            return []
        begun = len(view.paths)
        counts = [*tally(Candidate(p.answer) for p in view.finished).values(), 0.0, 0.0]
        if begun >= self.paths or leads(int(counts[0]), int(counts[1])) >= self.sure:
            return [Stop()]
        return [Fork(i) for i in range(begun, min(begun + self.batch, self.paths))]

    def aggregate(self, view: PoolView) -> Answer:
        return vote(Candidate(p.answer, node=p.node) for p in view.finished)


def leads(a: int, b: int) -> float:
    """Share of the Beta(a + 1, b + 1) distribution above one half.

    For whole a and b the regularised incomplete beta function is a binomial tail: the probability
    of at most a heads in a + b + 1 fair throws.
    """
    n = a + b + 1
    logs = (math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(a + 1))
    return min(math.fsum(math.exp(x - n * math.log(2)) for x in logs), 1.0)
