"""`draw` as an op. On a TPU, scores of eight rows stay in VMEM while thresholds are searched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import sample_gpu
from kernels_pallas.draw import BITS, COLDEST, check, draw, highest
from kernels_pallas.op import Body, Case, Cost, Op, UnsupportedError, refuse_no_rows, tried
from kernels_pallas.target import not_hopper
from kernels_pallas.tpu import LANES, SUBLANES

_ROWS = SUBLANES  # that are searched together, in a register


@dataclass(frozen=True)
class TpuTile:
    """vocab: entries of each row that are read at a time."""

    vocab: int = tried(2048, 1024, 4096, 8192)


def tpu(
    scores: Array, u: Array, temperature: Array, top_k: Array, top_p: Array, min_p: Array, *,
    tile: TpuTile | None = None, interpret: Any = False,
) -> Array:  # fmt: skip
    """`draw` as a TPU kernel: scores are read from HBM once, and searched in VMEM.

    Raises:
        UnsupportedError: scores have no rows, or are not float32.
    """
    R, V = scores.shape
    refuse_no_rows(R)
    if scores.dtype != jnp.float32:
        raise UnsupportedError(f"scores are {scores.dtype}, and must be float32")
    width = min((tile or TpuTile()).vocab, -(-V // LANES) * LANES)
    padded, groups = -(-V // width) * width, pl.cdiv(R, _ROWS)

    def rounds(wanted: Array) -> Array:  # [groups]; 0 where no row of a group asks for any
        wanted = jnp.pad(wanted, (0, groups * _ROWS - R)).reshape(groups, _ROWS)
        return jnp.where(wanted.any(-1), BITS, 0)

    def rows(count: int) -> pl.BlockSpec:
        return pl.BlockSpec((_ROWS, count), lambda r, *_: (r, 0))

    tokens = pl.pallas_call(
        partial(_kernel, vocab=V, width=width),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(groups,),
            in_specs=[rows(padded), *(rows(1) for _ in range(5))],
            out_specs=rows(1),
            scratch_shapes=[pltpu.VMEM((_ROWS, padded), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((R, 1), jnp.int32),
        # two buffers of scores, as the next rows are loaded meanwhile, and one of probabilities
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=3 * 4 * _ROWS * padded + 2**22),
        interpret=interpret,
        name="sample",
    )(
        rounds(top_k > 0),
        rounds(top_p < 1),
        scores,
        *(x[:, None] for x in (u, temperature, top_k, top_p, min_p)),
    )
    return tokens[:, 0]


def _kernel(
    k_rounds_ref, p_rounds_ref, scores_ref, u_ref, temperature_ref, top_k_ref, top_p_ref, min_p_ref,
    token_ref, p_ref, *, vocab: int, width: int,
):  # fmt: skip
    """Draws the tokens of eight rows.

    Args:
        p_ref: scratch of the scores' shape, for probabilities relative to the largest.
        width: entries of each row that are read at a time.
    """
    steps, group = p_ref.shape[1] // width, pl.program_id(0)
    place = lax.broadcasted_iota(jnp.int32, (_ROWS, width), 1)

    def part(ref: Any, i: Array) -> Array:
        return ref[:, pl.ds(pl.multiple_of(i * width, LANES), width)]

    def score(i: Array) -> Array:
        return jnp.where(i * width + place < vocab, part(scores_ref, i), -jnp.inf)

    def total(of: Callable[[Array], Array]) -> Array:  # [8, 1]
        zero = jnp.zeros((_ROWS, LANES), jnp.float32)
        add = lax.fori_loop(0, steps, lambda i, sums: sums + _folded(of(part(p_ref, i))), zero)
        return jnp.sum(add, 1, keepdims=True)

    def reaching(threshold: Array, what: Callable[[Array], Array]) -> Array:
        return total(
            lambda p: jnp.where(lax.bitcast_convert_type(p, jnp.int32) >= threshold, what(p), 0.0)
        )

    row_max = lax.fori_loop(
        0, steps, lambda i, found: jnp.maximum(found, _folded(score(i), jnp.maximum)),
        jnp.full((_ROWS, LANES), -jnp.inf, jnp.float32),
    )  # fmt: skip
    row_max = jnp.max(row_max, 1, keepdims=True)

    def weigh(i: Array, _: None) -> None:
        p = jnp.exp((score(i) - row_max) / jnp.maximum(temperature_ref[...], COLDEST))
        p_ref[:, pl.ds(pl.multiple_of(i * width, LANES), width)] = jnp.where(
            p >= min_p_ref[...], p, 0.0
        )

    lax.fori_loop(0, steps, weigh, None)
    column = (_ROWS, 1)
    k = jnp.where(top_k_ref[...] > 0, top_k_ref[...], vocab).astype(jnp.float32)  # exact up to 2^24
    low = highest(column, k_rounds_ref[group], lambda at: reaching(at, jnp.ones_like) >= k)
    share = jnp.maximum(top_p_ref[...], jnp.finfo(jnp.float32).tiny)  # one of 0 keeps nothing
    need = share * reaching(low, lambda p: p)
    lower = highest(
        column,
        p_rounds_ref[group],
        lambda at: reaching(jnp.maximum(at, low), lambda p: p) >= need,
    )
    low = jnp.where(top_p_ref[...] < 1, jnp.maximum(low, lower), low)
    target = u_ref[...] * reaching(low, lambda p: p)
    _pick(lambda i: part(p_ref, i), low, target, steps, token_ref)


def _folded(x: Array, by: Callable[[Array, Array], Array] = jnp.add) -> Array:
    """[8, W] reduced to [8, 128] by operations on whole registers."""
    parts = [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)]
    while len(parts) > 1:
        pairs = [by(*parts[i : i + 2]) for i in range(0, len(parts) - 1, 2)]
        parts = pairs + parts[2 * len(pairs) :]
    return parts[0]


def _pick(part: Callable[[Any], Array], low: Array, target: Array, steps: int, token_ref: Any):
    """Writes the token at which the running sum of what reaches `low` passes the target [8, 1].

    It is found among parts, then registers, then lanes: each time the last one that has any weight
    and before which the running sum is at most the target. Rounding cannot make it a token of no
    weight.
    """

    def kept(i: Array) -> Array:
        p = part(i)
        return jnp.where(lax.bitcast_convert_type(p, jnp.int32) >= low, p, 0.0)

    def choose(at: Any, p: Array, state: Any) -> Any:
        running, (chosen, before, index) = state
        weight = jnp.sum(_folded(p), 1, keepdims=True)
        hit = (weight > 0) & (running <= target)
        best = jnp.where(hit, p, chosen), jnp.where(hit, running, before), jnp.where(hit, at, index)
        return running + weight, best

    def none(like: Any, running: Any) -> Any:
        return running, (jnp.zeros_like(like), running, jnp.zeros(running.shape, jnp.int32))

    start = none(part(0), jnp.zeros(target.shape, jnp.float32))
    _, (p, before, outer) = lax.fori_loop(0, steps, lambda i, s: choose(i, kept(i), s), start)
    registers = [p[:, i : i + LANES] for i in range(0, p.shape[1], LANES)]
    state = none(registers[0], before)
    for i, register in enumerate(registers):
        state = choose(i, register, state)
    _, (inside, before, inner) = state
    lane = lax.broadcasted_iota(jnp.int32, inside.shape, 1)
    begins = jnp.where(lane >= 1, pltpu.roll(inside, 1, 1), 0.0)
    for shift in (1, 2, 4, 8, 16, 32, 64):
        begins += jnp.where(lane >= shift, pltpu.roll(begins, shift, 1), 0.0)
    hit = (inside > 0) & (before + begins <= target)
    last = jnp.max(jnp.where(hit, lane.astype(jnp.float32), 0.0), 1, keepdims=True)
    token_ref[...] = outer * p.shape[1] + inner * LANES + last.astype(jnp.int32)


def _case(R: int, V: int, *, shipped: bool = False, **filters: float) -> Case:
    """R rows of V scores. Every other row has the filters, and the others none."""

    def make(key: Array) -> tuple[tuple[Array, ...], dict[str, Array]]:
        a, b = jax.random.split(key)
        some = jnp.arange(R) % 2 == 0

        def rows(name: str, default: float) -> Array:
            return jnp.where(some, filters.get(name, default), default).astype(jnp.float32)

        return (
            4 * jax.random.normal(a, (R, V)),
            jax.random.uniform(b, (R,)),
            rows("temperature", 1.0),
            rows("top_k", 0).astype(jnp.int32),
            rows("top_p", 1.0),
            rows("min_p", 0.0),
        ), {}

    name = "-".join([f"{R}x{V}", *filters])
    return Case(name, make, {}, shipped, Cost(4 * R * (V + 6), dtype="float32"), tolerance=0)


CASES = (
    _case(3, 300),
    _case(12, 9000, temperature=1.7, top_k=40, top_p=0.8, min_p=0.02),
    _case(8, 4096, top_p=0.9),
    _case(64, 151936, top_k=50, top_p=0.9, shipped=True),
    _case(256, 128256, temperature=0.6, top_p=0.95, shipped=True),
)

sample = Op(
    "sample",
    draw,
    {
        "mosaic_tpu": Body("tpu", tpu, TpuTile),
        "mosaic_gpu": Body("gpu", sample_gpu.gpu, sample_gpu.GpuTile, declines=not_hopper),
    },
    CASES,
    check=check,
)
