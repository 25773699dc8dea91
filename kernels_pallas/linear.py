"""Products with weights stored as checkpoints store them: outputs first, inputs last."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from kernels_pallas.quantize import quantize_rows
from kernels_pallas.weight import Int8Weight, LowRankWeight, Weight, unstacked


def linear(x: Array, *weights: Weight) -> Array | tuple[Array, ...]:
    """x @ w.T for each weight, accumulated in float32 and returned in x's type.

    Args:
        x: [..., K].
        weights: [*out, K] each, of one element type. On a narrower type than x's, x is rounded
            to it first, as the hardware's own matrix units do; on `Int8Weight` every row of x is
            rounded to eight bits with a scale of its own.

    Returns:
        [..., *out] for each weight, in a tuple if there are several.
    """
    outs = tuple(_apply(x, w) for w in weights)
    return outs if len(weights) > 1 else outs[0]


def _apply(x: Array, w: Weight) -> Array:
    if not isinstance(w, LowRankWeight):
        return _product(x, unstacked(w)).astype(x.dtype)
    added = _apply(_apply(x, w.down), w.up)
    return _apply(x, w.base) + (w.scale * added).astype(x.dtype)


def _product(x: Array, w: Array | Int8Weight) -> Array:
    return product(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], *w.shape[:-1])


def product(x: Array, w: Array | Int8Weight) -> Array:
    """x [T, K] @ w.T in float32, [T, N]; the axes of w [*out, *in] may be any that make K and N."""
    dims = (((1,), (1,)), ((), ()))
    if isinstance(w, Int8Weight):
        values, scale = quantize_rows(x)
        y = lax.dot_general(
            values, w.values.reshape(-1, x.shape[1]), dims, preferred_element_type=jnp.int32
        )
        return y.astype(jnp.float32) * scale[:, None] * w.scale.reshape(-1)
    w = w.reshape(-1, x.shape[1])
    return lax.dot_general(x.astype(w.dtype), w, dims, preferred_element_type=jnp.float32)


def _swiglu_oai(gate: Array, up: Array) -> Array:
    """The clamped SwiGLU of gpt-oss: alpha 1.702, limit 7, and one added to the linear half."""
    gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
    return (up + 1) * gate * jax.nn.sigmoid(1.702 * gate)


GATES: dict[str, Callable[[Array, Array], Array]] = {
    "silu": lambda gate, up: jax.nn.silu(gate) * up,
    "gelu_tanh": lambda gate, up: jax.nn.gelu(gate, approximate=True) * up,
    "swiglu_oai": _swiglu_oai,
}
"""How a gated MLP joins its two halves."""


def gated_linear(x: Array, w_gate: Weight, w_up: Weight, *, activation: str) -> Array:
    """GATES[activation](x @ w_gate.T, x @ w_up.T): the first half of a gated MLP.

    Args:
        x: [..., D].
        w_gate, w_up: [F, D].

    Returns:
        [..., F] in x's type; the gate is computed in float32.
    """
    gate, up = linear(x, w_gate, w_up)
    return GATES[activation](gate.astype(jnp.float32), up.astype(jnp.float32)).astype(x.dtype)
