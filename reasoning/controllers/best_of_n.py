"""Best of N: so many paths, and the answer of the one that is thought best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from reasoning.answers import Answer, Candidate, best_of, vote
from reasoning.pool import Action, Fork, Path, PoolView


@dataclass(frozen=True)
class BestOfN:
    """Paths 0 to `paths` - 1, judged by the scorer that `run_pool` was given.

    Where there is none, by mean log-probability.

    Attributes:
        choose: "best": the answer of the best path; "vote": that of a vote in which paths weigh as
            they are thought of.
    """

    paths: int = 16
    choose: Literal["best", "vote"] = "best"
    period: int = 64
    name: ClassVar[str] = "best-of-n"
    branching: ClassVar[bool] = False

    def __post_init__(self):
        if self.paths < 1 or self.period < 1:
            raise ValueError(f"{self}: at least one path and one token a round")
        if self.choose not in ("best", "vote"):
            raise ValueError(f"{self}: choose is 'best' or 'vote'")

    def start(self, view: PoolView) -> Sequence[Action]:
        return [Fork(i) for i in range(self.paths)]

    def step(self, view: PoolView) -> Sequence[Action]:
        return []

    def aggregate(self, view: PoolView) -> Answer:
        choose = best_of if self.choose == "best" else vote
        return choose(Candidate(p.answer, self._worth(p), p.node) for p in view.finished)

    def _worth(self, path: Path) -> float:
        if path.score is not None:
            return path.score
        mean = path.stats.logprob / max(path.stats.n_tokens, 1)
        return math.exp(mean)  # in (0, 1], as scores are; a vote needs it positive
