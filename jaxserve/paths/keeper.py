"""Paths between their extensions, on the engine's thread: their tokens, and the pages they rest on.

An extension is a sequence like any other. What it leaves when it ends is kept by its path, so that
the next extension, or that of a fork, goes on where it was. Pages of resting paths are given back
when the engine runs out of them, speculation first: such a path finds what the prefix index still
knows of it, and computes the rest again.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from jaxserve.engine.engine import Engine
from jaxserve.engine.sequence import Sequence as Seq
from jaxserve.errors import EngineError
from jaxserve.protocol import Capacity, Gen
from jaxserve.request import CompletionOutput, RequestMetrics, RouteNoise, SamplingParams


@dataclass(frozen=True)
class Extension:
    """How an extension ended.

    Attributes:
        tokens: that were drawn.
        stats: of each, as `sampler.observe`.
        routes: of each, the experts that were asked in every layer; empty if nobody notes them.
        error: why there are no more; None: it stopped of itself.
        passes: that refining them took, beyond one for each.
    """

    tokens: list[int]
    stats: list[list[float]]
    error: BaseException | None = None
    routes: tuple[tuple[int, ...], ...] = ()
    passes: int = 0


class Path:
    """A path's tokens, keys and evidence. Everything in it belongs to the engine's thread.

    A fork has nothing of its own until it is extended. The evidence of a reward head is kept as
    running sums, from the first token that the path computes itself, if the path is `judged`.
    """

    __slots__ = (
        "_evidence", "_first", "_keeper", "_scores", "at", "computed", "dead", "held", "judged",
        "keys", "pages", "parent", "published", "rank", "seq", "speculative", "tokens", "waiting",
    )  # fmt: skip

    def __init__(self, keeper: Keeper, parent: Path | None, at: int, rank: int):
        self._keeper, self.parent, self.at, self.rank = keeper, parent, at, rank
        self.tokens: list[int] | None = None  # a fork's, until it is extended
        self.judged = parent is not None and parent.judged
        self.pages: list[int] = []
        self.keys: list[bytes] = []
        self.computed = self.published = 0
        self.held = True  # pages may rest with it
        self.dead = self.speculative = False
        self.seq: Seq | None = None  # while it is extended or read
        self.waiting: list[Callable[[], None]] = []  # until it has been read
        self._first = 0
        self._evidence: list[float] = []
        self._scores: list[tuple[int, Callable[[float | Exception], None]]] = []

    # ---- as the scheduler sees it -------------------------------------------------------

    def take(self, seq: Seq) -> None:
        """Takes over the pages of an extension that ends."""
        self.pages, self.computed = seq.pages, min(seq.computed, len(seq.tokens))
        self.keys, self.published = seq.keys, min(seq.published, len(seq.pages))
        seq.pages = []
        self.seq = None
        self._keeper.rest(self)

    def see(self, start: int, evidence: Sequence[float]) -> None:
        """Notes what tokens from `start` on say; rows that are computed again say nothing new."""
        known = self._first + len(self._evidence) - start
        if 0 <= known < len(evidence):
            total = self.log_odds(known + start)
            if len(evidence) == 1:
                self._evidence.append(total + evidence[0])
            else:
                self._evidence += list(itertools.accumulate(evidence[known:], initial=total))[1:]
            if self._scores:
                self._answer()

    # ---- evidence -----------------------------------------------------------------------

    @property
    def num_judged(self) -> int:
        """Tokens from the first on whose evidence is known."""
        return self._first + len(self._evidence)

    def log_odds(self, count: int) -> float:
        """Of the first `count` tokens, which have been judged; without the prior."""
        if count > self._first:
            return self._evidence[count - self._first - 1]
        return self.parent.log_odds(count) if self.parent is not None and count else 0.0

    def give_up(self, error: Exception) -> None:
        """Nobody will know."""
        scores, self._scores = self._scores, []
        for _, answer in scores:
            answer(error)

    def ask(self, count: int, answer: Callable[[float | Exception], None]) -> None:
        """Calls `answer` with the log-odds of the first `count` tokens once they are known."""
        self._scores.append((count, answer))
        self._answer()

    @property
    def asked(self) -> int:
        """Tokens that somebody waits for the evidence of; 0: nobody does."""
        return max((count for count, _ in self._scores), default=0)

    def _answer(self) -> None:
        ready = [s for s in self._scores if s[0] <= self.num_judged]
        self._scores = [s for s in self._scores if s[0] > self.num_judged]
        for count, answer in ready:
            answer(self.log_odds(count))

    # ---- forks --------------------------------------------------------------------------

    def begin(self) -> list[int]:
        """Its tokens. A fork that had none yet takes its parent's, on the parent's pages."""
        if self.tokens is not None:
            return self.tokens
        parent = self.parent
        assert parent is not None, "roots have tokens"
        self.tokens = parent.begin()[: self.at]
        self._first = min(self.at, parent.num_judged)
        owner = parent.seq or parent
        self.computed = max(min(owner.computed, self.at - 1), 0)
        self.pages = self._keeper.shared(self.rank, owner.pages, self.computed)
        if not self.pages:
            self.computed = 0
        size = self._keeper.page_size
        self.keys = owner.keys[: self.computed // size]
        self.published = min(owner.published, self.computed // size)
        self._keeper.rest(self)
        return self.tokens


class _Waiter:
    """A generation whose tokens nobody reads one by one."""

    prompt_logprobs = None
    embedding = None

    def __init__(self, name: str, done: Callable[[CompletionOutput | BaseException], None]):
        self.request_id, self._done = name, done
        self.num_cached_tokens = 0
        self.metrics = RequestMetrics(arrival_time=time.monotonic())

    def put(self, item: CompletionOutput | BaseException) -> None:
        if isinstance(item, BaseException) or item.finished:
            self._done(item)


_CERTAIN = 1e9  # a bias that no logit outweighs


@lru_cache(maxsize=256)
def _params(temperature: float, top_p: float, forced: int | None = None) -> SamplingParams:
    bias = {} if forced is None else {forced: _CERTAIN}
    return SamplingParams(temperature=temperature, top_p=top_p, logit_bias=bias)


class Keeper:
    """All paths of an engine.

    Args:
        root: parent of a prompt's first page in the prefix index.
        max_model_len: most tokens of a path, prompt included.
    """

    def __init__(self, engine: Engine, root: bytes, max_model_len: int):
        self._engine, self._root, self.max_model_len = engine, root, max_model_len
        self.page_size = engine.runner.plan.page_size
        self._resting: list[dict[Path, None]] = [{} for _ in engine.ranks]  # oldest first
        self._asked: set[Path] = set()
        self._roots: set[Path] = set()  # of searches under way
        self._names = itertools.count()
        self._judges = engine.runner.reward_head is not None
        engine.after_loss = self._lose_all
        engine.expects = lambda: bool(self._roots)
        for rank, resting in zip(engine.ranks, self._resting, strict=True):
            rank.reclaim = partial(self._reclaim, resting)

    # ---- verbs --------------------------------------------------------------------------

    def new_root(self, tokens: list[int], *, judged: bool = True) -> Path:
        """A path of a prompt; `read_root` is to follow. On any thread."""
        ranks = self._engine.ranks
        path = Path(self, None, 0, min(range(len(ranks)), key=lambda r: ranks[r].num_queued))
        path.tokens, path.judged = tokens, judged and self._judges
        return path

    def read_root(self, path: Path) -> None:
        """Computes a prompt once for all forks, but for its last token, which each begins with."""
        assert path.tokens is not None
        self._roots.add(path)
        if len(path.tokens) > 1:
            self._read(path, len(path.tokens) - 1, lambda _: self._begin_waiting(path))

    def leave(self, root: Path) -> None:
        """Its search is over."""
        self._roots.discard(root)

    def fork(self, parent: Path, at: int) -> Path:
        """A path that begins with `at` tokens of another. On any thread: nothing happens."""
        return Path(self, parent, at, parent.rank)

    def extend(
        self,
        path: Path,
        gen: Gen,
        seed: tuple[int, int],
        stop_ids: frozenset[int],
        priority: int,
        suffix: Sequence[int],
        done: Callable[[Extension], None],
        forced: int | None = None,
    ) -> None:
        """Draws a path's next tokens, or one that is `forced`; behind `suffix`, if there is one."""
        if (source := _reading(path)) is not None:
            again = partial(self.extend, path, gen, seed, stop_ids, priority, suffix, done, forced)
            source.waiting.append(again)
            return
        if path.dead or path.seq is not None:
            state = "gone" if path.dead else "being extended already"
            done(Extension([], [], EngineError(f"the path is {state}")))
            return
        tokens = path.begin()
        tokens += suffix
        if len(tokens) >= self.max_model_len:
            done(Extension([], []))
            return
        path.speculative = bool(priority)
        seq = self._sequence(path, tokens, _params(gen.temperature, gen.top_p, forced))
        seq.max_len = min(self.max_model_len, len(tokens) + gen.max_tokens)
        seq.seed, seq.stop_ids, seq.priority = seed, stop_ids, priority
        seq.observed, seq.confidence_k = [], gen.topk_logprobs
        seq.route = gen.route if gen.route is not None and gen.route.K > 1 else None
        seq.routes = [] if self._engine.runner.plan.notes_routes else None
        self._start(path, seq, partial(_ended, seq, done))

    def weigh(
        self, path: Path, suffix: Sequence[int], token: int, done: Callable[[Extension], None]
    ) -> None:
        """Has a fork say one token behind a suffix, so that it is known how likely that was; the
        fork is given up."""

        def end(extension: Extension) -> None:
            done(extension)
            self.release(path)

        self.extend(path, Gen(1, 0.0), (0, 0), frozenset(), 0, suffix, end, forced=token)

    def follow(self, path: Path, tokens: Sequence[int]) -> None:
        """Lets a fork go on with tokens that somebody else has drawn."""
        if (source := _reading(path)) is not None:
            source.waiting.append(partial(self.follow, path, tokens))
        else:
            path.begin().extend(tokens)

    def score(self, path: Path, done: Callable[[float | Exception], None]) -> None:
        """Log-odds, without the prior, that a path is right so far; an error if nobody can say."""
        if not path.judged:
            why = "the search was begun with another scorer" if self._judges else "none is loaded"
            done(EngineError(f"no reward head has looked at the path: {why}"))
            return
        if (source := _reading(path)) is not None:
            source.waiting.append(partial(self.score, path, done))
            return
        if path.seq is not None:
            done(EngineError("the path is being extended; score it when that is over"))
            return
        count = len(path.begin())
        self._asked.add(path)
        path.ask(count, partial(self._answered, path, done))
        self._find_out(path)

    def promote(self, path: Path) -> None:
        """What it is and does is no speculation any more."""
        path.speculative = False
        if path.seq is not None:
            self._engine.ranks[path.rank].promote(path.seq)

    def cancel(self, path: Path) -> None:
        """Ends what runs of it, now, and lets nothing of it begin."""
        path.dead = True
        self.release(path)
        if path.seq is not None:
            self._engine.abort(path.seq.generation.request_id)

    def release(self, path: Path) -> None:
        """Its pages go back, now or when what runs of it has ended."""
        path.held = False
        if path.seq is None:
            self._drop(path)

    # ---- on any thread ------------------------------------------------------------------

    def cannot_refine(self, route: RouteNoise) -> str | None:
        """Why tokens cannot be refined as is asked, and what to do; None: they can."""
        runner = self._engine.runner
        if route.K == 1:
            return None
        if not runner.plan.refines:
            why = "the model has no experts to choose among; leave route out"
            if runner.cfg.router is not None:
                setting = "enable_route_noise=True (--enable-route-noise)"
                why = f"the engine was started without the programs; start it with {setting}"
            return f"route: tokens cannot be refined by several routings: {why}"
        if (layers := runner.num_routers) <= 2 * route.spared:
            return (
                f"route: spared={route.spared} leaves none of the model's {layers} layers with "
                f"experts to refine; the most is {(layers - 1) // 2}"
            )
        return None

    def capacity(self) -> Capacity:
        """A snapshot, which may be a step old."""
        ranks = self._engine.ranks
        live = sum(len(r.running) + len(r.waiting) + len(r.speculative) for r in ranks)
        pace = self._engine.pace
        return Capacity(
            free_rows=sum(rank.free_rows for rank in self._engine.ranks),
            ridge=sum(rank.ridge for rank in self._engine.ranks),
            live_rows=live,
            free_pages=sum(rank.pages.num_free for rank in self._engine.ranks),
            doubles=pace.doubles,
            step=pace.seconds(live) or None,
        )

    def pages_in_use(self) -> int:
        return sum(rank.pages.num_pages - rank.pages.num_free for rank in self._engine.ranks)

    # ---- sequences ----------------------------------------------------------------------

    def _sequence(self, path: Path, tokens: list[int], params: SamplingParams) -> Seq:
        """A sequence that owns the path's pages for as long as it runs."""
        self._resting[path.rank].pop(path, None)
        seq = Seq(
            tokens, len(tokens), params, None, self._root,  # type: ignore[arg-type]
            computed=min(path.computed, len(tokens) - 1), pages=path.pages, keys=path.keys,
            published=path.published, rank=path.rank, rest=path, judged=path.judged,
        )  # fmt: skip
        path.pages, path.seq = [], seq
        return seq

    def _start(self, path: Path, seq: Seq, done: Callable[[Any], None]) -> None:
        seq.generation = _Waiter(f"path-{next(self._names)}", done)  # type: ignore[assignment]
        self._engine.add_path(seq)

    def _read(self, path: Path, count: int, done: Callable[[Any], None]) -> None:
        """Computes the first `count` tokens."""
        assert path.tokens is not None
        seq = self._sequence(path, path.tokens[:count], _params(1.0, 1.0))
        seq.reads, seq.max_len = True, count + 1
        self._start(path, seq, done)

    def _find_out(self, path: Path) -> None:
        """Computes tokens of whose evidence somebody waits, if no step on its way does."""
        if path.asked <= path.num_judged:
            self._asked.discard(path)
        elif path.computed < path.asked and path.seq is None:
            self._read(path, path.asked, partial(self._found_out, path))

    def _found_out(self, path: Path, last: CompletionOutput | Exception) -> None:
        if isinstance(last, Exception) or last.finish_reason == "abort":
            path.give_up(last if isinstance(last, Exception) else EngineError("aborted"))
        self._begin_waiting(path)

    def _answered(
        self, path: Path, done: Callable[[float | Exception], None], value: float | Exception
    ) -> None:
        if path.asked == 0:
            self._asked.discard(path)
        done(value)

    def _begin_waiting(self, path: Path) -> None:
        """Does what was asked of a path while it was being read."""
        waiting, path.waiting = path.waiting, []
        for begin in waiting:
            begin()

    # ---- pages --------------------------------------------------------------------------

    def shared(self, rank: int, pages: Sequence[int], computed: int) -> list[int]:
        """The pages of so many tokens, with one owner more each."""
        found = list(pages[: -(-computed // self.page_size)])
        self._engine.ranks[rank].pages.share(found)
        return found

    def rest(self, path: Path) -> None:
        """Keeps the pages of a path of which nothing runs."""
        if not path.held:
            self._drop(path)
        elif path.pages:
            self._resting[path.rank][path] = None

    def _drop(self, path: Path) -> None:
        self._resting[path.rank].pop(path, None)
        self._engine.ranks[path.rank].pages.release(path.pages)
        path.pages, path.computed, path.published = [], 0, 0

    def _reclaim(self, resting: dict[Path, None]) -> bool:
        """Takes the pages of the path that has rested longest, of speculation if there is any."""
        speculation = (path for path in resting if path.speculative)
        path = next(speculation, None) or next(iter(resting), None)
        if path is not None:
            self._drop(path)
        return path is not None

    def _lose_all(self) -> None:
        """What pages hold is about to change."""
        for path in (path for resting in self._resting for path in list(resting)):
            self._drop(path)
        for path in list(self._asked):
            self._find_out(path)


def _reading(path: Path) -> Path | None:
    """The root that a path's first extension waits for, if it is still being read."""
    at: Path | None = path
    while at is not None and at.tokens is None:
        at = at.parent
    return at if at is not None and at.seq is not None and at.seq.reads else None


def _ended(
    seq: Seq, done: Callable[[Extension], None], last: CompletionOutput | BaseException
) -> None:
    error = last if isinstance(last, BaseException) else None
    tokens = seq.tokens[seq.prompt_len :]
    routes = tuple(map(tuple, seq.routes or ()))
    done(Extension(tokens, seq.observed or [], error, routes, seq.passes))
