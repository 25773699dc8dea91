"""The simplest form: every token gathers all pages of its sequence. Gradients go through it."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from kernels_pallas.paged_attention.codec import (
    Pages,
    QuantizedPages,
    rotated,
    round_trip,
    take,
)
from kernels_pallas.paged_attention.ragged import Ragged, locate, write
from kernels_pallas.softmax import MASK_VALUE
from kernels_pallas.weight import Weight, as_array


def paged_attention(
    q: Array,
    k: Array,
    v: Array | None,
    k_pages: Pages,
    v_pages: Pages | None,
    layer: Array | int,
    batch: Ragged,
    *,
    scale: float,
    window: Array | int = 0,
    sinks: Weight | None = None,
    soft_cap: float = 0.0,
    value_dim: int | None = None,
) -> tuple[Array, Array, Pages, Pages | None]:
    """As `reference.paged_attention`, with memory for tokens x longest context x heads.

    Quantized pages carry no gradient. This step's own keys and values do, rounded as they are
    stored.
    """
    T, N, H = q.shape
    seq, position = locate(batch, T)
    stored = write(k_pages, v_pages, k, v, layer, batch, seq, position)
    at = jnp.arange(batch.tables.shape[1] * k_pages.shape[3])
    exists = at < batch.kv_lens[seq][:, None]  # [T, S]

    def context(pages: Pages, new: Array) -> Array:  # [T, S, K, W]
        floats, new = _differentiable(pages, new, layer)
        floats: Any = write(floats, None, new, None, 0, batch, seq, position)[0]
        x = jnp.moveaxis(floats[0][batch.tables[seq]].astype(jnp.float32), 2, 3)
        return jnp.where(exists[..., None, None], x.reshape(T, -1, *x.shape[3:]), 0.0)

    keys = context(k_pages, k)
    values = keys if v_pages is None or v is None else context(v_pages, v)
    keys, values = keys[..., :H], values[..., :value_dim]
    heads = q.astype(jnp.float32).reshape(T, keys.shape[2], -1, H) * scale
    s = jnp.einsum("tkgh,tskh->tkgs", heads, keys)
    s = soft_cap * jnp.tanh(s / soft_cap) if soft_cap else s
    back = position[:, None] - at
    seen = (back >= 0) & ((window == 0) | (back < window))
    s = jnp.where(seen[:, None, None], s, MASK_VALUE)
    sink = jnp.full(N, MASK_VALUE) if sinks is None else as_array(sinks).astype(jnp.float32)
    sink = jnp.broadcast_to(sink.reshape(1, *s.shape[1:3], 1), (*s.shape[:3], 1))
    lse = _logsumexp(jnp.concatenate([s, sink], -1))
    o = jnp.einsum("tkgs,tskh->tkgh", jnp.exp(s - lse[..., None]), values)
    return o.reshape(T, N, -1), lse.reshape(T, N), *stored


def _differentiable(pages: Pages, x: Array, layer: Array | int) -> tuple[Array, Array]:
    """The layer's pages [1, P, K, Z, W] as floats, and new rows as they would return them."""
    if isinstance(pages, QuantizedPages):
        floats = rotated(pages, take(pages, layer, jnp.arange(pages.shape[1])))
        return lax.stop_gradient(floats)[None], round_trip(pages, x, layer)
    pages = pages[jnp.asarray(layer)][None]
    bits = pages.dtype == jnp.uint16
    return lax.bitcast_convert_type(pages, jnp.bfloat16) if bits else pages, x


def _logsumexp(s: Array) -> Array:
    row_max = s.max(-1)
    return row_max + jnp.log(jnp.exp(s - row_max[..., None]).sum(-1))
