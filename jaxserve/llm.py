"""`LLM`: a served model in one object, for scripts, notebooks and the server alike."""

from __future__ import annotations

import dataclasses
import gc
import logging
import time
import weakref
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve import plan as planning
from jaxserve.checkpoint import cache_scales, hf, hub
from jaxserve.config import EngineConfig
from jaxserve.engine.compile_watch import keep_programs, watch
from jaxserve.engine.engine import Engine, EngineStats
from jaxserve.engine.generation import Generation
from jaxserve.engine.loop import EngineLoop
from jaxserve.engine.progress import Progress
from jaxserve.engine.runner import Runner
from jaxserve.engine.sequence import Sequence as Seq
from jaxserve.errors import ConfigError, EngineError, RequestError
from jaxserve.intake import Intake, Prompt, as_prompts, per_prompt
from jaxserve.models.family import family
from jaxserve.models.layers import restack
from jaxserve.models.parallel import placed, put, put_on_mesh
from jaxserve.quant import weights as quant
from jaxserve.request import (
    CompletionOutput,
    EmbeddingOutput,
    RequestOutput,
    SamplingParams,
)
from jaxserve.text.tokenizer import Tokenizer
from sharding.mesh import Parallelism, first_devices
from sharding.mesh import mesh as make_mesh
from sharding.probe import probe
from sharding.tree import Weight, initialise, is_weight, unstack

log = logging.getLogger(__name__)


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
        cfg, parallelism = self.model_config, planning.parallelism_of(self.engine_config)
        self._mesh = _mesh(parallelism, device)
        device = self._mesh.devices.flat[0] if self._mesh else device or planning.default_device()
        keep_programs()
        local = planning.sizes_on_device(cfg, parallelism)
        size = partial(quant.weight_bytes, self._family, cfg, sizes=local)
        rounded = self.engine_config.kv_cache_dtype == "int8"
        scales = cache_scales.load(folder, cfg.num_layers, cfg.kv_shape) if rounded else None
        self.plan = planning.resolve(
            self.engine_config, raw, cfg, size, device, kv_calibrated=scales is not None
        )
        self._folder, self._device = folder, device
        runner = Runner(self.plan, self._family, cfg, self._weights(), device, scales, self._mesh)
        self._progress = Progress(self.plan, self.engine_config.progress, started)
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
        self._asleep = False
        self._intake = Intake(
            self.plan,
            self.model_config.vocab,
            self.tokenizer,
            self.model_name,
            self.engine_config.seed,
            self._loop.abort,
        )
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
        many = as_prompts(prompts)
        params = per_prompt(sampling_params, len(many))
        requests = [self._prepare(p, s) for p, s in zip(many, params, strict=True)]
        return self._collect(requests)

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | None = None,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answers a conversation, or each of several, through the model's chat template.

        Args:
            messages: `[{"role": ..., "content": ...}, ...]`, or a list of such lists.
            template: what `jaxserve.text.chat.render_chat` takes: `tools`,
                `add_generation_prompt`, `chat_template_kwargs`.
        """
        many = messages if messages and isinstance(messages[0], (list, tuple)) else [messages]
        prompts = [{"prompt_token_ids": self.encode_chat(m, **template)} for m in many]
        return self.generate(prompts, sampling_params)

    def encode_chat(self, messages: Sequence[Any], **template: Any) -> list[int]:
        """The token ids that the model's chat template makes of a conversation."""
        return self._intake.chat(messages, **template)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[CompletionOutput]:
        """Completions of a prompt as they grow: each item is what has been added to one of them.

        Leaving the loop early aborts the request.
        """
        return iter(self._start(self._prepare(prompt, sampling_params)))

    async def generate_async(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> RequestOutput:
        """`generate` of one prompt for an event loop; cancelling the task aborts the request."""
        return await self._start(self._prepare(prompt, sampling_params)).aresult()

    def stream_async(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> AsyncIterator[CompletionOutput]:
        """`stream` for an event loop."""
        return aiter(self._start(self._prepare(prompt, sampling_params)))

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        prompt: str | None = None,
        pooling: str | None = None,
    ) -> Generation:
        """Starts a request and returns at once. Thread-safe.

        Args:
            pooling: "last" or "mean" asks for `Generation.embedding` instead of tokens.

        Raises:
            RequestError: it cannot be honoured.
            EngineError: the engine sleeps or has been shut down.
        """
        return self._start(
            self._intake.sequences(
                list(prompt_token_ids),
                params,
                request_id=request_id,
                prompt=prompt,
                pooling=pooling,
            )
        )

    def _collect(self, requests: list[list[Seq]]) -> list[RequestOutput]:
        """Runs requests to their ends; if anything goes wrong, none goes on without a reader."""
        generations = [sequences[0].generation for sequences in requests]
        try:
            for sequences in requests:
                self._start(sequences)
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
        ids = [self._intake.token_ids(p)[0] for p in as_prompts(prompts)]
        return self.embed(ids, pooling)

    def embed(
        self, prompts: Sequence[Sequence[int]], pooling: str | None = None
    ) -> list[EmbeddingOutput]:
        """`encode` for token ids."""
        pooling = pooling or "last"
        if pooling not in ("last", "mean"):
            raise RequestError(f"pooling={pooling!r} must be 'last' or 'mean'", "pooling")
        requests = [
            self._intake.sequences(list(ids), SamplingParams(), pooling=pooling) for ids in prompts
        ]
        self._collect(requests)
        found = [sequences[0].generation.embedding for sequences in requests]
        return [embedding for embedding in found if embedding is not None]

    def score(
        self, text_1: Prompt, text_2: Prompt | Sequence[Prompt], pooling: str = "mean"
    ) -> list[float]:
        """Cosine similarity of one text with each of others, by their embeddings."""
        first, *others = self.encode([text_1, *as_prompts(text_2)], pooling)
        unit = [np.asarray(o.embedding) / np.linalg.norm(o.embedding) for o in (first, *others)]
        return [float(unit[0] @ other) for other in unit[1:]]

    def _start(self, sequences: list[Seq]) -> Generation:
        if self._asleep:
            raise EngineError("the engine sleeps; call wake_up() first")
        self._loop.submit(sequences)
        return sequences[0].generation

    def _prepare(self, prompt: Prompt, params: SamplingParams | None) -> list[Seq]:
        ids, text = self._intake.token_ids(prompt)
        return self._intake.sequences(ids, params or SamplingParams(), prompt=text)

    # ---- state ----------------------------------------------------------------------------

    @property
    def max_model_len(self) -> int:
        return self.plan.max_model_len

    @property
    def params(self) -> Any:
        """The tree of weights that is being served."""
        return self._runner.params

    def load_params(self, params: Any, *, timeout: float | None = None) -> int:
        """Serves other weights from now on, without a restart or a compilation; their version.

        Requests that have begun end with the weights they began with, and later ones wait for them:
        `RequestOutput.metrics.params_version` says which ones a request saw. The tree is copied, so
        a training step may donate it afterwards.

        Args:
            params: a tree like `params`, in any float type, with its layers stacked in any way.
            timeout: seconds to wait for requests that have begun.

        Raises:
            ConfigError: a leaf is missing or of another shape; the message names it.
            TimeoutError: they took longer. The weights are served all the same once they are over.
        """
        tree = self._placed(params)
        swap = self._loop.call(lambda engine: engine.load_params(tree))
        return swap.result(timeout)

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
                s = engine.stats()
                raise EngineError(
                    f"{s.num_running + s.num_waiting} requests are running; sleep() when idle"
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
        while self._loop.call(lambda engine: engine.has_work):  # behind what is in the inbox
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

    def _weights(self) -> Any:
        cfg, plan = self.model_config, self.plan
        if self.engine_config.load_format == "dummy":
            declared = self._declared()
            drawn = initialise(declared, cfg.sizes, plan.dtype, self.engine_config.seed)
            return self._served(drawn)
        params = hf.load_params(
            self._folder,
            self._family,
            cfg,
            plan.dtype,
            unrolled=plan.unrolled,
            convert=quant.quantize if plan.quantization else None,
            place=self._place,
            progress=self.engine_config.progress,
        )
        return self._with_placement(self._with_own_head(params))

    def _place(self, w: Weight, leaf: Any) -> Any:
        """A leaf on the device, or each device's share on the mesh."""
        if self._mesh is None:
            return jax.device_put(leaf, self._device)
        dispatch, sizes = self.plan.dispatch, self.model_config.sizes
        placement = dispatch.layout.initial() if dispatch else None
        return put_on_mesh(w, leaf, sizes, self.plan.parallelism, self._mesh, placement)

    def _with_placement(self, params: Any) -> Any:
        """With tables of where experts live, if they are spread over devices."""
        if self.plan.dispatch is None:
            return params
        everywhere = NamedSharding(self._mesh, PartitionSpec())
        placement = self.plan.dispatch.layout.initial(self.model_config.num_layers)
        return placed(params, placement, partial(put, sharding=everywhere))

    def _with_own_head(self, params: Any) -> Any:
        """With an eight-bit copy of a tied table, which products want while lookups want floats."""
        if not self.plan.quantization or params.lm_head is not None:
            return params
        head = quant.round_to_int8(np.asarray(params.embed))
        return dataclasses.replace(params, lm_head=self._place(self._declared().embed, head))

    def _declared(self) -> Any:
        declared = self._family.declare_params(self.model_config)
        return unstack(declared) if self.plan.unrolled else declared

    def _served(self, params: Any) -> Any:
        """A tree of floats as it is served."""
        if not self.plan.quantization and self._mesh is None:
            return params

        def leaf(w: Weight, x: Any) -> Any:
            x = np.asarray(x)
            return self._place(w, quant.quantize(w, x) if self.plan.quantization else x)

        leaves = jax.tree.map(leaf, self._declared(), params, is_leaf=is_weight)
        return self._with_placement(self._with_own_head(leaves))

    def _placed(self, params: Any) -> Any:
        """A copy of a tree in the form, the type and the place of the one that is served."""
        self._loop.stats()  # raises after shut-down
        if self._runner.params is None:
            raise EngineError("the engine sleeps without weights; wake_up() first")
        sizes = [jax.tree.leaves(stack)[0].shape[0] for stack in self.params.stacks]
        if [jax.tree.leaves(stack)[0].shape[0] for stack in params.stacks] != sizes:
            params = restack(jax.tree.map(np.asarray, params), sizes)
        params = self._served(params)
        wanted, tree = jax.tree_util.tree_flatten_with_path(self.params)
        given = dict(jax.tree_util.tree_flatten_with_path(params)[0])
        leaves = []
        for path, old in wanted:
            new, name = given.pop(path, None), jax.tree_util.keystr(path).lstrip(".")
            if new is None or new.shape != old.shape:
                seen = "missing" if new is None else f"of shape {list(new.shape)}"
                raise ConfigError(f"{name} is {seen}; the engine serves {list(old.shape)}")
            leaves.append(_copied(new, old))
        if given:
            raise ConfigError(
                f"{jax.tree_util.keystr(next(iter(given))).lstrip('.')} is not served"
            )
        return jax.tree.unflatten(tree, leaves)


def _copied(x: Any, old: jax.Array) -> jax.Array:
    """x in another buffer, of the type and in the place of `old`, without a program: none may be
    compiled while an engine serves."""
    if x.dtype == old.dtype:
        return jax.device_put(x, old.sharding, may_alias=False)
    host = np.asarray(x)
    out = hf.aligned_empty(host.shape, np.dtype(old.dtype))
    out[...] = host.astype(old.dtype)
    return jax.device_put(out, old.sharding)


def _mesh(parallelism: Parallelism, device: Any) -> Mesh | None:
    """The mesh of a split over several devices."""
    if parallelism.num_devices == 1:
        return None
    if device is not None:
        raise ConfigError(
            f"device={device} is one, but {parallelism} asks for {parallelism.num_devices}"
        )
    try:
        devices = first_devices(parallelism.num_devices)
        return make_mesh(parallelism, probe(devices), devices)
    except ValueError as error:
        raise ConfigError(str(error)) from None


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
