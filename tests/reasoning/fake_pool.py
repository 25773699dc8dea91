"""A pool whose paths are written down beforehand: what a controller does is all there is to see."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random

from jaxserve.protocol import (
    Capacity,
    DeadPathError,
    Gen,
    Ledger,
    Node,
    PathStats,
    Question,
    Step,
)

END, STEP = 0, 1  # tokens: the end of a text, the end of a step; the one before END is the answer


@dataclass(frozen=True)
class Text:
    """All that a path will say."""

    tokens: tuple[int, ...]
    confidences: tuple[float, ...]


def text(answer: int, length: int = 8, confidence: float = 9.0, dip: float | None = None) -> Text:
    """`length` tokens that end in an answer; `dip` is the confidence of the third of them."""
    body = [100 + answer * 50 + i for i in range(length - 3)]
    conf = [confidence] * length
    if dip is not None:
        conf[2] = dip
    return Text((*body, STEP, answer, END), tuple(conf))


def read(tokens: Sequence[int]) -> int | None:
    return tokens[-2] if len(tokens) > 1 and tokens[-1] == END else None


QUESTION = Question((7, 8, 9), read, step=(STEP,), max_tokens=64)


@dataclass
class FakePool:
    """Path i of a question says `texts[i]`; other forks continue with what `branch` makes of them.

    `order` shuffles who finishes first, which must not matter.
    """

    texts: Sequence[Text]
    order: int | None = None
    scores: Sequence[float] = ()
    branches: Sequence[Text] = ()
    says: int = 5  # what probes answer
    grown: dict[Node, int] = field(default_factory=dict[Node, int])
    whole: dict[Node, Text] = field(default_factory=dict[Node, Text])
    dead: set[Node] = field(default_factory=set[Node])
    ledgers: dict[int, Ledger] = field(default_factory=dict[int, Ledger])
    closed: list[int] = field(default_factory=list[int])
    routed: list[Node] = field(default_factory=list[Node])
    forked: list[Node] = field(default_factory=list[Node])

    def root(self, prompt: Sequence[int], *, query: int, seed: int) -> Node:
        self.ledgers[query] = Ledger(prefill=len(prompt))
        return Node(query)

    def fork(self, parent: Node, index: int, *, at: int | None = None) -> Node:
        if parent in self.dead:
            raise DeadPathError(f"{parent} is gone")
        node = parent.fork(index, -1 if at is None else at)
        if node not in self.grown:
            start = self.grown.get(parent, 0) if at is None else at
            self.grown[node], self.whole[node] = start, self._text(parent, index, start)
            self.forked.append(node)
        return node

    def _text(self, parent: Node, index: int, at: int) -> Text:
        if not parent.path:
            return self.texts[index % len(self.texts)]
        old = self.whole[parent]
        if not self.branches:
            return old
        new = self.branches[index % len(self.branches)]
        return Text(
            (*old.tokens[:at], *new.tokens[at:]), (*old.confidences[:at], *new.confidences[at:])
        )

    async def extend(self, n: Node, g: Gen, *, prio: int = 0) -> Step:
        if n in self.dead:
            raise DeadPathError(f"{n} is gone")
        if self.order is not None:
            for _ in range(Random(f"{self.order} {n}").randrange(5)):
                await asyncio.sleep(0)
        whole, start = self.whole[n], self.grown[n]
        end = min(start + g.max_tokens, len(whole.tokens))
        self.grown[n] = end
        ledger = self.ledgers[n.query]
        ledger.committed += end - start
        if g.route is not None:
            ledger.effective += (g.route.K - 1) * (end - start)
            self.routed.append(n)
        done = end == len(whole.tokens)
        tokens, conf = whole.tokens[start:end], whole.confidences[start:end]
        zeros = (0.0,) * len(tokens)
        return Step(tokens, "end" if done else "length", zeros, zeros, zeros, conf)

    async def score(self, n: Node, *, scorer: str = "prm", prio: int = 0) -> float:
        return self.scores[n.path[0][0]]

    async def probe(self, n: Node, suffix: Sequence[int], max_tokens: int) -> Step:
        self.ledgers[n.query].committed += 2
        return Step((self.says, END), "end", (0.0, 0.0), (0.0, 0.0), (5.0, 5.0), (9.0, 9.0))

    def promote(self, n: Node) -> None: ...

    def cancel(self, n: Node, *, subtree: bool = True) -> None:
        assert not subtree, "branches of a pruned path live on"

    def release(self, n: Node) -> None:
        self.dead.add(n)

    def close(self, query: int) -> Ledger:
        self.closed.append(query)
        return replace(self.ledgers[query])

    def stats(self, n: Node) -> PathStats:
        whole, end = self.whole[n], self.grown[n]
        # Where a fake is sure it has no entropy; below 5 it has some, as real distributions do.
        conf = whole.confidences[:end]
        entropies = tuple(max(5.0 - c, 0.0) for c in conf)
        zeros = (0.0,) * end
        return PathStats(whole.tokens[:end], zeros, entropies, zeros, conf)

    def events(self, query: int):
        raise NotImplementedError("the runner awaits what it asks for")

    def capacity(self) -> Capacity:
        return Capacity(8, 8, 0, 100)

    def ledger(self, query: int) -> Ledger:
        return replace(self.ledgers[query])
