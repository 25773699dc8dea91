"""An engine that needs no model: one thread steps every sequence by a token, as the real one does.

What it writes is scripted, so that tests know it; what it refuses, it refuses as the engine does.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from jaxserve.engine.generation import Generation
from jaxserve.errors import EngineError, RequestError
from jaxserve.request import (
    CompletionOutput,
    EmbeddingOutput,
    FinishReason,
    Logprob,
    RequestMetrics,
    SamplingParams,
    StructuredOutputs,
    TokenLogprobs,
)
from jaxserve.text.after_reasoning import MayReason
from jaxserve.text.tokenizer import Tokenizer

TEMPLATE = """\
{%- if tools %}<|im_start|>system
# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif -%}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif -%}
{{ m.content }}
{%- for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>
{%- endfor %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif -%}"""

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]


def byte_tokenizer() -> Tokenizer:
    """One token per byte, three special ones and no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    return Tokenizer(
        backend,
        special_tokens={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        chat_templates={"default": TEMPLATE},
    )


@dataclass(frozen=True)
class Stats:
    """The engine's numbers."""

    num_running: int
    num_waiting: int = 0
    num_pages: int = 1000
    num_free_pages: int = 1000
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    shared_keys_total: int = 0
    num_preemptions: int = 0
    num_compiled_programs: int = 2
    compiles_after_warmup: int = 0
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    requests_total: dict[str, int] = field(default_factory=dict)


@dataclass
class _Sequence:
    """One choice being written."""

    generation: Generation
    params: SamplingParams
    index: int
    token_ids: list[int]
    text: str  # what will have been said when the last token is out
    finish_reason: FinishReason
    stop_reason: str | None
    done: int = 0
    shown: int = 0
    pooling: str | None = None


class FakeLLM:
    """The facade of `LLM`.

    Attributes:
        script: what to write for a prompt text; None writes seeded letters. Before an answer that
            is constrained it is the reasoning, if there may be any.
        delay: seconds per step.
        submitted: parameters of every request, in order.
        aborted: request ids that were aborted while running.
    """

    model_name = "fake/model"
    model_type = "qwen3"
    plan = SimpleNamespace(describe=lambda: "no model at all")

    def __init__(self, *, delay: float = 0.0, max_model_len: int = 4096):
        self.tokenizer = byte_tokenizer()
        self.max_model_len = max_model_len
        self.delay = delay
        self.script: Callable[[str], str | None] = lambda prompt: None
        self.submitted: list[tuple[str, SamplingParams]] = []
        self.aborted: list[str] = []
        self._ids = itertools.count()
        self._running: list[_Sequence] = []
        self._tokens = [0, 0]
        self._changed = threading.Condition()
        self._closed = False
        threading.Thread(target=self._loop, daemon=True, name="fake-engine").start()

    # ---- the facade -----------------------------------------------------------------------

    @property
    def searches(self) -> Any:
        raise RequestError("this engine cannot search", "search")

    def submit(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        prompt: str | None = None,
        pooling: str | None = None,
    ) -> Generation:
        self._check(prompt_token_ids, params)
        request_id = request_id or f"fake-{next(self._ids)}"
        metrics = RequestMetrics(arrival_time=time.monotonic())
        generation = Generation(
            request_id, list(prompt_token_ids), params.n, metrics, self._abort, prompt
        )
        generation.num_cached_tokens = min(4, len(prompt_token_ids) - 1)
        if params.prompt_logprobs is not None:
            scores = [self._logprob(t, params.prompt_logprobs) for t in prompt_token_ids]
            generation.prompt_logprobs = [None, *scores[1:]]
        text = self.tokenizer.decode(prompt_token_ids, skip_special_tokens=False)
        if pooling:  # reads a token a step
            one = _Sequence(generation, params, 0, prompt_token_ids, "", "stop", None)
            sequences = [replace(one, pooling=pooling)]
        else:
            sequences = [self._sequence(generation, params, i, text) for i in range(params.n)]
        with self._changed:
            if self._closed:
                raise EngineError("the engine has been shut down")
            self.submitted.append((text, params))
            self._running += sequences
            self._tokens[0] += len(prompt_token_ids)
            self._changed.notify()
        return generation

    def encode_chat(self, messages: list[dict[str, Any]], **template: Any) -> list[int]:
        from jaxserve.text.chat import render_chat

        return self.tokenizer.encode(render_chat(self.tokenizer, messages, **template))

    def wait_until_warm(self) -> None:
        """There is nothing to compile."""

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def stats(self) -> Stats:
        with self._changed:
            if self._closed:
                raise EngineError("the engine has been shut down")
            running = {s.generation.request_id for s in self._running}
            free = 1000 - len(self._running)
            return Stats(
                len(running),
                num_free_pages=free,
                prompt_tokens_total=self._tokens[0],
                generation_tokens_total=self._tokens[1],
            )

    def shutdown(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    # ---- what is refused --------------------------------------------------------------------

    def _check(self, ids: list[int], params: SamplingParams) -> None:
        self._check_ids(ids, "prompt")
        if len(ids) + (params.max_tokens or 1) > self.max_model_len:
            raise RequestError(
                f"{len(ids)} prompt tokens and max_tokens={params.max_tokens} exceed the context "
                f"of {self.max_model_len}",
                "max_tokens",
            )
        self._check_ids(params.stop_token_ids, "stop_token_ids")
        self._check_ids(params.logit_bias, "logit_bias")
        if params.structured_outputs is not None:
            constrained_text(params.structured_outputs)

    def _check_ids(self, ids: Any, param: str) -> None:
        for i in ids:
            if not 0 <= i < self.tokenizer.vocab_size:
                raise RequestError(f"token id {i} is outside the vocabulary", param)

    # ---- what is written --------------------------------------------------------------------

    def _sequence(
        self, generation: Generation, params: SamplingParams, index: int, prompt: str
    ) -> _Sequence:
        text = self._text(params, index, prompt)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        finish: FinishReason = "stop"
        reason = None
        cut, stop = min(
            ((at, s) for s in params.stop if (at := text.find(s)) >= 0), default=(len(text), None)
        )
        if stop is not None:
            end = cut + len(stop)
            ids = self.tokenizer.encode(text[:end], add_special_tokens=False)
            text = text[: end if params.include_stop_str_in_output else cut]
            reason = stop
        if params.max_tokens is not None and len(ids) > params.max_tokens:
            ids = ids[: params.max_tokens]
            text, finish, reason = self.tokenizer.decode(ids), "length", None
        return _Sequence(generation, params, index, ids or [0], text, finish, reason)

    def _text(self, params: SamplingParams, index: int, prompt: str) -> str:
        if params.structured_outputs is not None:
            reasoning = (
                self.script(prompt) if isinstance(params.structured_outputs, MayReason) else ""
            )
            return (reasoning or "") + constrained_text(params.structured_outputs)
        if (scripted := self.script(prompt)) is not None:
            return scripted
        seeded = params.seed is not None or params.greedy
        rng = random.Random(f"{params.seed} {index} {prompt}" if seeded else None)
        length = params.max_tokens if params.ignore_eos else 24
        return "".join(rng.choices("abcdefgh ", k=length or 24))

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not (self._running or self._closed):
                    self._changed.wait()
                if self._closed:
                    return self._close()
                for sequence in list(self._running):
                    self._step(sequence)
            time.sleep(self.delay)

    def _step(self, s: _Sequence) -> None:
        token = s.token_ids[s.done]
        s.done += 1
        if s.pooling:
            return self._pool(s, s.pooling)
        self._tokens[1] += 1
        last = s.done == len(s.token_ids)
        said = s.text if last else self.tokenizer.decode(s.token_ids[: s.done]).rstrip("\ufffd")
        said = said[: len(s.text)]
        delta = CompletionOutput(s.index, said[s.shown :], [token])
        s.generation.metrics.first_token_time = (
            s.generation.metrics.first_token_time or time.monotonic()
        )
        s.shown = max(s.shown, len(said))
        if s.params.logprobs is not None:
            delta.logprobs = [self._logprob(token, s.params.logprobs)]
        if "FAIL" in said:
            self._running.remove(s)
            return s.generation.put(EngineError("the scripted failure"))
        if last:
            delta.finish_reason, delta.stop_reason = s.finish_reason, s.stop_reason
            self._running.remove(s)
        s.generation.put(delta)

    def _pool(self, s: _Sequence, pooling: str) -> None:
        if s.done < len(s.token_ids):
            return
        ids, scale = s.token_ids, 2.0 if pooling == "mean" else 1.0
        vector = [scale * len(ids), sum(ids) / 256, -0.5, 0.25]
        s.generation.embedding = EmbeddingOutput(vector, ids)
        self._running.remove(s)
        s.generation.put(CompletionOutput(0, finish_reason="stop"))

    def _logprob(self, token: int, k: int) -> TokenLogprobs:
        found = {token: Logprob(-0.25, 1)}
        for rank in range(2, k + 1):
            found[(token + rank) % self.tokenizer.vocab_size] = Logprob(-float(rank), rank)
        return found

    def _abort(self, request_id: str) -> None:
        with self._changed:
            gone = [s for s in self._running if s.generation.request_id == request_id]
            self._running = [s for s in self._running if s not in gone]
            if gone:
                self.aborted.append(request_id)
            for s in gone:
                s.generation.put(CompletionOutput(s.index, finish_reason="abort"))

    def _close(self) -> None:
        for s in self._running:
            s.generation.put(EngineError("the engine has been shut down"))
        self._running = []


def constrained_text(wanted: StructuredOutputs) -> str:
    """The shortest text that fits, or a `RequestError` for a constraint that is malformed."""
    if wanted.choice:
        return wanted.choice[0]
    if wanted.json_object:
        return '{"answer": 42}'
    if wanted.regex is not None:
        try:
            re.compile(wanted.regex)
        except re.error as error:
            raise RequestError(f"bad regex: {error}", "structured_outputs") from None
        return "0"
    if wanted.grammar is not None:
        if "start:" not in wanted.grammar:
            raise RequestError("grammar has no rule named start", "structured_outputs")
        return "g"
    try:
        schema = json.loads(wanted.json) if isinstance(wanted.json, str) else wanted.json
        return json.dumps(_instance(schema, schema))
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise RequestError(f"bad schema: {error!r}", "structured_outputs") from None


def _instance(schema: Any, root: Any) -> Any:
    """The smallest value that a plain schema allows."""
    if "$ref" in schema:
        found = root
        for key in schema["$ref"].removeprefix("#").split("/")[1:]:
            found = found[key]
        return _instance(found, root)
    if "const" in schema:
        return schema["const"]
    for key in ("enum", "anyOf", "oneOf"):
        if key in schema:
            return schema[key][0] if key == "enum" else _instance(schema[key][0], root)
    match schema.get("type", "object"):
        case "object":
            return {k: _instance(v, root) for k, v in schema.get("properties", {}).items()}
        case "array":
            return [_instance(schema["items"], root)] * schema.get("minItems", 1)
        case "string":
            return "text"
        case "integer" | "number":
            return schema.get("minimum", 7)
        case "boolean":
            return True
        case "null":
            return None
        case other:
            raise ValueError(f"unknown type {other!r}")
