"""The device side of the engine: compiled steps, the page pool and per-sequence state.

A step is one program, `step`, or two: `forward`, by tokens, and `sample`, by sequences. Everything
is launched without waiting; results are read a step later.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array

import kernels_pallas.cpu
from jaxserve.cache.kv_cache import KVCache, with_scales
from jaxserve.engine.batch import (
    SlotTable,
    needs_history,
    pack_sampling,
    pack_stops,
    pack_tokens,
)
from jaxserve.engine.groups import Grouping
from jaxserve.engine.programs import Forward
from jaxserve.engine.sampler import MAX_BIAS, Sampled
from jaxserve.engine.scheduler import Step
from jaxserve.engine.signature import COPIES, empty_state, head, program
from jaxserve.errors import EngineError
from jaxserve.models.family import Family
from jaxserve.plan import Plan

log = logging.getLogger(__name__)

OnProgram = Callable[[str, int, float], None]  # kind, size, seconds

_HASTY: dict[str, Any] = {"xla_backend_optimization_level": 0}  # halves the time of LLVM


@dataclass
class Launched:
    """A step on its way; arrays may not have been computed yet."""

    step: Step
    sampled: Sampled | None  # None: no row of the step draws a token
    reports: bool  # log-probabilities of drawn tokens are asked for
    scored: bool  # and of prompt tokens
    forward: Forward | None  # None: a decode loop

    def wait(self) -> None:
        """Returns when the step has been computed.

        Raises:
            Exception: whatever the device raised.
        """
        array = self.sampled.tokens if self.sampled else self.forward and self.forward.last
        jax.block_until_ready(array)


class Runner:
    """Owns the device arrays. One thread launches; another may be compiling."""

    def __init__(
        self,
        plan: Plan,
        family: Family,
        cfg: Any,
        params: Any,
        device: Any,
        kv_scales: Sequence[np.ndarray] | None = None,
    ):
        self.plan, self.family, self.cfg, self.device = plan, family, cfg, device
        self.params: Any = params  # None while asleep
        self.table = SlotTable(plan, cfg.vocab)
        self._grouping = Grouping(plan, self.table.tables) if plan.group_pages else None
        self._traced = plan  # what programs are compiled for now; only its kernels may differ
        self._programs: dict[tuple[str, int], Callable[..., Any]] = {}
        self._sizes: dict[str, tuple[int, ...]] = {}  # of programs, by kind
        self._stop = threading.Event()
        self._compiler: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._unused: dict[int, dict[str, Any]] = {}
        self._kv_scales = kv_scales if plan.kv_calibrated else None
        self.kv: KVCache | None = None
        self.history: Array | None = None

    # ---- device state -----------------------------------------------------------------

    def allocate(self) -> None:
        """An empty cache and history."""
        self.kv, self.history = empty_state(self.plan, self.cfg, self.device)
        if self._kv_scales is not None:
            self.kv = with_scales(self.kv, self._kv_scales)

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
        urgent, rest = self.plan.programs[:2], self.plan.programs[2:]
        if not background:
            self.allocate()
            self._compile_all(self.plan.programs, on_program)
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

    def _compile_all(self, programs: Sequence[tuple[str, int]], on_program: OnProgram) -> None:
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
    def limits(self) -> tuple[int, int]:
        """Most tokens, and most sequences, of a step that can run now."""
        most = self._ready("sample")[-1]
        parts = [(t, min(self.plan.rows(t), most)) for t in self._ready("forward")]
        return max([*parts, *((self.plan.step_tokens(r), r) for r in self._ready("step"))])

    def _compile(self, kind: str, size: int, *, hasty: bool = False) -> float:
        """Makes or replaces a program, `hasty` one that will not live; the seconds it took."""
        started = time.monotonic()
        made = program(self._traced, self.family, self.cfg, self.params, kind, size)
        with jax.default_device(self.device):
            lowered = jax.jit(made.function, donate_argnums=made.donated).lower(*made.arguments)
            self._programs[kind, size] = lowered.compile(compiler_options=_HASTY if hasty else None)
        self._sizes[kind] = tuple(sorted({size, *self._ready(kind)}))
        return time.monotonic() - started

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
        moved_in = False
        for row in step.rows:
            if self.table.enter(row):
                moved_in = True
                if needs_history(row.seq):
                    self._seed(row.seq)
        if self._grouping is not None:
            self._grouping.arrange(step, moved_in)
        if step.copies:
            self._copy(step.copies)
        if step.repeats > 1:
            return self._launch_decode(step)
        R = self._whole(step)
        return self._launch_parts(step) if R is None else self._launch_whole(step, R)

    def _launch_whole(self, step: Step, R: int) -> Launched:
        inputs = pack_tokens(step, self.plan.step_tokens(R), R, self.table)
        drawing = pack_sampling(step, R, self.table, self._unused_arrays(R))
        sampled, forward, self.kv, self.history = self._programs["step", R](
            self.params, self.kv, self.history, inputs, drawing
        )
        return Launched(step, sampled, bool(drawing.flags[3]), bool(inputs.counts[1]), forward)

    def _launch_parts(self, step: Step) -> Launched:
        T = self._bucket(step)
        inputs = pack_tokens(step, T, self.plan.rows(T), self.table)
        forward, self.kv = self._programs["forward", T](self.params, self.kv, self.history, inputs)
        scored = bool(inputs.counts[1])
        if not any(row.samples for row in step.rows):  # chunks of prompts that go on
            return Launched(step, None, False, scored, forward)
        R = self._row_bucket(step)
        drawing = pack_sampling(step, R, self.table, self._unused_arrays(R))
        sampled, self.history = self._programs["sample", R](
            head(self.params), forward.last, self.history, drawing
        )
        return Launched(step, sampled, bool(drawing.flags[3]), scored, forward)

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
        return Launched(step, Sampled(tokens, *(None,) * 4), False, False, None)

    def _whole(self, step: Step) -> int | None:
        """Rows of the smallest program that exists and is this whole step."""
        fits = (r for r in self._ready("step") if r >= len(step.rows))
        return next((r for r in fits if self.plan.step_tokens(r) >= step.num_tokens), None)

    def _bucket(self, step: Step) -> int:
        """Tokens of the smallest `forward` that exists and holds the step."""
        fits = [t for t in self._ready("forward") if self.plan.rows(t) >= len(step.rows)]
        return next(t for t in fits if t >= step.num_tokens)

    def _row_bucket(self, step: Step) -> int:
        """Rows of the smallest `sample` that exists and holds the step."""
        return next(r for r in self._ready("sample") if r >= len(step.rows))

    def _ready(self, kind: str) -> tuple[int, ...]:
        """Sizes that exist, ascending."""
        return self._sizes.get(kind, ())

    def _seed(self, seq: Any) -> None:
        self._wait_for("seed_history")
        row = np.zeros(self.plan.max_model_len + 1, np.int32)
        row[: len(seq.tokens)] = seq.tokens
        self.history = self._programs["seed_history", 0](self.history, np.int32(seq.slot), row)

    def _copy(self, copies: list[tuple[int, int]]) -> None:
        self._wait_for("copy_pages")
        for i in range(0, len(copies), COPIES):
            pairs = np.full((2, COPIES), self.plan.num_pages, np.int32)  # out of range: not copied
            part = copies[i : i + COPIES]
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
