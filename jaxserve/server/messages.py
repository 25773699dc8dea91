"""`/v1/messages`: Anthropic's protocol over the same turns."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

from starlette.responses import Response

from jaxserve.errors import RequestError
from jaxserve.request import SamplingParams, StructuredOutputs
from jaxserve.server.anthropic import (
    AnthropicMessage,
    AnthropicTurn,
    AnthropicUsage,
    AnyChoice,
    AutoChoice,
    CountTokensRequest,
    MessagesRequest,
    NoChoice,
    OutputBlock,
    StopReason,
    TextBlock,
    TextOutput,
    ThinkingBlock,
    ThinkingBudget,
    ThinkingOff,
    ThinkingOn,
    ThinkingOutput,
    TokenCount,
    ToolNameChoice,
    ToolResultBlock,
    ToolUseBlock,
    ToolUseOutput,
)
from jaxserve.server.blocks import Block, BlockEvent, Blocks
from jaxserve.server.errors import as_api_error
from jaxserve.server.openai import Function
from jaxserve.server.pieces import new_id
from jaxserve.server.prompt import Conversation, chat_prompt, chat_template
from jaxserve.server.state import Exchange, Server
from jaxserve.server.stream import EventStream, Frames, frame
from jaxserve.server.tools import ToolUse
from jaxserve.server.turn import Prompt, Turn, begin
from jaxserve.server.wire import json_response


async def messages(exchange: Exchange, body: MessagesRequest) -> Response:
    """Handles `POST /v1/messages`."""
    server = exchange.server
    model = server.check_model(body.model)
    tools = _tool_use(body)
    params = _params(body, tools.constraint(server.notation))
    reader = tools.reader(server.notation, constrained=False)
    turn = await begin(exchange, lambda: [_prompt(server, body, tools)], params, reader, "toolu_")
    form = _Form(turn, model)
    if body.stream:
        return EventStream(form.frames(), _error_frame)
    return json_response(await form.whole())


async def count_tokens(exchange: Exchange, body: CountTokensRequest) -> Response:
    """Handles `POST /v1/messages/count_tokens`."""
    server = exchange.server
    server.check_model(body.model)
    tools = _tool_use(body)
    loop = asyncio.get_running_loop()
    prompt = await loop.run_in_executor(server.workers, _prompt, server, body, tools)
    return json_response(TokenCount(input_tokens=len(prompt.token_ids)))


def _error_frame(error: Exception) -> bytes:
    return frame(as_api_error(error).body("/v1/messages"), "error")


def _params(body: MessagesRequest, constraint: StructuredOutputs | None) -> SamplingParams:
    given = {
        "max_tokens": body.max_tokens,
        "stop": body.stop_sequences,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "seed": body.seed,
        "structured_outputs": constraint,
    }
    return SamplingParams(**{k: v for k, v in given.items() if v is not None})


def _tool_use(body: MessagesRequest | CountTokensRequest) -> ToolUse:
    functions = [
        Function(
            name=tool.name,
            description=tool.description,
            parameters=tool.input_schema,
            strict=tool.strict,
        )
        for tool in body.tools or ()
    ]
    match body.tool_choice:
        case None:
            return ToolUse.of(functions, None)
        case NoChoice():
            return ToolUse.of(functions, "none")
        case AutoChoice(disable_parallel_tool_use=alone):
            return ToolUse.of(functions, "auto", parallel=not alone)
        case AnyChoice(disable_parallel_tool_use=alone):
            return ToolUse.of(functions, "required", parallel=not alone)
        case ToolNameChoice(name=name):
            return ToolUse.of(functions, None, named=name)


# ---- the conversation -------------------------------------------------------------------


def _prompt(server: Server, body: MessagesRequest | CountTokensRequest, tools: ToolUse) -> Prompt:
    prefilled = body.messages[-1].role == "assistant"
    return chat_prompt(
        server,
        _conversation(body),
        tools.for_template(),
        template_kwargs=(body.chat_template_kwargs or {}) | _thinking(server, body),
        add_generation_prompt=not prefilled,
        continue_final_message=prefilled,
    )


def _thinking(server: Server, body: MessagesRequest | CountTokensRequest) -> dict[str, Any]:
    match body.thinking:
        case None:
            return {}
        case ThinkingBudget():
            raise RequestError(
                "thinking.budget_tokens cannot be honoured; send thinking.type='adaptive' and "
                "bound the whole answer with max_tokens",
                "thinking.budget_tokens",
            )
        case ThinkingOff() if "enable_thinking" not in chat_template(server):
            return {}  # a model that does not think has nothing to turn off
        case ThinkingOff():
            return {"enable_thinking": False}
        case ThinkingOn():
            return {"enable_thinking": True}


def _conversation(body: MessagesRequest | CountTokensRequest) -> Conversation:
    system = body.system
    if isinstance(system, list):
        system = "\n".join(block.text for block in system)
    conversation: Conversation = [{"role": "system", "content": system}] if system else []
    names: dict[str, str] = {}
    for i, message in enumerate(body.messages):
        conversation += _plain(message, names, f"messages[{i}]")
    return conversation


def _plain(message: AnthropicTurn, names: dict[str, str], param: str) -> Conversation:
    """Templates have a message per tool result; `names` collects the calls' function names."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    plain: dict[str, Any] = {"role": message.role, "content": ""}
    results: Conversation = []
    for block in message.content:
        match block:
            case TextBlock():
                plain["content"] += ("\n" if plain["content"] else "") + block.text
            case ThinkingBlock() if message.role == "assistant":
                plain["reasoning_content"] = plain.get("reasoning_content", "") + block.thinking
            case ToolUseBlock() if message.role == "assistant":
                names[block.id] = block.name
                function = {"name": block.name, "arguments": block.input}
                call = {"id": block.id, "type": "function", "function": function}
                plain.setdefault("tool_calls", []).append(call)
            case ToolResultBlock() if message.role == "user":
                results.append(_result(block, names, param))
            case _:
                kind = type(block).__struct_config__.tag
                raise RequestError(f"{param}: a {message.role} message holds no {kind}", param)
    spoken = plain["content"] or not results
    return results + ([plain] if spoken else [])


def _result(block: ToolResultBlock, names: dict[str, str], param: str) -> dict[str, Any]:
    if block.tool_use_id not in names:
        raise RequestError(
            f"{param}: tool_use_id {block.tool_use_id!r} answers no tool_use before it", param
        )
    content = block.content or ""
    if isinstance(content, list):
        content = "\n".join(part.text for part in content)
    return {
        "role": "tool",
        "tool_call_id": block.tool_use_id,
        "name": names[block.tool_use_id],
        "content": f"Error: {content}" if block.is_error else content,
    }


# ---- the answer -------------------------------------------------------------------------


class _Form:
    """Formats the blocks of one turn."""

    def __init__(self, turn: Turn, model: str):
        self._turn, self._blocks = turn, Blocks()
        self._id, self._model = new_id("msg_"), model

    async def whole(self) -> AnthropicMessage:
        async with aclosing(self._turn.pieces()) as pieces:
            async for piece in pieces:
                for _ in self._blocks.add(piece):
                    pass
        return self._message([_content(block) for block in self._blocks.blocks])

    async def frames(self) -> Frames:
        yield _frame("message_start", message=self._message([]))
        async with aclosing(self._turn.pieces()) as pieces:
            async for piece in pieces:
                for event in self._blocks.add(piece):
                    for data in _block_frames(event):
                        yield data
        end = self._message([])
        delta = {"stop_reason": end.stop_reason, "stop_sequence": end.stop_sequence}
        yield _frame("message_delta", delta=delta, usage=end.usage)
        yield _frame("message_stop")

    def _message(self, content: list[OutputBlock]) -> AnthropicMessage:
        stop, sequence = self._stop()
        usage = self._turn.usage()
        cached = usage.prompt_tokens_details.cached_tokens
        return AnthropicMessage(
            id=self._id,
            model=self._model,
            content=content,
            usage=AnthropicUsage(
                input_tokens=usage.prompt_tokens - cached,
                output_tokens=usage.completion_tokens,
                cache_read_input_tokens=cached,
            ),
            stop_reason=stop,
            stop_sequence=sequence,
        )

    def _stop(self) -> tuple[StopReason | None, str | None]:
        match self._blocks.finish_reason, self._blocks.stop_reason:
            case None, _:
                return None, None
            case "length", _:
                return "max_tokens", None
            case "tool_calls", _:
                return "tool_use", None
            case _, str(sequence):
                return "stop_sequence", sequence
            case _:
                return "end_turn", None


def _content(block: Block) -> OutputBlock:
    match block.kind:
        case "reasoning":
            return ThinkingOutput(thinking=block.text)
        case "text":
            return TextOutput(text=block.text)
        case "call":
            return ToolUseOutput(id=block.call_id, name=block.name, input=_object(block.text))


def _object(arguments: str) -> dict[str, Any]:
    """A call's arguments; what was cut off by max_tokens is no JSON and reads as nothing."""
    try:
        found = json.loads(arguments)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _block_frames(event: BlockEvent) -> Iterator[bytes]:
    index, kind = event.block.index, event.block.kind
    match event.what:
        case "open":
            empty = Block(index, kind, name=event.block.name, call_id=event.block.call_id)
            yield _frame("content_block_start", index=index, content_block=_content(empty))
        case "grow":
            yield _frame("content_block_delta", index=index, delta=_delta(event))
        case "close":
            yield _frame("content_block_stop", index=index)


def _delta(event: BlockEvent) -> dict[str, str]:
    match event.block.kind:
        case "reasoning":
            return {"type": "thinking_delta", "thinking": event.text}
        case "text":
            return {"type": "text_delta", "text": event.text}
        case "call":
            return {"type": "input_json_delta", "partial_json": event.text}


def _frame(kind: str, **fields: Any) -> bytes:
    return frame({"type": kind, **fields}, kind)
