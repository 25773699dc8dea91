"""How backward kernels become the gradient of an op, and what is computed outside of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def with_gradient(
    forward: Callable[..., tuple[Array, Array]], backward: Callable[..., Any]
) -> Callable[..., tuple[Array, Array]]:
    """`forward`, whose gradient is `backward` of what it returned: nothing is computed twice.

    Args:
        forward: takes and returns what `reference.attend` does.
        backward: likewise `reference.gradient`.
    """

    def attend(
        q: Array, k: Array, v: Array, segments: Array, *,
        window: Array | int = 0, sinks: Array | None = None, **fixed: Any,
    ) -> tuple[Array, Array]:  # fmt: skip
        @jax.custom_vjp
        def op(q, k, v, sinks, segments, window):
            return forward(q, k, v, segments, window=window, sinks=sinks, **fixed)

        def save(*operands):
            o, lse = op(*operands)
            return (o, lse), (operands, o, lse)

        def pull(saved, cotangents):
            (q, k, v, sinks, segments, window), o, lse = saved
            gradients = backward(
                q, k, v, segments, o, lse, *cotangents, window=window, sinks=sinks, **fixed
            )
            return *gradients, *(np.zeros(x.shape, jax.dtypes.float0) for x in (segments, window))

        op.defvjp(save, pull)
        return op(q, k, v, sinks, segments, jnp.asarray(window, jnp.int32))

    return attend


def softmax_delta(o: Array, lse: Array, do: Array, dlse: Array) -> Array:
    """D of FlashAttention-2: rowsum(o * do) - dlse, float32 [B, N, T]; ds = p * (dp - D).

    It is 0 for tokens that see nothing: their dlse may be NaN, which p = 0 would not silence.
    """
    delta = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), -1) - dlse
    return jnp.where(jnp.isfinite(lse), delta, 0.0)


def finite(lse: Array) -> Array:
    """lse, but 0 for tokens that see nothing: their probabilities are masked, and must not be NaN
    before."""
    return jnp.where(jnp.isfinite(lse), lse, 0.0)


def sinks_gradient(sinks: Array | None, lse: Array, delta: Array) -> Array | None:
    """Gradient [N] of the sinks. A sink has no value, so its dp is 0 and its ds is -p * delta."""
    if sinks is None:
        return None
    share = jnp.exp(sinks.astype(jnp.float32)[None, :, None] - finite(lse))
    share = jnp.where(jnp.isfinite(lse), share, 0.0)
    return -jnp.sum(share * delta, (0, 2)).astype(sinks.dtype)
