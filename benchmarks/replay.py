"""A `PathPool` without an engine: texts are recorded ones, or what a perfect student would say.

Tunes controllers thousands of times faster than the engine could. `Recorded` replays a bank that
`benchmarks.path_bank` has written; `Ideal` answers ModChain as its teacher does, gaps included, so
that shares of gaps can be tried that no model was trained on.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any, Protocol

import numpy as np

from benchmarks.path_bank import TOP, Bank
from jaxserve.protocol import (
    Capacity,
    Event,
    Gen,
    Ledger,
    Node,
    PathStats,
    Prio,
    Question,
    Step,
)
from reasoning.tasks import STEP, ModChain, Problem

State = Callable[[Sequence[int]], "tuple[int, ...] | None"]
WORDS = ModChain().words
SURE, LOST = (
    10.5,
    3.0,
)  # confidences of modchain-moe where it knows a product, and where it does not


@dataclass(frozen=True)
class Text:
    """All that a path will say, token by token."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    entropies: tuple[float, ...]
    margins: tuple[float, ...]
    confidences: tuple[float, ...]

    def cut(self, start: int, end: int | None = None) -> tuple[tuple[Any, ...], ...]:
        return tuple(x[start:end] for x in vars(self).values())

    def behind(self, prefix: Text, at: int, own: int) -> Text:
        """The first `at` tokens of another, and what follows the first `own` of this."""
        pairs = zip(prefix.cut(0, at), self.cut(own), strict=True)
        return Text(*(a + b for a, b in pairs))


class Source(Protocol):
    """Where a replayed path's text comes from."""

    def whole(self, index: int) -> Text:
        """Path `index` of the question."""
        ...

    def branch(self, parent: Text, at: int, node: Node) -> Text:
        """A text that begins with `at` tokens of the parent's."""
        ...


class Replay:
    """A `PathPool` of one question whose texts are known beforehand."""

    def __init__(self, source: Source):
        self.source = source
        self.texts: dict[Node, Text] = {}
        self.grown: dict[Node, int] = {}
        self.spent = Ledger()

    def root(self, prompt: Sequence[int], *, query: int, seed: int) -> Node:
        return Node(query)

    def fork(self, parent: Node, index: int, *, at: int | None = None) -> Node:
        node = parent.fork(index, -1 if at is None else at)
        if node not in self.texts:
            start = 0
            if not parent.path:
                self.texts[node] = self.source.whole(index)
            else:
                start = self.grown[parent] if at is None else at
                self.texts[node] = self.source.branch(self.texts[parent], start, node)
            self.grown[node] = start
        return node

    async def extend(self, n: Node, g: Gen, *, prio: Prio = Prio.COMMIT) -> Step:
        text, start = self.texts[n], self.grown[n]
        end = self.grown[n] = min(start + g.max_tokens, len(text.tokens))
        self.spent.committed += end - start
        self.spent.calls += 1
        tokens, *signals = text.cut(start, end)
        return Step(tokens, "end" if end == len(text.tokens) else "length", *signals)

    async def score(self, n: Node, *, scorer: str = "prm", prio: Prio = Prio.COMMIT) -> float:
        raise NotImplementedError("nobody recorded what scorers say")

    async def probe(self, n: Node, suffix: Sequence[int], max_tokens: int) -> Step:
        raise NotImplementedError("nobody recorded what probes say")

    def promote(self, n: Node) -> None: ...

    def cancel(self, n: Node, *, subtree: bool = True) -> None: ...

    def release(self, n: Node) -> None: ...

    def close(self, query: int) -> Ledger:
        return self.spent

    def stats(self, n: Node) -> PathStats:
        return PathStats(*self.texts[n].cut(0, self.grown[n]))

    def events(self, query: int) -> AsyncIterator[Event]:
        raise NotImplementedError("a replay has no clock")

    def capacity(self) -> Capacity:
        return Capacity(64, 64, 0, 1 << 20)

    def ledger(self, query: int) -> Ledger:
        return self.spent


class Recorded:
    """Question q of a bank. Another seed has the same paths in another order.

    A branch goes on as a path does that was drawn, with replacement, among all those recorded that
    were once in the same state; where its beginning is no closed step, among those that share it.
    """

    def __init__(self, bank: Bank, q: int, seed: int, state: State):
        self.bank, self.q, self.seed, self.state = bank, q, seed, state
        self.order = np.random.default_rng((seed, q)).permutation(bank.tokens.shape[1])

    def whole(self, index: int) -> Text:
        if index >= len(self.order):
            raise IndexError(f"the bank holds {len(self.order)} paths of a question")
        return recorded(self.bank, self.q, int(self.order[index]))

    def branch(self, parent: Text, at: int, node: Node) -> Text:
        here = self.state(parent.tokens[:at]) if at else ()
        known = places(self.bank, self.q, self.state).get(here, []) if here is not None else []
        if not known:
            known = [(n, at) for n in range(len(self.order)) if self._shares(n, parent, at)]
        n, own = Random(f"{self.seed} {self.q} {node.path}").choice(known)
        return recorded(self.bank, self.q, n).behind(parent, at, own)

    def _shares(self, n: int, parent: Text, at: int) -> bool:
        return recorded(self.bank, self.q, n).tokens[:at] == parent.tokens[:at]


@cache
def recorded(bank: Bank, q: int, n: int) -> Text:
    """One path of a bank, without its padding."""
    length = int((bank.tokens[q, n] >= 0).sum())
    kinds = (bank.tokens, bank.logprobs, bank.entropies, bank.margins, bank.confidences)
    return Text(*(tuple(kind[q, n, :length].tolist()) for kind in kinds))


@cache
def places(bank: Bank, q: int, state: State) -> dict[tuple[int, ...], list[tuple[int, int]]]:
    """Where each state of a question is first reached: paths, and after how many tokens."""
    found: dict[tuple[int, ...], list[tuple[int, int]]] = {(): []}
    for n in range(bank.tokens.shape[1]):
        tokens = recorded(bank, q, n).tokens
        found[()].append((n, 0))
        for i in range(1, len(tokens) + 1):
            if (here := state(tokens[:i])) is not None:
                found.setdefault(here, []).append((n, i))
    return found


@dataclass(frozen=True)
class Ideal:
    """What a perfect student of a ModChain would say: any number of paths, for any shares of gaps.

    Its confidences are the medians of modchain-moe, at results it cannot know and at those it is
    sure of; where the next pair is free, alternatives are equally likely.
    """

    task: ModChain
    problem: Problem
    seed: int

    def whole(self, index: int) -> Text:
        return self._text(self.problem, Random(f"{self.seed} {self.problem.key} {index}"))

    def branch(self, parent: Text, at: int, node: Node) -> Text:
        words = [WORDS[t] for t in parent.tokens[:at]]
        if at and words[-1] != STEP:
            raise ValueError("a perfect student begins at the end of a step")
        left = words[:-1] if at else []
        numbers = (
            left[len(left) - left[::-1].index(";") :] if at else self.problem.prompt.split()[:-1]
        )
        rest = Problem("", "", tuple(map(int, numbers)))
        new = self._text(rest, Random(f"{self.seed} {self.problem.key} {node.path}"))
        return new.behind(parent, at, 0)

    def _text(self, problem: Problem, rng: Random) -> Text:
        words = self.task.solve(problem, rng).split()
        rows = [(WORDS.index(word), 0.0, 0.0, 10.0, SURE) for word in words]
        left = len(problem.facts)
        for i, word in enumerate(words):
            if i == 0 or words[i - 1] == STEP:
                ways = left - 1
                conf = (ways * math.log(ways) + (TOP - ways) * SURE) / TOP
                rows[i] = (rows[i][0], -math.log(ways), math.log(ways), 0.0, conf)
                left -= 1
            elif word == "=" and _is_gap(self.task, int(words[i - 2]), int(words[i - 1])):
                wide = math.log(self.task.modulus - 1)
                rows[i + 1] = (rows[i + 1][0], -wide, wide, 0.0, LOST)
        end = (len(WORDS), 0.0, 0.0, 10.0, SURE)
        return Text(*zip(*[*rows, end], strict=True))


def _is_gap(task: ModChain, a: int, b: int) -> bool:
    return task._taught.get((min(a, b), max(a, b)), 0) is None


@dataclass(frozen=True, eq=False)
class Language:
    """How tokens read: the words by id, and what a chain's tokens come to."""

    words: tuple[str, ...]

    @classmethod
    def of(cls, bank: Bank | None) -> Language:
        """Of a bank's model; of a perfect student, where there is none."""
        return cls(WORDS if bank is None else tuple(bank.words.tolist()))

    def text(self, tokens: Sequence[int]) -> str:
        words = (self.words[t] for t in tokens if t < len(self.words))
        return " ".join(word for word in words if word)

    def read(self, tokens: Sequence[int]) -> str | None:
        """The number of the last closed step, if it left one alone."""
        steps = self.text(tokens).split(f" {STEP}")
        last = steps[-2].split(";")[-1].split() if len(steps) > 1 else []
        return last[0] if len(last) == 1 else None

    def state(self, tokens: Sequence[int]) -> tuple[int, ...] | None:
        """What the last step left, if it has just been closed."""
        bar, semicolon = self.words.index(STEP), self.words.index(";")
        if not tokens or tokens[-1] != bar:
            return None
        for i in range(len(tokens) - 1, -1, -1):
            if tokens[i] == semicolon:
                return tuple(tokens[i + 1 :])
        return None

    def question(self, prompt: str, seed: int) -> Question:
        return Question(
            tuple(self.words.index(word) for word in prompt.split()),
            self.read,
            step=(self.words.index(STEP),),
            max_tokens=128,
            seed=seed,
            text=self.text,
            state=self.state,
        )
