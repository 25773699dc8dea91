"""`/v1/responses`: OpenAI's item protocol over the same turns; nothing is stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import aclosing
from typing import Any

from starlette.responses import Response

from jaxserve.errors import RequestError
from jaxserve.request import SamplingParams, StructuredOutputs
from jaxserve.server.blocks import Block, BlockEvent, Blocks
from jaxserve.server.chat import refuse_beside_a_call, schema_constraint
from jaxserve.server.errors import as_api_error
from jaxserve.server.logprobs import chat_logprobs
from jaxserve.server.openai import Function, JsonObjectFormat, TextFormat, TokenLogprob
from jaxserve.server.openai_responses import (
    CallItem,
    CallOutput,
    FunctionChoice,
    IncompleteDetails,
    InputItem,
    InputTokensDetails,
    MessageInput,
    MessageItem,
    OutputItem,
    OutputText,
    OutputTokensDetails,
    PastCall,
    PastReasoning,
    ReasoningItem,
    ReasoningText,
    ResponseObject,
    ResponsesRequest,
    ResponsesUsage,
    Status,
    Texts,
)
from jaxserve.server.parsing import Reader
from jaxserve.server.pieces import new_id
from jaxserve.server.prompt import Conversation, chat_prompt, effort_kwargs, tool_call
from jaxserve.server.state import Exchange, Server
from jaxserve.server.stream import EventStream, Frames, frame
from jaxserve.server.tools import ToolUse
from jaxserve.server.turn import Prompt, Turn, begin
from jaxserve.server.wire import json_response


async def responses(exchange: Exchange, body: ResponsesRequest) -> Response:
    """Handles `POST /v1/responses`."""
    server = exchange.server
    model = server.check_model(body.model)
    tools = _tool_use(body)
    params, reader = _plan(server, body, tools)
    turn = await begin(exchange, lambda: [_prompt(server, body, tools)], params, reader)
    form = _Form(body, turn, server.llm.tokenizer, model, tools)
    if body.stream:
        return EventStream(form.frames(), form.error_frame)
    return json_response(await form.whole())


def _tool_use(body: ResponsesRequest) -> ToolUse:
    functions = [
        Function(
            name=tool.name,
            description=tool.description,
            parameters=tool.parameters,
            strict=tool.strict,
        )
        for tool in body.tools or ()
    ]
    choice = body.tool_choice
    named = choice.name if isinstance(choice, FunctionChoice) else None
    return ToolUse.of(
        functions, choice if isinstance(choice, str) else None, named, body.parallel_tool_calls
    )


def _plan(server: Server, body: ResponsesRequest, tools: ToolUse) -> tuple[SamplingParams, Reader]:
    """How to sample, and how to read what is sampled."""
    enforced = tools.constraint(server.notation)
    params = body.sampling_params(
        constraint=enforced or _format(body, tools),
        max_tokens=body.max_output_tokens,
        logprobs=(body.top_logprobs or 0) if _wants_logprobs(body) else None,
    )
    constrained = params.structured_outputs is not None and enforced is None
    return params, tools.reader(server.notation, constrained)


def _wants_logprobs(body: ResponsesRequest) -> bool:
    return body.top_logprobs is not None or "message.output_text.logprobs" in (body.include or ())


def _format(body: ResponsesRequest, tools: ToolUse) -> StructuredOutputs | None:
    """What `text.format` asks for."""
    wanted = None if body.text is None else body.text.format
    if wanted is None or isinstance(wanted, TextFormat):
        return None
    refuse_beside_a_call(tools, "text.format")
    if isinstance(wanted, JsonObjectFormat):
        return StructuredOutputs(json_object=True)
    return schema_constraint(wanted.schema)


# ---- the conversation -------------------------------------------------------------------


def _prompt(server: Server, body: ResponsesRequest, tools: ToolUse) -> Prompt:
    effort = body.reasoning.effort if body.reasoning is not None else None
    return chat_prompt(
        server,
        _conversation(body),
        tools.for_template(),
        template_kwargs=(body.chat_template_kwargs or {})
        | effort_kwargs(server, effort, "reasoning.effort"),
        param="input",
    )


def _conversation(body: ResponsesRequest) -> Conversation:
    start: Conversation = []
    if body.instructions:
        start.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*start, {"role": "user", "content": body.input}]
    return start + _from_items(body.input)


def _from_items(items: Sequence[InputItem]) -> Conversation:
    """Items as messages: what the model thought, said and called in one turn is one message."""
    conversation: Conversation = []
    names: dict[str, str] = {}
    for i, item in enumerate(items):
        match item:
            case MessageInput(role="assistant", content=content):
                message = _assistant(conversation)
                message["content"] += _joined(content)
            case MessageInput(role=role, content=content):
                conversation.append({"role": role, "content": _joined(content)})
            case PastReasoning(content=content):
                message = _assistant(conversation)
                thought = "".join(part.text for part in content or ())
                message["reasoning_content"] = message.get("reasoning_content", "") + thought
            case PastCall(call_id=call_id, name=name, arguments=arguments):
                names[call_id] = name
                call = tool_call(call_id, name, arguments, f"input[{i}].arguments")
                _assistant(conversation).setdefault("tool_calls", []).append(call)
            case CallOutput():
                conversation.append(_call_output(item, names, f"input[{i}].call_id"))
    return conversation


def _assistant(conversation: Conversation) -> dict[str, Any]:
    """The assistant's message being built; a new one if somebody else spoke last."""
    if not conversation or conversation[-1]["role"] != "assistant":
        conversation.append({"role": "assistant", "content": ""})
    return conversation[-1]


def _call_output(item: CallOutput, names: dict[str, str], param: str) -> dict[str, Any]:
    if item.call_id not in names:
        raise RequestError(f"{param}={item.call_id!r} answers no function_call before it", param)
    return {
        "role": "tool",
        "tool_call_id": item.call_id,
        "name": names[item.call_id],
        "content": _joined(item.output),
    }


def _joined(content: Texts) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


# ---- the answer -------------------------------------------------------------------------

_PREFIX = {"reasoning": "rs_", "text": "msg_", "call": "fc_"}


class _Form:
    """Formats the blocks of one turn: a block is an output item."""

    def __init__(self, body: ResponsesRequest, turn: Turn, tokenizer, model: str, tools: ToolUse):
        self._body, self._turn, self._tokenizer = body, turn, tokenizer
        self._tools, self._model = tools, model
        self._id = new_id("resp_")
        self._blocks = Blocks()
        self._count = 0

    async def whole(self) -> ResponseObject:
        async with aclosing(self._turn.pieces()) as pieces:
            async for piece in pieces:
                for _ in self._blocks.add(piece):
                    pass
        return self._response()

    async def frames(self) -> Frames:
        yield self._frame("response.created", response=self._response())
        yield self._frame("response.in_progress", response=self._response())
        async with aclosing(self._turn.pieces()) as pieces:
            async for piece in pieces:
                for event in self._blocks.add(piece):
                    for data in self._item_frames(event):
                        yield data
        end = self._response()
        yield self._frame(f"response.{end.status}", response=end)

    def error_frame(self, error: Exception) -> bytes:
        """The event for an error in mid-stream."""
        seen = as_api_error(error)
        code = seen.code or "server_error"
        return self._frame("error", code=code, message=seen.message, param=seen.param)

    def _frame(self, kind: str, **fields: Any) -> bytes:
        self._count += 1
        return frame({"type": kind, "sequence_number": self._count - 1, **fields}, kind)

    def _response(self) -> ResponseObject:
        body, reason = self._body, self._blocks.finish_reason
        cut = reason == "length"
        choice = body.tool_choice or ("auto" if self._tools.functions else "none")
        return ResponseObject(
            id=self._id,
            created_at=self._turn.created,
            model=self._model,
            output=[self._item(block, cut) for block in self._blocks.blocks],
            status="in_progress" if reason is None else "incomplete" if cut else "completed",
            tools=body.tools or [],
            tool_choice=choice,
            parallel_tool_calls=self._tools.parallel,
            incomplete_details=IncompleteDetails(reason="max_output_tokens") if cut else None,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata,
            reasoning=body.reasoning,
            temperature=body.temperature,
            text=body.text,
            top_logprobs=body.top_logprobs,
            top_p=body.top_p,
            usage=None if reason is None else self._usage(),
        )

    def _usage(self) -> ResponsesUsage:
        usage = self._turn.usage()
        cached = usage.prompt_tokens_details.cached_tokens
        return ResponsesUsage(
            input_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
            total_tokens=usage.total_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=cached),
            output_tokens_details=OutputTokensDetails(reasoning_tokens=self._turn.reasoning_tokens),
        )

    def _item(self, block: Block, cut: bool = False) -> OutputItem:
        last = block is self._blocks.blocks[-1]
        status: Status = "completed" if block.closed else "in_progress"
        status = "incomplete" if cut and last else status
        name = _PREFIX[block.kind] + block.id
        match block.kind:
            case "reasoning":
                parts = [ReasoningText(text=block.text)] if block.text else []
                return ReasoningItem(id=name, status=status, content=parts)
            case "text":
                texts = [self._text(block)] if block.text else []
                return MessageItem(id=name, status=status, content=texts)
            case "call":
                return CallItem(
                    id=name,
                    call_id=block.call_id,
                    name=block.name,
                    arguments=block.text,
                    status=status,
                )

    def _text(self, block: Block) -> OutputText:
        return OutputText(text=block.text, logprobs=self._logprobs(block.tokens))

    def _logprobs(self, tokens: Sequence[tuple[int, Any]]) -> list[TokenLogprob]:
        ids = [token_id for token_id, _ in tokens]
        found = [logprobs for _, logprobs in tokens]
        return chat_logprobs(self._tokenizer, ids, found, self._body.top_logprobs or 0)

    def _item_frames(self, event: BlockEvent) -> Iterator[bytes]:
        block = event.block
        place = {"output_index": block.index}
        within = place | {"item_id": _PREFIX[block.kind] + block.id}
        match event.what:
            case "open":
                yield self._frame("response.output_item.added", item=self._item(block), **place)
                yield from self._part("added", block, within)
            case "grow":
                yield self._grown(event, within)
            case "close":
                yield from self._done(block, within)
                yield from self._part("done", block, within)
                yield self._frame("response.output_item.done", item=self._item(block), **place)

    def _part(self, what: str, block: Block, within: dict[str, Any]) -> Iterator[bytes]:
        if block.kind == "call":
            return
        part = self._text(block) if block.kind == "text" else ReasoningText(text=block.text)
        yield self._frame(f"response.content_part.{what}", part=part, content_index=0, **within)

    def _grown(self, event: BlockEvent, within: dict[str, Any]) -> bytes:
        if event.block.kind == "call":
            kind = "response.function_call_arguments.delta"
            return self._frame(kind, delta=event.text, **within)
        within = within | {"content_index": 0, "delta": event.text}
        if event.block.kind == "reasoning":
            return self._frame("response.reasoning_text.delta", **within)
        logprobs = self._logprobs(event.tokens)
        return self._frame("response.output_text.delta", logprobs=logprobs, **within)

    def _done(self, block: Block, within: dict[str, Any]) -> Iterator[bytes]:
        match block.kind:
            case "call":
                kind = "response.function_call_arguments.done"
                yield self._frame(kind, arguments=block.text, name=block.name, **within)
            case "reasoning":
                kind = "response.reasoning_text.done"
                yield self._frame(kind, text=block.text, content_index=0, **within)
            case "text":
                logprobs = self._logprobs(block.tokens)
                yield self._frame(
                    "response.output_text.done",
                    text=block.text,
                    logprobs=logprobs,
                    content_index=0,
                    **within,
                )
