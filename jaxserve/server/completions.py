"""`/v1/completions`: texts or token ids in, continuations out; `echo` scores the prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace

from msgspec import UNSET
from starlette.responses import Response

from jaxserve.errors import RequestError
from jaxserve.request import SamplingParams, TokenLogprobs
from jaxserve.server.errors import as_api_error
from jaxserve.server.logprobs import completion_logprobs, prompt_logprobs
from jaxserve.server.openai import Completion, CompletionChoice, CompletionRequest
from jaxserve.server.pieces import Answer, Piece, new_id
from jaxserve.server.prompt import text_prompts
from jaxserve.server.search import CompletionForm, searched
from jaxserve.server.state import Exchange, Server
from jaxserve.server.stream import DONE, EventStream, Frames, frame
from jaxserve.server.turn import Prompt, Turn, begin
from jaxserve.server.wire import json_response


async def completions(exchange: Exchange, body: CompletionRequest) -> Response:
    """Handles `POST /v1/completions`."""
    server = exchange.server
    model = server.check_model(body.model)
    params = _params(body)

    def prepare() -> list[Prompt]:
        prompts = text_prompts(server, body.prompt, body.add_special_tokens)
        server.check_choices(len(prompts), params.n)
        if body.max_tokens is not UNSET or body.search is not None:
            return prompts
        return [replace(p, max_tokens=_default_max_tokens(server, p, body)) for p in prompts]

    if body.search is not None:
        return await searched(exchange, body, params, prepare, CompletionForm(model))
    turn = await begin(exchange, prepare, params)
    form = _Form(body, turn, exchange.server.llm.tokenizer, model, params.n)
    if body.stream:
        return EventStream(form.frames(), lambda error: frame(as_api_error(error).body("")))
    return json_response(await form.whole())


def _default_max_tokens(server: Server, prompt: Prompt, body: CompletionRequest) -> int:
    """OpenAI's 16, more if a minimum asks for it, less where the context ends."""
    room = server.llm.max_model_len - len(prompt.token_ids)
    return min(room, max(16, body.min_tokens or 0))


def _params(body: CompletionRequest) -> SamplingParams:
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise RequestError(
            f"best_of={body.best_of} cannot be honoured unless it equals n; remove it", "best_of"
        )
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream=true", "stream_options")
    scoring = body.max_tokens == 0 and body.echo
    echoed = body.logprobs if body.echo else None
    return body.sampling_params(
        max_tokens=1 if scoring else None if body.max_tokens is UNSET else body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=echoed if body.prompt_logprobs is None else body.prompt_logprobs,
    )


class _Form:
    """Formats the pieces of one turn."""

    def __init__(self, body: CompletionRequest, turn: Turn, tokenizer, model: str, n: int):
        self._body, self._turn, self._tokenizer = body, turn, tokenizer
        self._id, self._model, self._n = new_id("cmpl-"), model, n
        self._score_only = body.max_tokens == 0
        self._echoed: dict[int, str] = {}
        self._offsets: dict[int, int] = {}

    async def whole(self) -> Completion:
        answers = await self._turn.answers()
        choices = [self._choice(answer) for answer in answers]
        return self._completion(choices, self._usage())

    async def frames(self) -> Frames:
        async with aclosing(self._turn.pieces()) as pieces:
            async for piece in pieces:
                if piece.visible or piece.logprobs:
                    yield frame(self._completion([self._choice(piece)]))
        if self._body.stream_options is not None and self._body.stream_options.include_usage:
            yield frame(self._completion([], self._usage()))
        yield DONE

    def _completion(self, choices: list[CompletionChoice], usage=None) -> Completion:
        return Completion(
            id=self._id,
            created=self._turn.created,
            model=self._model,
            choices=choices,
            usage=usage,
        )

    def _usage(self):
        usage = self._turn.usage()
        if self._score_only:
            usage.total_tokens -= usage.completion_tokens
            usage.completion_tokens = 0
        return usage

    def _choice(self, got: Answer | Piece) -> CompletionChoice:
        first = got.index not in self._offsets
        self._offsets.setdefault(got.index, 0)
        generation = self._turn.generations[got.index // self._n]
        text = "" if self._score_only else got.text
        echo = self._prompt_text(generation) if self._body.echo and first else ""
        asked = self._body.prompt_logprobs is not None and first
        return CompletionChoice(
            index=got.index,
            text=echo + text,
            logprobs=None if self._body.logprobs is None else self._logprobs(got, first),
            finish_reason="length" if self._score_only else got.finish_reason,
            stop_reason=None if self._score_only else got.stop_reason,
            prompt_logprobs=prompt_logprobs(self._tokenizer, generation.prompt_logprobs)
            if asked
            else None,
        )

    def _logprobs(self, got: Answer | Piece, first: bool):
        rows = list(self._rows(got, first))
        ids = [token_id for token_id, _ in rows]
        out = completion_logprobs(
            self._tokenizer, ids, [found for _, found in rows], self._offsets[got.index]
        )
        self._offsets[got.index] += sum(map(len, out.tokens))
        return out

    def _rows(self, got: Answer | Piece, first: bool) -> Iterator[tuple[int, TokenLogprobs | None]]:
        generation = self._turn.generations[got.index // self._n]
        if self._body.echo and first:
            scores = generation.prompt_logprobs or ()
            yield from zip(generation.prompt_token_ids, scores, strict=True)
        if not self._score_only:
            yield from zip(got.token_ids, got.logprobs or (), strict=True)

    def _prompt_text(self, generation) -> str:
        if generation.prompt is not None:
            return generation.prompt
        return self._tokenizer.decode(generation.prompt_token_ids)
