"""What a user asks for and what comes back, in vLLM's names."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxserve.errors import RequestError

MAX_LOGPROBS = 20
"""Most alternatives reported beside a token; also OpenAI's limit."""

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class StructuredOutputs:
    """A constraint on the text; exactly one field is set.

    Attributes:
        json: a JSON schema, as a mapping or as text.
        regex: the whole output matches this pattern.
        choice: the output is one of these strings.
        grammar: a Lark grammar as llguidance reads it.
        json_object: any JSON object.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool = False

    def __post_init__(self) -> None:
        given = [f.name for f in dataclasses.fields(self) if getattr(self, f.name)]
        if len(given) != 1:
            raise RequestError(
                f"structured_outputs takes exactly one of json, regex, choice, grammar, json_object; got {given}",
                "structured_outputs",
            )


@dataclass(frozen=True)
class SamplingParams:
    """How to sample one request. Every field changes what is sampled; none is ignored.

    Defaults follow vLLM, except `max_tokens=None`: generate up to the context length.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 and -1: the whole vocabulary
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    max_tokens: int | None = None
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)  # normalised once, before anybody reads it
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", {int(k): float(v) for k, v in self.logit_bias.items()})
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        _check(self)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


def _check(p: SamplingParams) -> None:
    """Raises RequestError for the first field out of range."""
    ranges: list[tuple[str, bool, str]] = [
        ("n", 1 <= p.n <= 1024, "between 1 and 1024"),
        ("temperature", 0 <= p.temperature <= 100, "between 0 (greedy) and 100"),
        ("top_p", 0 < p.top_p <= 1, "in (0, 1]"),
        ("top_k", p.top_k >= 0, "0 (off) or positive"),
        ("min_p", 0 <= p.min_p <= 1, "in [0, 1]"),
        ("seed", p.seed is None or -(2**63) <= p.seed < 2**64, "a 64-bit integer"),
        ("max_tokens", p.max_tokens is None or p.max_tokens >= 1, "at least 1"),
        ("min_tokens", 0 <= p.min_tokens <= (p.max_tokens or math.inf), "between 0 and max_tokens"),
        ("logprobs", p.logprobs is None or 0 <= p.logprobs <= MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}"),
        (
            "prompt_logprobs",
            p.prompt_logprobs is None or 0 <= p.prompt_logprobs <= MAX_LOGPROBS,
            f"between 0 and {MAX_LOGPROBS}",
        ),
        ("presence_penalty", -2 <= p.presence_penalty <= 2, "between -2 and 2"),
        ("frequency_penalty", -2 <= p.frequency_penalty <= 2, "between -2 and 2"),
        ("repetition_penalty", 0 < p.repetition_penalty <= 100, "in (0, 100]"),
        ("stop", all(isinstance(s, str) and s for s in p.stop), "non-empty strings"),
        ("logit_bias", all(math.isfinite(v) for v in p.logit_bias.values()), "finite numbers"),
    ]
    for name, ok, expected in ranges:
        if not ok:
            raise RequestError(f"{name}={getattr(p, name)!r} must be {expected}", name)


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of one token under the model, before penalties and temperature."""

    logprob: float
    rank: int | None = None  # 1 is the most likely
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]
"""The sampled (or prompt) token first, then the most likely alternatives."""


@dataclass
class CompletionOutput:
    """One completion, or, from a stream, what has been added to it."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token id or string that ended it

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestMetrics:
    """Clock readings of one request, in seconds of `time.monotonic`."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass
class RequestOutput:
    """A finished request."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # None for the first token
    finished: bool = True
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None


@dataclass
class EmbeddingOutput:
    """One pooled vector and what it cost."""

    embedding: list[float]
    prompt_token_ids: list[int]
