"""How the backward passes of all bodies are joined to an op, and what no kernel computes."""

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
    """`forward`, a form of `reference.attend`, whose slopes come from `backward`, a form of
    `reference.gradient`, rather than from a second forward pass."""

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

        def pull(saved, slopes):
            (q, k, v, sinks, segments, window), o, lse = saved
            slopes = backward(
                q, k, v, segments, o, lse, *slopes, window=window, sinks=sinks, **fixed
            )
            return *slopes, *(np.zeros(x.shape, jax.dtypes.float0) for x in (segments, window))

        op.defvjp(save, pull)
        return op(q, k, v, sinks, segments, jnp.asarray(window, jnp.int32))

    return attend


def delta(o: Array, do: Array, dlse: Array) -> Array:
    """What is taken from every slope of a probability, float32 [B, N, T]: the mean slope under the
    softmax, less that of its denominator."""
    return jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), -1) - dlse


def finite(lse: Array) -> Array:
    """lse with a number for tokens that see nothing, whose probabilities are masked."""
    return jnp.where(jnp.isfinite(lse), lse, 0.0)


def sinks_gradient(sinks: Array | None, lse: Array, delta: Array) -> Array | None:
    """Slopes [N] of the sinks: logits without a value, so that delta is all there is to them."""
    if sinks is None:
        return None
    share = jnp.exp(sinks.astype(jnp.float32)[None, :, None] - lse)
    return -jnp.sum(share * delta, (0, 2)).astype(sinks.dtype)
