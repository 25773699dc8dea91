"""What a pool's paths have in common: the states they reach, and the steps between these.

Paths that reach the same state by different ways go on alike, so a step that one of them has made
is known to all. Seen so, a pool is a graph. Its ways from the question to an answer are
derivations, more of them than there are paths, and a place is worth another fork as long as what
follows it is likely to be new.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from jaxserve.protocol import Node, Question
from reasoning.answers import Candidate, LengthConfidence, faults, tally
from reasoning.pool import Path
from reasoning.signals import groups, step_ends

MOST_DERIVATIONS = 256  # of one pool: their number grows with the product of what can be swapped


@dataclass(frozen=True)
class Move:
    """A closed step, or the end of a text.

    Attributes:
        claim: the tokens of the step, less those at its end that only repeat the state.
        end: the state behind it; of a last one, the answer.
        least: the least confidence of its tokens, of which there are `size`.
    """

    claim: tuple[int, ...]
    end: Hashable
    least: float
    size: int
    last: bool = False


@dataclass
class Place:
    """A state, as the pool knows it.

    Attributes:
        node, at: a path that has reached it, surely, and after how many tokens.
        first: number of that path in the pool.
        tries: paths that went on from here.
        ways: how they did: the first tokens of each.
        width: how many next tokens there are, in effect; 0 before anybody went on.
        moves: steps from here that were sure enough, each once.
    """

    node: Node | None
    at: int
    first: int
    steps: int = 0
    tries: int = 0
    ways: dict[tuple[int, ...], int] = field(default_factory=dict[tuple[int, ...], int])
    width: float = 0.0
    moves: dict[tuple[Hashable, bool], Move] = field(
        default_factory=dict[tuple[Hashable, bool], Move]
    )

    @property
    def novelty(self) -> float:
        """How likely one more fork goes on as none did before; an estimate, in [0, 1]."""
        if not self.tries or not self.ways:
            return 0.0
        return max(1 - len(self.ways) / self.width, 0.0) * len(self.ways) / self.tries


@dataclass(frozen=True)
class Derivation:
    """A way from the question to an answer."""

    answer: Hashable
    claims: frozenset[tuple[int, ...]]
    least: float
    length: int


@dataclass
class Map:
    """A pool as a graph.

    Attributes:
        places: by state; () is the question.
        here: the state that each path reached last, and after how many tokens.
    """

    places: dict[Hashable, Place]
    here: dict[Node, tuple[Hashable, int]]

    def derivations(self) -> list[Derivation]:
        """Every way to an answer, those of early paths first."""
        return [d for d, _ in zip(self._from((), []), range(MOST_DERIVATIONS), strict=False)]

    def _from(self, state: Hashable, moves: list[Move]) -> Iterator[Derivation]:
        place = self.places.get(state)
        for move in place.moves.values() if place else ():
            if move in moves:  # a state that leads back to itself
                continue
            done = [*moves, move]
            if move.last:
                claims = frozenset(m.claim for m in done if not m.last)
                least = min(m.least for m in done)
                yield Derivation(move.end, claims, least, sum(m.size for m in done))
            else:
                yield from self._from(move.end, done)


def weigh(
    known: Sequence[Derivation], vote: LengthConfidence, fault: float
) -> dict[Hashable, float]:
    """The weight behind each answer, heaviest first: a vote, less what the answer would cost.

    Args:
        fault: nats for each claim that must be false if the answer is right, counted from the
            answer that needs the fewest; 0: a vote alone.
    """
    weights = vote.weights([d.length for d in known], [d.least for d in known])
    totals = tally(Candidate(d.answer, w) for d, w in zip(known, weights, strict=True))
    if not fault or not totals:
        return totals
    false = faults((d.answer, d.claims) for d in known)
    fewest = min(false.values())
    totals = {a: w * math.exp(-fault * (false[a] - fewest)) for a, w in totals.items()}
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def survey(paths: Sequence[Path], question: Question, floor: float, window: int, alike: int) -> Map:
    """The graph of all sure steps; what a path says behind an unsure one is no part of it.

    Args:
        floor: least confidence of any `window` tokens of a sure step.
        alike: how many tokens tell ways of going on apart.
    """
    known = Map({(): Place(None, 0, -1)}, {})
    for number, path in enumerate(paths):
        _walk(known, number, path, question, floor, window, alike)
    return known


def _walk(
    known: Map, number: int, path: Path, question: Question, floor: float, window: int, alike: int
) -> None:
    tokens, stats = path.stats.tokens, path.stats
    closed = step_ends(tokens, question.step)
    bounds = [0, *closed]
    if not closed or closed[-1] < len(tokens):
        bounds.append(len(tokens))
    state: Hashable = ()
    known.here[path.node] = ((), 0)
    for steps, (start, end) in enumerate(pairwise(bounds)):
        place = known.places[state]
        if start >= path.at and end > start:  # what was inherited is the parent's
            place.tries += 1
            place.width = max(place.width, math.exp(stats.entropies[start]))
            if end - start >= alike or end in closed:
                way = tokens[start : start + alike]
                place.ways.setdefault(way, number)
        least = min(groups(stats.confidences[start:end], window), default=math.inf)
        if least < floor:
            return
        if end not in closed:
            if path.state == "finished" and path.answer is not None:
                move = Move(tokens[start:end], path.answer, least, end - start, last=True)
                place.moves.setdefault((path.answer, True), move)
            return
        reached = _state(question, tokens, end)
        claim = _claim(tokens[start:end], reached)
        state = reached
        place.moves.setdefault((state, False), Move(claim, state, least, end - start))
        known.places.setdefault(state, Place(path.node, end, number, steps + 1))
        known.here[path.node] = (state, end)
    if path.state == "finished" and path.answer is not None:  # it ended with a closed step
        move = Move((), path.answer, math.inf, 0, last=True)
        known.places[state].moves.setdefault((path.answer, True), move)


def _state(question: Question, tokens: tuple[int, ...], end: int) -> tuple[int, ...]:
    """Where a task does not say what its state is, it is all that was said."""
    found = question.state(tokens[:end]) if question.state else None
    return tokens[:end] if found is None else found


def _claim(step: tuple[int, ...], state: tuple[int, ...]) -> tuple[int, ...]:
    if 0 < len(state) < len(step) and step[-len(state) :] == state:
        return step[: -len(state)]
    return step
