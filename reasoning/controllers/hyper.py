"""HyPER: expand a pool of paths where something new is to be found, reduce it where nothing is.

Each round, paths that have become unsure are pruned, and so are those that only repeat what others
have said from the same state. Then one of four actions is taken, by scores that shift from
exploring to exploiting as the search goes on (specification, section 2.3): branch from a sure
state that is likely to go on in a new way, grow unsure paths by the best of several segments,
refine their tokens by several routings, or nothing. Derivations are voted on by length and
confidence, and by how much of what an answer rests on may be false (`reasoning.answers.supports`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from jaxserve.protocol import RouteNoise
from reasoning.answers import Answer, LengthConfidence, is_decided
from reasoning.controllers.hyper_scores import Scores
from reasoning.derivations import Derivation, Map, Survey, trusting, weigh
from reasoning.pool import Action, Fork, Path, PoolView, Prune, Refine, Segment, Stop
from reasoning.signals import least_group, percentile

Actions = Sequence[Action]


@dataclass(frozen=True)
class HyPER:
    """Defaults were chosen on modchain-moe's dev split; elsewhere, begin with `floor=None`.

    Attributes:
        width, paths: most that are live, and of them all; a search begins with `width`.
        floor: least sure confidence of `window` tokens; None: that of the first `warmup` paths,
            whole, of which the share `keep` lies above it.
        slip: nats against the odds of a token at which a path is given up as an unsure one is.
        alike: tokens by which ways of going on are told apart; 0: paths are never merged.
        novelty: a place is worth a branch while a fork is new with at least this probability.
        deep: how much cheap branches, late in a path, are preferred over ones that share little.
        support: nats that an answer gains by each claim that must be false for it to fall.
        safe: the search ends once the best supported answer leads by so many claims; 0: never.
        trust: power of the mean score of an answer's finished paths by which its vote is
            multiplied, where `run_pool` was given a scorer; 0: scores are not looked at.
        segment: m tokens and k forks of a MultiToken action; None: never taken.
        route: of a SingleToken action; None: never taken.
    """

    width: int = 2
    paths: int = 512
    floor: float | None = 3.25
    slip: float = 1.5
    warmup: int = 16
    keep: float = 0.5
    window: int = 1
    alike: int = 2
    novelty: float = 0.002
    deep: float = 0.5
    support: float = 1.0
    safe: int = 2
    trust: float = 0.0
    vote: LengthConfidence = field(default_factory=LengthConfidence)
    segment: tuple[int, int] | None = None
    route: RouteNoise | None = None
    scores: Scores = field(default_factory=Scores)
    period: int = 3
    name: ClassVar[str] = "hyper"
    branching: ClassVar[bool] = True

    def __post_init__(self):
        if min(self.width, self.paths, self.warmup, self.window, self.period) < 1:
            raise ValueError(f"{self}: counts must be positive")

    @property
    def scored(self) -> bool:
        return self.trust > 0

    def start(self, view: PoolView) -> Actions:
        first = self.width if self.floor is not None else max(self.width, self.warmup)
        return [Fork(i) for i in range(min(first, self.paths))]

    def step(self, view: PoolView) -> Actions:
        if (floor := self.threshold(view)) is None:
            return []
        known, alive = self._survey(view, floor), view.live
        weak = view.dispensable([p for p in alive if known.walks[p].lost])
        merge = bool(self.alike) and view.question.state is not None
        same = [p for p in alive if merge and known.repeats(p, self.alike, self.novelty)]
        gone = {*weak, *same}
        live = [p for p in alive if p not in gone] if gone else alive
        votes = {} if merge or self.support else weigh(self._derivations(known), self.vote, 0.0)
        if is_decided(votes, len(live) + self.paths - len(view.paths)):  # each path is one vote
            return [Stop(decided=True)]
        branches = self._branches(view, known, live)
        if not live and not branches and weak and not self._derivations(known):
            live = [max(weak, key=lambda p: least_group(p.stats, self.window))]
            gone -= {*live}  # an unsure answer is better than none
        actions: list[Action] = [Prune(p.node) for p in alive if p in gone] if gone else []
        if (self.safe and known.lead >= self.safe) or not (live or branches):
            return [Stop()]
        return [*actions, *(self._act(view, live, floor, branches) if live else branches)]

    def threshold(self, view: PoolView) -> float | None:
        """None while the warm-up runs."""
        if self.floor is not None:
            return self.floor
        full = view.paths[: self.warmup]
        if any(p.state == "live" for p in full):
            return None
        return percentile([least_group(p.stats, self.window) for p in full], 1 - self.keep)

    def _survey(self, view: PoolView, floor: float) -> Map:
        slip = self.slip if floor > -math.inf else math.inf
        return Survey(floor, self.window, max(self.alike, 1), slip).of(view)

    def _derivations(self, known: Map) -> list[Derivation]:
        return known.derivations() if self.alike else known.own

    def _branches(self, view: PoolView, known: Map, live: Sequence[Path]) -> Actions:
        """Forks of the places most worth it, as many as there is room and budget for."""
        room = min(self.width - len(live), self.paths - len(view.paths))
        left = view.left - sum(known.length - p.stats.n_tokens for p in live) if room > 0 else 0
        places, forks = known.worthwhile(room, left, self.novelty, self.deep), list[Action]()
        anew = any(place.first is None for place in places)
        roots = 1 + max(p.node.path[0][0] for p in view.paths) if anew else 0
        for i, place in enumerate(places, len(view.paths)):
            forks.append(Fork(i, place.first.node, place.at) if place.first else Fork(roots))
            roots += place.first is None
        return forks

    def _act(self, view: PoolView, live: list[Path], floor: float, forks: Actions) -> Actions:
        if not (forks or self.segment or self.route):
            return []
        actions: dict[str, Actions] = {"none": []}
        actions |= {"branch": forks} if forks else {}  # it would only keep others out
        if self.segment or self.route:
            unsure = min(live, key=lambda p: p.stats.conf_group(self.window)).node
            actions |= {"multi": [Segment(unsure, *self.segment)]} if self.segment else {}
            actions |= {"single": [Refine(unsure, self.route)]} if self.route else {}
        scores = self.scores.of(view, live, floor, self.window, self.width, actions)
        return actions[self.scores.choose(view, scores)]

    def aggregate(self, view: PoolView) -> Answer:
        floor = self.threshold(view)
        sure = self._derivations(self._survey(view, -math.inf if floor is None else floor))
        known = sure or self._derivations(self._survey(view, -math.inf))
        totals = trusting(weigh(known, self.vote, self.support), view.finished, self.trust)
        answer = next(iter(totals), None)
        saying = [p for p in view.finished if p.answer is not None and p.answer == answer]
        best = max(saying, key=lambda p: least_group(p.stats, self.window), default=None)
        return Answer(answer, totals, best.node if best else None)
