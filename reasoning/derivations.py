"""What a pool's paths have in common: the states they reach, and the steps between these.

Paths that reach the same state by different ways go on alike, so a step that one of them has made
is known to all. Seen so, a pool is a graph. Its ways from the question to an answer are
derivations, more of them than there are paths, and a place is worth another fork as long as what
follows it is likely to be new.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from jaxserve.protocol import Node, PathStats, Question
from reasoning.answers import Candidate, LengthConfidence, faults, tally
from reasoning.pool import Path, PoolView
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

    def worth(self, length: int, deep: float) -> float:
        """Of one more fork, where paths have so many tokens: novelty, by what is left to pay."""
        return self.novelty * max(length - self.at, 1) ** -deep


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
        own: one derivation for each sure path with an answer: the way it took itself.
    """

    places: dict[Hashable, Place]
    here: dict[Node, tuple[Hashable, int]]
    own: list[Derivation] = field(default_factory=list["Derivation"])

    def repeats(self, number: int, path: Path, alike: int, novelty: float) -> bool:
        """Whether earlier paths have been where it is, and went on as it does or is likely to."""
        state, at = self.here[path.node]
        place, began = self.places[state], path.stats.tokens[at:]
        if place.first >= number:
            return False
        if len(began) >= alike:
            return place.ways.get(began[:alike], number) < number
        return at > path.at and place.novelty < novelty

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
                yield _derivation(done)
            else:
                yield from self._from(move.end, done)


def _derivation(moves: Sequence[Move]) -> Derivation:
    claims = frozenset(m.claim for m in moves if not m.last)
    least, length = min(m.least for m in moves), sum(m.size for m in moves)
    return Derivation(moves[-1].end, claims, least, length)


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


def trusting(
    totals: Mapping[Hashable, float], paths: Sequence[Path], power: float
) -> dict[Hashable, float]:
    """Weights times a power of the mean score of the paths that say it, where they have any."""
    trusted = dict(totals)
    for answer in trusted if power else ():
        scores = [p.score for p in paths if p.answer == answer and p.score is not None]
        trusted[answer] *= (sum(scores) / len(scores)) ** power if scores else 1.0
    return dict(sorted(trusted.items(), key=lambda item: -item[1]))


@dataclass(frozen=True)
class Survey:
    """How a pool is read.

    Attributes:
        floor: least confidence of any `window` tokens of a sure step.
        alike: how many tokens tell ways of going on apart.
    """

    floor: float
    window: int
    alike: int

    def of(self, view: PoolView) -> Map:
        """The graph of all sure steps; what a path says behind an unsure one is no part of it."""
        known = Map({(): Place(None, 0, -1)}, {})
        for number, path in enumerate(view.paths):
            self._walk(known, number, path, self._parts(view, path))
        return known

    def _parts(self, view: PoolView, path: Path) -> list[_Part]:
        """The path's steps; those of a path that has not grown are kept from last time."""
        kept: dict[Node, tuple[int, list[_Part]]] = view.memory.setdefault("parts", {})
        size, parts = kept.get(path.node, (-1, []))
        if size != path.stats.n_tokens:
            parts = _split(path.stats, view.question, self.window)
            kept[path.node] = path.stats.n_tokens, parts
        return parts

    def _walk(self, known: Map, number: int, path: Path, parts: Sequence[_Part]) -> None:
        state: tuple[int, ...] = ()
        moves = list[Move]()
        known.here[path.node] = ((), 0)
        answer = path.answer if path.state == "finished" else None
        for part in parts:
            place = known.places[state]
            if part.start >= path.at:  # what was inherited is the parent's
                place.tries += 1
                place.width = max(place.width, part.width)
                if part.state is not None or len(part.tokens) >= self.alike:
                    place.ways.setdefault(part.tokens[: self.alike], number)
            if part.least < self.floor:
                return
            size = len(part.tokens)
            if part.state is None:
                if answer is not None:
                    move = Move(part.tokens, answer, part.least, size, last=True)
                    place.moves.setdefault((answer, True), move)
                    known.own.append(_derivation([*moves, move]))
                return
            move = Move(_claim(part.tokens, part.state), part.state, part.least, size)
            place.moves.setdefault((part.state, False), move)
            moves.append(move)
            state, end = part.state, part.start + size
            known.places.setdefault(state, Place(path.node, end, number))
            known.here[path.node] = (state, end)
        if answer is not None:  # its text ended with a closed step
            end = Move((), answer, math.inf, 0, last=True)
            known.places[state].moves.setdefault((answer, True), end)
            known.own.append(_derivation([*moves, end]))


@dataclass(frozen=True)
class _Part:
    """A step of a path: closed, with the state behind it, or still open."""

    start: int
    tokens: tuple[int, ...]
    least: float
    width: float  # of its first token's distribution: how many there are, in effect
    state: tuple[int, ...] | None


def _split(stats: PathStats, question: Question, window: int) -> list[_Part]:
    tokens = stats.tokens
    closed = step_ends(tokens, question.step)
    bounds = [0, *closed]
    if bounds[-1] < len(tokens):
        bounds.append(len(tokens))
    return [
        _Part(
            start,
            tokens[start:end],
            min(groups(stats.confidences[start:end], window), default=math.inf),
            math.exp(stats.entropies[start]) if stats.entropies else 1.0,
            _state(question, tokens, end) if n < len(closed) else None,
        )
        for n, (start, end) in enumerate(pairwise(bounds))
    ]


def _state(question: Question, tokens: tuple[int, ...], end: int) -> tuple[int, ...]:
    """Where a task does not say what its state is, it is all that was said."""
    found = question.state(tokens[:end]) if question.state else None
    return tokens[:end] if found is None else found


def _claim(step: tuple[int, ...], state: tuple[int, ...]) -> tuple[int, ...]:
    if 0 < len(state) < len(step) and step[-len(state) :] == state:
        return step[: -len(state)]
    return step
