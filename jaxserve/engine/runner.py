"""The device side of the engine: compiled steps, the page pool and per-sequence state.

A step is two programs: `forward`, one per bucket of tokens, and `sample`, one per bucket of
sequences. Everything is launched without waiting; results are read a step later.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import kernels_pallas.cpu
from jaxserve.cache import kv_cache
from jaxserve.cache.kv_cache import KVCache
from jaxserve.engine.batch import (
    MAX_STOPS,
    SampleArrays,
    SlotTable,
    StepArrays,
    StepInputs,
    needs_history,
    pack_sampling,
    pack_stops,
    pack_tokens,
)
from jaxserve.engine.sampler import MAX_BIAS, Sampled, logprobs_of, sample
from jaxserve.engine.scheduler import Step
from jaxserve.engine.serving_ops import head_ops, serving_ops
from jaxserve.errors import EngineError
from jaxserve.models.family import Family
from jaxserve.plan import Plan

log = logging.getLogger(__name__)

OnProgram = Callable[[str, int, float], None]  # kind, size, seconds

_HASTY: dict[str, Any] = {"xla_backend_optimization_level": 0}  # halves the time of LLVM
_COPIES = 64  # pages copied per launch
_SCORED = 64  # prompt tokens whose logits exist at a time
FIRST_BUCKET = 64
"""Tokens of the program that is compiled first and serves until the others exist."""


@dataclass
class Launched:
    """A step on its way; arrays may not have been computed yet."""

    step: Step
    sampled: Sampled
    reports: bool  # log-probabilities of drawn tokens are asked for
    scored: bool  # and of prompt tokens
    hidden: Array | None  # [T, D]
    scores: tuple[Array, ...] | None  # of prompt tokens, as `logprobs_of`


class Runner:
    """Owns the device arrays. One thread launches; another may be compiling."""

    def __init__(self, plan: Plan, family: Family, cfg: Any, params: Any, device: Any):
        self.plan, self.family, self.cfg, self.device = plan, family, cfg, device
        self.params = params
        self.table = SlotTable(plan, cfg.vocab)
        self._traced = plan  # what programs are compiled for now; only its kernels may differ
        self._programs: dict[tuple[str, int], Callable[..., Any]] = {}
        self._stop = threading.Event()
        self._compiler: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._unused: dict[int, dict[str, Any]] = {}
        self.kv: KVCache | None = None
        self.history: Array | None = None
        self._state = jax.eval_shape(self._empty_state)

    # ---- device state -----------------------------------------------------------------

    def allocate(self) -> None:
        """An empty cache and history."""
        self.kv, self.history = self._empty_state()

    def _empty_state(self) -> tuple[KVCache, Array]:
        plan = self.plan
        kv = kv_cache.allocate(
            self.cfg.num_layers,
            plan.num_pages,
            plan.page_size,
            self.cfg.kv_shape,
            plan.kv_dtype,
            self.device,
        )
        shape = (plan.max_num_seqs, plan.max_model_len + 1)
        return kv, jnp.zeros(shape, jnp.int32, device=self.device)

    def free(self) -> None:
        """Gives the cache's memory back."""
        for leaf in jax.tree.leaves((self.kv, self.history)):
            leaf.delete()
        self.kv = self.history = None

    # ---- programs ---------------------------------------------------------------------

    def warm_up(self, *, background: bool, on_program: OnProgram) -> None:
        """Allocates and compiles what the first token needs; the rest behind it if `background`.

        Where the native kernels are still to be built, that happens behind the first tokens too:
        the first program then runs the reference, and makes way for the native one.
        """
        buckets = self.plan.token_buckets
        first = min(buckets, key=lambda t: abs(t - FIRST_BUCKET))
        order = [first, *(t for t in buckets if t != first)]
        urgent = [("forward", first), ("sample", self.plan.rows(first))]
        rest = [("seed_history", 0), ("copy_pages", 0)]
        for t in order[1:]:
            rest += [("forward", t), ("sample", self.plan.rows(t))]
        if self.plan.decode_steps > 1:
            rest += [("decode", r) for r in self.plan.row_buckets]
        rest = list(dict.fromkeys(rest))  # buckets may share a sampler
        if not background:
            self.allocate()
            self._compile_all(urgent + rest, on_program)
            return self._check()
        interim = self.plan.kernels == "native" and not kernels_pallas.cpu.ready()
        if interim:
            log.info("serving with reference kernels until the native ones are built")
            self._traced = replace(self.plan, kernels="reference")
            rest = urgent + rest
        else:
            self._find_kernels()
        with ThreadPoolExecutor(len(urgent)) as pool:  # the compiler lets go of the interpreter
            jobs = [pool.submit(self._compile, *program, hasty=interim) for program in urgent]
            self.allocate()  # a gigabyte of zeros takes a while too
            took = [job.result() for job in jobs]
        if not interim:
            for program, seconds in zip(urgent, took, strict=True):
                on_program(*program, seconds)
        self._compiler = threading.Thread(
            target=self._compile_all, args=(rest, on_program), name="jaxserve-compile", daemon=True
        )
        self._compiler.start()

    def _find_kernels(self) -> None:
        """From here on programs are for the plan's kernels, or for the reference if they fail."""
        lost = self.plan.kernels == "native" and not kernels_pallas.cpu.available()
        self._traced = replace(self.plan, kernels="reference") if lost else self.plan

    def _compile_all(self, programs: list[tuple[str, int]], on_program: OnProgram) -> None:
        try:
            self._find_kernels()
            for kind, size in programs:
                if self._stop.is_set():
                    return
                on_program(kind, size, self._compile(kind, size))
            _settle_heap()
        except BaseException as error:  # reported to whoever waits, or runs the next step
            self._failure = error

    def wait_until_warm(self) -> None:
        """Returns when every program exists.

        Raises:
            EngineError: one of them could not be compiled.
        """
        if self._compiler is not None:
            self._compiler.join()
        self._check()

    def _check(self) -> None:
        if self._failure is not None:
            raise EngineError(f"a step could not be compiled: {self._failure}") from self._failure

    @property
    def num_programs(self) -> int:
        return len(self._programs)

    @property
    def max_tokens(self) -> int:
        """The largest step that can run now."""
        ready = [t for kind, t in list(self._programs) if kind == "forward"]
        return max(t for t in ready if ("sample", self.plan.rows(t)) in self._programs)

    def _compile(self, kind: str, size: int, *, hasty: bool = False) -> float:
        """Makes or replaces a program, `hasty` one that will not live; the seconds it took."""
        started = time.monotonic()
        function, donated, arguments = getattr(self, f"_{kind}_program")(size)
        with jax.default_device(self.device):
            lowered = jax.jit(function, donate_argnums=donated).lower(*arguments)
            self._programs[kind, size] = lowered.compile(compiler_options=_HASTY if hasty else None)
        return time.monotonic() - started

    def _forward_program(self, T: int):
        R = self.plan.rows(T)
        ints = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
        tables = ints((R, self.plan.pages_per_seq))
        inputs = StepArrays(ints((4, T)), ints((3, R + 1)), tables, ints((2,)))
        arguments = (_abstract(self.params), *self._state, inputs)
        return partial(forward_step, self._traced, self.family, self.cfg), (1,), arguments

    def _sample_program(self, R: int):
        logits = jax.ShapeDtypeStruct((R, self.cfg.vocab), self.plan.activation_dtype)
        inputs = pack_sampling(Step(), R, self.table, self._unused_arrays(R))
        return sample_step, (1,), (logits, self._state[1], _abstract(inputs))

    def _decode_program(self, R: int):
        _, _, (params, kv, history, inputs) = self._forward_program(R)
        _, _, (_, _, drawing) = self._sample_program(R)
        stops = jax.ShapeDtypeStruct((R, MAX_STOPS), jnp.int32)
        arguments = (
            params,
            kv,
            history,
            inputs,
            drawing,
            stops,
            jax.ShapeDtypeStruct((), jnp.int32),
        )
        return partial(decode_loop, self._traced, self.family, self.cfg), (1, 2), arguments

    def _seed_history_program(self, _: int):
        row = jax.ShapeDtypeStruct((self.plan.max_model_len + 1,), jnp.int32)
        slot = jax.ShapeDtypeStruct((), jnp.int32)
        return lambda h, slot, row: h.at[slot].set(row), (0,), (self._state[1], slot, row)

    def _copy_pages_program(self, _: int):
        pages = jax.ShapeDtypeStruct((_COPIES,), jnp.int32)
        return kv_cache.copy_pages, (0,), (self._state[0], pages, pages)

    def _unused_arrays(self, R: int) -> dict[str, Any]:
        if R not in self._unused:
            zeros = partial(jax.device_put, device=self.device)
            self._unused[R] = {
                "bias_ids": zeros(np.zeros((R, MAX_BIAS), np.int32)),
                "bias": zeros(np.zeros((R, MAX_BIAS), np.float32)),
                "mask": zeros(np.zeros((R, -(-self.cfg.vocab // 32)), np.uint32)),
            }
        return self._unused[R]

    # ---- steps ------------------------------------------------------------------------

    def launch(self, step: Step) -> Launched:
        """Starts a step behind those already started."""
        self._check()
        for row in step.rows:
            if self.table.enter(row) and needs_history(row.seq):
                self._seed(row.seq)
        if step.copies:
            self._copy(step.copies)
        if step.repeats > 1:
            return self._launch_decode(step)
        T = self._bucket(step)
        R = self.plan.rows(T)
        inputs = pack_tokens(step, T, R, self.table)
        logits, self.kv, hidden, scores = self._programs["forward", T](
            self.params, self.kv, self.history, inputs
        )
        drawing = pack_sampling(step, R, self.table, self._unused_arrays(R))
        sampled, self.history = self._programs["sample", R](logits, self.history, drawing)
        reports, scored = bool(drawing.flags[3]), bool(inputs.counts[1])
        return Launched(step, sampled, reports, scored, hidden, scores)

    def max_repeats(self, step: Step) -> int:
        """Tokens that a launch may draw for each row of a decoding step."""
        R = self._decode_bucket(step)
        return self.plan.decode_steps if ("decode", R) in self._programs else 1

    def _decode_bucket(self, step: Step) -> int:
        return next(R for R in self.plan.row_buckets if len(step.rows) <= R)

    def _launch_decode(self, step: Step) -> Launched:
        """Draws `step.repeats` tokens for every row in one launch."""
        R = self._decode_bucket(step)
        inputs = pack_tokens(step, R, R, self.table)
        drawing = pack_sampling(step, R, self.table, self._unused_arrays(R))
        tokens, self.kv, self.history = self._programs["decode", R](
            self.params, self.kv, self.history, inputs, drawing,
            pack_stops(step, R), np.int32(step.repeats),
        )  # fmt: skip
        return Launched(step, Sampled(tokens, *(None,) * 4), False, False, None, None)

    def _bucket(self, step: Step) -> int:
        """The smallest program that exists and holds the step."""
        n, r = step.num_tokens, len(step.rows)
        sizes = [
            t
            for t in self.plan.token_buckets
            if t >= n
            and self.plan.rows(t) >= r
            and ("forward", t) in self._programs
            and ("sample", self.plan.rows(t)) in self._programs
        ]
        return sizes[0]

    def _seed(self, seq: Any) -> None:
        self._wait_for("seed_history")
        row = np.zeros(self.plan.max_model_len + 1, np.int32)
        row[: len(seq.tokens)] = seq.tokens
        self.history = self._programs["seed_history", 0](self.history, np.int32(seq.slot), row)

    def _copy(self, copies: list[tuple[int, int]]) -> None:
        self._wait_for("copy_pages")
        for i in range(0, len(copies), _COPIES):
            pairs = np.full((2, _COPIES), self.plan.num_pages, np.int32)  # out of range: not copied
            part = copies[i : i + _COPIES]
            pairs[:, : len(part)] = np.asarray(part, np.int32).T
            self.kv = self._programs["copy_pages", 0](self.kv, pairs[0], pairs[1])

    def _wait_for(self, kind: str) -> None:
        while (kind, 0) not in self._programs:
            self._check()
            time.sleep(0.01)

    def close(self) -> None:
        """Ends background compilation and gives the memory back."""
        self._stop.set()
        if self._compiler is not None:
            self._compiler.join()
        if self.kv is not None:
            self.free()
        self._programs.clear()
        self._unused.clear()
        gc.unfreeze()
        self.params = None


def _settle_heap() -> None:
    """Takes what start-up has made out of the garbage collector's rounds, as vLLM does.

    Otherwise it walks through all objects of jax now and then, in the middle of a step.
    """
    gc.collect()
    gc.freeze()


def forward_step(
    plan: Plan,
    family: Family,
    cfg: Any,
    params: Any,
    kv: KVCache,
    history: Array,
    arrays: StepArrays,
) -> tuple[Array, KVCache, Array, tuple[Array, Array, Array, Array]]:
    """One step's forward pass.

    Returns:
        Logits [R, V] after each sequence's last token, the cache, hidden states [T, D] and, if
        asked for, log-probabilities of the targets, as `logprobs_of`.
    """
    x = arrays.unpack()
    logits, kv, hidden = next_logits(plan, family, cfg, params, kv, history, x)

    def head(h: Array) -> Array:
        return family.logits(cfg, params, h[None], head_ops(plan, jnp.int32(h.shape[0])))[0]

    return logits, kv, hidden, _score(head, hidden, x)


def next_logits(
    plan: Plan, family: Family, cfg: Any, params: Any, kv: KVCache, history: Array, x: StepInputs
) -> tuple[Array, KVCache, Array]:
    """Logits [R, V] after each sequence's last token, the cache, and hidden states [T, D]."""
    drawn = history[x.slots, x.positions[0]][None]
    tokens = jnp.where(x.tokens < 0, drawn, x.tokens)
    hidden, kv = family.forward(cfg, params, tokens, x.positions, serving_ops(plan, x.ragged), kv)
    hidden = hidden[0]
    head = head_ops(plan, x.ragged.num_seqs)
    logits = family.logits(cfg, params, hidden[x.last][None], head)[0]
    return logits, kv, hidden


def sample_step(logits: Array, history: Array, arrays: SampleArrays) -> tuple[Sampled, Array]:
    """`sample`, of arrays as they travel."""
    return sample(logits, history, arrays.unpack())


def decode_loop(
    plan: Plan,
    family: Family,
    cfg: Any,
    params: Any,
    kv: KVCache,
    history: Array,
    arrays: StepArrays,
    sampling: SampleArrays,
    stops: Array,
    repeats: Array,
) -> tuple[Array, KVCache, Array]:
    """Several decoding steps in one launch; ends early once every sequence has drawn a stop token.

    Args:
        stops: [R, MAX_STOPS], tokens that end each sequence.

    Returns:
        Tokens [decode_steps, R], of which `repeats` rows are drawn; the cache and the history.
    """
    x, drawing = arrays.unpack(), sampling.unpack()
    R = drawing.lengths.shape[0]

    def unfinished(carry: tuple[Array, ...]) -> Array:
        i, _, _, active, _ = carry
        return (i < repeats) & jnp.any(active)

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        i, kv, history, active, tokens = carry
        ragged = x.ragged._replace(kv_lens=x.ragged.kv_lens + i)
        known = jnp.where(i == 0, x.tokens, -1)
        inputs = x._replace(tokens=known, positions=x.positions + i, ragged=ragged)
        logits, kv, _ = next_logits(plan, family, cfg, params, kv, history, inputs)
        sampled, history = sample(logits, history, drawing._replace(lengths=drawing.lengths + i))
        active &= ~jnp.any(sampled.tokens[:, None] == stops, -1)
        return i + 1, kv, history, active, tokens.at[i].set(sampled.tokens)

    active = jnp.arange(R) < x.ragged.num_seqs
    tokens = jnp.zeros((plan.decode_steps, R), jnp.int32)
    carry = lax.while_loop(unfinished, step, (jnp.int32(0), kv, history, active, tokens))
    return carry[4], carry[1], carry[2]


def _score(
    head: Callable[[Array], Array], hidden: Array, x: StepInputs
) -> tuple[Array, Array, Array, Array]:
    """Log-probabilities of `targets` for the first `num_scored` tokens, a block at a time."""
    T = hidden.shape[0]
    size = min(_SCORED, T)
    blank = jax.eval_shape(logprobs_of, jax.ShapeDtypeStruct((T, 32), jnp.float32), x.targets)
    start = tuple(jnp.zeros(leaf.shape, leaf.dtype) for leaf in blank)

    def block(i: Array, out: tuple[Array, ...]) -> tuple[Array, ...]:
        at = jnp.minimum(i * size, T - size)
        rows = head(lax.dynamic_slice_in_dim(hidden, at, size)).astype(jnp.float32)
        found = logprobs_of(rows, lax.dynamic_slice_in_dim(x.targets, at, size))
        return tuple(
            lax.dynamic_update_slice_in_dim(o, f, at, 0) for o, f in zip(out, found, strict=True)
        )

    blocks = -(-x.num_scored // size)
    # the condition keeps XLA from hoisting a body that does not depend on i out of an empty loop
    return lax.cond(blocks > 0, lambda: lax.fori_loop(0, blocks, block, start), lambda: start)


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype), tree)
