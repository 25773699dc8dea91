"""`PathPool` over an engine: what a search sees, on its event loop.

The loop's thread keeps what has been delivered; tokens on their way and all pages are the
`Keeper`'s, on the engine's thread. Each tells the other without waiting, except that `close` hears
what the last rows of a query came to.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from jaxserve.engine.loop import EngineLoop
from jaxserve.errors import EngineError, RequestError
from jaxserve.paths.keeper import Extension, Keeper, Path
from jaxserve.paths.records import first, longer, spend, step_of, words_of
from jaxserve.paths.scorers import OWN, Batched, Said, ScoreOf, Scorer
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
    Scored,
    SearchError,
    Step,
    StepDone,
)
from jaxserve.request import check_ids


@dataclass(slots=True)
class _Record:
    """What has been delivered of a path.

    `known` has its parent's part in front; its lists are never changed, so that forks share them.
    """

    path: Path
    parent: Node | None
    known: PathStats
    prio: Prio = Prio.COMMIT
    alive: bool = True
    flying: bool = False  # the engine has an extension of it, or is about to have one
    made: int = 0  # tokens of its own that count as its priority says
    seed: tuple[int, int] | None = None  # once it has been extended
    running: asyncio.Future[Step] | None = None
    scoring: dict[str, asyncio.Future[float]] = field(default_factory=dict[str, Any])


@dataclass
class _Query:
    seed: int
    prompt: tuple[int, ...]
    steps: int  # of the engine, when it began
    ledger: Ledger = field(default_factory=Ledger)
    events: asyncio.Queue[Event | None] = field(default_factory=asyncio.Queue[Event | None])
    nodes: dict[Node, _Record] = field(default_factory=dict[Node, _Record])
    closed: bool = False


class EnginePool:
    """Paths of the searches of one event loop.

    Args:
        loop, keeper: the engine.
        eos_ids: tokens that end a text.
        prior: log-odds of a reward head for a path without tokens.
        scorers: by name, besides "prm" (the reward head), "confidence" and "certainty".
        on_event: is told of every event, of all queries.
        decode: from tokens to text, for scorers that read.
        judged: whether the reward head looks at paths as they are made; "prm" needs that.
        vocab: of the model; ids beyond it are refused. None: nobody knows.
    """

    def __init__(
        self,
        loop: EngineLoop,
        keeper: Keeper,
        eos_ids: frozenset[int] = frozenset(),
        prior: float = 0.0,
        scorers: Mapping[str, ScoreOf | Scorer] | None = None,
        on_event: Callable[[Event], None] | None = None,
        *,
        decode: Callable[[Sequence[int]], str] = repr,
        judged: bool = True,
        vocab: int | None = None,
    ):
        self._loop, self._keeper, self._vocab = loop, keeper, vocab
        self._eos_ids, self._prior = eos_ids, prior
        self._decode, self._judged = decode, judged
        self._scorers: dict[str, ScoreOf] = {
            **OWN,
            **{name: self._asked(scorer) for name, scorer in (scorers or {}).items()},
        }  # fmt: skip
        self._on_event = on_event
        self._queries: dict[int, _Query] = {}
        self._arrived: deque[Callable[[], None]] = deque()
        self._awake = False
        self._flying = 0  # records that are
        self._asyncio = asyncio.get_running_loop()

    def _asked(self, scorer: ScoreOf | Scorer) -> ScoreOf:
        return scorer if callable(scorer) else Batched(scorer, self)

    # ---- paths --------------------------------------------------------------------------

    def root(self, prompt: Sequence[int], *, query: int, seed: int) -> Node:
        """See `PathPool`.

        Raises:
            RequestError: the prompt is empty, or as long as the context, or no token of the model.
            SearchError: there is a query of that number.
        """
        longest = self._keeper.max_model_len - 1
        if not 0 < len(prompt) <= longest:
            raise RequestError(f"a prompt has 1 to {longest} tokens, not {len(prompt)}", "prompt")
        check_ids("the prompt", prompt, self._vocab, "prompt")
        if query in self._queries:
            raise SearchError(f"query {query} has begun already; give each a number of its own")
        path = self._keeper.new_root(list(prompt), judged=self._judged)
        self._loop.post(lambda _: self._keeper.read_root(path))
        node, found = Node(query), _Query(seed, tuple(prompt), self._loop.stats().num_steps)
        found.nodes[node] = _Record(path, None, PathStats(()))
        found.ledger.prefill = len(prompt)
        self._queries[query] = found
        return node

    def fork(self, parent: Node, index: int, *, at: int | None = None) -> Node:
        node = parent.fork(index, -1 if at is None else at)
        query = self._query(parent)
        if (found := query.nodes.get(node)) is not None and found.alive:
            return node
        record = self._record(parent)
        known = record.known if at is None else first(record.known, at)
        path = self._keeper.fork(record.path, len(query.prompt) + known.n_tokens)
        query.nodes[node] = _Record(path, parent, known)
        return node

    def extend(self, n: Node, g: Gen, *, prio: Prio = Prio.COMMIT) -> Awaitable[Step]:
        record, query = self._record(n), self._query(n)
        future: asyncio.Future[Step] = self._asyncio.create_future()
        if record.running is not None:
            return _failed(future, f"{n} is being extended; wait for that, or fork")
        if g.route is not None and (why := self._keeper.cannot_refine(g.route)):
            return _failed(future, why)
        record.running, record.prio = future, prio
        query.ledger.calls += 1
        self._extend(n, record, g, prio, (), partial(self._extended, n, record, g))
        return future

    def _extend(
        self,
        n: Node,
        record: _Record,
        g: Gen,
        prio: Prio,
        suffix: Sequence[int],
        done: Callable[[Extension], None],
    ) -> None:
        if record.seed is None:
            record.seed = words_of(self._query(n).seed, n.path)
        stops = self._eos_ids.union(g.stop) if g.stop else self._eos_ids
        record.flying = True
        self._flying += 1
        answer = partial(self._deliver, done)
        arguments = record.path, g, record.seed, stops, int(prio), suffix, answer
        self._loop.post(lambda _: self._keeper.extend(*arguments))

    def score(self, n: Node, *, scorer: str = "prm", prio: Prio = Prio.COMMIT) -> Awaitable[float]:
        record = self._record(n)
        if scorer not in self._scorers:
            known = ", ".join(self._scorers)
            raise SearchError(f"there is no scorer {scorer!r}; there are {known}")
        if (running := record.scoring.get(scorer)) is not None:
            return running
        task = asyncio.ensure_future(self._scorers[scorer](self, n))
        record.scoring[scorer] = task
        task.add_done_callback(partial(self._scored, n, record, scorer))
        return task

    def probe(self, n: Node, suffix: Sequence[int], max_tokens: int) -> Awaitable[Step]:
        record, query = self._record(n), self._query(n)
        check_ids("the suffix of a probe", suffix, self._vocab, "suffix")
        future: asyncio.Future[Step] = self._asyncio.create_future()
        path = self._keeper.fork(record.path, len(query.prompt) + record.known.n_tokens)
        node = Node(n.query, (*n.path, (-1, query.ledger.calls)))
        probe = _Record(path, n, record.known, running=future)
        query.nodes[node] = probe
        query.ledger.calls += 1
        query.ledger.prefill += len(suffix)
        g = Gen(max_tokens, temperature=0.0)

        def done(extension: Extension) -> None:
            self._extended(node, probe, g, extension, silent=True)
            self.release(node)

        self._extend(node, probe, g, Prio.COMMIT, tuple(suffix), done)
        return future

    def follow(self, parent: Node, index: int, tokens: Sequence[int]) -> Node:
        """A fork that goes on with tokens which somebody else has drawn; a reward head may read it.

        Raises:
            RequestError: it would be longer than the context.
        """
        node = self.fork(parent, index)
        query, record = self._query(node), self._record(node)
        record.known = replace(record.known, tokens=(*record.known.tokens, *tokens))
        length, longest = len(query.prompt) + record.known.n_tokens, self._keeper.max_model_len
        if length > longest:
            self.release(node)
            raise RequestError(f"a path of {length} tokens is longer than {longest}", "prompt")
        query.ledger.prefill += len(tokens)
        self._loop.post(lambda _: self._keeper.follow(record.path, tokens))
        return node

    async def weigh(self, n: Node, suffix: Sequence[int], token: int) -> float:
        """The log-probability of a token behind a suffix, on a fork that is thrown away.

        Raises:
            SearchError: the context has no room for it, or the engine failed.
        """
        record, query = self._record(n), self._query(n)
        future: asyncio.Future[float] = self._asyncio.create_future()

        def done(end: Extension) -> None:
            if future.done():
                return
            if end.stats:
                future.set_result(end.stats[0][0])
            else:
                why = end.error or "the context has no room for the question"
                future.set_exception(SearchError(f"{n} cannot be asked: {why}"))

        self.charge(n.query, len(suffix) + 1)
        at = len(query.prompt) + record.known.n_tokens
        path, answer = self._keeper.fork(record.path, at), partial(self._deliver, done)
        self._loop.post(lambda _: self._keeper.weigh(path, tuple(suffix), token, answer))
        return await future

    def charge(self, query: int, tokens: int) -> None:
        """Enters tokens that a scorer has read or written."""
        self._queries[query].ledger.scorer += tokens

    # ---- ends ---------------------------------------------------------------------------

    def promote(self, n: Node) -> None:
        record, ledger = self._record(n), self._query(n).ledger
        if record.prio is Prio.SPEC:
            record.prio = Prio.COMMIT
            ledger.spec_waste -= record.made
            ledger.spec_hit += record.made
            ledger.committed += record.made
            self._loop.post(lambda _: self._keeper.promote(record.path))

    def cancel(self, n: Node, *, subtree: bool = True) -> None:
        query = self._query(n)
        self._record(n)
        depth = len(n.path)
        for node, record in list(query.nodes.items()):
            below = subtree and node.path[:depth] == n.path
            if record.alive and (below or node == n):
                self._end(node, record)

    def _end(self, n: Node, record: _Record) -> None:
        record.alive = False
        self._land(record)
        self._loop.post(lambda _: self._keeper.cancel(record.path))
        cancelled = Cancelled(f"{n} was cancelled")
        if (running := record.running) is not None and not running.done():
            _fail(running, cancelled)
            self._tell(n, Failed(n, cancelled))
        for scoring in record.scoring.values():
            scoring.cancel()

    def _land(self, record: _Record) -> None:
        self._flying -= record.flying
        record.flying = False

    def release(self, n: Node) -> None:
        record = self._query(n).nodes.get(n)
        if record is not None:
            record.alive = False
            self._loop.post(lambda _: self._keeper.release(record.path))

    def close(self, query: int) -> Ledger:
        found = self._queries.get(query)
        if found is None or found.closed:
            return replace(found.ledger) if found else Ledger()
        found.closed = True
        found.events.put_nowait(None)
        with suppress(EngineError):  # an engine that is shut down has nothing to give back
            for node, record in list(found.nodes.items()):
                if record.alive:
                    self._end(node, record)
            root = found.nodes[Node(query)].path
            self._loop.call(lambda _: self._keeper.leave(root))  # what was running has ended
            self._drain()
            found.ledger.critical_steps = self._loop.stats().num_steps - found.steps
        for scorer in self._scorers.values():
            if isinstance(scorer, Batched):
                scorer.close(query)
        return replace(found.ledger)

    # ---- what is known --------------------------------------------------------------------

    def stats(self, n: Node) -> PathStats:
        record = self._query(n).nodes.get(n)
        if record is None:
            raise DeadPathError(f"{n} never was; fork it first")
        return record.known

    def said(self, n: Node) -> Said:
        """The path as scorers are given it."""
        return Said(n, self._query(n).prompt, self.stats(n).tokens, self._decode)

    async def events(self, query: int) -> AsyncIterator[Event]:
        found = self._queries[query]
        while (event := await found.events.get()) is not None:
            yield event

    def capacity(self) -> Capacity:
        """A snapshot that knows of what the engine has not been told yet."""
        found = self._keeper.capacity()
        more = self._flying - found.live_rows
        if more <= 0:
            return found
        free = max(found.free_rows - more, 0)
        return replace(found, live_rows=self._flying, free_rows=free)

    def ledger(self, query: int) -> Ledger:
        return replace(self._queries[query].ledger)

    def log_odds(self, n: Node, as_: Callable[[float], float] = float) -> asyncio.Future[float]:
        """Of a reward head, that the path is right so far; or what `as_` makes of that.

        Raises:
            SearchError: no reward head is loaded, or the engine failed.
        """
        future: asyncio.Future[float] = self._asyncio.create_future()
        record = self._record(n)

        def done(value: float | Exception) -> None:
            if future.done():
                return
            if isinstance(value, Exception):
                future.set_exception(SearchError(str(value)))
            else:
                future.set_result(as_(value + self._prior))

        answer = partial(self._deliver, done)
        self._loop.post(lambda _: self._keeper.score(record.path, answer))
        return future

    def _query(self, n: Node) -> _Query:
        found = self._queries.get(n.query)
        if found is None:
            raise DeadPathError(f"{n}: query {n.query} never began; ask for a root first")
        return found

    def _record(self, n: Node) -> _Record:
        found = self._query(n).nodes.get(n)
        if found is None or not found.alive:
            state = "never was; fork it first" if found is None else "was cancelled or released"
            raise DeadPathError(f"{n} {state}")
        return found

    # ---- what arrives -----------------------------------------------------------------------

    def _deliver(self, done: Callable[[Any], None], value: Any) -> None:
        """Calls `done` on the event loop; on the engine's thread, and once for many."""
        self._arrived.append(partial(done, value))
        if not self._awake:
            self._awake = True
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._asyncio.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._awake = False
        while self._arrived:
            self._arrived.popleft()()

    def _extended(
        self, n: Node, record: _Record, g: Gen, end: Extension, *, silent: bool = False
    ) -> None:
        query, count = self._query(n), len(end.tokens)
        self._land(record)
        record.made += count
        spend(query.ledger, record.prio, count)
        query.ledger.effective += end.passes
        query.ledger.peak_pages = max(query.ledger.peak_pages, self._keeper.pages_in_use())
        step = step_of(end, g, self._eos_ids)
        record.known = longer(record.known, step, end.routes)
        future, record.running = record.running, None
        if future is None or future.done():
            return  # given up meanwhile
        if end.error is not None:
            error = SearchError(f"{n} cannot be extended: {end.error}")
            _fail(future, error)
            self._tell(n, Failed(n, error))
            return
        future.set_result(step)
        if not silent:
            self._tell(n, StepDone(n, step))

    def _scored(self, n: Node, record: _Record, scorer: str, task: asyncio.Future[float]) -> None:
        record.scoring.pop(scorer, None)
        if task.cancelled():
            self._tell(n, Failed(n, Cancelled(f"{n} was cancelled")))
        elif (error := task.exception()) is not None:
            failure = error if isinstance(error, Exception) else SearchError(repr(error))
            self._tell(n, Failed(n, failure))
        else:
            scores = {**(record.known.scores or {}), scorer: task.result()}
            record.known = replace(record.known, scores=scores)
            self._tell(n, Scored(n, scorer, task.result()))

    def _tell(self, n: Node, event: Event) -> None:
        if not (query := self._query(n)).closed:
            query.events.put_nowait(event)
            if self._on_event is not None:
                self._on_event(event)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    """Ends a future that nobody need look at: what became of it may be read as an event instead."""
    future.set_exception(error)
    future.exception()


def _failed(future: asyncio.Future[Step], why: str) -> asyncio.Future[Step]:
    _fail(future, SearchError(why))
    return future
