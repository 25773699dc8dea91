"""What a user asks for and what comes back, in vLLM's names."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal

from jaxserve.errors import RequestError

MAX_LOGPROBS = 20
"""Most alternatives reported beside a token; also OpenAI's limit."""

MAX_ROUTINGS = 64
"""Of one token."""

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
        empty = (None, False, "", (), [])  # an empty mapping is a schema: any JSON
        given = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) not in empty]
        if len(given) != 1 or isinstance(self.choice, str):
            raise RequestError(
                "structured_outputs takes exactly one of json, regex, choice (a list), grammar, "
                f"json_object; got {given}",
                "structured_outputs",
            )


@dataclass(frozen=True)
class RouteNoise:
    """Several routings of one token, mixed into one (HyPER's SingleToken, specification, 2.4).

    Attributes:
        K: routings of a token, the plain one among them; 1 is plain decoding.
        tau: size of the Gumbel noise on router logits.
        reuse: what an expert's logit loses once an earlier routing of the token has used it.
        mix: temperature of the weights, by confidence, with which distributions are mixed.
        entropy_gate: only tokens whose plain distribution has more nats than this are refined.
        spared: layers with experts, at either end of the model, that route plainly.
    """

    K: int = 4
    tau: float = 0.3
    reuse: float = 0.1
    mix: float = 0.4
    entropy_gate: float = 0.5
    spared: int = 1

    def __post_init__(self) -> None:
        if not (isinstance(self.K, Integral) and 1 <= self.K <= MAX_ROUTINGS):
            raise ValueError(f"{self}: K must be a whole number, 1 to {MAX_ROUTINGS}")
        if not (isinstance(self.spared, Integral) and self.spared >= 0):
            raise ValueError(f"{self}: spared must be a whole number, at least 0")
        for name in ("tau", "reuse", "entropy_gate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{self}: {name} must be at least 0, and finite")
        if not 0 < self.mix < math.inf:
            raise ValueError(f"{self}: mix must be above 0, and finite")


@dataclass(frozen=True)
class Asked:
    """What a model is asked about its own reasoning, and the two answers that are weighed."""

    question: str = "\n\nIs the reasoning above correct? Answer yes or no:"
    yes: str = " yes"
    no: str = " no"


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
        for name, (kind, fits, expected) in _RULES.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if not isinstance(value, kind) or not fits(value):
                raise RequestError(f"{name}={reprlib.repr(value)} must be {expected}", name)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens={self.min_tokens} must be at most max_tokens={self.max_tokens}",
                "min_tokens",
            )
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        bias = {int(k): float(v) for k, v in (self.logit_bias or {}).items()}
        object.__setattr__(self, "stop", stop)  # normalised once, before anybody reads it
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "logit_bias", bias)
        object.__setattr__(self, "top_k", max(self.top_k, 0))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


def _is_text(stop: Any) -> bool:
    texts = (stop,) if isinstance(stop, str) else stop
    return all(isinstance(text, str) and text for text in texts)


def _are_ids(ids: Any) -> bool:
    return not isinstance(ids, (str, bytes)) and all(isinstance(i, Integral) for i in ids)


def _is_bias(bias: Any) -> bool:
    ids = all(isinstance(i, Integral) or (isinstance(i, str) and i.isdecimal()) for i in bias)
    return ids and all(isinstance(v, Real) and math.isfinite(v) for v in bias.values())


_PENALTY = (Real, lambda x: -2 <= x <= 2, "between -2 and 2")
_ALTERNATIVES = (Integral, lambda n: 0 <= n <= MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}")
_FLAG = (bool, lambda _: True, "true or false")

_RULES: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "n": (Integral, lambda n: 1 <= n <= 1024, "between 1 and 1024"),
    "temperature": (Real, lambda t: 0 <= t <= 100, "between 0 (greedy) and 100"),
    "top_p": (Real, lambda p: 0 < p <= 1, "in (0, 1]"),
    "top_k": (Integral, lambda k: -1 <= k < 2**31, "0 (off) or positive, below 2**31"),
    "min_p": (Real, lambda p: 0 <= p <= 1, "in [0, 1]"),
    "seed": (Integral, lambda s: -(2**63) <= s < 2**64, "a 64-bit integer"),
    "stop": (Collection, _is_text, "non-empty strings"),
    "stop_token_ids": (Collection, _are_ids, "token ids"),
    "include_stop_str_in_output": _FLAG,
    "max_tokens": (Integral, lambda n: n >= 1, "at least 1"),
    "min_tokens": (Integral, lambda n: n >= 0, "between 0 and max_tokens"),
    "logprobs": _ALTERNATIVES,
    "prompt_logprobs": _ALTERNATIVES,
    "logit_bias": (Mapping, _is_bias, "finite numbers by token id"),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "repetition_penalty": (Real, lambda x: 0 < x <= 100, "in (0, 100]"),
    "ignore_eos": _FLAG,
    "skip_special_tokens": _FLAG,
    "structured_outputs": (StructuredOutputs, lambda _: True, "a StructuredOutputs"),
}
"""What each field of `SamplingParams` may be."""

_OPTIONAL = {
    "seed", "stop", "stop_token_ids", "max_tokens", "logprobs", "prompt_logprobs", "logit_bias",
    "structured_outputs",
}  # fmt: skip


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
    """Clock readings of one request, in seconds of `time.monotonic`, and the weights it saw.

    Attributes:
        params_version: 0 for the weights that the engine started with, then what
            `LLM.load_params` returned.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    params_version: int | None = None


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


def check_ids(what: str, ids: Iterable[int], vocab: int | None, where: str) -> None:
    """Refuses what is no token of a model, before its embedding is asked for it.

    Raises:
        RequestError: some id is none; its `param` is `where`.
    """
    for i, token in enumerate(ids):
        if not isinstance(token, int) or token < 0 or (vocab is not None and token >= vocab):
            last = "" if vocab is None else f" to {vocab - 1}"
            raise RequestError(
                f"{what} holds token {token!r}; ids go from 0{last}. It is number {i}; encode the "
                "text with the model's own tokenizer",
                where,
            )
