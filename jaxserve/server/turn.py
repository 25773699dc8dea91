"""One HTTP request's work for the engine: submitted off the loop, drained as pieces, counted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from jaxserve.engine.generation import Generation
from jaxserve.errors import EngineError
from jaxserve.request import CompletionOutput, SamplingParams
from jaxserve.server.metrics import Metrics
from jaxserve.server.openai import PromptTokensDetails, Usage
from jaxserve.server.parsing import PLAIN, Reader
from jaxserve.server.pieces import Answer, Parser, Piece, new_id
from jaxserve.server.state import Exchange
from jaxserve.text.after_reasoning import constrain_answer


@dataclass(frozen=True)
class Prompt:
    """What the engine is to continue; `max_tokens` overrides the request's."""

    token_ids: list[int]
    text: str | None = None
    max_tokens: int | None = None


class Turn:
    """The generations of one request, one per prompt, each with `n` choices.

    Choice `i` of prompt `p` has the index `p * n + i`.
    """

    def __init__(
        self,
        generations: Sequence[Generation],
        n: int,
        reader: Reader,
        metrics: Metrics,
        call_prefix: str,
    ):
        self.generations = list(generations)
        self.created = int(time.time())
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self._n = n
        self._choices = [
            _Choice(reader.make(g.prompt), call_prefix) for g in generations for _ in range(n)
        ]
        self._clocks = [metrics.clock(len(g.prompt_token_ids), n) for g in generations]
        self._unfinished = [n] * len(generations)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Pieces of all choices in the order they come. Closing it early aborts the rest."""
        sources = [self._of_one(p) for p in range(len(self.generations))]
        try:
            async with aclosing(sources[0] if len(sources) == 1 else merge(sources)) as merged:
                async for piece in merged:
                    yield piece
        finally:
            self.abort()

    async def answers(self) -> list[Answer]:
        """Waits for the end and adds the pieces up."""
        answers = [Answer(i) for i in range(len(self._choices))]
        async with aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                answers[piece.index].add(piece)
        return answers

    def usage(self) -> Usage:
        """Tokens so far; complete once every piece has been taken."""
        prompt = sum(len(g.prompt_token_ids) for g in self.generations)
        cached = sum(g.num_cached_tokens for g in self.generations)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=self.completion_tokens,
            total_tokens=prompt + self.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        )

    def abort(self) -> None:
        """Stops what is still running. Safe to call twice."""
        for p, left in enumerate(self._unfinished):
            if left:
                self.generations[p].abort()
                self._clocks[p].aborted(left)
        self._unfinished = [0] * len(self._unfinished)

    def cut(self) -> None:
        """Ends what is still running, which its reader sees as an error."""
        for generation, left in zip(self.generations, self._unfinished, strict=True):
            if left:
                generation.abort()

    async def _of_one(self, p: int) -> AsyncGenerator[Piece, None]:
        offset = p * self._n
        async for delta in self.generations[p]:
            self._clocks[p].tick(delta)
            self._unfinished[p] -= delta.finished
            if delta.finish_reason == "abort":  # not by this reader, which would be gone
                raise EngineError("the answer was cut off: the server is shutting down")
            piece = self._choices[offset + delta.index].piece(offset, delta)
            self.completion_tokens += len(piece.token_ids)
            if piece.reasoning and not (piece.text or piece.calls):
                self.reasoning_tokens += len(piece.token_ids)
            yield piece


class _Choice:
    """One choice: its parser, and whether it has called a tool."""

    def __init__(self, parser: Parser, call_prefix: str):
        self._parser, self._call_prefix = parser, call_prefix
        self._called = False

    def piece(self, offset: int, delta: CompletionOutput) -> Piece:
        parsed = self._parser.feed(delta.text)
        if delta.finished:
            parsed += self._parser.finish()
        for call in parsed.calls:
            if call.name is not None:
                call.id = new_id(self._call_prefix)
        self._called |= bool(parsed.calls)
        stopped = delta.finish_reason == "stop"
        return Piece(
            offset + delta.index,
            parsed.text,
            parsed.reasoning,
            parsed.calls,
            delta.token_ids,
            delta.logprobs,
            "tool_calls" if stopped and self._called else delta.finish_reason,
            delta.stop_reason,
        )


async def begin(
    exchange: Exchange,
    prepare: Callable[[], list[Prompt]],
    params: SamplingParams,
    reader: Reader = PLAIN,
    call_prefix: str = "call_",
    pooling: str | None = None,
) -> Turn:
    """Prepares the prompts and submits them; the turn is aborted when the exchange ends.

    Templates, tokenisers and grammars take milliseconds: they run on a worker thread, and
    requests with a grammar on other threads than those without, so that a slow one delays no
    plain request.
    """
    server = exchange.server
    if reader.needs_special_tokens:
        params = replace(params, skip_special_tokens=False)

    def work() -> list[Generation]:
        return _submit(server.llm, prepare(), params, reader, pooling)

    pool = server.workers if params.structured_outputs is None else server.compilers
    job = pool.submit(work)
    try:
        generations = await asyncio.wrap_future(job)
    except asyncio.CancelledError:
        job.add_done_callback(_abort_orphans)  # the thread may still be submitting
        raise
    turn = Turn(generations, params.n, reader, server.metrics, call_prefix)
    exchange.stack.callback(turn.abort)
    exchange.stack.callback(server.gate.hold(turn.cut))
    return turn


def _submit(
    llm: Any, prompts: list[Prompt], params: SamplingParams, reader: Reader, pooling: str | None
) -> list[Generation]:
    generations: list[Generation] = []
    try:
        for prompt in prompts:
            own = params
            if prompt.max_tokens is not None:
                own = replace(params, max_tokens=prompt.max_tokens)
            if reader.reasons and (outputs := own.structured_outputs) is not None:
                own = replace(own, structured_outputs=constrain_answer(outputs, prompt.text))
            generations.append(
                llm.submit(prompt.token_ids, own, prompt=prompt.text, pooling=pooling)
            )
    except BaseException:
        for generation in generations:
            generation.abort()
        raise
    return generations


def _abort_orphans(job: Future[list[Generation]]) -> None:
    if not job.cancelled() and job.exception() is None:
        for generation in job.result():
            generation.abort()


async def merge(sources: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Piece, None]:
    """Items of all sources as they come. The first error ends them all; so does closing."""
    queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()

    async def pump(source: AsyncIterator[Piece]) -> None:
        try:
            async for item in source:
                queue.put_nowait(item)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.ensure_future(pump(source)) for source in sources]
    try:
        left = len(tasks)
        while left:
            match item := await queue.get():
                case None:
                    left -= 1
                case BaseException():
                    raise item
                case _:
                    yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
