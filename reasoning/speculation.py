"""What a search will probably ask for next, and which of it is worth a row now (SPEX; section 1).

Nothing is learned to predict a policy: its own rule is replayed on a copy of its tree, with guesses
for what is not known yet. What is learned, from hits and misses, is how far to trust that.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Literal, Protocol

from jaxserve.protocol import Capacity, Node, Step
from reasoning.tree import Expand, Grown, SearchPolicy, Tree

Mode = Literal["lossless", "paper", "opportunistic"]

_SPREAD = [NormalDist().inv_cdf((i + 0.5) / 16) for i in (7, 1, 12, 4, 15, 9, 2, 10, 5, 14, 0, 8)]
"""Quantiles of the normal distribution in a mixed order: errors that guesses are tried with."""


@dataclass(frozen=True)
class Speculator:
    """How a search runs ahead of itself.

    Attributes:
        mode: "lossless": the same tree, answer and committed tokens as without; "paper": and
            `stop="paper"` is allowed; "opportunistic": finished steps that nobody asked for vote.
        width: most speculative rows of the search at a time; 0: none (T1 off).
        lookahead: most steps in a row that nobody has asked for.
        slack: above 1, rewards still to come are taken for lower, by (slack - 1) times ten of
            their usual errors, so that nodes which are done get more children.
        floor: least probability of use that a row is given for, even if it costs nothing.
        draws: sets of guesses that the policy is asked about.
        distant: worth of a step that is not the next one, relative to one that is.
        patience: guesses without a new step, after which a set of them is given up.
        stop: end once no vote can change the answer ("safe"), or once that is unlikely ("paper";
            section 1.6). T3.
    """

    mode: Mode = "lossless"
    width: int = 32
    lookahead: int = 3
    slack: float = 1.0
    floor: float = 0.25
    draws: int = 4
    distant: float = 0.25
    patience: int = 32
    stop: Literal["never", "safe", "paper"] = "never"

    def __post_init__(self):
        if self.stop == "paper" and self.mode == "lossless":
            raise ValueError('stop="paper" can change an answer: ask for mode="paper"')
        if self.width < 0 or self.lookahead < 1 or not 1 <= self.draws <= len(_SPREAD):
            raise ValueError(
                f"{self}: width is 0 or more, lookahead 1 or more, draws 1 to {len(_SPREAD)}"
            )


@dataclass(frozen=True)
class Guess:
    """A step that a search may ask for.

    Attributes:
        probability: share of the replays that asked for it.
        distance: decisions of the policy between now and then.
        rank: its place in that decision.
    """

    expand: Expand
    probability: float
    distance: int
    rank: int

    @property
    def bucket(self) -> tuple[int, int, int]:
        """Guesses whose fates say something about each other."""
        sure = round(4 * self.probability)
        return min(self.distance, 8).bit_length(), min(self.expand.index, 2), sure


def shadow_predict(
    policy: SearchPolicy, tree: Tree, flying: Mapping[Node, object], spec: Speculator, count: int
) -> list[Guess]:
    """What the policy would ask for if guesses came true, likeliest first.

    Args:
        tree: with `ahead`: results that wait for their turn, speculative ones among them.
        flying: what is being made, speculative or not.
        count: about how many are wanted.
    """
    asked, first = dict[Node, int](), dict[Node, Guess]()
    for draw in range(spec.draws):
        for guess in itertools.islice(_replay(policy, tree, flying, spec, draw), 2 * count):
            child = guess.expand.child
            asked[child] = asked.get(child, 0) + 1
            first.setdefault(child, guess)
    found = [
        Guess(g.expand, asked[child] / spec.draws, g.distance, g.rank) for child, g in first.items()
    ]
    return sorted(found, key=lambda g: (-g.probability, g.distance, g.rank))


def _replay(
    policy: SearchPolicy, tree: Tree, flying: Mapping[Node, object], spec: Speculator, draw: int
) -> Iterator[Guess]:
    """The policy on a copy of its tree, where whatever is pending ends as it is guessed to."""
    shadow, seen, idle, distance = tree.clone(), _Habits.of(tree), 0, 0
    while shadow.pending and idle <= spec.patience:
        node, expand = next(iter(shadow.pending.items()))
        grown = shadow.ahead.get(node)
        if grown is None or grown.score is None:
            grown = seen.guess(shadow, expand, spec, draw, grown)
            idle += 1
        shadow.commit(grown)
        policy.observe(shadow, grown)
        if policy.done(shadow):
            return
        wanted = [expand for expand in policy.ready(shadow) if shadow.ask(expand)]
        distance += bool(wanted)
        for rank, new in enumerate(wanted):
            if new.child in tree.ahead or new.child in flying or not _can_begin(tree, new, spec):
                continue
            idle = 0
            yield Guess(new, 1.0, distance, rank)


def _can_begin(tree: Tree, expand: Expand, spec: Speculator) -> bool:
    """Whether the text that it continues is there, and not too far from what is asked for."""
    parent, steps = tree.look(expand.parent), 1
    if parent is None or parent.finished:
        return False
    while parent is not None and parent.node not in tree.grown:
        steps += parent.node not in tree.pending
        parent = tree.look(parent.parent) if parent.parent else None
    return steps <= spec.lookahead


@dataclass
class _Habits:
    """How scores of a tree have been so far."""

    mean: float
    error: float  # of a parent's score as a guess at its child's

    @classmethod
    def of(cls, tree: Tree) -> _Habits:
        known = [*tree.grown.values(), *tree.ahead.values()]
        scores = [grown.score for grown in known if grown.score is not None]
        mean = sum(scores) / len(scores) if scores else 0.5
        squares = 0.1**2 * 4  # a little is known before anything is
        for grown in known:
            above = tree.look(grown.parent) if grown.parent else None
            if grown.score is not None and above and above.score is not None:
                squares += (grown.score - above.score) ** 2
        return cls(mean, (squares / (len(scores) + 4)) ** 0.5)

    def guess(
        self, tree: Tree, expand: Expand, spec: Speculator, draw: int, ended: Grown | None
    ) -> Grown:
        """A step that is not there, or is and waits for its score: as good as its parent's."""
        above = tree.look(expand.parent)
        score = self.mean if above is None or above.score is None else above.score
        child = expand.child
        luck = _SPREAD[(hash(child.path) + draw) % len(_SPREAD)] if draw else 0.0
        score += self.error * (luck - 10 * (spec.slack - 1))
        score = min(max(score, 0.0), 1.0)
        if ended is not None:
            return Grown(
                child, expand.parent, ended.step, score, ended.answer, ended.finished, ended.total
            )
        # A token that no text has, so that paths which are not there do not look alike.
        return Grown(child, expand.parent, Step((-1 - expand.index,), "stop"), score)


class Seeker(Protocol):
    """A search, as the coordinator knows it."""

    policy: SearchPolicy

    def flying(self) -> int:
        """Its speculative rows."""
        ...

    def begin(self, guess: Guess) -> None: ...


@dataclass
class _Trust:
    """Hits and misses of guesses of one kind, the old ones half forgotten."""

    hits: float = 0.0
    misses: float = 0.0

    def learn(self, hit: bool, keep: float) -> None:
        self.hits, self.misses = self.hits * keep + hit, self.misses * keep + (not hit)


@dataclass
class Coordinator:
    """Deals rows out to the guesses of all searches of a pool, the likeliest gains first (T2).

    Give the same one to searches that share a pool; what it has learned can go on to later ones.

    Attributes:
        prior: hits and misses that a replay's own probability is worth.
        keep: what is left of a hit or a miss when the next one is learned.
    """

    prior: float = 4.0
    keep: float = 0.98
    trust: dict[tuple[str, tuple[int, int, int]], _Trust] = field(
        default_factory=dict[tuple[str, tuple[int, int, int]], _Trust]
    )
    _offers: dict[Seeker, list[tuple[float, Guess]]] = field(
        default_factory=dict[Seeker, list[tuple[float, Guess]]]
    )

    def probability(self, policy: SearchPolicy, guess: Guess) -> float:
        """Mean of a Beta posterior that starts where the replays put it."""
        seen = self.trust.get((policy.name, guess.bucket), _Trust())
        weight = self.prior + seen.hits + seen.misses
        return (self.prior * guess.probability + seen.hits) / weight

    def learn(self, policy: SearchPolicy, guess: Guess, hit: bool) -> None:
        key = policy.name, guess.bucket
        self.trust.setdefault(key, _Trust()).learn(hit, self.keep)

    def offer(self, seeker: Seeker, guesses: Sequence[Guess], spec: Speculator) -> None:
        """Replaces what this search had to offer.

        A step's gain is its tokens times the probability of their use, and its cost is those tokens
        too, so that a row's worth is the probability; steps further away save less.
        """
        found = list[tuple[float, Guess]]()
        for guess in guesses:
            p = self.probability(seeker.policy, guess)
            if p >= spec.floor:
                found.append((p * (1.0 if guess.distance <= 1 else spec.distant), guess))
        self._offers[seeker] = sorted(found, key=lambda offer: offer[0])  # the best one last

    def leave(self, seeker: Seeker) -> None:
        self._offers.pop(seeker, None)

    def deal(self, capacity: Capacity) -> None:
        """Begins the best offers while they are worth their price."""
        begun = 0
        while offers := self._open():
            seeker = max(offers, key=lambda s: self._offers[s][-1][0])
            worth, guess = self._offers[seeker][-1]
            if worth <= price(capacity, begun):
                return
            self._offers[seeker].pop()
            seeker.begin(guess)
            begun += 1

    def _open(self) -> list[Seeker]:
        """Whose turn it may be: nobody gets a third row while somebody waits for a first."""
        offering = [seeker for seeker, offers in self._offers.items() if offers]
        without = any(seeker.flying() == 0 for seeker in offering)
        return [s for s in offering if not without or s.flying() < 2]


def price(capacity: Capacity, begun: int) -> float:
    """What a row must be worth: nothing while it would be padding, everything at the ridge."""
    if begun < capacity.free_rows:
        return 0.0
    live = capacity.live_rows + begun
    return live / capacity.ridge if live < capacity.ridge else float("inf")
