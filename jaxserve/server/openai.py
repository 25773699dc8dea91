"""OpenAI's request and response types, with the extra fields that vLLM's users know.

A field that is accepted and never read (`user`, `metadata`, `store`, ...) is one that OpenAI
defines and that has no effect on sampling. Every other field is honoured or refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from jaxserve.server.openai_search import Reported, SearchOptions, Told
from jaxserve.server.pieces import FinishReason
from jaxserve.server.sampling import Positive, SamplingBody
from jaxserve.server.wire import Body, Count, TokenId

JsonObject = dict[str, Any]
ToolName = Annotated[str, Meta(pattern="^[a-zA-Z0-9_.-]+$", max_length=256)]
Alternatives = Annotated[int, Meta(ge=0, le=20)]


# ---- shared -----------------------------------------------------------------------------


class StreamOptions(Struct, kw_only=True, forbid_unknown_fields=True):
    """What a stream carries beside its deltas."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class PromptTokensDetails(Struct, kw_only=True):
    """How many prompt tokens the prefix cache supplied."""

    cached_tokens: int = 0


class Usage(Struct, kw_only=True):
    """Tokens in and out."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


PromptLogprobs = list[dict[str, JsonObject] | None]
"""vLLM's `prompt_logprobs`: by token id; null for the first token."""


# ---- /v1/completions --------------------------------------------------------------------


class CompletionRequest(SamplingBody, kw_only=True):
    """A prompt to continue."""

    refused: ClassVar = {"suffix": "jaxserve does not fill in the middle; remove it"}

    prompt: str | list[str | TokenId | list[TokenId]]
    model: str | None = None
    max_tokens: Count | UnsetType | None = UNSET  # OpenAI's default: 16; null: the context
    echo: bool | None = None
    logprobs: Alternatives | None = None
    prompt_logprobs: Alternatives | None = None
    best_of: Positive | None = None
    suffix: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    add_special_tokens: bool | None = None
    search: SearchOptions | None = None
    user: str | None = None


class CompletionLogprobs(Struct, kw_only=True):
    """Per token; with `echo`, the prompt's tokens first."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class CompletionChoice(Struct, kw_only=True):
    """One continuation, or what a stream adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(Struct, kw_only=True):
    """The answer of `/v1/completions`, or one frame of its stream."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    object: Literal["text_completion"] = "text_completion"
    usage: Usage | None = None
    search: Reported = UNSET
    search_event: Told = UNSET


# ---- /v1/chat/completions ---------------------------------------------------------------


class TextPart(Struct, kw_only=True, forbid_unknown_fields=True):
    """A piece of a message; jaxserve reads text only."""

    type: Literal["text"]
    text: str


Content = str | list[TextPart]


class FunctionCall(Struct, kw_only=True, forbid_unknown_fields=True):
    """A call with its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Struct, kw_only=True, forbid_unknown_fields=True):
    """A call the assistant makes or made."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"
    index: int | UnsetType = UNSET  # streams number calls, and their users send them back


class Message(Struct, kw_only=True, forbid_unknown_fields=True):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None
    type: Literal["text"] | None = None  # lm-eval writes it


class Function(Struct, kw_only=True, forbid_unknown_fields=True):
    """What may be called."""

    name: ToolName
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class Tool(Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool; jaxserve knows functions only."""

    function: Function
    type: Literal["function"]


class FunctionName(Struct, kw_only=True, forbid_unknown_fields=True):
    """The function to call."""

    name: str


class NamedTool(Struct, kw_only=True, forbid_unknown_fields=True):
    """`tool_choice` that names a function."""

    function: FunctionName
    type: Literal["function"] = "function"


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class JsonSchema(Struct, kw_only=True, forbid_unknown_fields=True):
    """A named schema; it is enforced whether `strict` or not."""

    name: str
    schema: JsonObject
    description: str | None = None
    strict: bool | None = None


class TextFormat(Struct, tag="text", forbid_unknown_fields=True):
    """Plain text."""


class JsonObjectFormat(Struct, tag="json_object", forbid_unknown_fields=True):
    """Any JSON object."""


class JsonSchemaFormat(Struct, tag="json_schema", kw_only=True, forbid_unknown_fields=True):
    """JSON that fits a schema."""

    json_schema: JsonSchema


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ChatRequest(SamplingBody, kw_only=True):
    """A conversation to continue."""

    refused: ClassVar = {
        "audio": "jaxserve writes text only; remove it",
        "function_call": "deprecated by OpenAI; send tool_choice",
        "functions": "deprecated by OpenAI; send tools",
        "moderation": "jaxserve does not moderate; remove it",
        "prediction": "jaxserve does not take predicted outputs; remove it",
        "verbosity": "open models have no such setting; ask for it in the prompt",
        "web_search_options": "jaxserve does not search the web; remove it",
    }

    messages: Annotated[list[Message], Meta(min_length=1)]
    model: str | None = None
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    prompt_logprobs: Alternatives | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: JsonObject | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    modalities: list[Literal["text"]] | None = None
    search: SearchOptions | None = None

    audio: Any = None
    function_call: Any = None
    functions: Any = None
    moderation: Any = None
    prediction: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    metadata: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    store: Any = None
    user: Any = None


class TokenAlternative(Struct, kw_only=True):
    """A token that could have been, and its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(TokenAlternative, kw_only=True):
    """The token that was sampled."""

    top_logprobs: list[TokenAlternative] = []


class ChatLogprobs(Struct, kw_only=True):
    """Per token, whether it ended up in content, reasoning or a call."""

    content: list[TokenLogprob]
    refusal: None = None


class AssistantMessage(Struct, kw_only=True):
    """What the model said."""

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: None = None


class ChatChoice(Struct, kw_only=True):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class ChatCompletion(Struct, kw_only=True):
    """The answer of `/v1/chat/completions`."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"
    prompt_logprobs: PromptLogprobs | None = None
    search: Reported = UNSET


class FunctionDelta(Struct, kw_only=True, omit_defaults=True):
    """A growing call."""

    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(Struct, kw_only=True, omit_defaults=True):
    """What a stream adds to a call; the first delta names it."""

    index: int
    function: FunctionDelta
    id: str | None = None
    type: Literal["function"] | None = None


class MessageDelta(Struct, kw_only=True, omit_defaults=True):
    """What a stream adds to a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(Struct, kw_only=True):
    """What a stream adds to one answer."""

    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class ChatChunk(Struct, kw_only=True):
    """One frame of a chat stream."""

    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    usage: Usage | None = None
    search: Reported = UNSET
    search_event: Told = UNSET


# ---- /v1/embeddings, /v1/models ---------------------------------------------------------


class EmbeddingRequest(Body, kw_only=True):
    """Texts or token ids to pool into vectors."""

    input: str | list[str | TokenId | list[TokenId]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Positive | None = None
    pooling: Literal["last", "mean"] | None = None
    add_special_tokens: bool | None = None
    user: str | None = None


class Embedding(Struct, kw_only=True):
    """One vector: numbers, or little-endian float32 in base64."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingUsage(Struct, kw_only=True):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(Struct, kw_only=True):
    """The answer of `/v1/embeddings`."""

    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    object: Literal["list"] = "list"


class Model(Struct, kw_only=True):
    """A name that requests may use."""

    id: str
    created: int
    max_model_len: int
    root: str
    object: Literal["model"] = "model"
    owned_by: str = "jaxserve"


class Models(Struct, kw_only=True):
    """The answer of `/v1/models`."""

    data: list[Model]
    object: Literal["list"] = "list"
