"""Attention without a cache: whole documents, packed into rows, for training and for scoring."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxserve.models.ops import Attend
from kernels_pallas.weight import as_array


def packed(
    segments: Array, positions: Array, attention: Callable[..., tuple[Array, Array]] | None = None
) -> Attend:
    """Causal attention inside each document of a row.

    Args:
        segments: [B, T], which document a token is of; equal numbers attend to one another.
        positions: [B, T], the token's place in its document.
        attention: `kernels_pallas.flash_attention` for a target, where scores of [T, T] should not
            be in memory. Documents must then be runs of equal numbers, and 0 is padding.
    """
    if attention is not None:
        return partial(_packed_by, attention, segments)
    q_pos, k_pos = positions[:, :, None], positions[:, None, :]
    same = (segments[:, :, None] == segments[:, None, :]) & (k_pos <= q_pos)

    def attend(
        q: Array,
        k: Array,
        v: Array | None,
        kv: Any,
        layer: Array | int,
        *,
        scale: float,
        window: Array | int = 0,
        sinks: Any = None,
        soft_cap: float = 0.0,
        value_dim: int | None = None,
    ) -> tuple[Array, Any]:
        B, T, N, H = q.shape
        K = k.shape[2]
        v = k[..., :value_dim] if v is None else v
        s = jnp.einsum(
            "btkgh,bskh->bkgts",
            q.reshape(B, T, K, N // K, H),
            k,
            preferred_element_type=jnp.float32,
        )
        s = s * scale
        if soft_cap:
            s = soft_cap * jnp.tanh(s / soft_cap)
        seen = same & ((window == 0) | (q_pos - k_pos < window))
        s = jnp.where(seen[:, None, None], s, -1e30)
        if sinks is not None:
            sink = as_array(sinks).astype(s.dtype).reshape(1, K, N // K, 1, 1)
            s = jnp.concatenate([s, jnp.broadcast_to(sink, (*s.shape[:-1], 1))], -1)
        p = jax.nn.softmax(s)[..., :T]
        return jnp.einsum("bkgts,bskh->btkgh", p.astype(v.dtype), v).reshape(B, T, N, -1), kv

    return attend


def _packed_by(
    attention: Callable[..., tuple[Array, Array]],
    segments: Array,
    q: Array,
    k: Array,
    v: Array | None,
    kv: Any,
    layer: Array | int,
    *,
    sinks: Any = None,
    value_dim: int | None = None,
    **options: Any,
) -> tuple[Array, Any]:
    v = k[..., :value_dim] if v is None else v
    heads = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    sinks = None if sinks is None else as_array(sinks)
    o, _ = attention(*heads, segments, sinks=sinks, **options)
    return jnp.swapaxes(o, 1, 2), kv
