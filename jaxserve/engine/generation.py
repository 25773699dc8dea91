"""A handle on one running request: the engine's thread fills it, any caller drains it.

The same object is read with `for` (a script), with `async for` (a server) or all at once with
`result()`. Deltas are handed over in the order the engine made them and none is lost.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator

from jaxserve.request import (
    CompletionOutput,
    EmbeddingOutput,
    RequestMetrics,
    RequestOutput,
    TokenLogprobs,
)


class Generation:
    """One request in flight.

    Attributes:
        request_id: the engine's name for it.
        prompt_token_ids: the prompt as the engine sees it.
        prompt_logprobs: filled before the first delta is handed over, if asked for.
        num_cached_tokens: prompt tokens that the prefix cache supplied; known with the first delta.
        metrics: clock readings, updated by the engine.
        embedding: the result of a request that pools instead of sampling.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        n: int,
        metrics: RequestMetrics,
        abort: Callable[[str], None],
        prompt: str | None = None,
    ):
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.num_cached_tokens = 0
        self.metrics = metrics
        self.embedding: EmbeddingOutput | None = None
        self._abort = abort
        self._unfinished = self._open = n  # as the caller has seen it, and as the engine has
        self._ended = threading.Event()
        self._n = n
        self._queue: queue.SimpleQueue[CompletionOutput | BaseException] = queue.SimpleQueue()
        self._wake: Callable[[], None] | None = None

    # ---- the engine's side ------------------------------------------------------------

    def put(self, item: CompletionOutput | BaseException) -> None:
        """Hands over a delta, or the error that ends the request. Never blocks."""
        self._queue.put(item)
        self._open -= 1 if isinstance(item, BaseException) else item.finished
        if not self._open or isinstance(item, BaseException):
            self._ended.set()
        if (wake := self._wake) is not None:
            wake()

    # ---- the caller's side ------------------------------------------------------------

    def abort(self) -> None:
        """Stops the request at the next step; its pages are freed. Safe to call twice."""
        self._abort(self.request_id)

    def __iter__(self) -> Iterator[CompletionOutput]:
        """Deltas until every completion has finished; leaving the loop early aborts."""
        try:
            while self._unfinished:
                yield self._take(self._queue.get())
        finally:
            if self._unfinished:
                self.abort()

    async def __aiter__(self) -> AsyncIterator[CompletionOutput]:
        """As `__iter__`; cancelling the task aborts the request."""
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        self._wake = lambda: _call_soon(loop, arrived.set)
        try:
            while self._unfinished:
                try:
                    item = self._queue.get_nowait()
                except queue.Empty:
                    await arrived.wait()
                    arrived.clear()
                    continue
                yield self._take(item)
        finally:
            self._wake = None
            if self._unfinished:
                self.abort()

    def result(self) -> RequestOutput:
        """Waits for the end and joins the deltas. An interrupt aborts the request first."""
        try:
            self._ended.wait()  # one wake-up for all deltas: each costs the engine its turn
        except BaseException:
            self.abort()
            raise
        joined = self._joiner()
        for delta in self:
            joined.add(delta)
        return joined.output()

    async def aresult(self) -> RequestOutput:
        """`result` for an event loop."""
        joined = self._joiner()
        async for delta in self:
            joined.add(delta)
        return joined.output()

    def _take(self, item: CompletionOutput | BaseException) -> CompletionOutput:
        if isinstance(item, BaseException):
            self._unfinished = 0
            raise item
        self._unfinished -= item.finished
        return item

    def _joiner(self) -> _Joiner:
        return _Joiner(self, [CompletionOutput(i) for i in range(self._n)])


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    if not loop.is_closed():  # the reader is gone; its request is being aborted
        loop.call_soon_threadsafe(callback)


class _Joiner:
    """Adds deltas up to whole completions."""

    def __init__(self, generation: Generation, outputs: list[CompletionOutput]):
        self._generation, self._outputs = generation, outputs

    def add(self, delta: CompletionOutput) -> None:
        whole = self._outputs[delta.index]
        whole.text += delta.text
        whole.token_ids += delta.token_ids
        if delta.logprobs is not None:
            whole.logprobs = (whole.logprobs or []) + delta.logprobs
        if delta.cumulative_logprob is not None:
            whole.cumulative_logprob = delta.cumulative_logprob
        whole.finish_reason, whole.stop_reason = delta.finish_reason, delta.stop_reason

    def output(self) -> RequestOutput:
        g = self._generation
        return RequestOutput(
            request_id=g.request_id,
            prompt=g.prompt,
            prompt_token_ids=g.prompt_token_ids,
            outputs=self._outputs,
            prompt_logprobs=g.prompt_logprobs,
            num_cached_tokens=g.num_cached_tokens,
            metrics=g.metrics,
        )
