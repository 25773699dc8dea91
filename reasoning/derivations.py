"""What a pool's paths have in common: the states they reach, and the steps between these.

Paths that reach the same state by different ways go on alike, so a step that one of them has made
is known to all. Seen so, a pool is a graph. Its ways from the question to an answer are
derivations, more of them than there are paths, and a place is worth another fork as long as what
follows it is likely to be new.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxserve.protocol import Node, Question
from reasoning.answers import Candidate, LengthConfidence, lead, supports, tally
from reasoning.pool import Path, PoolView
from reasoning.signals import groups

MOST_DERIVATIONS = 256  # of one pool: their number grows with the product of what can be swapped


class Move(NamedTuple):
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


@dataclass(slots=True)
class Place:
    """A state, as the pool knows it.

    Attributes:
        first, at: the path that reached it first, surely, and after how many tokens; None for the
            question itself.
        tries: paths that went on from here.
        ways: how they did: the first tokens of each, and the first path to do so.
        width: how many next tokens there are, in effect; 0 before anybody went on.
        moves: steps from here that were sure enough, each once.
    """

    first: Path | None
    at: int
    tries: int = 0
    ways: dict[tuple[int, ...], Path] = field(default_factory=dict[tuple[int, ...], Path])
    width: float = 0.0
    moves: dict[tuple[Hashable, bool], Move] = field(
        default_factory=dict[tuple[Hashable, bool], Move]
    )

    @property
    def novelty(self) -> float:
        """How likely one more fork goes on as none did before; an estimate, in [0, 1]."""
        ways = len(self.ways)
        if not ways or not self.tries or ways >= self.width:
            return 0.0
        return (1 - ways / self.width) * ways / self.tries

    def worth(self, length: int, deep: float) -> float:
        """Of one more fork, where paths have so many tokens: novelty, by what is left to pay."""
        fresh = self.novelty
        return fresh * max(length - self.at, 1) ** -deep if fresh else 0.0


@dataclass(frozen=True)
class Derivation:
    """A way from the question to an answer."""

    answer: Hashable
    claims: frozenset[tuple[int, ...]]
    least: float
    length: int


@dataclass(slots=True)
class Walk:
    """How far a path has been followed through the graph.

    Attributes:
        place, start: that it reached last, and after how many tokens.
        seen: tokens looked at.
        least: the least confidence of the step that is open.
        moves: the steps so far.
        lost: it said something unsure or against the odds; what follows is no part of the graph.
        over: nothing more is to come.
    """

    place: Place
    start: int = 0
    seen: int = 0
    least: float = math.inf
    moves: list[Move] = field(default_factory=list[Move])
    lost: bool = False
    over: bool = False


@dataclass
class Map:
    """A pool as a graph.

    Attributes:
        places: by state; () is the question.
        walks: of each path.
        nodes: the same, by the node that a path began as.
        open: walks of which more may come.
        length: tokens of the longest path.
        own: one derivation for each sure path with an answer: the way it took itself.
    """

    places: dict[Hashable, Place] = field(default_factory=lambda: {(): Place(None, 0)})
    walks: dict[Path, Walk] = field(default_factory=dict[Path, Walk])
    nodes: dict[Node, Walk] = field(default_factory=dict[Node, Walk])
    open: list[tuple[Path, Walk]] = field(default_factory=list[tuple[Path, "Walk"]])
    length: int = 0
    own: list[Derivation] = field(default_factory=list["Derivation"])
    _ways: list[Derivation] | None = None
    _lead: int | None = None

    @property
    def lead(self) -> int:
        """By how many claims the best supported answer is ahead."""
        if self._lead is None:
            self._lead = lead((d.answer, d.claims) for d in self.derivations())
        return self._lead

    def worthwhile(self, most: int, left: int, novelty: float, deep: float) -> list[Place]:
        """Where forks are best begun, at most so many and within so many tokens; places may recur.

        Args:
            novelty: the least that is worth it.
            deep: as `Place.worth` takes it.
        """
        found = list[Place]()
        places = list(self.places.values()) if most > 0 else []
        heap = [(-place.worth(self.length, deep), i) for i, place in enumerate(places)]
        heapq.heapify(heap)
        while len(found) < most:
            place = places[i := heap[0][1]]
            left -= self.length - place.at
            if place.novelty < novelty or left < 0:
                break
            place.tries += 1  # so that the next fork looks elsewhere
            heapq.heapreplace(heap, (-place.worth(self.length, deep), i))
            found.append(place)
        for place in found:
            place.tries -= 1  # a path counts itself once it has gone on
        return found

    def repeats(self, path: Path, alike: int, novelty: float) -> bool:
        """Whether others have been where it is first, and went on as it does or is likely to."""
        walk = self.walks[path]
        place, began = walk.place, path.stats.tokens[walk.start :]
        if place.first is path:
            return False
        if len(began) >= alike:
            return place.ways.get(began[:alike], path) is not path
        return walk.start > path.at and place.novelty < novelty

    def derivations(self) -> list[Derivation]:
        """Every way to an answer, in the order in which steps became known."""
        if self._ways is None:
            ways = zip(self._from((), []), range(MOST_DERIVATIONS), strict=False)
            self._ways = [d for d, _ in ways]
        return self._ways

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

    def behind(self, path: Path) -> Walk:
        """A walk that begins where a path was forked, if that is behind a step of its parent's."""
        parent, at = self.nodes.get(path.parent) if path.parent else None, 0
        for n, move in enumerate(parent.moves if parent else (), 1):
            at += move.size
            if parent and at == path.at and not move.last:
                return Walk(self.places[move.end], at, at, moves=parent.moves[:n])
        return Walk(self.places[()])

    def move(self, walk: Walk, move: Move) -> None:
        """A walk goes on by a step."""
        known = walk.place.moves
        if (move.end, move.last) not in known:
            known[move.end, move.last] = move
            self._ways = self._lead = None
        walk.moves.append(move)
        if move.last:
            self.own.append(_derivation(walk.moves))


def _derivation(moves: Sequence[Move]) -> Derivation:
    claims = frozenset(m.claim for m in moves if not m.last)
    least, length = min(m.least for m in moves), sum(m.size for m in moves)
    return Derivation(moves[-1].end, claims, least, length)


def weigh(
    known: Sequence[Derivation], vote: LengthConfidence, support: float
) -> dict[Hashable, float]:
    """The weight behind each answer, heaviest first: a vote, and how well the answer is supported.

    Args:
        support: nats for each claim that must be false for no derivation of the answer to stand,
            counted from the best supported one; 0: a vote alone.
    """
    weights = vote.weights([d.length for d in known], [d.least for d in known])
    totals = tally(Candidate(d.answer, w) for d, w in zip(known, weights, strict=True))
    if not support or not totals:
        return totals
    found = supports((d.answer, d.claims) for d in known)
    most = max(found.values())
    totals = {a: w * math.exp(support * (found[a] - most)) for a, w in totals.items()}
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
        slip: nats by which a token may be less likely than tokens of its distribution are on
            average. One beyond was drawn against the odds: the model does not hold it to be true.
    """

    floor: float
    window: int = 1
    alike: int = 2
    slip: float = math.inf

    def of(self, view: PoolView) -> Map:
        """The graph of all sure steps, with what has been said since last time."""
        known: Map = view.memory.setdefault(f"map {self.floor}", Map())
        for path in view.paths[len(known.walks) :]:
            walk = known.walks[path] = known.nodes[path.node] = known.behind(path)
            known.length = max(known.length, walk.start)
            known.open.append((path, walk))
        for path, walk in known.open:
            self._follow(known, path, walk, view.question)
        known.open = [(path, walk) for path, walk in known.open if not walk.over]
        return known

    def _follow(self, known: Map, path: Path, walk: Walk, question: Question) -> None:
        tokens, closers = path.stats.tokens, question.step
        if (n := len(tokens)) > known.length:
            known.length = n
        while walk.seen < n and not walk.over:
            closed = self._go_on(path, walk, closers)
            if closed and not walk.lost:
                end = walk.seen
                state = _state(question, tokens, end)
                step = tokens[walk.start : end]
                known.move(walk, Move(_claim(step, state), state, walk.least, len(step)))
                if (place := known.places.get(state)) is None:
                    place = known.places[state] = Place(path, end)
                walk.place, walk.start, walk.least = place, end, math.inf
        if path.state == "finished" and not walk.over:
            rest = tokens[walk.start :]
            if path.answer is not None:
                known.move(walk, Move(rest, path.answer, walk.least, len(rest), last=True))
        walk.over |= path.state != "live"

    def _go_on(self, path: Path, walk: Walk, closers: Sequence[int]) -> bool:
        """Looks at the open step's tokens, to its end or as far as there are any; whether it is
        closed."""
        stats, start, seen = path.stats, walk.start, walk.seen
        tokens, logprobs, entropies = stats.tokens, stats.logprobs, stats.entropies
        told, single = bool(entropies), self.window == 1  # some pools report tokens alone
        i, closed, slipped, least = seen, False, False, walk.least
        for i in range(seen, len(tokens)):
            if told:
                if logprobs[i] + entropies[i] < -self.slip:
                    slipped = True
                if single and stats.confidences[i] < least:
                    least = stats.confidences[i]
            if tokens[i] in closers:
                closed = True
                break
        walk.seen = end = i + 1
        fresh = start >= path.at  # what was inherited is the parent's
        if fresh and seen - start < self.alike:
            self._count(walk.place, path, start, seen, end, closed)
        if not single:
            least = self._least_group(stats.confidences, least, start, seen, end)
        walk.least = least
        if slipped and fresh:  # it does not show where the model would go
            walk.place.tries -= 1
            ways = walk.place.ways.items()
            walk.place.ways = {way: first for way, first in ways if first is not path}
        walk.over = walk.lost = slipped or least < self.floor
        return closed

    def _count(
        self, place: Place, path: Path, start: int, seen: int, end: int, closed: bool
    ) -> None:
        """Enters how a path goes on from a place, as far as that is said."""
        stats = path.stats
        if seen == start:
            place.tries += 1
            width = math.exp(stats.entropies[start]) if stats.entropies else 1.0
            place.width = max(place.width, width)
        if closed or end - start >= self.alike:
            place.ways.setdefault(stats.tokens[start : min(start + self.alike, end)], path)

    def _least_group(
        self, confidences: Sequence[float], least: float, start: int, seen: int, end: int
    ) -> float:
        """The least confidence of the open step, with its tokens from `seen` up to `end`."""
        whole = seen - start >= self.window  # windows up to here count as they are
        since = max(seen - self.window + 1, start) if whole else start
        found = min(groups(confidences[since:end], self.window), default=math.inf)
        return min(least, found) if whole else found


def _state(question: Question, tokens: tuple[int, ...], end: int) -> tuple[int, ...]:
    """Where a task does not say what its state is, it is all that was said."""
    found = question.state(tokens[:end]) if question.state else None
    return tokens[:end] if found is None else found


def _claim(step: tuple[int, ...], state: tuple[int, ...]) -> tuple[int, ...]:
    if 0 < len(state) < len(step) and step[-len(state) :] == state:
        return step[: -len(state)]
    return step
