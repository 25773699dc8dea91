"""Request and response types of OpenAI's Responses API, without its stored state."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, Struct

from jaxserve.server.openai import (
    Alternatives,
    Effort,
    JsonObject,
    JsonObjectFormat,
    TextFormat,
    TokenLogprob,
    ToolName,
)
from jaxserve.server.sampling import Positive, SamplingBody

Status = Literal["in_progress", "completed", "incomplete"]


# ---- in ---------------------------------------------------------------------------------


class InputText(Struct, tag="input_text", kw_only=True, forbid_unknown_fields=True):
    """Text a user wrote."""

    text: str


class PastText(Struct, tag="output_text", kw_only=True, forbid_unknown_fields=True):
    """Text the model wrote in an earlier turn."""

    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


Texts = str | list[InputText | PastText]


class MessageInput(Struct, tag="message", kw_only=True, forbid_unknown_fields=True):
    """One turn; `type` may be left out."""

    role: Literal["user", "assistant", "system", "developer"]
    content: Texts
    id: str | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class PastCall(Struct, tag="function_call", kw_only=True, forbid_unknown_fields=True):
    """A call the model made in an earlier turn."""

    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Status | None = None


class CallOutput(Struct, tag="function_call_output", kw_only=True, forbid_unknown_fields=True):
    """What a call returned."""

    call_id: str
    output: Texts
    id: str | None = None
    status: Status | None = None


class ReasoningText(Struct, tag="reasoning_text", kw_only=True, forbid_unknown_fields=True):
    """What the model thought."""

    text: str


class PastReasoning(Struct, tag="reasoning", kw_only=True, forbid_unknown_fields=True):
    """What the model thought in an earlier turn."""

    id: str | None = None
    summary: list[Any] = []
    content: list[ReasoningText] | None = None
    encrypted_content: None = None
    status: Status | None = None


InputItem = MessageInput | PastCall | CallOutput | PastReasoning


class FunctionTool(Struct, tag="function", kw_only=True, forbid_unknown_fields=True):
    """What may be called."""

    name: ToolName
    parameters: JsonObject | None = None
    description: str | None = None
    strict: bool | None = None


class FunctionChoice(Struct, tag="function", kw_only=True, forbid_unknown_fields=True):
    """The function that must be called."""

    name: str


class FlatSchemaFormat(Struct, tag="json_schema", kw_only=True, forbid_unknown_fields=True):
    """JSON that fits a schema; it is enforced whether `strict` or not."""

    name: str
    schema: JsonObject
    description: str | None = None
    strict: bool | None = None


class TextSettings(Struct, kw_only=True, forbid_unknown_fields=True):
    """What the text must look like."""

    format: TextFormat | JsonObjectFormat | FlatSchemaFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningSettings(Struct, kw_only=True, forbid_unknown_fields=True):
    """How much to think. The reasoning itself is returned, so there is nothing to summarise."""

    effort: Effort | None = None
    summary: Literal["auto"] | None = None


class ResponsesStreamOptions(Struct, kw_only=True, forbid_unknown_fields=True):
    """What a stream carries beside its events."""

    include_obfuscation: Literal[False] | None = None


_STATELESS = "this server keeps no responses; send the whole conversation as input"
_PLAIN = "jaxserve runs models, not services; remove it"


class ResponsesRequest(SamplingBody, kw_only=True):
    """A conversation to continue, as items."""

    refused: ClassVar = {
        "background": "this server keeps no responses; send background=false",
        "context_management": _PLAIN,
        "conversation": _STATELESS,
        "moderation": _PLAIN,
        "n": "the Responses API has one answer; send several requests",
        "previous_response_id": _STATELESS,
        "prompt": "this server keeps no prompt templates; send input",
        "store": "this server keeps no responses; send store=false",
        "truncation": "nothing is cut silently; shorten the input, or send truncation='disabled'",
    }

    input: str | Annotated[list[InputItem], Meta(min_length=1)]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Positive | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    reasoning: ReasoningSettings | None = None
    top_logprobs: Alternatives | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = (
        None
    )
    chat_template_kwargs: JsonObject | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None

    background: bool = False
    context_management: Any = None
    conversation: Any = None
    moderation: Any = None
    previous_response_id: str | None = None
    prompt: Any = None
    store: bool | None = False
    truncation: Literal["disabled", "auto"] | None = "disabled"

    max_tool_calls: Any = None
    metadata: JsonObject | None = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    user: Any = None


def tidy(body: Any) -> Any:
    """Gives the untagged messages of `input` their tag."""
    items = body.get("input") if isinstance(body, dict) else None
    for item in items if isinstance(items, list) else ():
        if isinstance(item, dict):
            item.setdefault("type", "message")
    return body


# ---- out --------------------------------------------------------------------------------


class OutputText(Struct, tag="output_text", kw_only=True):
    """Text the model wrote."""

    text: str
    annotations: list[Any] = []
    logprobs: list[TokenLogprob] = []


class MessageItem(Struct, tag="message", kw_only=True):
    """What the model said."""

    id: str
    status: Status
    content: list[OutputText]
    role: Literal["assistant"] = "assistant"


class CallItem(Struct, tag="function_call", kw_only=True):
    """A call the model makes."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: Status


class ReasoningItem(Struct, tag="reasoning", kw_only=True):
    """What the model thought."""

    id: str
    status: Status
    content: list[ReasoningText]
    summary: list[Any] = []


OutputItem = MessageItem | CallItem | ReasoningItem


class IncompleteDetails(Struct, kw_only=True):
    """Why an answer is not whole."""

    reason: Literal["max_output_tokens"]


class InputTokensDetails(Struct, kw_only=True):
    """How many prompt tokens the prefix cache supplied; writing to it is not charged."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputTokensDetails(Struct, kw_only=True):
    """How many tokens were thought rather than said."""

    reasoning_tokens: int = 0


class ResponsesUsage(Struct, kw_only=True):
    """Tokens in and out."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens_details: OutputTokensDetails


class ResponseObject(Struct, kw_only=True):
    """The answer of `/v1/responses`."""

    id: str
    created_at: int
    model: str
    output: list[OutputItem]
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    tools: list[FunctionTool]
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice
    parallel_tool_calls: bool
    object: Literal["response"] = "response"
    background: bool = False
    error: None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: JsonObject | None = None
    previous_response_id: None = None
    reasoning: ReasoningSettings | None = None
    store: bool = False
    temperature: float | None = None
    text: TextSettings | None = None
    top_logprobs: int | None = None
    top_p: float | None = None
    truncation: Literal["disabled"] = "disabled"
    usage: ResponsesUsage | None = None
