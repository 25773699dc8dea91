"""A pool of paths that grow side by side, in rounds: extend all, look, act, and again.

A round extends every live path by the policy's `period` and hands the policy what has become of
them. Nothing that it sees depends on timing, so a search replays. Text does not depend on the
period either: a path is one node, extended again and again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from jaxserve.protocol import (
    DeadPathError,
    Gen,
    Node,
    PathPool,
    PathStats,
    Question,
    RouteNoise,
    SearchError,
    Step,
)
from reasoning.answers import Answer, Candidate, tally
from reasoning.result import Budget, Piece, Result, Stopped, next_query
from reasoning.watchdog import limited


@dataclass(frozen=True)
class Fork:
    """Begins a path: path `index` of the question, or of `parent` behind its first `at` tokens."""

    index: int
    parent: Node | None = None
    at: int | None = None


@dataclass(frozen=True)
class Refine:
    """In the coming round the path's tokens are refined by several routings."""

    node: Node
    route: RouteNoise


@dataclass(frozen=True)
class Segment:
    """In the coming round `k` forks of the path grow by `m` tokens; the surest goes on as the path.

    All of them cost. A path whose fork is kept goes by that fork's node from then on.
    """

    node: Node
    m: int
    k: int


@dataclass(frozen=True)
class Prune:
    """Ends a live path. Paths forked from it go on."""

    node: Node


@dataclass(frozen=True)
class Probe:
    """Asks what a path would answer now: a suffix, and a few greedy tokens thrown away."""

    node: Node
    suffix: tuple[int, ...]
    max_tokens: int = 8


@dataclass(frozen=True)
class Stop:
    """Ends the search; `decided` if no vote to come could have changed the answer."""

    decided: bool = False


Action = Fork | Refine | Segment | Prune | Probe | Stop


@dataclass(frozen=True)
class Probed:
    """What a probe said, and when: after so many tokens of the path."""

    answer: Hashable | None
    step: Step
    at: int


@dataclass(eq=False, slots=True)
class Path:
    """What is known of a path. Policies read it; the runner alone writes.

    Attributes:
        parent: that it was forked from behind `at` tokens; None if it begins with the question.
        answer: None before its end, or if it came to none.
        score: of the scorer that `run_pool` was given, once it is finished.
    """

    node: Node
    parent: Node | None = None
    at: int = 0
    stats: PathStats = field(default_factory=lambda: PathStats(()))
    state: Literal["live", "finished", "pruned"] = "live"
    answer: Hashable | None = None
    score: float | None = None
    probes: list[Probed] = field(default_factory=list[Probed])


@dataclass
class PoolView:
    """What a policy sees: the same whatever the timing.

    Attributes:
        paths: in the order in which they were begun, the dead among them.
        spent: tokens so far, extra passes included.
        memory: a policy's own notes on this search; the policy itself keeps none, so that one
            serves many searches at a time.
    """

    question: Question
    budget: Budget
    paths: list[Path] = field(default_factory=list[Path])
    spent: int = 0
    rounds: int = 0
    memory: dict[str, Any] = field(default_factory=dict[str, Any])
    _by_node: dict[Node, Path] = field(default_factory=dict[Node, Path], repr=False)

    def add(self, path: Path) -> None:
        """A path begins; the runner's."""
        self.paths.append(path)
        self._by_node[path.node] = path

    def move(self, path: Path, node: Node) -> None:
        """A path goes on as another node; the runner's."""
        del self._by_node[path.node]
        path.node = node
        self._by_node[node] = path

    def has(self, node: Node) -> bool:
        """Whether it is a path, alive or dead."""
        return node in self._by_node

    @property
    def live(self) -> list[Path]:
        return [p for p in self.paths if p.state == "live"]

    @property
    def finished(self) -> list[Path]:
        return [p for p in self.paths if p.state == "finished"]

    @property
    def left(self) -> int:
        """Tokens that may still be spent."""
        return self.budget.tokens - self.spent

    def dispensable(self, paths: Sequence[Path]) -> list[Path]:
        """Of some live paths all but the last one that says an answer which is among the first two.

        What a live path says is what it said to its last probe.
        """
        if not paths:
            return []
        said = {p: p.probes[-1].answer if p.probes else None for p in self.live}
        said |= {p: p.answer for p in self.finished}
        leaders = list(tally(Candidate(answer) for answer in said.values()))[:2]
        left, found = list(said.values()), list[Path]()
        for path in paths:
            if said[path] in leaders and left.count(said[path]) == 1:
                continue
            left.remove(said[path])
            found.append(path)
        return found

    def find(self, node: Node) -> Path:
        """The path of a node.

        Raises:
            DeadPathError: there never was one.
        """
        path = self._by_node.get(node)
        if path is None:
            raise DeadPathError(f"{node} is no path of this search")
        return path


class PoolPolicy(Protocol):
    """A controller of a pool. It decides; it never calls the engine.

    Attributes:
        period: tokens of a round.
        branching: forks paths that are finished or pruned; only then do they keep their pages.
        scored: looks at `Path.score`. It may be left out, and then is taken for true; where it is
            not, finished paths are scored only if whoever searches names a scorer.
    """

    @property
    def name(self) -> str: ...

    @property
    def period(self) -> int: ...

    @property
    def branching(self) -> bool: ...

    def start(self, view: PoolView) -> Sequence[Action]: ...

    def step(self, view: PoolView) -> Sequence[Action]:
        """What to do before the next round."""
        ...

    def aggregate(self, view: PoolView) -> Answer: ...


async def run_pool(
    policy: PoolPolicy,
    pool: PathPool,
    question: Question,
    budget: Budget,
    scorer: str | None = None,
    *,
    query: int | None = None,
) -> Result:
    """Carries a search out, and closes its query whatever happens.

    The budget is never exceeded: what a round may cost at most is cut to what is left, the paths
    that were begun first served first. A policy that raises, or that acts on a dead path, ends its
    own search and no other one: with `SearchError`, its own error as the cause.

    Seconds are looked at between rounds.

    Args:
        scorer: whose opinion of finished paths the policy wants.
        query: a number that no other search of the pool has; by default the next one.
    """
    number = next_query() if query is None else query
    search = _Search(policy, pool, question, budget, scorer, number)
    try:
        return await search.run()
    finally:
        pool.close(number)


Said = TypeVar("Said")
SEGMENT = 1 << 16  # indices of segments' forks begin here, so that no branch has the same


class _Search:
    """One search under way."""

    def __init__(
        self,
        policy: PoolPolicy,
        pool: PathPool,
        question: Question,
        budget: Budget,
        scorer: str | None,
        query: int,
    ):
        if policy.period < 1:
            raise SearchError(f"{policy.name}: period={policy.period} must be at least 1")
        self.policy, self.pool, self.question, self.scorer = policy, pool, question, scorer
        self.query, self.budget = query, budget
        self.root = pool.root(question.prompt, query=query, seed=question.seed)
        self.view = PoolView(question, budget)
        self.plans: dict[Node, Refine | Segment] = {}  # for the coming round
        self.probes: list[Probe] = []
        self.aside: list[Path] = []  # of segments: forks not kept, and beginnings that go on
        self.gen = Gen(policy.period)  # that was asked for last
        self.refused = False  # a fork, for want of budget
        self.begun = time.monotonic()
        self.thinking = 0.0
        self.generated = 0

    async def run(self) -> Result:
        actions = self._ask(self.policy.start)
        while True:
            stopped = self._take(actions)
            if stopped is None and time.monotonic() - self.begun > self.budget.seconds:
                stopped = "budget"
            if stopped is not None:
                return self._result(stopped, self._ask(self.policy.aggregate))
            await self._round()
            actions = self._ask(self.policy.step)

    def _ask(self, question: Callable[[PoolView], Said]) -> Said:
        """Lets the policy think, on the clock."""
        begun = time.perf_counter()
        try:
            return limited(self.budget.decision, self.policy.name, question, self.view)
        except SearchError:
            raise
        except Exception as error:
            raise SearchError(f"{self.policy.name}: {type(error).__name__}: {error}") from error
        finally:
            self.thinking += time.perf_counter() - begun

    def _take(self, actions: Sequence[Action]) -> Stopped | None:
        """Carries out what costs nothing and plans the rest; says why it is over, if it is."""
        self.plans.clear()
        self.probes.clear()
        for action in actions:
            match action:
                case Stop(decided):
                    return "decided" if decided else "done"
                case Fork():
                    self.refused |= not self._fork(action)
                case Prune(node):
                    path = self._alive(node)
                    path.state = "pruned"
                    if not self.policy.branching:
                        self._let_go(path.node)
                case Probe(node):
                    self._alive(node)
                    self.probes.append(action)
                case Refine(node) | Segment(node):
                    self._alive(node)
                    self.plans[node] = action
        if self.view.left <= 0 and (self.view.live or self.probes or self.refused):
            return "budget"
        if not self.view.live and not self.probes:
            return "budget" if self.refused else "done"
        return None

    def _fork(self, action: Fork) -> bool:
        """Whether the budget has room for it."""
        parent = self.root if action.parent is None else action.parent
        start, shared = None, PathStats(())
        if action.parent is not None:
            start = self.view.find(action.parent)
            known = start.stats.n_tokens
            at = known if action.at is None else action.at
            if not 0 <= at <= known:
                raise SearchError(f"{action}: the parent has {known} tokens")
            shared = first(start.stats, at)
        if self.view.left <= 0 or len(self.view.paths) >= self.budget.paths:
            return False
        node = self.pool.fork(parent, action.index, at=action.at)
        if self.view.has(node):
            raise SearchError(f"{action} begins a path that is there already")
        self.view.add(Path(node, action.parent, shared.n_tokens, shared))
        return True

    def _alive(self, node: Node) -> Path:
        path = self.view.find(node)
        if path.state != "live":
            raise DeadPathError(f"{node} is {path.state}, and can be acted on no more")
        return path

    def _let_go(self, node: Node) -> None:
        """Paths forked from it live on."""
        self.pool.cancel(node, subtree=False)
        self.pool.release(node)

    async def _round(self) -> None:
        """Extends every live path, within what is left, and sees what came of it."""
        view, left = self.view, self.view.left
        plain, work = list[tuple[Path, int, Awaitable[Step]]](), list[Awaitable[Any]]()
        for probe in self.probes:
            if most := min(probe.max_tokens, left):
                left -= most
                work.append(self._probe(probe, most))
        for path in view.live:
            plan = self.plans.get(path.node)
            most = self.question.max_tokens - path.stats.n_tokens
            if isinstance(plan, Segment) and (n := min(plan.m, most, left // plan.k)):
                left -= n * plan.k
                work.append(self._segment(path, plan.k, n))
                continue
            route = plan.route if isinstance(plan, Refine) else None
            if route is not None and left < route.K:
                route = None
            each = 1 if route is None else route.K
            if n := min(self.policy.period, most, left // each):
                left -= n * each
                gen = self._gen(n) if route is None else Gen(n, route=route)
                plain.append((path, n, self.pool.extend(path.node, gen)))
        before = set(view.finished)
        steps = await asyncio.gather(*[step for _, _, step in plain], *work)
        for (path, n, _), step in zip(plain, steps, strict=False):
            self._grown(path, step, n)
        view.rounds += 1
        view.spent = self.generated + self.pool.ledger(self.query).effective
        await self._closed([p for p in view.finished if p not in before])

    def _gen(self, n: int) -> Gen:
        """The same for all that ask for as much: a round of many paths makes one."""
        if n != self.gen.max_tokens:
            self.gen = Gen(n)
        return self.gen

    async def _segment(self, path: Path, k: int, n: int) -> None:
        at = path.stats.n_tokens
        nodes = [self.pool.fork(path.node, SEGMENT + i, at=at) for i in range(k)]
        steps = await asyncio.gather(*[self.pool.extend(node, Gen(n)) for node in nodes])
        self.generated += sum(len(step.tokens) for step in steps)
        kept = max(range(k), key=lambda i: mean(steps[i].confidences))
        for i, node in enumerate(nodes):
            if i != kept:
                stats = self.pool.stats(node)
                self.aside.append(Path(node, path.node, at, stats, "pruned"))
                self._let_go(node)
        self.aside.append(Path(path.node, path.parent, path.at, path.stats, "finished"))
        self._let_go(path.node)
        path.parent, path.at = path.node, at
        self.view.move(path, nodes[kept])
        self.generated -= len(steps[kept].tokens)  # `_grown` counts them
        self._grown(path, steps[kept], n)

    async def _probe(self, probe: Probe, most: int) -> None:
        path = self.view.find(probe.node)
        tokens = path.stats.tokens
        step = await self.pool.probe(probe.node, probe.suffix, most)
        self.generated += len(step.tokens)
        answer = self.question.read((*tokens, *probe.suffix, *step.tokens))
        path.probes.append(Probed(answer, step, len(tokens)))

    def _grown(self, path: Path, step: Step, asked: int) -> None:
        self.generated += len(step.tokens)
        path.stats = self.pool.stats(path.node)
        full = path.stats.n_tokens >= self.question.max_tokens or len(step.tokens) < asked
        if step.reason == "end" or full:
            path.state = "finished"
            path.answer = self.question.read(path.stats.tokens)

    async def _closed(self, paths: Sequence[Path]) -> None:
        """Asks the scorer about paths that have just ended, and gives up their pages."""
        if self.scorer is not None:
            said = [self.pool.score(path.node, scorer=self.scorer) for path in paths]
            for path, score in zip(paths, await asyncio.gather(*said), strict=True):
                path.score = score
        if not self.policy.branching:
            for path in paths:
                self._let_go(path.node)

    def _result(self, stopped: Stopped, answer: Answer) -> Result:
        paths = [*self.view.paths, *self.aside]
        return Result(
            answer.answer,
            answer.distribution,
            self.pool.close(self.query),
            stopped,
            self.policy.name,
            best=answer.best,
            tree=(self._piece(Path(self.root)), *map(self._piece, paths)),
            notes={
                "policy_seconds": self.thinking,
                "spent": self.view.spent,
                "rounds": self.view.rounds,
                "paths": len(self.view.paths),
            },
        )

    def _piece(self, path: Path) -> Piece:
        root = path.node == self.root
        tokens = self.question.prompt if root else path.stats.tokens[path.at :]
        text = self.question.text(tokens) if self.question.text else ""
        parent = None if root else path.parent or self.root
        return Piece(path.node, parent, tokens, text, path.score, path.answer, path.state)


def first(stats: PathStats, n: int) -> PathStats:
    """What was known of a path when it had n tokens."""
    return PathStats(
        stats.tokens[:n],
        stats.logprobs[:n],
        stats.entropies[:n],
        stats.margins[:n],
        stats.confidences[:n],
        route_sketch=None if stats.route_sketch is None else stats.route_sketch[:n],
    )


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
