"""RMSNorm over the last axis (Zhang and Sennrich, 2019)."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from kernels_pallas.weight import Weight, as_array


def rms_norm(x: Array, scale: Weight, *, eps: float, offset: float = 0.0) -> Array:
    """x / rms(x) * (offset + scale), computed in float32 and returned in x's type.

    Args:
        x: [..., D].
        scale: [D].
        eps: added to the mean square.
        offset: 1.0 for families that store scales around zero (Gemma).

    Raises:
        ValueError: scale is not as long as the rows of x.
    """
    if tuple(scale.shape) != x.shape[-1:]:
        raise ValueError(
            f"rms_norm: scale is {list(scale.shape)} with x {list(x.shape)}: "
            f"expected [{x.shape[-1]}]"
        )
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return (y * (offset + as_array(scale).astype(jnp.float32))).astype(x.dtype)
