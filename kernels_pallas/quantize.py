"""Eight-bit integers and the steps that take them back to floats."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax


def quantize_rows(x: Array) -> tuple[Array, Array]:
    """Rows [..., K] as int8 [..., K] and scales [...]: x is close to values * scale.

    The largest magnitude of a row becomes 127; halves round to even; a row of zeros has scale 0,
    and one that is not finite has no finite scale.
    """
    x = x.astype(jnp.float32)
    top = jnp.max(jnp.abs(x), -1, keepdims=True)
    steps = jnp.where(top > 0, 127.0 / top, 0.0)
    values = lax.round(x * steps, lax.RoundingMethod.TO_NEAREST_EVEN).astype(jnp.int8)
    return values, jnp.squeeze(top, -1) * (1 / 127.0)
