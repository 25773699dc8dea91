"""Attention over disjoint sets of keys, merged."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def merge(o_a: Array, lse_a: Array, o_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """`(o, lse)` of the union of two disjoint sets of keys, from those of each set, in float32.

    Exact but for rounding: many sets may be merged in any order, which shows in the last bits only.
    An empty set has the lse -inf (kernels say -1e30), whatever its o. Sinks weigh in a softmax and
    have no value: give them to one of the sets only, or merge them as a set of their own with o = 0
    and lse = sinks.

    Args:
        o_a, o_b: [..., N, Hv], the attention over either set.
        lse_a, lse_b: [..., N], the logarithm of the sum of its exponentials.

    Returns:
        o [..., N, Hv] and lse [..., N].
    """
    lse_a, lse_b = (jnp.asarray(x, jnp.float32) for x in (lse_a, lse_b))
    top = jnp.maximum(lse_a, lse_b)
    top = jnp.where(top == -jnp.inf, 0.0, top)  # both are empty, and so is their union
    weights = jnp.exp(lse_a - top), jnp.exp(lse_b - top)
    total = weights[0] + weights[1]
    o = jnp.zeros((), jnp.float32)
    for x, weight in zip((o_a, o_b), weights, strict=True):
        share = (weight / jnp.maximum(total, 1e-30))[..., None]
        o += jnp.where(share == 0, 0.0, x.astype(jnp.float32) * share)  # even if x is NaN
    return o, top + jnp.log(total)
