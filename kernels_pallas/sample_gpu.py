"""`draw` on Hopper: a warpgroup searches the thresholds of a row, which stays in the L2 cache.

Scores of a large vocabulary do not fit into shared memory, so each round reads them again, makes
probabilities of them and compares these with three thresholds: two bits a round. The rounds of
top-k end as soon as no more than k are left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.draw import COLDEST
from kernels_pallas.op import UnsupportedError, tried

_LOG2E = 1.4426950408889634
_ABOVE = 0x3F800001  # the bits of what follows 1: no probability relative to the largest is it
_THREADS, _WORDS = 128, 4  # of a warpgroup; that one load takes


@dataclass(frozen=True)
class GpuTile:
    """vocab: entries of a row that are read at a time."""

    vocab: int = tried(2048, 1024, 4096)


def gpu(
    scores: Array, u: Array, temperature: Array, top_k: Array, top_p: Array, min_p: Array, *,
    tile: GpuTile | None = None, interpret: Any = False,
) -> Array:  # fmt: skip
    """`draw` as a Hopper kernel."""
    R, V = scores.shape
    if scores.dtype != jnp.float32:
        raise UnsupportedError(f"scores are {scores.dtype}, and must be float32")
    if V % _WORDS or V < _THREADS:
        raise UnsupportedError(f"{V=} must be a multiple of {_WORDS}, from {_THREADS} on: pad it")
    width = min((tile or GpuTile()).vocab, V // _THREADS * _THREADS)
    return plgpu.kernel(
        partial(_kernel, width=width),
        out_type=jax.ShapeDtypeStruct((R,), jnp.int32),
        grid=(R,),
        grid_names=("row",),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        interpret=interpret,
        kernel_name="sample",
    )(scores, u, temperature, top_k, top_p, min_p)


def _kernel(
    scores_ref, u_ref, temperature_ref, top_k_ref, top_p_ref, min_p_ref, token_ref, *, width: int
):  # fmt: skip
    V, row = scores_ref.shape[1], lax.axis_index("row")
    steps = -(-V // width)
    place = lax.broadcasted_iota(jnp.int32, (width,), 0)
    zeros = jnp.zeros((width,), jnp.float32)

    def begin(i: Array) -> Array:
        return jnp.minimum(i * width, V - width)  # the last part overlaps the one before

    def score(i: Array) -> Array:
        x = scores_ref[row, pl.ds(begin(i), width)]
        return jnp.where(begin(i) + place >= i * width, x, -jnp.inf)

    most = lax.fori_loop(0, steps, lambda i, most: jnp.maximum(most, score(i)), zeros - jnp.inf)
    most = jnp.max(most)
    heat = _LOG2E / jnp.maximum(temperature_ref[row], COLDEST)
    least, k, share = min_p_ref[row], top_k_ref[row], top_p_ref[row]

    def weigh(i: Array) -> Array:
        p = jnp.exp2((score(i) - most) * heat)
        return jnp.where(p >= least, p, 0.0)

    def reaching(thresholds: list[Array], what: Callable[[Array], Array]) -> list[Array]:
        """Sums of `what` over the probabilities that reach each threshold."""

        def add(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            p = weigh(i)
            bits, x = lax.bitcast_convert_type(p, jnp.int32), what(p)
            return tuple(
                total + jnp.where(bits >= low, x, 0.0)
                for low, total in zip(thresholds, sums, strict=True)
            )

        sums = lax.fori_loop(0, steps, add, (zeros,) * len(thresholds))
        return [jnp.sum(x) for x in sums]

    def highest(wanted: Array, low: Array, what: Callable[[Array], Array], need: Array) -> Array:
        """The bits of the highest probability from `low` on which so many reach; or `low`."""

        def narrow(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bounds  # what reaches low is enough, what reaches high is not
            quarter = jnp.maximum(lax.shift_right_logical(high - low, 2), 1)
            middles = [low + quarter * n for n in (1, 2, 3)]
            for middle, found in zip(middles, reaching(middles, what), strict=True):
                enough = (found >= need) & (middle < high)
                low = jnp.where(enough, middle, low)
                high = jnp.where(enough, high, jnp.minimum(high, middle))
                high = jnp.where(enough & (found == need), middle + 1, high)
            return low, high

        start = low, jnp.where(wanted, jnp.int32(_ABOVE), low + 1)
        return lax.while_loop(lambda bounds: bounds[1] - bounds[0] > 1, narrow, start)[0]

    low = highest(k > 0, jnp.int32(0), jnp.ones_like, k.astype(jnp.float32))
    (total,) = reaching([low], lambda p: p)
    low = highest(share < 1, low, lambda p: p, share * total)
    (total,) = reaching([low], lambda p: p)
    target = u_ref[row] * total

    def kept(i: Array) -> Array:
        p = weigh(i)
        return jnp.where(lax.bitcast_convert_type(p, jnp.int32) >= low, p, 0.0)

    def choose(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        """The last part that weighs something and whose running sum begins at or before target."""
        running, chosen, before = state
        weight = jnp.sum(kept(i))
        hit = (weight > 0) & (running <= target)
        return running + weight, jnp.where(hit, i, chosen), jnp.where(hit, running, before)

    nothing = jnp.float32(0)
    _, chosen, before = lax.fori_loop(0, steps, choose, (nothing, jnp.int32(0), nothing))
    p = kept(chosen)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        first, end = bounds  # what lies before `first` does not pass the target
        middle = lax.shift_right_logical(first + end, 1)
        fits = before + jnp.sum(jnp.where(place < middle, p, 0.0)) <= target
        return jnp.where(fits, middle, first), jnp.where(fits, end, middle)

    rounds = width.bit_length()
    last, _ = lax.fori_loop(0, rounds, halve, (jnp.int32(0), jnp.int32(width)))
    # of those up to there it is the last that weighs something
    at = jnp.max(jnp.where((p > 0) & (place <= last), place.astype(jnp.float32), 0.0))
    token_ref[row] = begin(chosen) + at.astype(jnp.int32)
