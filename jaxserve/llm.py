"""`LLM`: a served model in one object, for scripts, notebooks and the server alike."""

from __future__ import annotations

import gc
import logging
import time
import weakref
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve import plan as planning
from jaxserve import split
from jaxserve.checkpoint import cache_scales, hf, hub
from jaxserve.config import EngineConfig
from jaxserve.engine.balance import ExpertBalance
from jaxserve.engine.compile_watch import keep_programs, watch
from jaxserve.engine.engine import Engine, EngineStats
from jaxserve.engine.generation import Generation
from jaxserve.engine.lockstep import Follower, Lockstep
from jaxserve.engine.loop import EngineLoop
from jaxserve.engine.progress import Progress
from jaxserve.engine.runner import Runner
from jaxserve.engine.sequence import Sequence as Seq
from jaxserve.errors import ConfigError, EngineError, RequestError
from jaxserve.intake import Intake, Prompt, as_prompts, per_prompt
from jaxserve.models.family import family
from jaxserve.models.parallel import expert_layers
from jaxserve.paths.keeper import Keeper
from jaxserve.quant import weights as quant
from jaxserve.request import (
    CompletionOutput,
    EmbeddingOutput,
    RequestOutput,
    SamplingParams,
)
from jaxserve.searches import Searches, once
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.weights import ServedWeights, has_reward_head, held_in_int8, serving_mesh
from reasoning.result import Budget

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
        self.engine_config = EngineConfig.of(settings)
        self.model_name = str(model)
        folder = hub.resolve(model, revision)
        raw = hf.read_config(folder)
        self.model_type: str = raw.get("model_type", "")
        self._family = family(self.model_type)
        cfg = self.model_config = hf.model_config(self._family, raw)
        self.tokenizer: Tokenizer | None = _tokenizer(folder, tokenizer, cfg.vocab)
        split.check_split(self.engine_config, cfg)
        self._mesh = serving_mesh(split.parallelism_of(self.engine_config), device)
        self._lockstep = None if device else Lockstep.over(self._mesh)  # a device is this one's
        device = self._mesh.local_devices[0] if self._mesh else device or planning.default_device()
        keep_programs()
        rounded = self.engine_config.kv_cache_dtype == "int8"
        scales = cache_scales.load(folder, cfg.num_layers, cfg.kv_shape) if rounded else None
        in_int8 = held_in_int8(folder, self._family, cfg, raw, self.engine_config)
        plan = self._resolve(raw, device, in_int8, kv_calibrated=scales is not None)
        judges = has_reward_head(folder, self.engine_config)
        self.plan = planning.for_searches(plan, self.engine_config, cfg, judges=judges)
        self._weights = ServedWeights(
            folder, self._family, cfg, self.engine_config, self.plan, device, self._mesh, in_int8
        )
        params, self._reward_head = self._weights.load(), self._weights.reward_head()
        runner = Runner(
            self.plan, self._family, cfg, params, device, scales, self._mesh, self._reward_head
        )
        self._progress = Progress(self.plan, self.engine_config.progress, started)
        self._progress.say(f"{self.model_name}: {self.plan.describe()}")
        background = self.engine_config.background_compile and self._lockstep is None
        runner.warm_up(background=background, on_program=self._progress.program)
        self._runner = runner
        text = self.tokenizer.token_text if self.tokenizer else str
        engine = Engine(
            runner, prefix_caching=self.engine_config.enable_prefix_caching, token_text=text
        )
        self._loop = self._start_loop(engine)
        self._balance = self._expert_balance()
        self._close = weakref.finalize(self, _close, self._loop, self._balance)  # or by hand
        self._asleep = False
        self._intake = Intake(
            self.plan,
            self.model_config.vocab,
            self.tokenizer,
            self.model_name,
            self.engine_config.seed,
            self._loop.abort,
            self.num_processes,
        )
        if not background:
            self.wait_until_warm()

    def _resolve(self, raw: Any, device: Any, held: Any, *, kv_calibrated: bool) -> planning.Plan:
        """The plan for a device, which is the same in all processes."""
        cfg, config = self.model_config, self.engine_config
        memory = planning.memory_limit(device)
        if self._lockstep is not None:
            self._lockstep.check(self.model_type, config)
            memory = self._lockstep.agreed(memory)
        local = split.sizes_on_device(cfg, split.parallelism_of(config))
        size = partial(quant.weight_bytes, self._family, cfg, sizes=local, in_int8=held)
        return planning.resolve(
            config, raw, cfg, size, device, kv_calibrated=kv_calibrated, memory=memory
        )

    def _start_loop(self, engine: Engine) -> EngineLoop | Follower:
        if self._lockstep is None:
            return EngineLoop(engine)
        self._lockstep.meet()  # a step waits for nobody who still compiles
        return (EngineLoop if self._lockstep.leads else Follower)(engine, self._lockstep)

    # ---- several processes ------------------------------------------------------------------

    @property
    def num_processes(self) -> int:
        """Processes that serve together (sharding/multihost.py)."""
        return self._lockstep.count if self._lockstep else 1

    @property
    def follows(self) -> bool:
        """Whether process 0 takes the requests, and this one is to `follow`."""
        return isinstance(self._loop, Follower)

    def follow(self) -> None:
        """Does what process 0 does until that shuts down, in every other process of a mesh.

        Raises:
            EngineError: this is process 0, or a step failed.
        """
        if not isinstance(self._loop, Follower):
            raise EngineError("follow() is for processes 1 and up: process 0 takes the requests")
        self._loop.follow(self._intake.sequences)

    def _needs_one_process(self, what: str) -> None:
        if self._lockstep is not None:
            raise EngineError(
                f"{what} needs one process, and {self.num_processes} serve together; start them "
                "again instead"
            )

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
        ids = [{"prompt_token_ids": self.encode_chat(m, **template)} for m in many]
        return self.generate(ids, sampling_params)

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

    # ---- searches ----------------------------------------------------------------------------

    def search(
        self, prompts: Any, controller: Any, budget: Budget | None = None, **options: Any
    ) -> Any:
        """The `Result` of a search for the answer to a prompt; a list of them for several.

        Args:
            prompts: as of `generate`, or `Question`s. `options` are those of `Searches.search`.
            controller: of `reasoning.controllers`, or one of your own.
        """
        return self.searches.search(prompts, controller, budget, **options)

    @once
    def searches(self) -> Searches:
        """What searches of this engine go through."""
        self._needs_one_process("search()")
        keep = partial(Keeper, root=self._intake.root, max_model_len=self.max_model_len)
        keeper, head = self._loop.call(keep), self._reward_head
        return Searches(self._loop, keeper, self._intake, head and float(head.prior))  # type: ignore[arg-type]

    # ---- embeddings -----------------------------------------------------------------------

    def encode(
        self, prompts: Prompt | Sequence[Prompt], pooling: str = "last"
    ) -> list[EmbeddingOutput]:
        """A vector per prompt: the normed hidden state of its last token, or the mean of all.

        Raises:
            RequestError: as `generate`, or a pooling other than "last" and "mean".
        """
        return self.embed(prompts, pooling)

    def embed(
        self, prompts: Prompt | Sequence[Prompt], pooling: str | None = None
    ) -> list[EmbeddingOutput]:
        """`encode`, as vLLM calls it for vectors."""
        pooling = pooling or "last"
        if pooling not in ("last", "mean"):
            raise RequestError(f"pooling={pooling!r} must be 'last' or 'mean'", "pooling")
        params, ids = SamplingParams(), [self._intake.token_ids(p)[0] for p in as_prompts(prompts)]
        requests = [self._intake.sequences(p, params, pooling=pooling) for p in ids]
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
        self._loop.stats()  # raises after shut-down
        self._needs_one_process("load_params()")
        if self.params is None:
            raise EngineError("the engine sleeps without weights; wake_up() first")
        tree = self._weights.copied(params, self.params)
        swap = self._loop.call(lambda engine: engine.load_params(tree))
        return swap.result(timeout)

    def stats(self) -> EngineStats:
        """A snapshot of the engine's counters. Cheap and thread-safe."""
        return self._loop.stats()

    def expert_load(self) -> np.ndarray:
        """Tokens that chose each expert since experts were last placed, int64 [layers, experts].

        Layers without experts have zeros.

        Raises:
            ConfigError: experts are not spread over devices, so nobody counts.
        """
        return self._spread_experts().load()

    def rebalance_experts(self) -> int:
        """Moves experts and their copies to where the load since the last time wants them.

        Requests go on: the move happens between two steps, and changes no token. The memory of the
        old weights is reused, so a tree that `params` gave before is of no use afterwards.

        Returns:
            The number of slots that took another expert; 0: no layer would gain.

        Raises:
            ConfigError: experts are not spread over devices.
        """
        return self._spread_experts().rebalance()

    def _spread_experts(self) -> ExpertBalance:
        if self._asleep:
            raise EngineError("the engine sleeps; call wake_up() first")
        if self._balance is None:
            raise ConfigError(
                "expert_parallel_size=1: all experts are on every device, and none can move; set "
                "expert_parallel_size to spread them"
            )
        return self._balance

    def _expert_balance(self) -> ExpertBalance | None:
        if self.plan.dispatch is None:
            return None
        layers, ready = expert_layers(self._runner.params), self._runner.wait_until_warm
        interval = None if self.follows else self.engine_config.eplb_step_interval
        return ExpertBalance(self._loop, ready, self.plan.dispatch.layout, layers, interval)

    def reset_prefix_cache(self) -> None:
        """Forgets which prompt beginnings are cached."""
        self._loop.order("reset_prefix_cache")

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
        self._needs_one_process("sleep()")
        if self._asleep:
            return

        def free(engine: Engine) -> None:
            if engine.busy:
                s = engine.stats()
                count = s.num_running + s.num_waiting
                what = f"{count} requests are" if count else "a search is"
                raise EngineError(f"{what} running; sleep() when idle")
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
                self._runner.params = self._weights.load()
            self._runner.allocate()

        self._loop.call(restore)
        self._asleep = False

    def drain(self, timeout: float | None = None) -> bool:
        """Waits until nothing runs, no search either; False if `timeout` seconds were too few."""
        end = None if timeout is None else time.monotonic() + timeout
        while self._loop.call(lambda engine: engine.busy):  # behind what is in the inbox
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


def _close(loop: EngineLoop | Follower, balance: ExpertBalance | None) -> None:
    watch.allow(loop)
    loop.close()
    if balance:
        balance.close()


def _tokenizer(folder: Path, asked: str | Path | bool | None, vocab: int) -> Tokenizer | None:
    if asked is False:
        return None
    folder = hub.resolve(asked) if isinstance(asked, str | Path) else folder
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.check_vocab(vocab)
    return tokenizer
