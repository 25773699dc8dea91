"""Eight-bit integers and the steps that take them back to floats."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Rows:
    """Rows that have been rounded already: values * scale, as `quantize_rows` makes them.

    Attributes:
        values: int8 [T, K].
        scale: float32 [T].
    """

    values: Array
    scale: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def dequantized(self) -> Array:
        """The rows as float32."""
        return self.values.astype(jnp.float32) * self.scale[:, None]


def quantize_rows(x: Array) -> tuple[Array, Array]:
    """Rows [..., K] as int8 [..., K] and scales [...]: x is close to values * scale.

    The largest magnitude of a row becomes 127; halves round to even; a row of zeros has scale 0,
    and one that is not finite has no finite scale.
    """
    x = x.astype(jnp.float32)
    top = largest(x)
    steps = jnp.where(top > 0, 127.0 / top, 0.0)
    values = lax.round(x * steps, lax.RoundingMethod.TO_NEAREST_EVEN).astype(jnp.int8)
    return values, top[..., 0] * (1 / 127.0)


def largest(x: Array) -> Array:
    """The largest magnitude of each row of x [..., K], [..., 1]; infinite where a lane is NaN.

    XLA's maximum over long rows forgets a NaN on CPU, and the row would pass for a sound one.
    """
    return jnp.max(jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x)), -1, keepdims=True)
