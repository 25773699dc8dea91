"""Contestants of one case: compiled programs over several sets of its inputs, and how they agree.

A small case is given so many sets of inputs that they do not fit the device's cache together: a
decoding step finds its weights in memory too. On accelerators one program runs over all sets,
because starting a program takes longer than many a kernel. On CPU starting is cheap and sets take
turns.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.alternatives import Alternative, Inputs
from benchmarks.stopwatch import Launch
from kernels_pallas.op import Case, Op

_CACHE = {"cpu": 64, "gpu": 192, "tpu": 256}  # MiB that the inputs of a case exceed together
_MOST_SETS = 16
_NEAR_TIES = 0.05  # of drawn tokens: sums in another order move a border between two


def shapes_of(case: Case) -> Any:
    """A case's inputs, as shapes."""
    return jax.eval_shape(case.make, jax.random.key(0))


def set_count(case: Case, platform: str, memory: float, most: int = _MOST_SETS) -> int:
    """How many sets of inputs exceed the cache together, of `memory` bytes at most."""
    wanted = -(-_CACHE[platform] * 2**20 // _read(case))
    return int(max(1, min(most, wanted, memory // max(1, _bytes(shapes_of(case))))))


def fits_cache(case: Case, platform: str, sets: int) -> bool:
    """Whether so many sets are still in the cache when their turn comes again."""
    return sets * _read(case) < _CACHE[platform] * 2**20


def _read(case: Case) -> int:
    return max(1, int(case.cost.bytes if case.cost else _bytes(shapes_of(case))))


def maker(case: Case) -> Any:
    """The compiled program that draws a set from a key."""
    return jax.jit(case.make).lower(jax.random.key(0)).compile()


def input_sets(case: Case, count: int, make: Callable[[Any], Any] | None = None) -> list[Any]:
    """Sets of inputs.

    Args:
        make: what `maker` returned.
    """
    make = make or maker(case)
    return [make(jax.random.key(i)) for i in range(count)]


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree) if hasattr(x, "size"))


InPlace = tuple[tuple[int, int], ...]
"""As `Op.in_place`."""


def compiled_over(
    run: Callable[[Any], Any], sets: Sequence[Any], joined: bool, in_place: InPlace = ()
) -> Any:
    """The program of `Program`, for sets or for their shapes."""
    one = jax.jit(run)  # traced and lowered once, however many sets there are
    replaced = {result for _, result in in_place}

    def whole(state: Any, rests: Sequence[Any]) -> tuple[Any, list[Any]]:
        outs = []
        for rest in rests:
            out = one(_with(rest, state, in_place))
            if replaced:
                state = tuple(out[result] for _, result in in_place)
                out = [x for i, x in enumerate(out) if i not in replaced]
            outs.append(out)
        return state, outs

    begin, groups = _arranged(sets, joined, in_place)
    return jax.jit(whole, donate_argnums=0).lower(begin, groups[0]).compile()


def _arranged(sets: Sequence[Any], joined: bool, in_place: InPlace) -> tuple[Any, list[list[Any]]]:
    """What is carried, and what each start of the program is given besides."""
    rests = [_without(x, in_place) for x in sets]
    return _carried(sets[0], in_place), [rests] if joined else [[x] for x in rests]


class Program:
    """One JAX contestant, compiled over the sets.

    Args:
        run: inputs -> the op's result.
        joined: whether one program runs over all sets.
        in_place: as `Op.in_place`. Such arguments are donated and carried from call to call; those
            of the first set are copied for it.
        compiled: what `compiled_over` returned for sets of these shapes.
    """

    def __init__(
        self, run: Callable[[Any], Any], sets: Sequence[Any], joined: bool,
        in_place: InPlace = (), compiled: Any = None,
    ):  # fmt: skip
        self._begin, self._groups = _arranged(sets, joined, in_place)
        self._compiled = compiled or compiled_over(run, sets, joined, in_place)

    def _fresh(self) -> Any:
        return jax.tree.map(jnp.copy, self._begin)

    def first(self) -> tuple[Any, Any]:
        """What became of carried arguments, and the result for the first set."""
        state, outs = self._compiled(self._fresh(), self._groups[0])
        return state, outs[0]

    def launch(self) -> Launch:
        state, turns = self._fresh(), itertools.cycle(self._groups)

        def start() -> Any:
            nonlocal state
            state, outs = self._compiled(state, next(turns))
            return state, outs

        return Launch(start, jax.block_until_ready, len(self._groups[0]))


def _carried(inputs: Any, in_place: InPlace) -> tuple[Any, ...]:
    return tuple(inputs[0][argument] for argument, _ in in_place)


def _without(inputs: Any, in_place: InPlace) -> Any:
    gone = {argument for argument, _ in in_place}
    return (
        (tuple(None if i in gone else x for i, x in enumerate(inputs[0])), inputs[1])
        if gone
        else inputs
    )


def _with(rest: Any, state: Any, in_place: InPlace) -> Any:
    if not in_place:
        return rest
    args = list(rest[0])
    for (argument, _), x in zip(in_place, state, strict=True):
        args[argument] = x
    return tuple(args), rest[1]


class TorchProgram:
    """One torch contestant; on a GPU a graph of its calls, which costs as little to start.

    It is recorded when the race begins and not beside other contestants, which are compiled by
    other threads: what those ask of the card meanwhile would be an error, theirs and torch's.
    """

    def __init__(self, way: Alternative, sets: Sequence[Any], platform: str):
        import torch

        self._way, self._torch, self._gpu = way, torch, platform == "gpu"
        self._parts = [way.prepare(x) for x in sets]

    def _all(self) -> list[Any]:
        return [self._way.run(parts) for parts in self._parts]

    def _captured(self) -> Any:
        """A CUDA graph, or None where the library cannot record itself (autograd may not)."""
        torch = self._torch
        try:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                self._all()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._kept = self._all()
            return graph if self._fills(graph) else None
        except RuntimeError:
            torch.cuda.synchronize()
            return None

    def _fills(self, graph: Any) -> bool:
        """Whether its results come from the graph: autograd may have worked on another stream."""
        results = [x.detach() for x in jax.tree.leaves(self._kept)]
        for x in results:
            x.zero_()
        graph.replay()
        self._wait(None)
        return all(bool(x.count_nonzero()) for x in results)

    def first(self) -> tuple[Any, Any]:
        """Nothing is carried; and the result for the first set."""
        out = self._way.run(self._parts[0])
        self._wait(None)
        return (), out

    def launch(self) -> Launch:
        graph = self._captured() if self._gpu else None
        start = self._all if graph is None else graph.replay
        return Launch(start, self._wait, len(self._parts))

    def _wait(self, _: Any) -> None:
        if self._gpu:
            self._torch.cuda.synchronize()


def runner(op: Op, case: Case, name: str, tile: Any = None) -> Callable[[Inputs], Any]:
    """What one implementation makes of a case's inputs."""

    def run(inputs: Inputs) -> Any:
        args, arrays = inputs
        return op.run(name, *args, tile=tile, **arrays, **case.options)

    return run


def truth(op: Op, case: Case, sets: Sequence[Any], joined: bool, compiled: Any = None) -> Program:
    """The reference, in full precision: TF32 and products of bfloat16 are approximations."""
    compiled = compiled or compiled_truth(op, case, sets, joined)
    run = runner(op, case, "reference")
    return Program(run, _judged(op, sets, joined), joined, op.in_place, compiled)


def compiled_truth(op: Op, case: Case, sets: Sequence[Any], joined: bool) -> Any:
    """The program of `truth`, for sets or for their shapes."""
    with jax.default_matmul_precision("highest"):
        run = runner(op, case, "reference")
        return compiled_over(run, _judged(op, sets, joined), joined, op.in_place)


def _judged(op: Op, sets: Sequence[Any], joined: bool) -> Sequence[Any]:
    return sets if joined and op.in_place else sets[:1]


# ---- agreement ----------------------------------------------------------------------------


@partial(jax.jit, static_argnames="exact")
def _apart(x: Array, y: Array, exact: bool) -> tuple[Array, Array]:
    """The largest difference and the largest value, or the share of entries that differ."""
    if exact:
        return jnp.mean(x != y, dtype=jnp.float32), jnp.float32(1)
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    same = (x == y) | (jnp.isnan(x) & jnp.isnan(y))
    finite = jnp.where(jnp.isfinite(y), jnp.abs(y), 0.0)
    return jnp.max(jnp.where(same, 0.0, jnp.abs(x - y)), initial=0.0), jnp.max(finite, initial=0.0)


@dataclass(frozen=True)
class Agreement:
    """Whether a result is right, and how far it is off, relative to the largest value."""

    right: bool
    error: float
    reason: str = ""


def agreement(found: Any, expected: Any, tolerance: float) -> Agreement:
    """Compares leaf by leaf. Integers are drawn tokens, or exact where no tolerance is given."""
    pairs = list(_pairs(found, expected))
    worst = Agreement(True, 0.0)
    for x, y in pairs:
        if x.shape != y.shape:
            return Agreement(False, float("inf"), f"shape {x.shape} instead of {y.shape}")
        ids = y.dtype == jnp.int32 and y.ndim == 1
        apart, top = (float(v) for v in _apart(x, y, bool(ids)))
        error = apart / max(top, 1e-30) if apart else 0.0
        limit = _NEAR_TIES if ids else tolerance
        right = bool(np.isfinite(error)) and error <= limit
        if not right or error > worst.error:
            worst = Agreement(right, error, "" if right else f"off by {error:.2g}, not {limit:g}")
        if not right:
            return worst
    return worst


def _pairs(found: Any, expected: Any) -> Iterator[tuple[Array, Array]]:
    xs, ys = jax.tree.leaves(found), jax.tree.leaves(expected)
    if len(xs) != len(ys):
        raise ValueError(f"{len(xs)} results instead of {len(ys)}")
    yield from zip(xs, ys, strict=True)
