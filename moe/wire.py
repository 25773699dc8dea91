"""A token as it travels to an expert: eight bits an entry, and its scale behind them."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from kernels_pallas.quantize import Int8Rows, quantize_rows

SLOT_BYTES = 512
"""Behind the values of a row: a scale of 4 bytes, padded so that rows of 7,168 stay multiples of
128 lanes (CloudMatrix-Infer, §3)."""


def row_bytes(width: int) -> int:
    """Bytes of a token of `width` entries."""
    return width + SLOT_BYTES


def pack(x: Array) -> Array:
    """Tokens [T, D] as int8 [T, D + 512]: values, and the bytes of the scale."""
    values, scale = quantize_rows(x)
    scale = lax.bitcast_convert_type(scale, jnp.int8)  # [T, 4]
    return jnp.concatenate([values, jnp.pad(scale, ((0, 0), (0, SLOT_BYTES - 4)))], 1)


def unpack(rows: Array) -> Int8Rows:
    """The inverse of `pack`, but for the rounding: int8 [T, D + 512]."""
    width = rows.shape[1] - SLOT_BYTES
    scale = lax.bitcast_convert_type(rows[:, width : width + 4], jnp.float32)
    return Int8Rows(rows[:, :width], scale)
