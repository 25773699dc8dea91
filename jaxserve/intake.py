"""From a prompt and its parameters to sequences: everything that can be refused is refused here."""

from __future__ import annotations

import hashlib
import itertools
import reprlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxserve.cache.page_manager import root_key
from jaxserve.engine.batch import check_sampling
from jaxserve.engine.generation import Generation
from jaxserve.engine.sequence import Sequence as Seq
from jaxserve.errors import RequestError
from jaxserve.plan import Plan
from jaxserve.request import RequestMetrics, SamplingParams, check_ids
from jaxserve.text.chat import render_chat
from jaxserve.text.detokenize import Detokenizer
from jaxserve.text.grammar import compile_grammar
from jaxserve.text.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or vLLM's `{"prompt": ...}` and `{"prompt_token_ids": [...]}`."""


class Intake:
    """Checks requests and prepares what the engine needs of them, on the caller's thread.

    Args:
        plan: how long a sequence may be.
        vocab: of the model; ids beyond it are refused.
        model_name: enters the keys of cached pages.
        seed: of requests that bring none.
        abort: ends a request by its id.
        num_processes: that serve together; some results would lie where process 0 cannot read.
    """

    def __init__(
        self,
        plan: Plan,
        vocab: int,
        tokenizer: Tokenizer | None,
        model_name: str,
        seed: int,
        abort: Callable[[str], None],
        num_processes: int = 1,
    ):
        self._plan, self.vocab, self._tokenizer = plan, vocab, tokenizer
        self._seed, self._abort, self._num_processes = seed, abort, num_processes
        self.root = root_key(model_name, str(plan.dtype), plan.kv_taint)
        self._numbers = itertools.count()

    def token_ids(self, prompt: Prompt) -> tuple[list[int], str | None]:
        """A prompt's ids, and its text if that was given."""
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" in prompt:
                return list(prompt["prompt_token_ids"]), prompt.get("prompt")
            prompt = prompt.get("prompt", prompt)
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt), prompt
        if isinstance(prompt, Sequence):
            return list(prompt), None
        raise RequestError(
            f"a prompt must be text or token ids, not {type(prompt).__name__}", "prompt"
        )

    def chat(self, messages: Sequence[Any], **template: Any) -> list[int]:
        """The token ids that the model's chat template makes of a conversation."""
        text = render_chat(self.tokenizer, messages, **template)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def sequences(
        self,
        ids: list[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        prompt: str | None = None,
        pooling: str | None = None,
    ) -> list[Seq]:
        """The sequences of a request, one per completion; their generation is shared.

        Args:
            pooling: "last" or "mean" for an embedding instead of a completion.

        Raises:
            RequestError: the request cannot be honoured; the message names the field.
        """
        self.check(ids, params, pooling)
        number = next(self._numbers)
        metrics = RequestMetrics(arrival_time=time.monotonic())
        name = request_id or f"request-{number}"
        generation = Generation(name, ids, params.n, metrics, self._abort, prompt)
        if params.prompt_logprobs is not None:
            generation.prompt_logprobs = [None]  # nothing comes before the first token
        seed = (self._seed, number) if params.seed is None else (int(params.seed),)
        grammar = None
        if params.structured_outputs is not None:
            grammar = compile_grammar(self.tokenizer, params.structured_outputs)
        return [
            Seq(
                tokens=list(ids),
                prompt_len=len(ids),
                params=params,
                generation=generation,
                root=self.root,
                index=i,
                seed=_words(*seed, i),
                max_len=self._max_len(ids, params, pooling),
                stop_ids=self._stop_ids(params),
                pooling=pooling,
                matcher=grammar.matcher() if grammar else None,
                text=self._detokenizer(ids, params),
            )
            for i in range(params.n)
        ]

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, for what cannot do without.

        Raises:
            RequestError: the engine serves token ids only.
        """
        if self._tokenizer is None:
            raise RequestError(
                "this engine was started with tokenizer=False; give token ids", "prompt"
            )
        return self._tokenizer

    def check(self, ids: list[int], params: SamplingParams, pooling: str | None = None) -> None:
        """Refuses what cannot be honoured, as `sequences` does."""
        if not ids:
            raise RequestError("the prompt is empty; give at least one token", "prompt")
        check_ids("the prompt", ids, self.vocab, "prompt")
        context = self._plan.max_model_len
        room = context - len(ids)
        if room < (0 if pooling else 1):
            raise RequestError(
                f"the prompt has {len(ids)} tokens, the context {context}; shorten it, or raise "
                "max_model_len",
                "prompt",
            )
        if not pooling and params.max_tokens is not None and params.max_tokens > room:
            raise RequestError(
                f"max_tokens={params.max_tokens} and a prompt of {len(ids)} tokens exceed the "
                f"context of {context}; ask for at most {room}",
                "max_tokens",
            )
        if params.stop and self._tokenizer is None:
            raise RequestError("stop needs a tokenizer; this engine serves token ids only", "stop")
        check_sampling(params, self.vocab)
        self._check_processes("embedding", pooling is not None)
        self._check_processes("prompt_logprobs", params.prompt_logprobs is not None)

    def _check_processes(self, what: str, asked: bool) -> None:
        if asked and self._num_processes > 1:
            raise RequestError(
                f"{what} needs one process, and {self._num_processes} serve together: hidden "
                "states stay where they are computed. Ask an engine of one process",
                what,
            )

    def _max_len(self, ids: list[int], params: SamplingParams, pooling: str | None) -> int:
        if pooling:
            return len(ids) + 1  # never reached: nothing is drawn
        context = self._plan.max_model_len
        return min(context, len(ids) + (params.max_tokens or context))

    def _stop_ids(self, params: SamplingParams) -> frozenset[int]:
        stop = frozenset(params.stop_token_ids)
        if self._tokenizer is None or params.ignore_eos:
            return stop
        return stop | self._tokenizer.eos_token_ids

    def _detokenizer(self, ids: list[int], params: SamplingParams) -> Detokenizer | None:
        if self._tokenizer is None:
            return None
        return Detokenizer(
            self._tokenizer,
            ids,
            tuple(params.stop),
            params.include_stop_str_in_output,
            params.skip_special_tokens,
            params.min_tokens,
        )


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as several; a list of integers is one.

    Raises:
        RequestError: it is neither.
    """
    if not isinstance(prompts, Sequence | Mapping):
        raise RequestError(
            f"prompts are of type {type(prompts).__name__}; give text, token ids, or a list of "
            "such prompts",
            "prompt",
        )
    if isinstance(prompts, (str, Mapping)) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, n: int
) -> list[SamplingParams]:
    """Parameters for each of n prompts.

    Raises:
        RequestError: several were given, but not n, or something else.
    """
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * n
    if not isinstance(params, list | tuple) or not all(
        isinstance(one, SamplingParams) for one in params
    ):
        raise RequestError(
            f"sampling_params are {reprlib.repr(params)}; give SamplingParams(...), or a list of "
            "them",
            "sampling_params",
        )
    if len(params) != n:
        raise RequestError(
            f"{len(params)} sampling_params for {n} prompts; give one or as many",
            "sampling_params",
        )
    return list(params)


def _words(*parts: int) -> tuple[int, int]:
    """Two 32-bit words out of a seed and what tells completions apart."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
