"""`/v1/chat/completions`: conversations in, answers with reasoning and tool calls out."""

from __future__ import annotations

from contextlib import aclosing

from starlette.responses import Response

from jaxserve.errors import RequestError
from jaxserve.request import SamplingParams, StructuredOutputs
from jaxserve.server.errors import as_api_error
from jaxserve.server.logprobs import chat_logprobs, prompt_logprobs
from jaxserve.server.openai import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    ChunkChoice,
    FunctionCall,
    FunctionDelta,
    JsonObjectFormat,
    MessageDelta,
    NamedTool,
    TextFormat,
    ToolCall,
    ToolCallDelta,
)
from jaxserve.server.parsing import Reader
from jaxserve.server.pieces import Answer, CallDelta, Piece, new_id
from jaxserve.server.prompt import chat_prompt, conversation_of, effort_kwargs
from jaxserve.server.search import ChatForm, searched
from jaxserve.server.state import Exchange, Server
from jaxserve.server.stream import DONE, EventStream, Frames, frame
from jaxserve.server.tools import ToolUse
from jaxserve.server.turn import Prompt, Turn, begin
from jaxserve.server.wire import json_response


async def chat_completions(exchange: Exchange, body: ChatRequest) -> Response:
    """Handles `POST /v1/chat/completions`."""
    server = exchange.server
    model = server.check_model(body.model)
    tools = tool_use(body)
    params, reader = _plan(server, body, tools)

    def prepare() -> list[Prompt]:
        return [_prompt(server, body, tools)]

    if body.search is not None:
        return await searched(exchange, body, params, prepare, ChatForm(model), reader)
    turn = await begin(exchange, prepare, params, reader)
    form = _Form(body, turn, server.llm.tokenizer, model)
    if body.stream:
        return EventStream(form.frames(), lambda error: frame(as_api_error(error).body("")))
    return json_response(await form.whole())


def tool_use(body: ChatRequest) -> ToolUse:
    """The request's tools and how they may be used."""
    choice = body.tool_choice
    named = choice.function.name if isinstance(choice, NamedTool) else None
    functions = [tool.function for tool in body.tools or ()]
    return ToolUse.of(
        functions, choice if isinstance(choice, str) else None, named, body.parallel_tool_calls
    )


def _prompt(server: Server, body: ChatRequest, tools: ToolUse) -> Prompt:
    effort = effort_kwargs(server, body.reasoning_effort, "reasoning_effort")
    return chat_prompt(
        server,
        conversation_of(body.messages),
        tools.for_template(),
        template_kwargs=(body.chat_template_kwargs or {}) | effort,
        add_generation_prompt=not body.continue_final_message
        if body.add_generation_prompt is None
        else body.add_generation_prompt,
        continue_final_message=bool(body.continue_final_message),
        add_special_tokens=bool(body.add_special_tokens),
    )


def _plan(server: Server, body: ChatRequest, tools: ToolUse) -> tuple[SamplingParams, Reader]:
    """How to sample, and how to read what is sampled."""
    enforced = tools.constraint(server.notation)
    params = _params(body, enforced or _format(body, tools))
    constrained = params.structured_outputs is not None and enforced is None
    return params, tools.reader(server.notation, constrained)


def _params(body: ChatRequest, constraint: StructuredOutputs | None) -> SamplingParams:
    limits = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise RequestError("max_tokens and max_completion_tokens differ; send one", "max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs=true", "top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream=true", "stream_options")
    if body.prompt_logprobs is not None and body.stream:
        raise RequestError("prompt_logprobs needs stream=false", "prompt_logprobs")
    return body.sampling_params(
        constraint=constraint,
        max_tokens=limits.pop() if limits else None,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
    )


def _format(body: ChatRequest, tools: ToolUse) -> StructuredOutputs | None:
    """What `response_format` asks for."""
    wanted = body.response_format
    if wanted is None or isinstance(wanted, TextFormat):
        return None
    refuse_beside_a_call(tools, "response_format")
    if isinstance(wanted, JsonObjectFormat):
        return StructuredOutputs(json_object=True)
    return schema_constraint(wanted.json_schema.schema)


def refuse_beside_a_call(tools: ToolUse, param: str) -> None:
    """Refuses a format of the whole text where the whole text is, or may hold, a tool call."""
    if tools.forced or tools.may_choose:
        raise RequestError(
            f"{param} leaves no room for tool calls; send tool_choice 'none', or no {param}", param
        )


def schema_constraint(schema: dict) -> StructuredOutputs:
    """JSON that fits `schema`; the empty schema allows any."""
    return StructuredOutputs(json=schema or "{}")


class _Form:
    """Formats the pieces of one turn."""

    def __init__(self, body: ChatRequest, turn: Turn, tokenizer, model: str):
        self._body, self._turn, self._tokenizer = body, turn, tokenizer
        self._id, self._model = new_id("chatcmpl-"), model

    async def whole(self) -> ChatCompletion:
        answers = await self._turn.answers()
        return ChatCompletion(
            id=self._id,
            created=self._turn.created,
            model=self._model,
            choices=[self._choice(answer) for answer in answers],
            usage=self._turn.usage(),
            prompt_logprobs=prompt_logprobs(
                self._tokenizer, self._turn.generations[0].prompt_logprobs
            ),
        )

    def _choice(self, answer: Answer) -> ChatChoice:
        calls = [
            ToolCall(id=call.id, function=FunctionCall(name=call.name, arguments=call.arguments))
            for call in answer.calls
        ]
        message = AssistantMessage(
            content=answer.text if answer.text or not calls else None,
            reasoning_content=answer.reasoning or None,
            tool_calls=calls or None,
        )
        return ChatChoice(
            index=answer.index,
            message=message,
            logprobs=self._logprobs(answer),
            finish_reason=answer.finish_reason,
            stop_reason=answer.stop_reason,
        )

    async def frames(self) -> Frames:
        for index in range(self._body.n or 1):
            opening = MessageDelta(role="assistant", content="")
            yield frame(self._chunk([ChunkChoice(index=index, delta=opening)]))
        async with aclosing(self._turn.pieces()) as pieces:
            async for piece in pieces:
                if piece.visible or piece.logprobs:
                    yield frame(self._chunk([self._chunk_choice(piece)]))
        if self._body.stream_options is not None and self._body.stream_options.include_usage:
            yield frame(self._chunk([], self._turn.usage()))
        yield DONE

    def _chunk(self, choices: list[ChunkChoice], usage=None) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            created=self._turn.created,
            model=self._model,
            choices=choices,
            usage=usage,
        )

    def _chunk_choice(self, piece: Piece) -> ChunkChoice:
        delta = MessageDelta(
            content=piece.text or None,
            reasoning_content=piece.reasoning or None,
            tool_calls=[_call_delta(call) for call in piece.calls] or None,
        )
        return ChunkChoice(
            index=piece.index,
            delta=delta,
            logprobs=self._logprobs(piece),
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason,
        )

    def _logprobs(self, got: Answer | Piece) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        top = self._body.top_logprobs or 0
        rows = chat_logprobs(self._tokenizer, got.token_ids, got.logprobs or (), top)
        return ChatLogprobs(content=rows)


def _call_delta(call: CallDelta) -> ToolCallDelta:
    return ToolCallDelta(
        index=call.index,
        id=call.id,
        type="function" if call.id is not None else None,
        function=FunctionDelta(name=call.name, arguments=call.arguments),
    )
