"""From the answers of many paths to one: votes, and how sure of it they are."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

from jaxserve.protocol import Node


@dataclass(frozen=True)
class Candidate:
    """A finished path, as a vote sees it."""

    answer: Hashable | None
    weight: float = 1.0
    node: Node | None = None


@dataclass(frozen=True)
class Answer:
    """What a search has come to.

    Attributes:
        answer: None if no path came to one.
        distribution: the weight behind each answer, heaviest first.
        best: the path that stands for it: the heaviest of those that say it, the first of equals.
    """

    answer: Hashable | None
    distribution: Mapping[Hashable, float] = field(default_factory=dict[Hashable, float])
    best: Node | None = None


def tally(candidates: Iterable[Candidate]) -> dict[Hashable, float]:
    """The weight behind each answer, heaviest first; paths that came to none have no vote.

    Equal weights stay in the order in which their answers came.
    """
    totals: dict[Hashable, float] = {}
    for c in candidates:
        if c.answer is not None:
            totals[c.answer] = totals.get(c.answer, 0.0) + c.weight
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def winner(totals: Mapping[Hashable, float]) -> Hashable | None:
    """The heaviest answer, the first of equals; None if nobody has come to one."""
    return max(totals, key=lambda answer: totals[answer], default=None)


def vote(candidates: Iterable[Candidate]) -> Answer:
    """The heaviest answer and the path that stands for it."""
    voters = [c for c in candidates if c.answer is not None]
    totals = tally(voters)
    answer = winner(totals)
    saying = [c for c in voters if c.answer == answer]
    return Answer(answer, totals, max(saying, key=lambda c: c.weight).node if saying else None)


def best_of(candidates: Iterable[Candidate]) -> Answer:
    """The answer of the heaviest path, the first of equals; each answer weighs as its best path."""
    voters = [c for c in candidates if c.answer is not None]
    if not voters:
        return Answer(None)
    totals: dict[Hashable, float] = {}
    for c in voters:
        totals[c.answer] = max(totals.get(c.answer, c.weight), c.weight)
    best = max(voters, key=lambda c: c.weight)
    return Answer(best.answer, dict(sorted(totals.items(), key=lambda item: -item[1])), best.node)


def ranks(values: Sequence[float]) -> list[float]:
    """Where each stands among all, in (0, 1]: 1 is the largest, and equals share their mean rank.

    What is left of a scale that means nothing outside its query.
    """
    ordered, n = sorted(values), len(values)
    return [(bisect_left(ordered, x) + bisect_right(ordered, x) + 1) / (2 * n) for x in values]


@dataclass(frozen=True)
class LengthConfidence:
    """HyPER's vote (specification, section 2.5): ranks of length and of confidence.

    Attributes:
        length_sign: whether longer paths count more (+1), less (-1) or as much (0) as others;
            with 0 confidence decides alone.
    """

    length: float = 0.6
    confidence: float = 0.4
    length_sign: Literal[-1, 0, 1] = 0

    def __post_init__(self):
        if self.length_sign not in (-1, 0, 1) or min(self.length, self.confidence) < 0:
            raise ValueError(f"{self}: length_sign is -1, 0 or 1, and weights are not negative")

    def weights(self, lengths: Sequence[int], confidences: Sequence[float]) -> list[float]:
        """One for each path, in (0, 1]."""
        sure = ranks(confidences)
        if not self.length_sign:
            return sure
        long = ranks([self.length_sign * n for n in lengths])
        whole = self.length + self.confidence
        return [
            (self.length * a + self.confidence * b) / whole for a, b in zip(long, sure, strict=True)
        ]


def supports(derivations: Iterable[tuple[Hashable, Set[Hashable]]]) -> dict[Hashable, int]:
    """For each answer, how many claims must be false for none of its derivations to stand.

    A derivation is an answer and the claims that it rests on. Paths that share a claim share its
    error: an answer that a hundred of them came to by one false claim has a support of one, where
    a vote counts a hundred, while a right answer is reached by ways that have nothing in common.
    (Greedy set cover: exact where it matters, within a logarithm otherwise.)
    """
    known = dict[Hashable, set[frozenset[Hashable]]]()
    for answer, claims in derivations:
        known.setdefault(answer, set()).add(frozenset(claims))
    return {answer: _cover(list(sets)) for answer, sets in known.items()}


def lead(derivations: Iterable[tuple[Hashable, Set[Hashable]]]) -> int:
    """By how many claims the best supported answer is ahead of the next, or of none."""
    ranked = sorted(supports(derivations).values(), reverse=True)
    return ranked[0] - (ranked[1] if len(ranked) > 1 else 0) if ranked else 0


def _cover(sets: list[frozenset[Hashable]]) -> int:
    """Elements that it takes to hit every set; empty sets take one each."""
    open_sets: list[frozenset[Hashable]] = [s for s in sets if s]
    count = len(sets) - len(open_sets)
    while open_sets:
        seen: Counter[Hashable] = Counter(chain.from_iterable(open_sets))
        most = max(seen.values())
        best = min((x for x, n in seen.items() if n == most), key=repr)  # sets have no order
        open_sets = [s for s in open_sets if best not in s]
        count += 1
    return count


def is_decided(totals: Mapping[Hashable, float], missing: int, largest: float = 1.0) -> bool:
    """Whether `missing` votes of at most `largest` each cannot change the winner (section 1.6)."""
    ranked = [*sorted(totals.values(), reverse=True), 0.0, 0.0]
    return bool(totals) and ranked[0] - ranked[1] > missing * largest
