"""An engine that only counts: paths with made-up steps, under a clock that searches can stop.

Lengths, scores and answers of a path are a function of (seed, path), so two searches that ask for
the same path get the same one, whatever else ran. The clock moves only while every open search
waits for events: what a controller computes takes no time. Specification, section 5.4 (a).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import math
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from random import Random
from typing import Any, TypeVar

from jaxserve.protocol import (
    Cancelled,
    Capacity,
    DeadPathError,
    Event,
    Failed,
    Gen,
    Ledger,
    Node,
    PathStats,
    Prio,
    Question,
    Scored,
    SearchError,
    Step,
    StepDone,
)

T = TypeVar("T")
Way = tuple[tuple[int, int], ...]

STOP, END, ANSWER = 1, 2, 1000
"""Tokens: the end of a step, the end of a text, and the first of those that stand for answers."""


@dataclass(frozen=True)
class Trees:
    """What paths look like.

    Attributes:
        length: mean tokens of a step; lengths are log-normal.
        variation: their standard deviation over their mean.
        shallowest, deepest: between these depths paths end, earlier ones as likely as later ones.
        drift: how far a child's quality moves from its parent's, in log-odds.
        noise: what a scorer gets wrong of a step, in log-odds.
        leaf: weight of the step's score in that of a leaf; the rest is chance.
        answers: different answers; the better a path, the likelier it has the first.
    """

    length: float = 20.0
    variation: float = 0.6
    shallowest: int = 5
    deepest: int = 5
    drift: float = 0.7
    noise: float = 0.3
    leaf: float = 0.8
    answers: int = 4

    def made_up(self, seed: int, way: Way) -> Made:
        """The last step of a path."""
        rng = _random(seed, way)
        sigma = math.sqrt(math.log1p(self.variation**2))
        length = max(2, round(self.length * math.exp(rng.gauss(-(sigma**2) / 2, sigma))))
        depth = len(way)
        quality = self.drift * sum(_drift(seed, way[:i]) for i in range(1, depth + 1))
        left = self.deepest - max(depth, self.shallowest - 1)
        ends = depth >= self.shallowest and (left <= 0 or rng.random() < 1 / (left + 1))
        score = _sigmoid(quality + rng.gauss(0, self.noise))
        if ends:
            score = self.leaf * score + (1 - self.leaf) * rng.random()
        right = rng.random() < _sigmoid(quality)
        answer = 0 if right or self.answers < 2 else rng.randrange(1, self.answers)
        return Made(length, score, answer if ends else None)


@dataclass(frozen=True)
class Made:
    """A step: how long it is, what a scorer thinks of it, and the answer if the text ends here."""

    length: int
    score: float
    answer: int | None

    def tokens(self, g: Gen) -> tuple[int, ...]:
        if self.answer is None:
            whole = (*[0] * (self.length - 1), g.stop[0] if g.stop else STOP)
        else:
            whole = (*[0] * (self.length - 2), ANSWER + self.answer, END)
        return whole[: g.max_tokens]


def question(seed: int = 0, max_tokens: int = 1 << 20) -> Question:
    """What searches of a simulated pool are to answer."""
    return Question((3, 4, 5), read, (STOP,), max_tokens, seed)


def read(tokens: Sequence[int]) -> int | None:
    """The answer of a simulated path."""
    return next((token - ANSWER for token in reversed(tokens) if token >= ANSWER), None)


@dataclass(frozen=True)
class Machine:
    """What the engine can do.

    Attributes:
        slots: rows that run at a time; committed ones come first, and others make way for them.
        ridge: a step of b rows takes max(1, b / ridge); None: a step always takes 1.
        score: time until a scorer has spoken.
        page: tokens of a page.
        pages: of the pool; only counted, never short.
    """

    slots: int = 32
    ridge: int | None = None
    score: float = 0.0
    page: int = 16
    pages: int = 1 << 20

    def cost(self, rows: int) -> float:
        return max(1.0, rows / self.ridge) if self.ridge else 1.0


@dataclass
class _Path:
    """A path that was begun: its tokens, who holds its pages, and whether it may still be used."""

    node: Node
    parent: _Path | None
    seed: int
    offset: int = 0  # tokens before its own, the prompt's among them
    way: Way = ()
    tokens: list[int] = field(default_factory=list[int])
    score: float | None = None
    prio: Prio = Prio.COMMIT
    ended: bool = False
    alive: bool = True
    held: bool = True
    freed: bool = False
    children: int = 0  # that hold pages
    credit: int = 0  # speculative tokens that nobody has wanted so far

    def prefix(self) -> int:
        return self.offset + len(self.tokens)

    def pages(self, page: int) -> int:
        """Pages of its own: whole ones of the parent are shared, the last one is copied."""
        if self.parent is None:
            return -(-self.prefix() // page)
        return -(-self.prefix() // page) - self.offset // page if self.tokens else 0


@dataclass
class _Row:
    """An extension on its way."""

    path: _Path
    step: Step
    ticks: int  # engine steps that it takes
    order: int
    future: asyncio.Future[Step]
    passes: int = 1  # over the model, for a token
    ran: int = 0

    def made(self) -> int:
        return len(self.step.tokens) * self.ran // self.ticks


@dataclass
class _Wait:
    """A score on its way."""

    path: _Path
    scorer: str
    value: float
    due: float
    order: int
    future: asyncio.Future[float]


@dataclass
class _Query:
    """A search: its paths, its ledger, and what it has not been told yet."""

    began: float
    paths: dict[Node, _Path] = field(default_factory=dict[Node, _Path])
    ledger: Ledger = field(default_factory=Ledger)
    inbox: deque[Event] = field(default_factory=deque[Event])
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    waiting: bool = False
    open: bool = True
    stuck: bool = False
    pages: int = 0


class SimulatedPool:
    """A `PathPool` under a virtual clock. One event loop owns it.

    Attributes:
        now: the time.
        jitter: if given, extensions and scores take times drawn from this seed instead of those
            that follow from their lengths: whatever order results come in, a search must not care.
    """

    def __init__(
        self, trees: Trees | None = None, machine: Machine | None = None, jitter: int | None = None
    ):
        self.trees, self.machine = trees or Trees(), machine or Machine()
        self.now = 0.0
        self.steps = 0
        self._jitter = None if jitter is None else Random(jitter)
        self._queries = dict[int, _Query]()
        self._rows = list[_Row]()
        self._scores = list[_Wait]()
        self._orders = itertools.count()

    # ---- what searches ask for

    def root(self, prompt: Sequence[int], *, query: int, seed: int) -> Node:
        if query in self._queries and self._queries[query].open:
            raise SearchError(f"query {query} is open already")
        found = self._queries[query] = _Query(self.now)
        found.ledger.prefill = len(prompt)
        node = Node(query)
        found.paths[node] = _Path(node, None, seed, len(prompt))
        found.pages = found.ledger.peak_pages = found.paths[node].pages(self.machine.page)
        return node

    def fork(self, parent: Node, index: int, *, at: int | None = None) -> Node:
        node = parent.fork(index, -1 if at is None else at)
        query = self._queries.get(parent.query)
        above = query.paths.get(parent) if query else None
        known = query.paths.get(node) if query else None
        gone = known is None or not known.alive or not known.held
        if query and above and above.alive and above.held and gone:
            offset = above.prefix() if at is None else min(at + self._prompt(above), above.prefix())
            way = (*above.way, node.path[-1])
            query.paths[node] = _Path(node, above, above.seed, offset, way)
            above.children += 1
        return node

    def extend(self, n: Node, g: Gen, *, prio: Prio = Prio.COMMIT) -> Awaitable[Step]:
        future = asyncio.get_running_loop().create_future()
        path = self._usable(n)
        busy = any(row.path is path for row in self._rows)
        if path is None or busy or path.ended:
            return self._refuse(n, future, "is being extended" if busy else "is gone, or has ended")
        query = self._queries[n.query]
        path.prio = min(path.prio, prio) if path.tokens else prio
        if path.tokens:
            path.way = (*path.way, (0, -2))  # as if a child had been forked
        made = self.trees.made_up(path.seed, path.way)
        tokens = made.tokens(g)
        whole = len(tokens) == made.length
        step = Step(tokens, "length" if not whole else "stop" if made.answer is None else "end")
        path.score = made.score
        ticks = len(tokens) if self._jitter is None else self._jitter.randint(1, 4 * len(tokens))
        query.ledger.calls += 1
        passes = 1 if g.route is None else g.route.K
        self._rows.append(_Row(path, step, ticks, next(self._orders), future, passes))
        return future

    def score(self, n: Node, *, scorer: str = "prm", prio: Prio = Prio.COMMIT) -> Awaitable[float]:
        future = asyncio.get_running_loop().create_future()
        path = self._usable(n)
        if path is None or path.score is None or not path.tokens:
            return self._refuse(n, future, "is gone, or has nothing to score")
        self._queries[n.query].ledger.scorer += len(path.tokens)
        delay = self.machine.score
        if self._jitter is not None:
            delay = self._jitter.uniform(0, 4 * self.trees.length)
        order = next(self._orders)
        self._scores.append(_Wait(path, scorer, path.score, self.now + delay, order, future))
        return future

    def probe(self, n: Node, suffix: Sequence[int], max_tokens: int) -> Awaitable[Step]:
        raise SearchError("paths of a simulated pool say nothing to a probe; run on an engine")

    def promote(self, n: Node) -> None:
        path = self._usable(n)
        if path is None:
            raise DeadPathError(f"{n} is gone")
        if path.prio == Prio.SPEC:
            path.prio = Prio.COMMIT
            ledger = self._queries[n.query].ledger
            ledger.spec_waste -= path.credit
            ledger.committed += path.credit
            ledger.spec_hit += path.credit
            path.credit = 0

    def cancel(self, n: Node, *, subtree: bool = True) -> None:
        query = self._queries.get(n.query)
        if query is None:
            return
        depth = len(n.path)
        gone = (
            [p for p in query.paths.values() if p.node.path[:depth] == n.path]
            if subtree
            else [p for p in (query.paths.get(n),) if p]
        )
        for path in gone:
            path.alive = False
        self._drop(lambda path: not path.alive)
        for path in reversed(gone):
            self._let_go(query, path)

    def release(self, n: Node) -> None:
        path = self._usable(n)
        if path is None:
            raise DeadPathError(f"{n} is gone")
        self._let_go(self._queries[n.query], path)

    def close(self, query: int) -> Ledger:
        found = self._queries[query]
        if found.open:
            self.cancel(Node(query))
            found.ledger.critical_steps = self.now - found.began
            found.open = False
            found.wake.set()
            with contextlib.suppress(RuntimeError):  # no loop runs, so nobody waits
                asyncio.get_running_loop().call_soon(self._advance)
        return replace(found.ledger)

    def stats(self, n: Node) -> PathStats:
        query = self._queries.get(n.query)
        path = query.paths.get(n) if query else None
        if path is None:
            raise DeadPathError(f"{n} never was")
        tokens, start, up = list(path.tokens), path.offset, path.parent
        while up is not None:
            tokens[:0] = up.tokens[: max(start - up.offset, 0)]
            start, up = min(start, up.offset), up.parent
        scores = None if path.score is None else {"prm": path.score}
        return PathStats(tuple(tokens), scores=scores, finished=path.ended)

    async def events(self, query: int) -> AsyncIterator[Event]:
        found = self._queries[query]
        while found.open or found.inbox:
            if found.inbox:
                yield found.inbox.popleft()
                continue
            found.wake.clear()
            await asyncio.sleep(0)  # whoever is about to begin, or to think, comes first
            found.waiting = True
            self._advance()
            await found.wake.wait()
            found.waiting = False
            if found.stuck:
                raise SearchError(f"query {query} waits, and nothing is on its way to it")

    def capacity(self) -> Capacity:
        slots, live = self.machine.slots, len(self._rows)
        ridge = min(slots, self.machine.ridge or slots)
        held = sum(query.pages for query in self._queries.values())
        return Capacity(max(ridge - live, 0), ridge, live, self.machine.pages - held)

    def ledger(self, query: int) -> Ledger:
        found = self._queries[query]
        steps = self.now - found.began if found.open else found.ledger.critical_steps
        return replace(found.ledger, critical_steps=steps)

    # ---- the clock

    def _advance(self) -> None:
        """Moves the clock until somebody has something to do."""

        def asleep(query: _Query) -> bool:
            return query.waiting and not query.inbox

        open_ones = [query for query in self._queries.values() if query.open]
        while open_ones and all(map(asleep, open_ones)):
            if not self._rows and not self._scores:
                for query in open_ones:
                    query.stuck = True
                    query.wake.set()
                return
            self._tick()

    def _tick(self) -> None:
        """Runs engine steps until the next extension or score ends."""
        self._rows.sort(key=lambda row: (row.path.prio, row.order))
        running = self._rows[: self.machine.slots]
        cost = self.machine.cost(sum(row.passes for row in running))
        due = min((wait.due for wait in self._scores), default=math.inf)
        if running:
            count = min(row.ticks - row.ran for row in running)
            if due < math.inf:
                count = min(count, max(0, math.ceil((due - self.now) / cost)))
            for row in running:
                self._run(row, count)
            self.now += count * cost
            self.steps += count
        else:
            self.now = due
        ended = [row for row in running if row.ran >= row.ticks]
        spoken = [wait for wait in self._scores if wait.due <= self.now]
        self._rows = [row for row in self._rows if row.ran < row.ticks]
        self._scores = [wait for wait in self._scores if wait.due > self.now]
        for item in sorted([*ended, *spoken], key=lambda item: item.order):
            self._tell(item)

    def _run(self, row: _Row, count: int) -> None:
        path, query = row.path, self._queries[row.path.node.query]
        before, pages = row.made(), path.pages(self.machine.page)
        row.ran += count
        new = row.step.tokens[before : row.made()]
        path.tokens += new
        query.ledger.effective += len(new) * (row.passes - 1)
        if path.prio == Prio.COMMIT:
            query.ledger.committed += len(new)
        else:
            query.ledger.spec_waste += len(new)
            path.credit += len(new)
        query.pages += path.pages(self.machine.page) - pages
        query.ledger.peak_pages = max(query.ledger.peak_pages, query.pages)

    def _tell(self, item: _Row | _Wait) -> None:
        node = item.path.node
        if isinstance(item, _Row):
            item.path.ended = item.step.reason == "end"
            item.future.set_result(item.step)
            self._post(StepDone(node, item.step))
        else:
            item.future.set_result(item.value)
            self._post(Scored(node, item.scorer, item.value))

    def _post(self, event: Event) -> None:
        query = self._queries[event.node.query]
        query.inbox.append(event)
        query.wake.set()

    # ---- paths

    def _prompt(self, path: _Path) -> int:
        while path.parent is not None:
            path = path.parent
        return path.offset

    def _usable(self, n: Node) -> _Path | None:
        query = self._queries.get(n.query)
        path = query.paths.get(n) if query and query.open else None
        return path if path and path.alive and path.held else None

    def _refuse(self, n: Node, future: asyncio.Future[T], why: str) -> asyncio.Future[T]:
        self._fail(n, future, DeadPathError(f"{n} {why}"))
        return future

    def _fail(self, n: Node, future: asyncio.Future[Any], error: Exception) -> None:
        future.set_exception(error)
        future.exception()  # whoever does not await it has the event
        if n.query in self._queries:
            self._post(Failed(n, error))

    def _drop(self, gone: Callable[[_Path], bool]) -> None:
        """Ends what is on its way for these paths."""
        for item in [*self._rows, *self._scores]:
            if gone(item.path):
                self._fail(item.path.node, item.future, Cancelled(f"{item.path.node} was given up"))
        self._rows = [row for row in self._rows if not gone(row.path)]
        self._scores = [wait for wait in self._scores if not gone(wait.path)]

    def _let_go(self, query: _Query, path: _Path) -> None:
        """Gives its pages back as soon as no path that was forked from it holds any."""
        path.held = False
        up: _Path | None = path
        while up is not None and not up.held and not up.children and not up.freed:
            up.freed = True
            query.pages -= up.pages(self.machine.page)
            up = up.parent
            if up is not None:
                up.children -= 1


def _random(*what: object) -> Random:
    """Random numbers that follow from what is given, on every machine."""
    return Random(int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=8).digest()))


@cache
def _drift(seed: int, way: Way) -> float:
    return _random("drift", seed, way).gauss(0, 1)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))
