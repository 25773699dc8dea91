"""Drawing a token from scores: temperature, min-p, top-k, top-p, without a sort.

It does not import Pallas, which would take a fifth of a second of every engine's start.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from kernels_pallas import shapes

COLDEST = 1e-6
"""The lowest temperature: with a lower one, scores would overflow."""

BITS = 31
"""Bits of a positive float, which order as the floats do."""

_INFINITY = 0x7F800000


def draw(
    scores: Array,  # float32 [R, V]
    u: Array,  # float32 [R], in [0, 1)
    temperature: Array,  # float32 [R]
    top_k: Array,  # int32 [R], 0: all
    top_p: Array,  # float32 [R], 1: all
    min_p: Array,  # float32 [R]
) -> Array:
    """The token [R] at which the running sum of the kept probabilities passes u times their total.

    The temperature is applied first, then min-p, top-k and top-p, in the order of vLLM. Ties with
    the last token that top-k or top-p keeps are kept as well. Sums are rounded, so a u very close
    to the border between two tokens may draw either.

    Raises:
        ValueError: shapes and types do not go together.
    """
    check(scores, u, temperature, top_k, top_p, min_p)
    # relative to the largest score: its exponent is 0 at any temperature
    behind = scores - jnp.max(scores, -1, keepdims=True)
    p = jnp.exp(behind / jnp.maximum(temperature, COLDEST)[:, None])
    p = jnp.where(p >= min_p[:, None], p, 0.0)
    p = lax.cond(jnp.any(top_k > 0), _keep_top_k, lambda p, k: p, p, top_k)
    p = lax.cond(jnp.any(top_p < 1), _keep_top_p, lambda p, t: p, p, top_p)
    return _inverse_cdf(p, u)


def check(scores, u, temperature, top_k, top_p, min_p) -> None:
    """Raises ValueError where the arguments of `draw` do not go together."""
    shapes.check(
        "sample", scores=(scores, "float R V"), u=(u, "float R"),
        temperature=(temperature, "float R"), top_k=(top_k, "int R"), top_p=(top_p, "float R"),
        min_p=(min_p, "float R"),
    )  # fmt: skip


def _keep_top_k(p: Array, k: Array) -> Array:
    """Keeps the k largest of each row, and ties with the last of them, as vLLM does."""
    k = jnp.where(k > 0, k, p.shape[-1])
    return _above(p, lambda kept: jnp.sum(kept, -1) >= k)


def _keep_top_p(p: Array, top_p: Array) -> Array:
    """Keeps the fewest of the largest whose share reaches top_p."""
    share = jnp.maximum(top_p, jnp.finfo(jnp.float32).tiny)  # a share of 0 would keep nothing
    need = share * jnp.sum(p, -1)
    return jnp.where(
        (top_p < 1)[:, None], _above(p, lambda kept: jnp.sum(jnp.where(kept, p, 0), -1) >= need), p
    )


def _above(p: Array, enough: Callable[[Array], Array]) -> Array:
    """p where it reaches the highest threshold that keeps enough, 0 elsewhere."""
    bits = lax.bitcast_convert_type(p, jnp.int32)
    low = highest(p.shape[:-1], BITS, lambda middle: enough(bits >= middle[:, None]))
    return jnp.where(bits >= low[:, None], p, 0.0)


def highest(shape: tuple[int, ...], rounds: int | Array, enough: Callable[[Array], Array]) -> Array:
    """Bits of the highest threshold that keeps enough; 0 after no rounds.

    Positive floats order as their bits do, so a bisection over 31 bits is exact, without a sort.

    Args:
        shape: of the thresholds, one per row.
        rounds: `BITS` for an exact result, or 0.
        enough: bits of thresholds -> bool, whether they keep enough.
    """

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # a threshold of `low` keeps enough, one of `high` does not
        middle = low + ((high - low) >> 1)
        ok = enough(middle)
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle)

    start = jnp.zeros(shape, jnp.int32), jnp.full(shape, _INFINITY, jnp.int32)
    return lax.fori_loop(0, rounds, halve, start)[0]


def _inverse_cdf(p: Array, u: Array) -> Array:
    """The token at which the running sum of p passes u times its total.

    Two levels keep running sums short: each is over about the square root of the vocabulary.
    """
    R, V = p.shape
    width = 1 << (V - 1).bit_length() // 2
    blocks = jnp.pad(p, ((0, 0), (0, -V % width))).reshape(R, -(-V // width), width)
    sums = blocks.sum(-1)
    ends = jnp.cumsum(sums, -1)
    target = u * ends[:, -1]
    block = _first_past(target, sums, ends)
    inside = jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0]
    before = jnp.take_along_axis(ends, block[:, None], 1)[:, 0] - inside.sum(-1)
    token = _first_past(target, inside, before[:, None] + jnp.cumsum(inside, -1))
    return (block * width + token).astype(jnp.int32)


def _first_past(target: Array, p: Array, ends: Array) -> Array:
    """The first index with weight p [R, N] whose running sum `ends` passes target [R].

    Sums are rounded, each in its own order, so they may pass it early, at an index without weight,
    or never. The first would draw what top-k, top-p or a mask removed.
    """
    ids = jnp.arange(p.shape[-1])
    some = p > 0
    last = jnp.max(jnp.where(some, ids, 0), -1)
    passed = some & (ends > target[:, None])
    return jnp.minimum(jnp.min(jnp.where(passed, ids, p.shape[-1]), -1), last)
