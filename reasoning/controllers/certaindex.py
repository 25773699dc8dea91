"""Certaindex (Fu et al., 2024): ask unfinished paths for their answer; stop those that repeat it.

Every so many tokens each live path is probed: a suffix such as "the answer is", and a few greedy
tokens on a fork that is thrown away. A path whose last probes agree has made up its mind, and the
rest of its reasoning is not paid for.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from reasoning.answers import Answer, Candidate, vote
from reasoning.pool import Action, Fork, Path, PoolView, Probe, Prune


@dataclass(frozen=True)
class Certaindex:
    """Paths 0 to `paths` - 1, probed every `period` tokens.

    Attributes:
        suffix: tokens of the probe; `max_tokens` are generated behind them.
        equal: a path is stopped after so many probes with one and the same answer.
        hedge: a probe counts as hedged, and so not at all, if the likeliest token of its answer is
            anywhere ahead of the next one by fewer nats than this.
    """

    suffix: tuple[int, ...] = ()
    paths: int = 16
    equal: int = 3
    max_tokens: int = 8
    hedge: float = 0.0
    period: int = 64
    name: ClassVar[str] = "certaindex"
    branching: ClassVar[bool] = False
    scored: ClassVar[bool] = False

    def __post_init__(self):
        if min(self.paths, self.equal, self.max_tokens, self.period) < 1:
            raise ValueError(f"{self}: counts must be positive")

    def start(self, view: PoolView) -> Sequence[Action]:
        return [Fork(i) for i in range(self.paths)]

    def step(self, view: PoolView) -> Sequence[Action]:
        certain = [p for p in view.live if self.answer(p) is not None]
        open_paths = [p for p in view.live if p not in certain]
        probes = [Probe(p.node, self.suffix, self.max_tokens) for p in open_paths]
        return [*(Prune(p.node) for p in certain), *probes]

    def answer(self, path: Path) -> Hashable | None:
        """What a path says: its own answer, or the one its last probes agree on."""
        if path.state == "finished":
            return path.answer
        last = path.probes[-self.equal :]
        said = {p.answer for p in last}
        sure = all(min(p.step.margins, default=0.0) >= self.hedge for p in last)
        return said.pop() if len(last) == self.equal and len(said) == 1 and sure else None

    def aggregate(self, view: PoolView) -> Answer:
        return vote(Candidate(self.answer(p), node=p.node) for p in view.paths)
