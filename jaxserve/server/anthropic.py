"""Anthropic's request and response types.

Accepted and never read: `metadata`, `service_tier` and `cache_control`, which have no effect on
sampling (the prefix cache is automatic).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, Struct

from jaxserve.server.openai import JsonObject, ToolName
from jaxserve.server.sampling import Positive
from jaxserve.server.wire import Body


class CacheControl(Struct, tag="ephemeral", kw_only=True, forbid_unknown_fields=True):
    """Where Anthropic would cache; jaxserve caches every prefix."""

    ttl: Literal["5m", "1h"] | None = None


class _Block(Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    cache_control: CacheControl | None = None


class TextBlock(_Block, tag="text", kw_only=True):
    """Text."""

    text: str
    citations: None = None


class ThinkingBlock(_Block, tag="thinking", kw_only=True):
    """What the model thought before; the signature is not checked."""

    thinking: str
    signature: str = ""


class ToolUseBlock(_Block, tag="tool_use", kw_only=True):
    """A call the assistant made."""

    id: str
    name: str
    input: JsonObject


class ToolResultBlock(_Block, tag="tool_result", kw_only=True):
    """What a call returned."""

    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool = False


InputBlock = TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock


class AnthropicTurn(Struct, kw_only=True, forbid_unknown_fields=True):
    """One turn of a conversation."""

    role: Literal["user", "assistant"]
    content: str | list[InputBlock]


class ToolDefinition(Struct, kw_only=True, forbid_unknown_fields=True):
    """What may be called."""

    name: ToolName
    input_schema: JsonObject
    description: str | None = None
    type: Literal["custom"] | None = None
    cache_control: CacheControl | None = None
    strict: bool | None = None


class AutoChoice(Struct, tag="auto", kw_only=True, forbid_unknown_fields=True):
    """The model decides."""

    disable_parallel_tool_use: bool = False


class AnyChoice(Struct, tag="any", kw_only=True, forbid_unknown_fields=True):
    """Some tool must be called."""

    disable_parallel_tool_use: bool = False


class ToolNameChoice(Struct, tag="tool", kw_only=True, forbid_unknown_fields=True):
    """This tool must be called."""

    name: str
    disable_parallel_tool_use: bool = False


class NoChoice(Struct, tag="none", forbid_unknown_fields=True):
    """No tool may be called."""


class ThinkingOff(Struct, tag="disabled", forbid_unknown_fields=True):
    """Answer at once."""


class ThinkingOn(Struct, tag="adaptive", forbid_unknown_fields=True):
    """Think as long as it takes."""


class ThinkingBudget(Struct, tag="enabled", kw_only=True, forbid_unknown_fields=True):
    """Think for so many tokens; refused, since nothing enforces it."""

    budget_tokens: int


class _Conversation(Body, kw_only=True):
    messages: Annotated[list[AnthropicTurn], Meta(min_length=1)]
    model: str | None = None
    system: str | list[TextBlock] | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: AutoChoice | AnyChoice | ToolNameChoice | NoChoice | None = None
    thinking: ThinkingOff | ThinkingOn | ThinkingBudget | None = None
    chat_template_kwargs: JsonObject | None = None


class CountTokensRequest(_Conversation, kw_only=True):
    """A conversation to measure."""


class MessagesRequest(_Conversation, kw_only=True):
    """A conversation to continue."""

    refused: ClassVar = {"container": "jaxserve runs no code; remove it"}

    max_tokens: Positive
    stop_sequences: list[str] | None = None
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stream: bool | None = None
    container: Any = None
    metadata: Any = None
    service_tier: Any = None


class TextOutput(Struct, tag="text", kw_only=True):
    """Text."""

    text: str


class ThinkingOutput(Struct, tag="thinking", kw_only=True):
    """What the model thought; jaxserve signs nothing."""

    thinking: str
    signature: str = ""


class ToolUseOutput(Struct, tag="tool_use", kw_only=True):
    """A call."""

    id: str
    name: str
    input: JsonObject


OutputBlock = TextOutput | ThinkingOutput | ToolUseOutput
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class AnthropicUsage(Struct, kw_only=True):
    """Tokens in and out; what the prefix cache supplied is counted apart."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0


class AnthropicMessage(Struct, tag="message", kw_only=True):
    """The answer of `/v1/messages`."""

    id: str
    model: str
    content: list[OutputBlock]
    usage: AnthropicUsage
    role: Literal["assistant"] = "assistant"
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None


class TokenCount(Struct, kw_only=True):
    """The answer of `/v1/messages/count_tokens`."""

    input_tokens: int
