"""`search` of a completion or a chat: the answer that a search finds, and what happened meanwhile.

The search runs on a thread of its own (`jaxserve.searches`). Its events come over to the server's
loop one by one; a client that hangs up cancels it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from msgspec import Struct
from starlette.responses import Response

from jaxserve.errors import EngineError, RequestError
from jaxserve.protocol import Cancelled, Event, Failed, Question, Scored, SearchError, StepDone
from jaxserve.request import Asked, CompletionOutput, SamplingParams
from jaxserve.searches import Running, Searches, controller_of
from jaxserve.server.errors import ApiError, as_api_error
from jaxserve.server.openai import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChunkChoice,
    Completion,
    CompletionChoice,
    MessageDelta,
    PromptTokensDetails,
    Usage,
)
from jaxserve.server.openai_search import (
    SearchEvent,
    SearchLedger,
    SearchOptions,
    SearchReport,
    SelfEvaluated,
)
from jaxserve.server.parsing import PLAIN, Reader
from jaxserve.server.pieces import Parsed, new_id
from jaxserve.server.sampling import constraint_field
from jaxserve.server.state import Exchange
from jaxserve.server.stream import DONE, EventStream, Frames, frame
from jaxserve.server.turn import Prompt
from jaxserve.server.wire import json_response
from reasoning.result import Budget, Result
from reasoning.speculation import Speculator

Finish = Literal["stop", "length"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """The end of a search, as answers need it."""

    said: Parsed
    finish: Finish
    usage: Usage
    report: SearchReport


class Form(Protocol):
    """How an endpoint writes an answer, whole and in chunks."""

    def opening(self) -> list[Struct]: ...
    def event(self, event: SearchEvent) -> Struct: ...
    def text(self, said: Parsed) -> Struct: ...
    def end(self, found: Found) -> Struct: ...
    def usage(self, usage: Usage) -> Struct: ...
    def whole(self, found: Found) -> Struct: ...


async def searched(
    exchange: Exchange,
    body: Any,
    params: SamplingParams,
    prepare: Callable[[], list[Prompt]],
    form: Form,
    reader: Reader = PLAIN,
) -> Response:
    """Answers a request that has `search`.

    Args:
        params: how the request samples; a search leaves all but length and seed to its controller.
        prepare: the prompts; on a worker thread.
        reader: tells reasoning apart in the text that is found.
    """
    _refuse(body, params)
    search = await _begin(exchange, body.search, params, prepare, reader)
    if body.stream:
        options = body.stream_options
        frames = _frames(search, form, bool(options and options.include_usage))
        return EventStream(frames, lambda error: frame(as_api_error(error).body("")))
    return json_response(form.whole(await search.found()))


async def _frames(search: _Search, form: Form, include_usage: bool) -> Frames:
    for chunk in form.opening():
        yield frame(chunk)
    async with aclosing(search.events()) as events:
        async for event in events:
            yield frame(form.event(event))
    found = await search.found()
    yield frame(form.text(found.said))
    yield frame(form.end(found))
    if include_usage:
        yield frame(form.usage(found.usage))
    yield DONE


# ---- what cannot be asked for -----------------------------------------------------------

_OURS = {"seed", "max_tokens"}
_USUAL = SamplingParams()


def _refuse(body: Any, params: SamplingParams) -> None:
    """Refuses what has no meaning in a search, by the name that the client used."""
    for field in dataclasses.fields(SamplingParams):
        name = field.name
        if name not in _OURS and getattr(params, name) != getattr(_USUAL, name):
            name = constraint_field(body) if name == "structured_outputs" else name
            raise _beside(name)
    for name in ("tools", "echo"):
        if getattr(body, name, None):
            raise _beside(name)


def _beside(name: str) -> RequestError:
    return RequestError(
        f"{name} cannot be honoured beside search: its controller decides how paths are drawn and "
        f"how many; remove {name}, or search",
        name,
    )


# ---- a search under way -----------------------------------------------------------------


class _Search:
    """The search of one request, on the server's event loop."""

    def __init__(self, exchange: Exchange, reader: Reader, prompt: Prompt, running: Running):
        self._reader, self._prompt, self._running = reader, prompt, running
        self._words = exchange.server.llm.tokenizer
        self._happened: asyncio.Queue[Event | None] = asyncio.Queue()
        self._clock = exchange.server.metrics.clock(len(prompt.token_ids), 1)
        self._finished = False
        exchange.stack.callback(self._leave)
        exchange.stack.callback(exchange.server.gate.hold(running.cancel))

    def tell(self, event: Event | None) -> None:
        """Takes note of what has happened; None: it is over."""
        self._happened.put_nowait(event)

    def _leave(self) -> None:
        self._running.cancel()
        if not self._finished:
            self._clock.aborted(1)

    async def events(self) -> AsyncGenerator[SearchEvent, None]:
        """What happens, until the search is over."""
        while (event := await self._happened.get()) is not None:
            yield self._event(event)

    def _event(self, event: Event) -> SearchEvent:
        path = list(event.node.path)
        match event:
            case StepDone():
                tokens = event.step.tokens
                text = self._words.decode(tokens)
                return SearchEvent(kind="step", path=path, tokens=len(tokens), text=text)
            case Scored():
                return SearchEvent(kind="score", path=path, scorer=event.scorer, score=event.value)
            case Failed():
                kind = "cancelled" if isinstance(event.error, Cancelled) else "failed"
                return SearchEvent(kind=kind, path=path, message=str(event.error))

    async def found(self) -> Found:
        """Waits for the end.

        Raises:
            ApiError: the controller failed.
            EngineError: the server is shutting down.
        """
        try:
            (result,) = await self._running.aresult()
        except Cancelled:  # not by this reader, who would be gone
            raise EngineError("the search was cut off: the server is shutting down") from None
        except (RequestError, EngineError):
            raise
        except Exception as error:
            log.warning("a search failed", exc_info=error)
            said = (
                str(error) if isinstance(error, SearchError) else f"{type(error).__name__}: {error}"
            )
            raise ApiError(500, f"the search failed: {said}", code="search_failed") from error
        self._finished = True
        return self._read(result)

    def _read(self, result: Result) -> Found:
        text = self._words.decode(
            result.tokens, skip_special_tokens=not self._reader.needs_special_tokens
        )
        parser = self._reader.make(self._prompt.text)
        said = parser.feed(text) + parser.finish()
        finish: Finish = "length" if result.stopped == "budget" else "stop"
        self._clock.tick(CompletionOutput(0, text, list(result.tokens), finish_reason=finish))
        generated, prompt = result.ledger.generated, len(self._prompt.token_ids)
        usage = Usage(
            prompt_tokens=prompt,
            completion_tokens=generated,
            total_tokens=prompt + generated,
            prompt_tokens_details=PromptTokensDetails(),
        )
        return Found(said, finish, usage, _report(result))


def _report(result: Result) -> SearchReport:
    ledger = dataclasses.asdict(result.ledger)
    return SearchReport(
        answer=None if result.answer is None else str(result.answer),
        distribution={str(answer): weight for answer, weight in result.distribution.items()},
        controller=result.controller,
        mode=result.mode,
        stopped=result.stopped,
        ledger=SearchLedger(generated=result.ledger.generated, **ledger),
    )


async def _begin(
    exchange: Exchange,
    options: SearchOptions,
    params: SamplingParams,
    prepare: Callable[[], list[Prompt]],
    reader: Reader,
) -> _Search:
    """Starts a search; it is cancelled when the exchange ends."""
    server, loop = exchange.server, asyncio.get_running_loop()
    with _named():
        _check_size(options.settings, server.limits.max_choices)
        controller = controller_of(options.controller, options.settings)

    def work() -> tuple[Prompt, Question]:
        prompts = prepare()
        if len(prompts) != 1:
            raise RequestError(
                f"search takes one prompt, not {len(prompts)}; send a request for each", "prompt"
            )
        return prompts[0], _question(server.llm.searches, controller, options, params, prompts[0])

    def tell(event: Event | None) -> None:
        with suppress(RuntimeError):  # the server's loop is gone
            loop.call_soon_threadsafe(lambda: search.tell(event))

    prompt, question = await asyncio.wrap_future(server.workers.submit(work))
    most = min(options.paths or 1 << 30, server.limits.max_choices)
    budget = Budget(options.tokens, most, options.seconds or float("inf"))
    spec = Speculator(mode=options.speculate) if options.speculate else None
    scorer = options.scorer
    if isinstance(scorer, SelfEvaluated):
        scorer = Asked(scorer.question, scorer.yes, scorer.no)
    with _named():
        running = server.llm.searches.start(
            [question], controller, budget, spec=spec, scorer=scorer, on_event=tell
        )
    search = _Search(exchange, reader, prompt, running)
    running.when_over(lambda: tell(None))
    return search


def _check_size(settings: Mapping[str, Any], most: int) -> None:
    """Refuses numbers of paths, nodes or rounds that would keep a server's memory and lock."""
    for name, value in settings.items():
        if isinstance(value, int) and value > most:
            raise RequestError(
                f"settings.{name}={value}: one request may ask for at most {most}; lower it",
                f"settings.{name}",
            )


def _question(
    searches: Searches,
    controller: Any,
    options: SearchOptions,
    params: SamplingParams,
    prompt: Prompt,
) -> Question:
    if None not in (options.seed, params.seed) and options.seed != params.seed:
        raise RequestError("seed and search.seed differ; send one", "seed")
    seeds = [seed for seed in (options.seed, params.seed, 0) if seed is not None]
    with _named():
        step = searches.step_tokens(options.step, controller)
    return searches.question(
        list(prompt.token_ids), step=step, max_tokens=params.max_tokens, seed=seeds[0]
    )


@contextmanager
def _named() -> Iterator[None]:
    """Errors name the fields of `search` as the client spelled them."""
    try:
        yield
    except RequestError as error:
        name = "speculate" if error.param == "spec" else error.param
        error.param = f"search.{name}"
        raise


# ---- how endpoints write it -------------------------------------------------------------


class CompletionForm:
    """As `/v1/completions` does."""

    def __init__(self, model: str):
        self._about = {"id": new_id("cmpl-"), "created": int(time.time()), "model": model}

    def opening(self) -> list[Struct]:
        return []

    def event(self, event: SearchEvent) -> Completion:
        return Completion(**self._about, choices=_texts(), search_event=event)

    def text(self, said: Parsed) -> Completion:
        return Completion(**self._about, choices=_texts(said.text))

    def end(self, found: Found) -> Completion:
        return Completion(**self._about, choices=_texts("", found.finish), search=found.report)

    def usage(self, usage: Usage) -> Completion:
        return Completion(**self._about, choices=[], usage=usage)

    def whole(self, found: Found) -> Completion:
        choices = _texts(found.said.text, found.finish)
        return Completion(**self._about, choices=choices, usage=found.usage, search=found.report)


def _texts(text: str = "", finish: Finish | None = None) -> list[CompletionChoice]:
    return [CompletionChoice(index=0, text=text, finish_reason=finish)]


class ChatForm:
    """As `/v1/chat/completions` does."""

    def __init__(self, model: str):
        self._about = {"id": new_id("chatcmpl-"), "created": int(time.time()), "model": model}

    def opening(self) -> list[Struct]:
        return [ChatChunk(**self._about, choices=_deltas(role="assistant", content=""))]

    def event(self, event: SearchEvent) -> ChatChunk:
        return ChatChunk(**self._about, choices=_deltas(content=""), search_event=event)

    def text(self, said: Parsed) -> ChatChunk:
        delta = {"content": said.text, "reasoning_content": said.reasoning or None}
        return ChatChunk(**self._about, choices=_deltas(**delta))

    def end(self, found: Found) -> ChatChunk:
        return ChatChunk(**self._about, choices=_deltas(found.finish), search=found.report)

    def usage(self, usage: Usage) -> ChatChunk:
        return ChatChunk(**self._about, choices=[], usage=usage)

    def whole(self, found: Found) -> ChatCompletion:
        message = AssistantMessage(
            content=found.said.text, reasoning_content=found.said.reasoning or None
        )
        choice = ChatChoice(index=0, message=message, finish_reason=found.finish)
        return ChatCompletion(
            **self._about, choices=[choice], usage=found.usage, search=found.report
        )


def _deltas(finish: Finish | None = None, **delta: Any) -> list[ChunkChoice]:
    return [ChunkChoice(index=0, delta=MessageDelta(**delta), finish_reason=finish)]
