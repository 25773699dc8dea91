"""Causal attention over packed rows in plain JAX, and which blocks of its scores have work."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from kernels_pallas import shapes


def attend(
    q: Array,  # [B, N, T, H]
    k: Array,  # [B, K, T, H]
    v: Array,  # [B, K, T, Hv]
    segments: Array,  # int32 [B, T]
    *,
    scale: float,
    window: Array | int = 0,
    sinks: Array | None = None,  # [N]
    soft_cap: float = 0.0,
) -> tuple[Array, Array]:
    """Causal attention inside each document of a row; head n reads keys of head n // (N // K).

    Heads come before tokens, because the matrix units of both TPUs and GPUs take a head's tokens
    in rows; the products that compute q, k and v write them in this order at no cost.

    Args:
        segments: which document a token belongs to. A document is one run of equal numbers; 0 is
            padding, which sees nothing.
        window: keys at least this far back are hidden; 0 hides none.
        sinks: a logit per head that joins the softmax and has no value.
        soft_cap: logits become cap * tanh(logits / cap); 0 leaves them as they are.

    Returns:
        o [B, N, T, Hv] of q's type and lse float32 [B, N, T], the logarithm of the softmax's
        denominator. A token that sees nothing has o = 0, and lse = -inf unless there are sinks.

    Raises:
        ValueError: shapes and types do not go together.
    """
    check(q, k, v, segments, sinks=sinks)
    B, N, T, H = q.shape
    K = k.shape[1]
    sink = jnp.full(N, -jnp.inf) if sinks is None else sinks.astype(jnp.float32)
    at, first = jnp.arange(T), first_seen(segments, window)
    seen = (first[:, :, None] <= at) & (at <= at[:, None])  # [B, T, T]

    @jax.checkpoint  # so that a gradient, too, keeps the scores of one head at a time
    def head(operands: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        q, k, v, sink = (x.astype(jnp.float32) for x in operands)
        s = jnp.einsum("bgth,bsh->bgts", q, k) * scale
        s = soft_cap * jnp.tanh(s / soft_cap) if soft_cap else s
        s = jnp.where(seen[:, None], s, -jnp.inf)
        row_max = lax.stop_gradient(jnp.maximum(s.max(-1), sink[:, None]))
        row_max = jnp.where(jnp.isfinite(row_max), row_max, 0.0)
        p = jnp.where(seen[:, None], jnp.exp(s - row_max[..., None]), 0.0)
        row_sum = p.sum(-1) + jnp.exp(sink[:, None] - row_max)
        some = jnp.where(row_sum > 0, row_sum, 1.0)
        lse = jnp.where(row_sum > 0, row_max + jnp.log(some), -jnp.inf)
        return jnp.einsum("bgts,bsh->bgth", p, v) / some[..., None], lse

    by_head = (
        jnp.moveaxis(q.reshape(B, K, N // K, T, H), 1, 0),
        *(jnp.moveaxis(x, 1, 0) for x in (k, v)),
        sink.reshape(K, N // K),
    )
    o, lse = lax.map(head, by_head)  # [K, B, G, T, ...]
    o, lse = (jnp.moveaxis(x, 0, 1).reshape(B, N, *x.shape[3:]) for x in (o, lse))
    return o.astype(q.dtype), lse


def check(q, k, v, segments, *, sinks: Any = None, **options: Any) -> None:
    """Raises ValueError where the arguments of `attend` do not go together."""
    given = {"sinks": (sinks, "float N")} if sinks is not None else {}
    sizes = shapes.check(
        "flash_attention", q=(q, "float B N T H"), k=(k, "float B K T H"), v=(v, "float B K T Hv"),
        segments=(segments, "int32 B T"), **given,
    )  # fmt: skip
    shapes.check_heads("flash_attention", sizes["N"], sizes["K"])


def gradient(
    q: Array,  # [B, N, T, H]
    k: Array,  # [B, K, T, H]
    v: Array,  # [B, K, T, Hv]
    segments: Array,  # int32 [B, T]
    o: Array,  # [B, N, T, Hv]
    lse: Array,  # [B, N, T]
    do: Array,  # [B, N, T, Hv]
    dlse: Array,  # [B, N, T]
    *,
    scale: float,
    window: Array | int = 0,
    sinks: Array | None = None,
    soft_cap: float = 0.0,
) -> tuple[Array, Array, Array, Array | None]:
    """Gradients of `attend`, which returned o and lse, for the cotangents do and dlse.

    Returns:
        dq, dk and dv, of the shapes and types of q, k and v, and dsinks [N], None without sinks.
    """

    def forward(q: Array, k: Array, v: Array, sinks: Array | None) -> tuple[Array, Array]:
        return attend(q, k, v, segments, scale=scale, window=window, sinks=sinks, soft_cap=soft_cap)

    _, pull = jax.vjp(forward, q, k, v, sinks)
    return pull((do, jnp.where(jnp.isfinite(lse), dlse, 0.0)))


def first_seen(segments: Array, window: Array | int) -> Array:
    """The first key that each token sees, int32 [B, T]; the last one is the token itself.

    Padding gets the next token, so that it sees none. Numbers never fall along a row, which the
    choice of blocks relies on.
    """
    at = jnp.arange(segments.shape[1], dtype=jnp.int32)
    starts = jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0
    first = lax.cummax(jnp.where(starts, at, 0), axis=1)
    window = jnp.asarray(window, jnp.int32)
    first = jnp.maximum(first, jnp.where(window > 0, at - window + 1, 0))
    return jnp.where(segments == 0, at + 1, first)


class Steps(NamedTuple):
    """Pairs of blocks that have work; those of one outer block are consecutive. All int32."""

    outer: Array  # [S], block of the outer axis, counted over all rows of the batch
    inner: Array  # [S], block of the inner axis
    flags: Array  # [S], FIRST and LAST (of an outer block) and MASKED (not all is seen)
    total: Array  # [], pairs that there are; S is an upper bound


FIRST, LAST, MASKED = 1, 2, 4


def query_major(first: Array, bq: int, bk: int) -> Steps:
    """For each block of queries, the blocks of keys that any of them sees.

    Args:
        first: `first_seen` [B, T].
        bq, bk: queries and keys in a block.
    """
    T = first.shape[1]
    highest = (jnp.arange(1, T // bq + 1, dtype=jnp.int32) * bq - 1) // bk
    lowest = jnp.minimum(first[:, ::bq] // bk, highest)  # at least one, which writes the result
    return _steps(first, lowest, jnp.broadcast_to(highest, lowest.shape), bq, bk, keys_inside=True)


def key_major(first: Array, bq: int, bk: int) -> Steps:
    """For each block of keys, the blocks of queries that see any of them; as `query_major`."""
    lowest = jnp.arange(first.shape[1] // bk, dtype=jnp.int32) * bk // bq
    highest = last_queries(first, bq, bk)
    lowest = jnp.broadcast_to(lowest, highest.shape)
    return _steps(first, lowest, highest, bq, bk, keys_inside=False)


def last_queries(first: Array, bq: int, bk: int) -> Array:
    """The last block of queries that sees any key of each block [B, T / bk].

    It is at least the block on the diagonal, which writes the result.
    """
    ends = jnp.arange(1, first.shape[1] // bk + 1, dtype=jnp.int32) * bk
    last = jnp.sum(first[:, ::bq, None] < ends, axis=1, dtype=jnp.int32) - 1  # `first` rises
    return jnp.maximum(last, (ends - bk) // bq)


def _steps(
    first: Array, lowest: Array, highest: Array, bq: int, bk: int, *, keys_inside: bool
) -> Steps:
    """Steps of outer blocks whose first and last inner blocks are `lowest` and `highest` [B, O]."""
    B, T = first.shape
    low, counts = lowest.reshape(-1), (highest - lowest + 1).reshape(-1)
    ends = jnp.cumsum(counts)
    size = B * sum(-(-(i + 1) * bq // bk) for i in range(T // bq))  # blocks up to the diagonal
    step = jnp.arange(size, dtype=jnp.int32)
    outer = jnp.searchsorted(ends, step, side="right").astype(jnp.int32)
    outer = jnp.minimum(outer, counts.size - 1)
    nth = step - (ends - counts)[outer]
    inner = jnp.minimum(low[outer] + nth, highest.reshape(-1)[outer])
    row, mine = outer // lowest.shape[1], outer % lowest.shape[1]
    query, key = (mine, inner) if keys_inside else (inner, mine)
    seen = ((key + 1) * bk - 1 <= query * bq) & (first[row, (query + 1) * bq - 1] <= key * bk)
    flags = jnp.where(nth == 0, FIRST, 0) | jnp.where(nth == counts[outer] - 1, LAST, 0)
    return Steps(outer, inner, flags | jnp.where(seen, 0, MASKED), ends[-1])
