"""`LLM`: a served model in one object, for scripts, notebooks and the server alike."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import itertools
import logging
import math
import sys
import time
import weakref
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxserve import plan as planning
from jaxserve.cache.page_manager import root_key
from jaxserve.checkpoint import hf, hub
from jaxserve.config import EngineConfig
from jaxserve.engine.batch import check_sampling
from jaxserve.engine.compile_watch import keep_programs, watch
from jaxserve.engine.engine import Engine, EngineStats
from jaxserve.engine.generation import Generation
from jaxserve.engine.loop import EngineLoop
from jaxserve.engine.runner import Runner
from jaxserve.engine.sequence import Sequence as Seq
from jaxserve.errors import ConfigError, EngineError, RequestError
from jaxserve.models.family import family
from jaxserve.request import (
    CompletionOutput,
    EmbeddingOutput,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
)
from jaxserve.text.detokenize import Detokenizer
from jaxserve.text.tokenizer import Tokenizer
from sharding.tree import initialise, is_weight, unstack

log = logging.getLogger(__name__)

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or vLLM's `{"prompt": ...}` and `{"prompt_token_ids": [...]}`."""


class LLM:
    """Loads a model and serves it until it is deleted.

    Args:
        model: a folder with a Hugging Face checkpoint, or a hub id.
        tokenizer: a folder with another tokenizer; False serves token ids only.
        device: a jax device; the first one by default.
        settings: fields of `EngineConfig`.

    Raises:
        CheckpointError: the model cannot be read or is of an unknown family.
        ConfigError: the settings cannot work on this device.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: str | Path | bool | None = None,
        revision: str | None = None,
        device: Any = None,
        **settings: Any,
    ):
        started = time.monotonic()
        self.engine_config = _config(settings)
        self.model_name = str(model)
        folder = hub.resolve(model, revision)
        raw = hf.read_config(folder)
        self.model_type: str = raw.get("model_type", "")
        self._family = family(self.model_type)
        self.model_config = hf.model_config(self._family, raw)
        self.tokenizer: Tokenizer | None = _tokenizer(folder, tokenizer, self.model_config.vocab)
        device = device or planning.default_device()
        keep_programs()
        self.plan = planning.resolve(
            self.engine_config, raw, self.model_config, self._num_params(), device
        )
        self._folder, self._device = folder, device
        runner = Runner(self.plan, self._family, self.model_config, self._weights(), device)
        self._progress = _Progress(self.plan, self.engine_config.progress, started)
        self._progress.say(f"{self.model_name}: {self.plan.describe()}")
        runner.warm_up(
            background=self.engine_config.background_compile, on_program=self._progress.program
        )
        self._runner = runner
        text = self.tokenizer.token_text if self.tokenizer else str
        engine = Engine(
            runner, prefix_caching=self.engine_config.enable_prefix_caching, token_text=text
        )
        self._loop = EngineLoop(engine)
        self._close = weakref.finalize(self, _close, self._loop)  # on `del`, at exit, or by hand
        self._ids = itertools.count()
        self._asleep = False
        self._root = root_key(self.model_name, str(self.plan.dtype), "exact")
        if not self.engine_config.background_compile:
            self.wait_until_warm()

    # ---- generation ---------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts, all at once; results are in their order.

        Interrupting it aborts what is unfinished; the engine stays usable.

        Raises:
            RequestError: a prompt or a parameter cannot be honoured; nothing has been started.
        """
        many = _as_prompts(prompts)
        params = _per_prompt(sampling_params, len(many))
        requests = [self._request(p, s) for p, s in zip(many, params, strict=True)]
        return self._collect([self._start(request) for request in requests])

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | None = None,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answers a conversation, or each of several, through the model's chat template.

        Args:
            messages: `[{"role": ..., "content": ...}, ...]`, or a list of such lists.
            template: `tools`, `add_generation_prompt` and whatever the template itself reads.
        """
        many = messages if messages and isinstance(messages[0], (list, tuple)) else [messages]
        prompts = [{"prompt_token_ids": self.encode_chat(m, **template)} for m in many]
        return self.generate(prompts, sampling_params)

    def encode_chat(self, messages: Sequence[Any], **template: Any) -> list[int]:
        """The token ids that the model's chat template makes of a conversation."""
        from jaxserve.text.chat import render_chat

        tokenizer = self._need_tokenizer()
        return tokenizer.encode(
            render_chat(tokenizer, messages, **template), add_special_tokens=False
        )

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[CompletionOutput]:
        """Completions of a prompt as they grow: each item is what has been added to one of them.

        Leaving the loop early aborts the request.
        """
        return iter(self._start(self._request(prompt, sampling_params or SamplingParams())))

    async def generate_async(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> RequestOutput:
        """`generate` of one prompt for an event loop; cancelling the task aborts the request."""
        return await self._start(
            self._request(prompt, sampling_params or SamplingParams())
        ).aresult()

    def stream_async(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> AsyncIterator[CompletionOutput]:
        """`stream` for an event loop."""
        return aiter(self._start(self._request(prompt, sampling_params or SamplingParams())))

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        prompt: str | None = None,
    ) -> Generation:
        """Starts a request and returns at once. Thread-safe.

        Raises:
            RequestError: it cannot be honoured.
            EngineError: the engine sleeps or has been shut down.
        """
        return self._start(self._sequences(list(prompt_token_ids), params, request_id, prompt))

    def _collect(self, generations: list[Generation]) -> list[RequestOutput]:
        try:
            return [generation.result() for generation in generations]
        except BaseException:
            for generation in generations:
                generation.abort()
            raise

    # ---- embeddings -----------------------------------------------------------------------

    def encode(
        self, prompts: Prompt | Sequence[Prompt], pooling: str = "last"
    ) -> list[EmbeddingOutput]:
        """A vector per prompt: the normed hidden state of its last token, or the mean of all.

        Raises:
            RequestError: as `generate`, or a pooling other than "last" and "mean".
        """
        ids = [self._token_ids(p)[0] for p in _as_prompts(prompts)]
        return self.embed(ids, pooling)

    def embed(
        self, prompts: Sequence[Sequence[int]], pooling: str | None = None
    ) -> list[EmbeddingOutput]:
        """`encode` for token ids."""
        pooling = pooling or "last"
        if pooling not in ("last", "mean"):
            raise RequestError(f"pooling={pooling!r} must be 'last' or 'mean'", "pooling")
        groups = [
            self._sequences(list(ids), SamplingParams(), None, None, pooling) for ids in prompts
        ]
        generations = [self._start(group) for group in groups]
        self._collect(generations)
        return [g.embedding for g in generations if g.embedding is not None]

    def score(
        self, text_1: Prompt, text_2: Prompt | Sequence[Prompt], pooling: str = "mean"
    ) -> list[float]:
        """Cosine similarity of one text with each of others, by their embeddings."""
        first, *others = self.encode([text_1, *_as_prompts(text_2)], pooling)
        unit = [np.asarray(o.embedding) / np.linalg.norm(o.embedding) for o in (first, *others)]
        return [float(unit[0] @ other) for other in unit[1:]]

    # ---- requests -------------------------------------------------------------------------

    def _request(self, prompt: Prompt, params: SamplingParams) -> list[Seq]:
        ids, text = self._token_ids(prompt)
        return self._sequences(ids, params, None, text)

    def _start(self, sequences: list[Seq]) -> Generation:
        if self._asleep:
            raise EngineError("the engine sleeps; call wake_up() first")
        self._loop.submit(sequences)
        return sequences[0].generation

    def _token_ids(self, prompt: Prompt) -> tuple[list[int], str | None]:
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" in prompt:
                return list(prompt["prompt_token_ids"]), prompt.get("prompt")
            prompt = prompt.get("prompt")  # type: ignore[assignment]
        if isinstance(prompt, str):
            return self._need_tokenizer().encode(prompt), prompt
        if isinstance(prompt, Sequence):
            return list(prompt), None
        raise RequestError(
            f"a prompt must be text or token ids, not {type(prompt).__name__}", "prompt"
        )

    def _sequences(
        self,
        ids: list[int],
        params: SamplingParams,
        request_id: str | None,
        prompt: str | None,
        pooling: str | None = None,
    ) -> list[Seq]:
        """The sequences of a request, checked."""
        self._check(ids, params, pooling)
        number = next(self._ids)
        metrics = RequestMetrics(arrival_time=time.monotonic())
        name = request_id or f"request-{number}"
        generation = Generation(name, ids, params.n, metrics, self._loop.abort, prompt)
        seed = (self.engine_config.seed, number) if params.seed is None else (params.seed,)
        limit = len(ids) + 1 if pooling else min(
            self.max_model_len, len(ids) + (params.max_tokens or self.max_model_len)
        )  # fmt: skip
        grammar = self._grammar(params)
        return [
            Seq(
                tokens=list(ids),
                prompt_len=len(ids),
                params=params,
                generation=generation,
                root=self._root,
                index=i,
                seed=_seed(*seed, i),
                max_len=limit,
                stop_ids=self._stop_ids(params),
                pooling=pooling,
                matcher=grammar.matcher() if grammar else None,
                text=self._detokenizer(ids, params),
            )
            for i in range(params.n)
        ]

    def _check(self, ids: list[int], params: SamplingParams, pooling: str | None) -> None:
        vocab = self.model_config.vocab
        if not ids:
            raise RequestError("the prompt is empty; give at least one token", "prompt")
        for token in ids:
            if not isinstance(token, int) or not 0 <= token < vocab:
                raise RequestError(
                    f"the prompt holds token {token!r}; ids go from 0 to {vocab - 1}", "prompt"
                )
        room = self.max_model_len - len(ids)
        if room < (0 if pooling else 1):
            raise RequestError(
                f"the prompt has {len(ids)} tokens, the context {self.max_model_len}; shorten it, "
                "or raise max_model_len",
                "prompt",
            )
        if not pooling and params.max_tokens is not None and params.max_tokens > room:
            raise RequestError(
                f"max_tokens={params.max_tokens} and a prompt of {len(ids)} tokens exceed the "
                f"context of {self.max_model_len}; ask for at most {room}",
                "max_tokens",
            )
        if params.stop and self.tokenizer is None:
            raise RequestError("stop needs a tokenizer; this engine serves token ids only", "stop")
        check_sampling(params, vocab)

    def _grammar(self, params: SamplingParams) -> Any:
        if params.structured_outputs is None:
            return None
        from jaxserve.text.grammar import compile_grammar

        return compile_grammar(self._need_tokenizer(), params.structured_outputs)

    def _stop_ids(self, params: SamplingParams) -> frozenset[int]:
        stop = frozenset(params.stop_token_ids)
        if self.tokenizer is None or params.ignore_eos:
            return stop
        return stop | self.tokenizer.eos_token_ids

    def _detokenizer(self, ids: list[int], params: SamplingParams) -> Detokenizer | None:
        if self.tokenizer is None:
            return None
        return Detokenizer(
            self.tokenizer, ids, params.stop, params.include_stop_str_in_output,  # type: ignore[arg-type]
            params.skip_special_tokens, params.min_tokens,
        )  # fmt: skip

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(
                "this engine was started with tokenizer=False; give token ids", "prompt"
            )
        return self.tokenizer

    # ---- state ----------------------------------------------------------------------------

    @property
    def max_model_len(self) -> int:
        return self.plan.max_model_len

    @property
    def params(self) -> Any:
        """The tree of weights that is being served."""
        return self._runner.params

    def stats(self) -> EngineStats:
        """A snapshot of the engine's counters. Cheap and thread-safe."""
        return self._loop.stats()

    def reset_prefix_cache(self) -> None:
        """Forgets which prompt beginnings are cached."""
        self._loop.call(lambda engine: engine.reset_prefix_cache())

    def wait_until_warm(self) -> None:
        """Returns when every program exists; with `forbid_compile`, none may follow."""
        self._runner.wait_until_warm()
        self._loop.call(lambda engine: engine.mark_warm())
        if self.engine_config.forbid_compile:
            watch.forbid(self._loop)

    def sleep(self, level: int = 1) -> None:
        """Gives the cache's memory back, and at level 2 the weights' too.

        Raises:
            EngineError: requests are running; wait for them or abort them first.
        """
        if self._asleep:
            return

        def free(engine: Engine) -> None:
            if engine.has_work:
                raise EngineError(
                    f"{engine.stats().num_running} requests are running; sleep() when idle"
                )
            self._runner.wait_until_warm()
            self._asleep = True
            engine.reset_prefix_cache()
            self._runner.free()
            if level >= 2:
                self._runner.params = None

        self._loop.call(free)
        gc.collect()

    def wake_up(self) -> None:
        """Undoes `sleep`; weights are read from the checkpoint again if they were given up."""
        if not self._asleep:
            return

        def restore(_: Engine) -> None:
            if self._runner.params is None:
                self._runner.params = self._weights()
            self._runner.allocate()

        self._loop.call(restore)
        self._asleep = False

    def drain(self, timeout: float | None = None) -> bool:
        """Waits until nothing runs; False if `timeout` seconds were not enough."""
        end = None if timeout is None else time.monotonic() + timeout
        while (s := self.stats()).num_running or s.num_waiting:
            if end is not None and time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True

    def shutdown(self) -> None:
        """Ends the engine and frees the device; what runs fails with EngineError."""
        self._close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    # ---- weights --------------------------------------------------------------------------

    def _num_params(self) -> int:
        declared = self._family.declare_params(self.model_config)
        leaves = jax.tree.leaves(declared, is_leaf=is_weight)
        return sum(math.prod(w.shape(self.model_config.sizes)) for w in leaves)

    def _weights(self) -> Any:
        cfg, plan = self.model_config, self.plan
        if self.engine_config.load_format == "dummy":
            declared = self._family.declare_params(cfg)
            declared = unstack(declared) if plan.unrolled else declared
            return initialise(declared, cfg.sizes, plan.dtype, self.engine_config.seed)
        return hf.load_params(
            self._folder,
            self._family,
            cfg,
            plan.dtype,
            unrolled=plan.unrolled,
            place=lambda x: jax.device_put(x, self._device),
            progress=self.engine_config.progress,
        )


def _close(loop: EngineLoop) -> None:
    watch.allow(loop)
    loop.close()


def _config(settings: dict[str, Any]) -> EngineConfig:
    known = {f.name for f in dataclasses.fields(EngineConfig)}
    if unknown := sorted(set(settings) - known):
        raise ConfigError(f"unknown setting {unknown[0]!r}; known: {', '.join(sorted(known))}")
    return EngineConfig(**settings)


def _tokenizer(folder: Path, asked: str | Path | bool | None, vocab: int) -> Tokenizer | None:
    if asked is False:
        return None
    tokenizer = Tokenizer.from_folder(folder if asked in (None, True) else hub.resolve(asked))  # type: ignore[arg-type]
    tokenizer.check_vocab(vocab)
    return tokenizer


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, (str, Mapping)) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, n: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * n
    if len(params) != n:
        raise RequestError(
            f"{len(params)} sampling_params for {n} prompts; give one or as many", "sampling_params"
        )
    return list(params)


def _seed(*parts: int) -> tuple[int, int]:
    """Two 32-bit words out of a seed and what tells completions apart."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


class _Progress:
    """Start-up as the user sees it: the plan, and one line that counts programs."""

    def __init__(self, plan: planning.Plan, shown: bool, started: float):
        self._plan, self._shown, self._started = plan, shown, started
        self._done, self._compiled_before = 0, watch.compiled - watch.loaded

    def say(self, text: str, end: str = "\n") -> None:
        log.info("%s", text)
        if self._shown:
            print(f"jaxserve: {text}", file=sys.stderr, end=end, flush=True)

    def program(self, name: str, seconds: float) -> None:
        """Notes that a program exists."""
        self._done += 1
        log.info("program %s ready after %.2f s", name, seconds)
        if self._done == self._plan.num_programs:
            fresh = watch.compiled - watch.loaded - self._compiled_before
            elapsed = time.monotonic() - self._started
            self.say(
                f"{self._done} programs ready {elapsed:.1f} s after start, "
                f"{max(fresh, 0)} of them compiled, the rest from the cache"
            )
        elif self._shown and sys.stderr.isatty():
            self.say(f"{self._done}/{self._plan.num_programs} programs ({name})", end="\r")
