"""Rows of eight-bit integers with a scale each."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Rows:
    """Rows that are quantized already: values * scale, as `quantize_rows` makes them.

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
    """Rows [..., K] as int8 [..., K] and float32 scales [...]: x is close to values * scale.

    The largest magnitude of a row becomes 127, and halves round to even. A row of zeros has scale
    0. The scale of a row that is not finite is not finite either.
    """
    x = x.astype(jnp.float32)
    absmax = largest(x)
    steps = jnp.where(absmax > 0, 127.0 / absmax, 0.0)
    values = lax.round(x * steps, lax.RoundingMethod.TO_NEAREST_EVEN).astype(jnp.int8)
    return values, absmax[..., 0] * (1 / 127.0)


def largest(x: Array) -> Array:
    """The largest magnitude of each row of x [..., K], [..., 1]; infinite where a lane is NaN.

    On CPU, XLA's maximum over long rows drops a NaN, and the row would pass for a sound one.
    """
    return jnp.max(jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x)), -1, keepdims=True)
