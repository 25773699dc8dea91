"""The device side of the engine: compiled steps, the page pool and per-sequence state.

A step is one program, `step`, or two: `forward`, by tokens, and `sample`, by sequences. Everything
is launched without waiting; results are read a step later.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

import kernels_pallas.cpu
from jaxserve.cache.kv_cache import KVCache, with_scales
from jaxserve.engine.batch import (
    SampleArrays,
    SlotTable,
    StepArrays,
    needs_history,
    pack_noise,
    pack_sampling,
    pack_stops,
    pack_tokens,
)
from jaxserve.engine.groups import Grouping
from jaxserve.engine.programs import Forward
from jaxserve.engine.sampler import MAX_BIAS, Sampled
from jaxserve.engine.scheduler import Step
from jaxserve.engine.signature import COPIES, empty_state, head, program
from jaxserve.engine.spread import empty_states, everywhere, on_devices, spread, stacked
from jaxserve.errors import EngineError
from jaxserve.models.family import Family
from jaxserve.models.parallel import by_stack, expert_layers, experts_of, with_experts
from jaxserve.models.reward_head import RewardHead
from jaxserve.plan import Plan
from moe.moving import sources
from moe.parallel import PlacedExperts

log = logging.getLogger(__name__)

OnProgram = Callable[[str, int, float], None]  # kind, size, seconds

_COMPILERS = 8  # at once, where nothing is served meanwhile: each may take gigabytes of the host

_HASTY: dict[str, Any] = {"xla_backend_optimization_level": 0}  # halves the time of LLVM


@dataclass
class Launched:
    """A step on its way; arrays may not have been computed yet."""

    steps: list[Step]  # of each rank
    sampled: Sampled | None  # rows of all ranks; None: none of them draws a token
    reports: bool  # log-probabilities of drawn tokens are asked for
    observes: bool  # and statistics
    scored: bool  # and of prompt tokens
    forward: Forward | None  # None: a decode loop
    counts: list[tuple[Array, Future[np.ndarray]]] = field(default_factory=list)  # taken behind it
    evidence: Array | None = None  # [T], of a reward head, if some row's path asks for it
    passes: Array | None = None  # [R], beyond the plain one, if some row is refined

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
        mesh: Mesh | None = None,
        reward_head: RewardHead | None = None,
    ):
        self.plan, self.family, self.cfg, self.device = plan, family, cfg, device
        self.mesh = mesh  # None: there is one device
        self.params: Any = params  # None while asleep
        self.reward_head = reward_head
        self.num_routers = len(expert_layers(params)) if plan.refines else 0
        self.tables = [SlotTable(plan, cfg.vocab) for _ in range(plan.num_ranks)]
        self._groupings = [Grouping(plan, t.tables) for t in self.tables if plan.group_pages]
        self._traced = plan  # what programs are compiled for now; only its kernels may differ
        self._programs: dict[tuple[str, int], Callable[..., Any]] = {}
        self._sizes: dict[str, tuple[int, ...]] = {}  # of programs, by kind
        self._listing = threading.Lock()  # of what exists, since several may be compiled at once
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
        if self.mesh is None:
            self.kv, self.history = empty_state(self.plan, self.cfg, self.device)
        else:
            self.kv, self.history = empty_states(self.plan, self.cfg, self.mesh)
        if self._kv_scales is not None:
            assert self.kv is not None
            self.kv = with_scales(self.kv, self._kv_scales)

    def free(self) -> None:
        """Gives the cache's memory back."""
        for leaf in jax.tree.leaves((self.kv, self.history)):
            leaf.delete()
        self.kv = self.history = None

    # ---- programs ---------------------------------------------------------------------

    def warm_up(
        self, *, background: bool, on_program: OnProgram,
        programs: Sequence[tuple[str, int]] | None = None,
    ) -> None:  # fmt: skip
        """Allocates and compiles what the first token needs; the rest behind it if `background`.

        In the foreground several are compiled at once, or only those `programs` of the plan that
        its steps will need; in the background one by one, because steps want the host too. Where
        the native kernels are still to be built, that happens behind the first tokens too:
        the first program then runs the reference, and makes way for the native one.
        """
        urgent, rest = self.plan.programs[:2], self.plan.programs[2:]
        if not background:
            self.allocate()
            # processes of one mesh must meet in the same order, and compile in it
            at_once = 1 if self.mesh is not None else min(_COMPILERS, os.cpu_count() or 1)
            self._compile_all(programs or self.plan.programs, on_program, at_once)
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

    def _compile_all(
        self, programs: Sequence[tuple[str, int]], on_program: OnProgram, at_once: int = 1
    ) -> None:
        def compiled(program: tuple[str, int]) -> float | None:
            return None if self._stop.is_set() else self._compile(*program)

        try:
            self._find_kernels()
            # a pool's threads are waited for as Python exits: none for what is in the background
            with ThreadPoolExecutor(at_once) if at_once > 1 else nullcontext() as pool:
                took = pool.map(compiled, programs) if pool else map(compiled, programs)
                for program, seconds in zip(programs, took, strict=True):
                    if seconds is None:
                        return
                    on_program(*program, seconds)
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
        return max([*parts, *((self.plan.step_tokens(r), r) for r in self._ready("step")[-1:])])

    def _compile(self, kind: str, size: int, *, hasty: bool = False) -> float:
        """Makes or replaces a program, `hasty` one that will not live; the seconds it took."""
        started = time.monotonic()
        params = self.reward_head if kind == "evidence" else self.params
        made = program(self._traced, self.family, self.cfg, params, kind, size)
        if self.mesh is not None:
            made = spread(made, self._traced, self.mesh)
        with jax.default_device(self.device):
            lowered = jax.jit(made.function, donate_argnums=made.donated).lower(*made.arguments)
            options = _HASTY if hasty else self.plan.compiler_options
            compiled = lowered.compile(compiler_options=options)
        with self._listing:
            self._programs[kind, size] = compiled
            self._sizes[kind] = tuple(sorted({size, *self._ready(kind)}))
        return time.monotonic() - started

    def _unused_arrays(self, R: int) -> dict[str, Any]:
        """What `pack_sampling` leaves out, on the device already: a step uploads no zeros."""
        if R not in self._unused:
            zeros = {
                "bias_ids": np.zeros((R, MAX_BIAS), np.int32),
                "bias": np.zeros((R, MAX_BIAS), np.float32),
                "mask": np.zeros((R, -(-self.cfg.vocab // 32)), np.uint32),
            }
            if self.mesh is None:
                self._unused[R] = jax.device_put(zeros, self.device)
            else:
                self._unused[R] = on_devices([zeros] * len(self.tables), self.mesh)
        return self._unused[R]

    def _host(self, each: Sequence[Any]) -> Any:
        """Host arrays of each rank as a program takes them."""
        return each[0] if self.mesh is None else stacked(each, self.mesh)

    # ---- steps ------------------------------------------------------------------------

    def launch(self, steps: list[Step]) -> Launched:
        """Starts a step of each rank behind those already started."""
        self._check()
        self._enter(steps)
        if any(step.copies for step in steps):
            self._copy([step.copies for step in steps])
        if steps[0].repeats > 1:
            return self._launch_decode(steps[0])
        if any(row.samples and row.seq.route for step in steps for row in step.rows):
            launched = self._launch_refined(steps)
        elif (R := self._whole(steps)) is None:
            launched = self._launch_parts(steps)
        else:
            launched = self._launch_whole(steps, R)
        if self.reward_head is not None and any(
            row.seq.judged for step in steps for row in step.rows
        ):
            launched.evidence = self._judge(launched)
        return launched

    def _judge(self, launched: Launched) -> Array:
        """What every token of a step adds to the log-odds of its path."""
        assert launched.forward is not None
        T = launched.forward.hidden.shape[0] // len(self.tables)
        self._wait_for("evidence", T)
        return self._programs["evidence", T](self.reward_head, launched.forward.hidden)

    def _enter(self, steps: list[Step]) -> None:
        """Brings the tables of slots up to date, and histories that sampling will look at; puts
        rows of one prefix side by side."""
        for rank, (step, table) in enumerate(zip(steps, self.tables, strict=True)):
            moved_in = table.enter(step.rows)
            for seq in moved_in:
                if needs_history(seq):
                    self._seed(rank, seq)
            if self._groupings:
                self._groupings[rank].arrange(step, bool(moved_in))

    def _launch_whole(self, steps: list[Step], R: int) -> Launched:
        inputs, scored = self._packed(steps, self.plan.step_tokens(R), R)
        drawing, reports, observes = self._drawing(steps, R)
        sampled, forward, self.kv, self.history = self._programs["step", R](
            self.params, self.kv, self.history, inputs, drawing
        )
        return Launched(steps, sampled, reports, observes, scored, forward)

    def _launch_parts(self, steps: list[Step]) -> Launched:
        kind, T = self._forward(steps)
        inputs, scored = self._packed(steps, T, self.plan.rows(T))
        forward, self.kv = self._programs[kind, T](self.params, self.kv, self.history, inputs)
        if not any(row.samples for step in steps for row in step.rows):
            return Launched(steps, None, False, False, scored, forward)  # prompts that go on
        R = self._row_bucket(steps)
        drawing, reports, observes = self._drawing(steps, R)
        sampled, self.history = self._programs["sample", R](
            head(self.params), forward.last, self.history, drawing
        )
        return Launched(steps, sampled, reports, observes, scored, forward)

    def _launch_refined(self, steps: list[Step]) -> Launched:
        """A step that refines tokens, on one device."""
        (step,) = steps
        T = next(t for t in self.plan.token_buckets if _fits(self.plan, t, step))
        self._wait_for("refine", T)
        R = self.plan.rows(T)
        inputs, scored = self._packed(steps, T, R)
        drawing, reports, observes = self._drawing(steps, R)
        sampled, passes, forward, self.kv, self.history = self._programs["refine", T](
            self.params, self.kv, self.history, inputs, drawing, pack_noise(step, R)
        )
        return Launched(steps, sampled, reports, observes, scored, forward, passes=passes)

    def _packed(self, steps: list[Step], T: int, R: int) -> tuple[StepArrays, bool]:
        """Arrays of a forward pass, and whether it scores prompts."""
        each = [
            pack_tokens(step, T, R, table) for step, table in zip(steps, self.tables, strict=True)
        ]
        return self._host(each), any(arrays.counts[1] for arrays in each)

    def _drawing(self, steps: list[Step], R: int) -> tuple[SampleArrays, bool, bool]:
        """Arrays for drawing tokens, and whether log-probabilities and statistics are asked for."""
        each = [pack_sampling(step, R, t) for step, t in zip(steps, self.tables, strict=True)]
        unused = self._unused_arrays(R)

        def column(name: str, values: tuple[Any, ...]) -> Any:
            seen = next((v for v in values if v is not None), None)
            if seen is None:
                return unused[name]
            return self._host([np.zeros_like(seen) if v is None else v for v in values])

        drawing = SampleArrays(*map(column, SampleArrays._fields, zip(*each, strict=True)))
        flags = each[0].flags if len(each) == 1 else np.any([a.flags for a in each], axis=0)
        return drawing, bool(flags[3]), bool(flags[4])

    def max_repeats(self, steps: list[Step]) -> int:
        """Tokens that a launch may draw for each row of a decoding step."""
        if self.plan.decode_steps == 1:
            return 1
        R = self._decode_bucket(steps[0])
        return self.plan.decode_steps if ("decode", R) in self._programs else 1

    def _decode_bucket(self, step: Step) -> int:
        return next(R for R in self.plan.row_buckets if len(step.rows) <= R)

    def _launch_decode(self, step: Step) -> Launched:
        """Draws `step.repeats` tokens for every row in one launch, on one device."""
        R = self._decode_bucket(step)
        inputs, _ = self._packed([step], R, R)
        drawing, *_ = self._drawing([step], R)
        tokens, self.kv, self.history = self._programs["decode", R](
            self.params, self.kv, self.history, inputs, drawing,
            pack_stops(step, R), np.int32(step.repeats),
        )  # fmt: skip
        return Launched([step], Sampled(tokens, *(None,) * 5), False, False, False, None)

    def _whole(self, steps: list[Step]) -> int | None:
        """Rows of the smallest program that exists and is this whole step."""
        rows, tokens = _largest(steps)
        fits = (r for r in self._ready("step") if r >= rows)
        return next((r for r in fits if self.plan.step_tokens(r) >= tokens), None)

    def _forward(self, steps: list[Step]) -> tuple[str, int]:
        """The smallest program that exists and is the forward pass of a step: its kind, its tokens.

        Where all sequences begin, and there is a program for that, it is taken.
        """
        rows, tokens = _largest(steps)

        def fits(kind: str) -> list[tuple[str, int]]:
            sizes = [t for t in self._ready(kind) if t >= tokens and self.plan.rows(t) >= rows]
            return [(kind, t) for t in sizes[:1]]

        begins = all(row.start == 0 for step in steps for row in step.rows)
        return [*(fits("beginning") if begins else ()), *fits("forward")][0]

    def _row_bucket(self, steps: list[Step]) -> int:
        """Rows of the smallest `sample` that exists and holds the step."""
        return next(r for r in self._ready("sample") if r >= _largest(steps)[0])

    def _ready(self, kind: str) -> tuple[int, ...]:
        """Sizes that exist, ascending."""
        return self._sizes.get(kind, ())

    def _seed(self, rank: int, seq: Any) -> None:
        self._wait_for("seed_history")
        row = np.zeros(self.plan.max_model_len + 1, np.int32)
        row[: len(seq.tokens)] = seq.tokens
        slots = np.full(len(self.tables), self.plan.max_num_seqs, np.int32)
        slots[rank] = seq.slot  # those of the other ranks are past the last: nothing is written
        arrays = self._host([(slot, row) for slot in slots])
        self.history = self._programs["seed_history", 0](self.history, *arrays)

    def _copy(self, copies: list[list[tuple[int, int]]]) -> None:
        """Copies pages of each rank."""
        self._wait_for("copy_pages")
        for i in range(0, max(map(len, copies)), COPIES):
            pairs = np.full((len(copies), 2, COPIES), self.plan.num_pages, np.int32)  # not copied
            for rank, all_ in enumerate(copies):
                if part := all_[i : i + COPIES]:
                    pairs[rank, :, : len(part)] = np.asarray(part, np.int32).T
            arrays = self._host([(source, target) for source, target in pairs])
            self.kv = self._programs["copy_pages", 0](self.kv, *arrays)

    # ---- experts ----------------------------------------------------------------------

    def take_load(self) -> Array:
        """How often experts were asked for since the last time, [ranks, L, E], on its way here."""
        self._wait_for("take_load")
        load, self.kv = self._programs["take_load", 0](self.kv)
        load.copy_to_host_async()
        return load

    @property
    def expert_of(self) -> np.ndarray:
        """The expert of each slot, in layers that have any: int32 [layers, S]."""
        return np.concatenate([np.asarray(p.placement.expert_of) for p in experts_of(self.params)])

    def move_experts(self, expert_of: np.ndarray) -> None:
        """Moves experts to where `expert_of` wants them, between the steps launched so far and
        those to come. The weights' memory is reused: trees with the old ones are of no use."""
        self._wait_for("move_experts")
        assert self.plan.dispatch is not None and self.mesh is not None
        layout, stacks = self.plan.dispatch.layout, experts_of(self.params)
        sizes = [len(p.placement.expert_of) for p in stacks]
        old, new = layout.placement(self.expert_of), layout.placement(expert_of)
        source = everywhere(tuple(by_stack(sources(layout, old, new), sizes)), self.mesh)
        tables = everywhere(by_stack(new, sizes), self.mesh)
        moved = self._programs["move_experts", 0](tuple(p.weights for p in stacks), source)
        self.params = with_experts(self.params, map(PlacedExperts, moved, tables))

    def _wait_for(self, kind: str, size: int = 0) -> None:
        while (kind, size) not in self._programs:
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


def _fits(plan: Plan, tokens: int, step: Step) -> bool:
    """Whether a bucket of so many tokens holds the step."""
    return step.num_tokens <= tokens and len(step.rows) <= plan.rows(tokens)


def _largest(steps: list[Step]) -> tuple[int, int]:
    """Rows and tokens of the largest step: all ranks run the program that holds it."""
    return max(len(step.rows) for step in steps), max(step.num_tokens for step in steps)
