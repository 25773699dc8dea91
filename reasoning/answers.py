"""From the answers of many paths to one: votes, and how sure of it they are."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """A finished path, as a vote sees it."""

    answer: Hashable | None
    weight: float = 1.0


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


def is_decided(totals: Mapping[Hashable, float], missing: int, largest: float = 1.0) -> bool:
    """Whether `missing` votes of at most `largest` each cannot change the winner (section 1.6)."""
    ranked = [*sorted(totals.values(), reverse=True), 0.0, 0.0]
    return bool(totals) and ranked[0] - ranked[1] > missing * largest
