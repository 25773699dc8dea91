"""What a search will probably ask for next, and which of it is worth a row now (SPEX; section 1).

Nothing is learned to predict a policy: its own rule is replayed on a copy of its tree, with guesses
for what is not known yet. What is learned, from hits and misses, is how far to trust that.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal, Protocol

from jaxserve.protocol import Capacity, Node, Step
from reasoning.tree import Expand, Grown, SearchPolicy, Tree

_SOME = 0.5  # rows

Bucket = tuple[int, int, bool]
Mode = Literal["lossless", "paper", "opportunistic"]


@dataclass(frozen=True)
class Speculator:
    """How a search runs ahead of itself.

    Attributes:
        mode: "lossless": the same tree, answer and committed tokens as without; "paper": and
            `stop="paper"` is allowed; "opportunistic": finished steps that nobody asked for vote.
        width: most speculative rows of the search at a time; 0: none (T1 off).
        lookahead: most steps in a row that nobody has asked for.
        slack: above 1, rewards still to come are taken to be so much lower than they seem, less 1,
            and steps that have ended get more children.
        floor: least probability of use that a row is given for, even if it costs nothing.
        distant: worth of a step that is not the next one, relative to one that is.
        patience: guesses in a row that came to no new step, after which there will be none.
        unscored: also builds on steps whose score is still to come. Not worth it, and twice the
            work, where a score comes at once.
        stop: end once no vote can change the answer ("safe"), or once that is unlikely ("paper";
            section 1.6). T3.
    """

    mode: Mode = "lossless"
    width: int = 32
    lookahead: int = 4
    slack: float = 1.03
    floor: float = 0.25
    distant: float = 0.9
    patience: int = 32
    unscored: bool = False
    stop: Literal["never", "safe", "paper"] = "never"

    def __post_init__(self):
        if self.stop == "paper" and self.mode == "lossless":
            raise ValueError('stop="paper" can change an answer: ask for mode="paper"')
        if self.width < 0 or self.lookahead < 1 or self.slack < 1:
            raise ValueError(f"{self}: width is 0 or more, lookahead and slack are 1 or more")


@dataclass(frozen=True)
class Guess:
    """A step that a search may ask for.

    Attributes:
        distance: decisions of the policy between now and then.
        rank: its place in that decision.
        scored: the step that it continues has its score.
    """

    expand: Expand
    distance: int
    rank: int
    scored: bool = True

    @property
    def bucket(self) -> Bucket:
        """Guesses whose fates say something about each other."""
        return min(self.distance, 15).bit_length(), min(self.expand.index, 3), self.scored


def shadow_predict(
    policy: SearchPolicy, tree: Tree, flying: Container[Node], spec: Speculator
) -> Iterator[Guess]:
    """What the policy would ask for, soonest first, if all that is pending ended as guessed.

    It replays its own rule on a copy of its tree.

    Args:
        tree: with `ahead`: results that wait for their turn, speculative ones among them.
        flying: what was begun, speculative or not.
    """
    shadow, idle, distance = tree.clone(), 0, 0
    pending, ahead, lower = shadow.pending, shadow.ahead, spec.slack - 1
    while pending and idle <= spec.patience:
        node = next(iter(pending))
        grown = ahead.get(node)
        if grown is None or grown.score is None:
            grown = _guessed(shadow, pending[node], grown, lower)
            idle += 1
        shadow.commit(grown)
        policy.observe(shadow, grown)
        wanted = policy.ready(shadow)
        if not wanted:
            continue
        wanted = [expand for expand in wanted if shadow.ask(expand)]
        distance += bool(wanted)
        for rank, new in enumerate(wanted):
            if new.child not in flying and _can_begin(tree, new, spec.lookahead):
                idle = 0
                parent = tree.look(new.parent)
                scored = parent is not None and parent.score is not None
                yield Guess(new, distance, rank, scored)


@cache
def _nothing(index: int) -> Step:
    """A token that no text has, so that steps which are not there do not look alike."""
    return Step((-1 - index,), "stop")


def _guessed(tree: Tree, expand: Expand, ended: Grown | None, lower: float) -> Grown:
    """A step as good as its parent, or as its siblings, that is not there or not scored yet."""
    child, parent = expand.child, tree.look(expand.parent)
    score = parent.score if parent else None
    if score is None:
        siblings = [tree.grown[node].score for node in tree.children.get(expand.parent, ())]
        known = [score for score in siblings if score is not None]
        score = sum(known) / len(known) if known else 0.5
    score = max(score - lower, 0.0)
    if ended is not None:
        return replace(ended, score=score)
    return Grown(child, expand.parent, _nothing(expand.index), score)


def _can_begin(tree: Tree, expand: Expand, lookahead: int) -> bool:
    """Whether the text that it continues is there, and not too far from what is asked for."""
    parent, steps = tree.look(expand.parent), 1
    if parent is None or parent.finished:
        return False
    while parent is not None and parent.node not in tree.grown:
        steps += parent.node not in tree.pending
        parent = tree.look(parent.parent) if parent.parent else None
    return steps <= lookahead


class Seeker(Protocol):
    """A search, as the coordinator knows it."""

    policy: SearchPolicy

    def flying(self) -> int:
        """Its speculative rows."""
        ...

    def begin(self, guess: Guess) -> bool:
        """Whether it still wanted that."""
        ...


@dataclass
class _Trust:
    """Hits and misses of guesses of one kind, the old ones half forgotten."""

    hits: float = 0.0
    misses: float = 0.0

    def learn(self, hit: bool, keep: float) -> None:
        self.fade(keep)
        self.hits, self.misses = self.hits + hit, self.misses + (not hit)

    def fade(self, keep: float) -> None:
        self.hits, self.misses = self.hits * keep, self.misses * keep


class Trust(dict[tuple[str, Bucket], _Trust]):
    """What has become of guesses, by policy and kind.

    Attributes:
        rows: by policy, how many rows are usually begun after guessing once.
    """

    USUAL = 8.0

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, float] = {}

    def usual(self, policy: SearchPolicy) -> float:
        return self.rows.get(policy.name, self.USUAL)

    def tried(self, policy: SearchPolicy, rows: int) -> None:
        """So many rows came of guessing."""
        self.rows[policy.name] = 0.75 * self.usual(policy) + 0.25 * rows

    def spared(self, policy: SearchPolicy) -> None:
        """No guess was made. What is never tried is forgotten, and tried again."""
        usual = self.usual(policy)
        self.rows[policy.name] = usual + 0.002 * (self.USUAL - usual)


@dataclass
class Coordinator:
    """Deals rows out to the guesses of all searches of a pool, the likeliest gains first (T2).

    Give the same one to searches that share a pool.

    Attributes:
        prior: hits, and misses, that every kind of guess begins with.
        keep: what is left of a hit or a miss when the next one is learned.
        trust: what it has learned; coordinators of other pools may share that.
    """

    prior: tuple[float, float] = (3.0, 1.0)
    keep: float = 0.98
    trust: Trust = field(default_factory=Trust)
    _offers: dict[Seeker, list[tuple[float, Guess]]] = field(
        default_factory=dict[Seeker, list[tuple[float, Guess]]]
    )

    def probability(self, policy: SearchPolicy, guess: Guess) -> float:
        """Mean of a Beta posterior."""
        seen = self.trust.get((policy.name, guess.bucket), _Trust())
        hits, misses = self.prior[0] + seen.hits, self.prior[1] + seen.misses
        return hits / (hits + misses)

    def learn(self, policy: SearchPolicy, guess: Guess, hit: bool) -> None:
        key = policy.name, guess.bucket
        self.trust.setdefault(key, _Trust()).learn(hit, self.keep)

    def offer(self, seeker: Seeker, guesses: Iterable[Guess], spec: Speculator) -> None:
        """Replaces what this search had to offer.

        A step's gain is its tokens times the probability of their use, and its cost is those tokens
        too, so that a row's worth is the probability; steps further away save less.
        """
        found = list[tuple[float, Guess]]()
        for guess in guesses:
            p = self.probability(seeker.policy, guess)
            if p >= spec.floor:
                found.append((p * (1.0 if guess.distance <= 1 else spec.distant), guess))
            elif seen := self.trust.get((seeker.policy.name, guess.bucket)):
                seen.fade(self.keep)  # what is never tried is forgotten, and tried again
        self._offers[seeker] = sorted(found, key=lambda offer: offer[0])  # the best one last

    def leave(self, seeker: Seeker) -> None:
        self._offers.pop(seeker, None)

    def offered(self, seeker: Seeker) -> list[Guess]:
        """What this search still has to offer."""
        return [guess for _, guess in self._offers.get(seeker, ())]

    def deal(self, capacity: Capacity) -> None:
        """Begins the best offers while they are worth their price."""
        begun = 0
        while offers := self._open():
            seeker = max(offers, key=lambda s: self._offers[s][-1][0])
            worth, guess = self._offers[seeker][-1]
            if worth <= price(capacity, begun):
                return
            self._offers[seeker].pop()
            begun += seeker.begin(guess)

    def _open(self) -> list[Seeker]:
        """Whose turn it may be: nobody gets a third row while somebody waits for a first."""
        offering = [seeker for seeker, offers in self._offers.items() if offers]
        without = any(seeker.flying() == 0 for seeker in offering)
        return [s for s in offering if not without or s.flying() < 2]


def price(capacity: Capacity, begun: int) -> float:
    """What a row must be worth for the engine to bring in more with it than without it.

    With b rows, each of which is worth something, one more must be worth the part of a step's time
    that they all add: b / (b + doubles) where a step of b rows takes time in proportion to
    doubles + b. Until that has been measured a row is free while it would be padding, and costs
    everything at the ridge.
    """
    live = capacity.live_rows + begun
    padding = begun < capacity.free_rows
    if live >= capacity.ridge and not padding:
        return float("inf")
    if capacity.doubles is not None:
        return live / (live + capacity.doubles) if live else 0.0
    return 0.0 if padding else live / capacity.ridge


def affordable(capacity: Capacity) -> int:
    """Rows that may be begun at all."""
    return max(capacity.free_rows, capacity.ridge - capacity.live_rows)


def pays(capacity: Capacity, rows: float, tokens: float, thought: float, hit: float = 0.9) -> bool:
    """Whether guesses are worth the seconds that it takes to make them.

    Of a step of base * (1 + b / doubles) seconds each of b rows that are used bears one part in b:
    one more row that is used spares the others so much of the fixed part, and one that is not used
    costs what it adds. Where the cost of a row is not known, guesses pay as long as rows come of
    them; where nobody has timed a step, as in a simulation, thinking is free.

    Args:
        rows: that would be begun, for so many `tokens` each.
    """
    if capacity.step is None:
        return True
    if capacity.doubles is None:
        return rows >= _SOME
    live = max(capacity.live_rows, 1)
    base = capacity.step / (1 + live / capacity.doubles)
    spared = hit * base / live - (1 - hit) * base / capacity.doubles
    return rows * tokens * spared > thought
