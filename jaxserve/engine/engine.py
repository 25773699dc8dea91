"""The engine: schedule, launch, and read the step before.

Step N + 1 is launched before step N is read: its input tokens are on the device already, so the
host's work hides behind the device's. What is only known on reading (a stop token) costs one wasted
row, whose result is dropped.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from jax import Array

from jaxserve.cache.page_manager import PageManager
from jaxserve.engine.compile_watch import watch
from jaxserve.engine.output import TokenText, advance, goes_on, not_finite, token_logprobs
from jaxserve.engine.pace import Pace
from jaxserve.engine.programs import Forward
from jaxserve.engine.runner import Launched, Runner
from jaxserve.engine.sampler import Sampled
from jaxserve.engine.scheduler import Row, Scheduler, Step
from jaxserve.engine.sequence import Sequence
from jaxserve.errors import EngineError, RequestError
from jaxserve.request import CompletionOutput, EmbeddingOutput

log = logging.getLogger(__name__)

_IN_FLIGHT = 2  # steps launched and not read


@dataclass(frozen=True)
class EngineStats:
    """A snapshot; token counts are since start-up.

    `shared_keys_total` counts keys of shared prefixes that steps need not read again, since a row's
    neighbour has them too: in each full-attention layer, and as far as one program of a kernel
    has both rows. `num_rebalances` counts the times that experts moved.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_pages: int = 0
    num_free_pages: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    shared_keys_total: int = 0
    num_preemptions: int = 0
    num_rebalances: int = 0
    num_steps: int = 0
    num_compiled_programs: int = 0
    compiles_after_warmup: int = 0
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    host_seconds_total: float = 0.0
    requests_total: dict[str, int] = field(default_factory=dict)


class Engine:
    """Serves sequences to their generations. Not thread-safe: one thread calls everything."""

    def __init__(self, runner: Runner, *, prefix_caching: bool = True, token_text: TokenText = str):
        plan = runner.plan
        self.runner = runner
        self.ranks = [
            Scheduler(
                PageManager(plan.num_pages, plan.page_size),
                plan.max_num_seqs,
                prefix_caching=prefix_caching,
                fill=partial(_program_rows, plan.row_buckets),
            )
            for _ in range(plan.num_ranks)
        ]
        self.params_version = 0
        self.explain = lambda error: EngineError(f"the step failed: {error}")
        self._token_text = token_text
        self._in_flight: deque[Launched] = deque()
        self._requests: dict[str, list[Sequence]] = {}
        self._swaps: deque[tuple[Any, Future[int]]] = deque()
        self._warm_compiles: int | None = None
        self.after_step: Callable[[int], None] = lambda num_steps: None
        self.after_loss: Callable[[], None] = lambda: None  # of all that pages held
        self.expects: Callable[[], bool] = lambda: False  # more, of what has begun
        self._load: Any = 0  # [L, E], as far as it has been read
        self._rebalances = 0
        self._steps = self._prompt_tokens = self._output_tokens = self._shared_pages = 0
        self._host_seconds = 0.0
        self.pace = Pace()
        self._last_read: float | None = None  # None: the device has been idle since
        self._finished: Counter[str] = Counter()

    # ---- requests -----------------------------------------------------------------------

    def add(self, sequences: list[Sequence]) -> None:
        """Queues the sequences of one request. They share its prompt: the first one computes it."""
        head = sequences[0]
        name = head.generation.request_id
        if name in self._requests:
            head.generation.put(RequestError(f"{name} is already being served", "request_id"))
            return
        self._requests[name] = list(sequences)
        head.siblings = sequences[1:]
        self._prompt_tokens += head.prompt_len
        rank = min(range(len(self.ranks)), key=lambda r: self.ranks[r].num_queued)
        for seq in sequences:
            seq.rank = rank
        self.ranks[rank].add(head)

    def add_path(self, seq: Sequence) -> None:
        """Queues an extension of a path, on the rank that has its pages."""
        self._requests[seq.generation.request_id] = [seq]
        self.ranks[seq.rank].add(seq)

    def abort(self, request_id: str) -> None:
        """Ends a request at once; unknown ids are ignored, since it may just have finished."""
        for seq in list(self._requests.get(request_id, ())):
            self._end(seq, CompletionOutput(seq.index, finish_reason="abort"))

    def fail(self, error: BaseException, sequences: Iterable[Sequence] | None = None) -> None:
        """Ends requests with an error; all of them, if none are named."""
        for seq in list(sequences or [s for group in self._requests.values() for s in group]):
            self._end(seq, error)

    def _fail_request(self, seq: Sequence, error: EngineError, *, distrusted: bool) -> None:
        """Ends a sequence and its siblings; where scores were broken, so may be what is cached."""
        group = self._requests[seq.generation.request_id]
        for each in group if distrusted else ():
            self.ranks[each.rank].distrust(each)
        self.fail(error, group)

    def close(self, error: BaseException) -> None:
        """Ends everything that waits for the engine."""
        self.fail(error)
        self._forget_steps(error)
        self.after_loss()
        self.fail(error)
        while self._swaps:
            self._swaps.popleft()[1].set_exception(error)

    def _end(self, seq: Sequence, last: CompletionOutput | BaseException) -> None:
        if seq.finished:
            return
        self.ranks[seq.rank].finish(seq)
        group = self._requests[seq.generation.request_id]
        group.remove(seq)
        if not group:
            del self._requests[seq.generation.request_id]
        reason = last.finish_reason if isinstance(last, CompletionOutput) else "error"
        self._finished[reason or "stop"] += 1
        seq.generation.put(last)

    def load_params(self, params: Any) -> Future[int]:
        """Serves other weights as soon as every request that has begun is over; their version.

        Requests that have not begun wait for them, so no request sees two versions. What is cached
        was computed with the old weights, and is forgotten.
        """
        future: Future[int] = Future()
        self._swaps.append((params, future))
        self._hold(True)
        return future

    def _hold(self, held: bool) -> None:
        for rank in self.ranks:
            rank.held = held

    @property
    def _num_begun(self) -> int:
        return sum(rank.num_begun for rank in self.ranks)

    def _swap(self) -> None:
        params, future = self._swaps.popleft()
        self.runner.params = params
        self.reset_prefix_cache()
        self.params_version += 1
        for rank in self.ranks:
            rank.params_version = self.params_version
        self._hold(bool(self._swaps))
        future.set_result(self.params_version)

    # ---- experts ------------------------------------------------------------------------

    def expert_load(self) -> Future[np.ndarray]:
        """How often each expert was asked for since they were last placed, int64 [L, E].

        The counts leave the device behind the last step launched and are looked at with its
        tokens, so that no step waits for them.
        """
        future: Future[np.ndarray] = Future()
        count = self.runner.take_load(), future
        if self._in_flight:
            self._in_flight[-1].counts.append(count)
        else:
            self._count(*count)
        return future

    def _count(self, load: Array, future: Future[np.ndarray]) -> None:
        self._load = self._load + np.asarray(load).sum(0, dtype=np.int64)
        future.set_result(self._load)

    def place_experts(self, expert_of: np.ndarray) -> None:
        """Moves experts into other slots [layers that have any, S] between two steps."""
        self.runner.move_experts(np.asarray(expert_of, np.int32))
        self._load = 0
        self._rebalances += 1

    @property
    def busy(self) -> bool:
        """Whether somebody is being served, a search that thinks about its next steps included."""
        return self.has_work or self.expects()

    @property
    def has_work(self) -> bool:
        return bool(self._requests or self._in_flight or self._swaps)

    # ---- steps --------------------------------------------------------------------------

    def step(self) -> None:
        """Launches the next step and reads the one before it.

        Raises:
            Exception: whatever the device raised; every request has been failed with it.
        """
        while self._swaps and not self._in_flight and not self._num_begun:
            self._swap()
        started = time.perf_counter()
        try:
            launched = self._launch()
            self._host_seconds += time.perf_counter() - started
            if self._in_flight and (not launched or len(self._in_flight) >= _IN_FLIGHT):
                self._read_next()
        except Exception as error:
            self._recover(error)
            raise

    def _launch(self) -> bool:
        limits = self.runner.limits
        steps = [rank.schedule(*limits) for rank in self.ranks]
        if not any(step.rows for step in steps):
            if not self._in_flight and self._requests:
                if self._swaps and not self._num_begun:
                    return False  # they wait for other weights, which come with the next step
                stuck = [s for group in self._requests.values() for s in group]
                self.fail(
                    EngineError("no pages are left for this request; raise num_pages"), stuck[:1]
                )
            return False
        if (repeats := self.runner.max_repeats(steps)) > 1:
            self.ranks[0].repeat(steps[0], repeats)
        self._in_flight.append(self.runner.launch(steps))
        self._steps += 1
        self.after_step(self._steps)
        self._shared_pages += sum(step.shared_pages for step in steps)
        return True

    def _read_next(self) -> None:
        """Reads the oldest step, and the time since the one before it."""
        launched = self._in_flight.popleft()
        self._read(launched)
        now, before = time.perf_counter(), self._last_read
        rows = sum(len(step.rows) for step in launched.steps)
        if before is not None and all(step.decodes for step in launched.steps):
            self.pace.see(rows, now - before)
        self._last_read = now if self._in_flight else None

    def _read(self, launched: Launched) -> None:
        """Waits for a step and hands its tokens out."""
        launched.wait()
        started = time.perf_counter()
        if launched.scored:
            self._read_prompt_logprobs(launched)
        if any(step.pools for step in launched.steps):
            self._read_hidden(launched)
        if launched.evidence is not None:
            self._read_evidence(launched, launched.evidence)
        if launched.observes and launched.forward is not None:
            _read_routes(launched, launched.forward)
        if launched.sampled is not None:
            self._read_tokens(launched, launched.sampled)
        if any(step.reads for step in launched.steps):
            self._end_readings(launched)
        for count in launched.counts:
            self._count(*count)
        self._host_seconds += time.perf_counter() - started

    def _read_tokens(self, launched: Launched, sampled: Sampled) -> None:
        tokens = np.atleast_2d(np.asarray(sampled.tokens)).tolist()  # [repeats, ranks * R]
        alternatives = [np.asarray(a) for a in sampled[1:5]] if launched.reports else None
        stats = np.asarray(sampled.stats).tolist() if launched.observes else None
        passes = None if launched.passes is None else np.asarray(launched.passes).tolist()
        width = len(tokens[0]) // len(launched.steps)
        for rank, step in enumerate(launched.steps):
            for drawn in tokens[: step.repeats]:
                for r, row in enumerate(step.rows, rank * width):
                    if row.samples:
                        seq = row.seq
                        if stats is not None and seq.observed is not None and not seq.finished:
                            seq.observed.append(stats[r])
                        if passes is not None and not seq.finished:
                            seq.passes += passes[r]
                        if goes_on(seq, drawn[r]):
                            self._counted(seq)
                        else:
                            self._token(seq, drawn[r], r, alternatives)

    def _read_evidence(self, launched: Launched, evidence: Array) -> None:
        found = np.asarray(evidence).tolist()
        for row, at in _rows(launched.steps, len(found)):
            if row.seq.rest is not None:
                row.seq.rest.see(row.start, found[at : at + row.count])

    def _end_readings(self, launched: Launched) -> None:
        """Ends sequences that draw nothing, and have been read to the end."""
        for step in launched.steps:
            for row in step.rows:
                seq = row.seq
                if seq.reads and not seq.finished and row.start + row.count == len(seq.tokens):
                    self._end(seq, CompletionOutput(0, finish_reason="stop"))

    def _token(
        self, seq: Sequence, token: int, r: int, alternatives: list[np.ndarray] | None
    ) -> None:
        seq.in_flight -= 1
        if seq.finished:
            return  # it ended while this step was on its way
        logprob = None
        if alternatives is not None and seq.params.logprobs is not None:
            n = seq.params.logprobs
            logprob = token_logprobs(token, alternatives, r, n, self._token_text)
        try:
            delta = advance(seq, token, logprob)
        except EngineError as error:  # its siblings have lost their reader
            self._fail_request(seq, error, distrusted=token < 0)
            return
        self._counted(seq)
        if delta.finished:
            self._end(seq, delta)
        else:
            seq.generation.put(delta)

    def _counted(self, seq: Sequence) -> None:
        """A token has come; its page may be full."""
        self._output_tokens += 1
        if len(seq.tokens) // self.runner.plan.page_size > seq.published:
            self.ranks[seq.rank].publish(seq)

    def _read_prompt_logprobs(self, launched: Launched) -> None:
        assert launched.forward is not None, "decode loops score no prompts"
        scores = [np.asarray(s) for s in launched.forward.scores]
        for row, at in _rows(launched.steps, len(scores[0])):
            seq, n = row.seq, row.seq.params.prompt_logprobs
            if n is not None and not seq.finished and row.start < seq.prompt_len - 1:
                found = seq.generation.prompt_logprobs
                assert found, "it begins with the first token's None"
                last = min(row.start + row.count, seq.prompt_len - 1)
                for i in range(len(found) - 1, last):  # a preempted prompt is scored once
                    where, following = at + i - row.start, seq.tokens[i + 1]
                    found.append(token_logprobs(following, scores, where, n, self._token_text))

    def _read_hidden(self, launched: Launched) -> None:
        assert launched.forward is not None, "decode loops embed nothing"
        hidden = np.asarray(launched.forward.hidden, np.float32)
        for row, at in _rows(launched.steps, len(hidden)):
            if row.seq.pooling and not row.seq.finished:
                self._pool(row, hidden[at : at + row.count])

    def _pool(self, row: Row, hidden: np.ndarray) -> None:
        """Adds a chunk's hidden states to an embedding, and hands it out once it is whole."""
        seq = row.seq
        if seq.pooling == "mean":
            total = hidden.sum(0, dtype=np.float64)
            seq.pooled = total if row.start == 0 else seq.pooled + total
        else:
            seq.pooled = hidden[-1]
        if row.start + row.count == seq.prompt_len:
            vector = seq.pooled / (seq.prompt_len if seq.pooling == "mean" else 1)
            if not np.isfinite(vector).all():
                self._fail_request(seq, not_finite(seq), distrusted=True)
                return
            seq.generation.embedding = EmbeddingOutput(vector.tolist(), seq.tokens)
            self._end(seq, CompletionOutput(0, finish_reason="stop"))

    def _recover(self, error: BaseException) -> None:
        """After a failed step nothing on the device can be trusted: start afresh, but start."""
        log.error("step failed; all %d requests end with it", len(self._requests), exc_info=error)
        explained = self.explain(error)
        self._forget_steps(explained)
        self.fail(explained)
        self.reset_prefix_cache()
        if self.runner.kv is not None:
            self.runner.allocate()

    def _forget_steps(self, error: BaseException) -> None:
        while self._in_flight:
            for _, future in self._in_flight.popleft().counts:
                future.set_exception(error)

    # ---- state --------------------------------------------------------------------------

    def mark_warm(self) -> None:
        """From now on, compilations count as `compiles_after_warmup`."""
        self._warm_compiles = watch.compiled

    def reset_prefix_cache(self) -> None:
        for rank in self.ranks:
            rank.pages.forget()
        self.after_loss()

    def stats(self) -> EngineStats:
        after = 0 if self._warm_compiles is None else watch.compiled - self._warm_compiles
        return EngineStats(
            num_running=sum(len(s.running) for s in self.ranks),
            num_waiting=sum(len(s.waiting) for s in self.ranks),
            num_pages=sum(s.pages.num_pages for s in self.ranks),
            num_free_pages=sum(s.pages.num_free for s in self.ranks),
            prefix_cache_queries=sum(s.prefix_queries for s in self.ranks),
            prefix_cache_hits=sum(s.prefix_hits for s in self.ranks),
            shared_keys_total=self._shared_pages * self.runner.plan.page_size,
            num_preemptions=sum(s.num_preemptions for s in self.ranks),
            num_rebalances=self._rebalances,
            num_steps=self._steps,
            num_compiled_programs=self.runner.num_programs,
            compiles_after_warmup=after,
            prompt_tokens_total=self._prompt_tokens,
            generation_tokens_total=self._output_tokens,
            host_seconds_total=self._host_seconds,
            requests_total=dict(self._finished),
        )


def _read_routes(launched: Launched, forward: Forward) -> None:
    """Notes the experts that were asked where a token of a path was drawn."""
    if forward.routes is None:
        return
    routes = np.asarray(forward.routes).T.tolist()
    for row, at in _rows(launched.steps, len(routes)):
        seq = row.seq
        if row.samples and seq.routes is not None and not seq.finished:
            seq.routes.append(routes[at + row.count - 1])


def _program_rows(buckets: Seq[int], rows: int) -> int:
    """Rows of the program that runs a step of `rows`."""
    return next((size for size in buckets if size >= rows), buckets[-1])


def _rows(steps: Seq[Step], num_tokens: int) -> Iterator[tuple[Row, int]]:
    """Rows of a step of all ranks, and where each begins among its tokens [num_tokens], padding
    included."""
    width = num_tokens // len(steps)
    for rank, step in enumerate(steps):
        at = rank * width
        for row in step.rows:
            yield row, at
            at += row.count
