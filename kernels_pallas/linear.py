"""Products with weights stored as checkpoints store them: outputs first, inputs last."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from kernels_pallas.quantize import Int8Rows, quantize_rows
from kernels_pallas.weight import Int8Weight, LowRankWeight, Weight, unstacked


def linear(x: Array, *weights: Weight, residual: Array | None = None) -> Array | tuple[Array, ...]:
    """x @ w.T for each weight, accumulated in float32 and returned in x's type.

    Args:
        x: [..., K].
        weights: [*out, K] each, of one element type. On a narrower type than x's, x is rounded
            to it first, as the hardware's own matrix units do; on `Int8Weight` every row of x is
            rounded to eight bits with a scale of its own.
        residual: [..., *out] of x's type, which the product of a single weight is added to.

    Returns:
        [..., *out] for each weight, in a tuple if there are several.

    Raises:
        ValueError: a weight with other inputs than x has, or a residual for several weights.
    """
    return added([_apply(x, w) for w in weights], residual)


def added(products: Sequence[Array], residual: Array | None) -> Array | tuple[Array, ...]:
    """What `linear` returns, given its products."""
    check_residual(residual, len(products))
    if residual is None:
        return tuple(products) if len(products) > 1 else products[0]
    return residual + products[0]


def check_residual(residual: Array | None, num_weights: int) -> None:
    """Raises ValueError where a residual meets several products."""
    if residual is not None and num_weights > 1:
        raise ValueError(f"a residual goes with one weight, not with {num_weights}")


def _apply(x: Array, w: Weight) -> Array:
    if not isinstance(w, LowRankWeight):
        return _product(x, unstacked(w)).astype(x.dtype)
    added = _apply(_apply(x, w.down), w.up)
    return _apply(x, w.base) + (w.scale * added).astype(x.dtype)


def _product(x: Array, w: Array | Int8Weight) -> Array:
    if w.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"linear: a weight is {list(w.shape)} with x {list(x.shape)}: expected "
            f"[..., {x.shape[-1]}], outputs first and inputs last, as checkpoints store it"
        )
    y = product(x.reshape(-1, x.shape[-1]), w)
    return y.reshape(*x.shape[:-1], *w.shape[:-1])


def product(x: Array | Int8Rows, w: Array | Int8Weight) -> Array:
    """x [T, K] @ w.T in float32, [T, N]; the axes of w [*out, K] may be any that make N."""
    dims = (((1,), (1,)), ((), ()))
    if isinstance(w, Int8Weight):
        rows = x if isinstance(x, Int8Rows) else Int8Rows(*quantize_rows(x))
        y = lax.dot_general(
            rows.values, w.values.reshape(-1, x.shape[1]), dims, preferred_element_type=jnp.int32
        )
        return y.astype(jnp.float32) * rows.scale[:, None] * w.scale.reshape(-1)
    if isinstance(x, Int8Rows):
        x = x.dequantized()
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

    Raises:
        ValueError: an activation that is not in GATES, or weights with other inputs than x has.
    """
    if activation not in GATES:
        raise ValueError(f"gated_linear: {activation=}: expected one of {sorted(GATES)}")
    gate, up = linear(x, w_gate, w_up)
    return GATES[activation](gate.astype(jnp.float32), up.astype(jnp.float32)).astype(x.dtype)
