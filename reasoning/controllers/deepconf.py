"""DeepConf online (Fu et al., 2025): stop paths that get less sure than good ones ever were.

Some full paths set a threshold on the least mean confidence of any window of tokens. Paths after
them are stopped as soon as a window falls below it. Only whole paths vote, weighted by their
weakest window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from reasoning.answers import Answer, Candidate, tally, vote
from reasoning.pool import Action, Fork, Path, PoolView, Prune, Stop
from reasoning.signals import agreement, least_group, percentile


@dataclass(frozen=True)
class DeepConf:
    """Paths 0 to `paths` - 1, `batch` at a time after the warm-up.

    Attributes:
        warmup: full paths, which set the threshold.
        keep: share of the warm-up that lies above it: 0.1 is aggressive, 0.9 the authors' default.
        floor: a threshold known beforehand, from other questions; there is no warm-up then.
        window: tokens of a group.
        consensus: the search ends once the leading answer has this share of the vote, and as many
            paths as a warm-up takes were begun.
        filter_warmup: whether warm-up paths below the threshold lose their vote, as later ones do.
    """

    paths: int = 32
    warmup: int = 16
    keep: float = 0.9
    floor: float | None = None
    window: int = 16
    batch: int = 4
    consensus: float = 0.95
    filter_warmup: bool = True
    period: int = 16
    name: ClassVar[str] = "deepconf"
    branching: ClassVar[bool] = False
    scored: ClassVar[bool] = False

    def __post_init__(self):
        if min(self.paths, self.warmup, self.window, self.batch, self.period) < 1:
            raise ValueError(f"{self}: counts must be positive")
        if not 0 <= self.keep <= 1 or not 0 < self.consensus <= 1:
            raise ValueError(f"{self}: keep and consensus are shares")

    def start(self, view: PoolView) -> Sequence[Action]:
        first = self.warmup if self.floor is None else self.batch
        return [Fork(i) for i in range(min(first, self.paths))]

    def step(self, view: PoolView) -> Sequence[Action]:
        threshold = self.threshold(view)
        if threshold is None:
            return []
        weak = [p for p in view.live if self._least(p) < threshold]
        actions: list[Action] = [Prune(p.node) for p in weak]
        if len(view.live) > len(weak):
            return actions
        begun = len(view.paths)
        share = agreement(tally(self._voters(view)))
        agreed = begun >= self.warmup and share >= self.consensus
        if begun >= self.paths or agreed:
            return [*actions, Stop()]
        return [*actions, *(Fork(i) for i in range(begun, min(begun + self.batch, self.paths)))]

    def threshold(self, view: PoolView) -> float | None:
        """None while the warm-up runs."""
        if self.floor is not None:
            return self.floor
        full = view.paths[: min(self.warmup, self.paths)]
        if any(p.state == "live" for p in full):
            return None
        return percentile([self._least(p) for p in full], 1 - self.keep)

    def _least(self, path: Path) -> float:
        return least_group(path.stats, self.window)

    def _voters(self, view: PoolView) -> list[Candidate]:
        threshold = self.threshold(view)
        spared = 0 if self.filter_warmup else min(self.warmup, self.paths)
        return [
            Candidate(p.answer, self._least(p), p.node)
            for i, p in enumerate(view.paths)
            if p.state == "finished"
            and (i < spared or threshold is None or self._least(p) >= threshold)
        ]

    def aggregate(self, view: PoolView) -> Answer:
        return vote(self._voters(view))
