"""Slim-SC (Hong et al., 2025): self-consistency without near-duplicates.

Paths whose recent text is much alike are likely to end alike; the less sure one of two is pruned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from reasoning.answers import Answer, Candidate, vote
from reasoning.pool import Action, Fork, Path, PoolView, Prune
from reasoning.signals import likeness


@dataclass(frozen=True)
class SlimSC:
    """A plain vote of paths 0 to `paths` - 1, less those that are pruned.

    Attributes:
        similar: likeness of the last `window` tokens, in [0, 1], from which two are one too many.
        delay: tokens before any path is judged.
    """

    paths: int = 16
    similar: float = 0.9
    window: int = 32
    delay: int = 16
    period: int = 16
    name: ClassVar[str] = "slim-sc"
    branching: ClassVar[bool] = False
    scored: ClassVar[bool] = False

    def __post_init__(self):
        if min(self.paths, self.window, self.period) < 1 or not 0 < self.similar <= 1:
            raise ValueError(f"{self}: counts must be positive, and similar lies in (0, 1]")

    def start(self, view: PoolView) -> Sequence[Action]:
        return [Fork(i) for i in range(self.paths)]

    def step(self, view: PoolView) -> Sequence[Action]:
        live = [p for p in view.live if p.stats.n_tokens >= self.delay]
        kept = list[Path]()
        for path in sorted(live, key=_confidence, reverse=True):
            if all(likeness(path.stats, k.stats, self.window) < self.similar for k in kept):
                kept.append(path)
        return [Prune(p.node) for p in live if p not in kept]

    def aggregate(self, view: PoolView) -> Answer:
        return vote(Candidate(p.answer, node=p.node) for p in view.finished)


def _confidence(path: Path) -> float:
    return path.stats.conf_group(path.stats.n_tokens)
