"""Rotary position embedding (Su et al., 2021): pairs of elements are rotated by angles."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from kernels_pallas.rms_norm import rms_norm
from kernels_pallas.weight import Weight

Table = tuple[Array, Array]
"""Cosine and sine of each position's angles: [B, T, 1, pairs] each."""


def rotate(
    x: Array,
    table: Table,
    *,
    norm: Weight | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    interleaved: bool = False,
) -> Array:
    """Rotates x [B, T, N, H] by its positions' angles; returns x's shape and type.

    Elements past the table's pairs are returned unchanged.

    Args:
        norm: [H], the scale of an RMSNorm that is applied to every head first, with its `eps` and
            `offset` (kernels_pallas.rms_norm).
        interleaved: pairs are neighbours (DeepSeek) instead of halves (Llama). They are returned
            as halves: their order does not matter to a product of two rotated vectors.
    """
    if norm is not None:
        x = rms_norm(x, norm, eps=eps, offset=offset)
    cos, sin = table
    pairs = cos.shape[-1]
    rotated, rest = x[..., : 2 * pairs].astype(jnp.float32), x[..., 2 * pairs :]
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
    else:
        a, b = rotated[..., :pairs], rotated[..., pairs:]
    out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
    return jnp.concatenate([out, rest], -1) if rest.shape[-1] else out
