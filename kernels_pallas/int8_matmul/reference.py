"""The contract of the W8A8 product, in plain JAX."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from kernels_pallas import shapes
from kernels_pallas.linear import GATES


def int8_matmul(
    x: Array,  # [T, K] int8
    x_scale: Array,  # [T] float32
    w: Array,  # [N, K] int8, or [L, N, K]
    w_scale: Array,  # [N] float32, or [L, N]
    *,
    layer: Array | int | None = None,
    bias: Array | None = None,  # [N], or [L, N]
    up: Array | None = None,  # as w
    up_scale: Array | None = None,  # as w_scale
    activation: str | None = None,
    out_dtype: Any = jnp.bfloat16,
) -> Array:  # [T, N]
    """x @ w.T of eight-bit integers, times the scales of both.

    Sums are int32 and therefore exact in any order. Implementations differ by the rounding of the
    last few operations, which are in float32. `quantize_rows` makes x and its scales.

    Args:
        layer: which of the stacked weights to use; None if w belongs to one layer.
        bias: added at the end, in float32.
        up: the second weight of a gated MLP. The result is then GATES[activation](y, y_up), and
            there must be no bias.
        out_dtype: bfloat16 or float32.

    Raises:
        ValueError: shapes, types or options do not go together.
    """
    check(
        x, x_scale, w, w_scale, layer, bias, up, up_scale, activation, out_dtype=out_dtype
    )  # fmt: skip
    y = _scaled(x, x_scale, w, w_scale, layer)
    if activation and up is not None and up_scale is not None:
        y = GATES[activation](y, _scaled(x, x_scale, up, up_scale, layer))
    if bias is not None:
        y = y + _of_layer(bias, layer).astype(jnp.float32)
    return y.astype(out_dtype)


def _scaled(x: Array, x_scale: Array, w: Array, w_scale: Array, layer: Array | int | None) -> Array:
    contract_last = (((1,), (1,)), ((), ()))
    sums = lax.dot_general(x, _of_layer(w, layer), contract_last, preferred_element_type=jnp.int32)
    return sums.astype(jnp.float32) * x_scale[:, None] * _of_layer(w_scale, layer)


def _of_layer(stack: Array, layer: Array | int | None) -> Array:
    """One layer of a stack [L, ...], or the whole array if it belongs to one layer."""
    return stack if layer is None else lax.dynamic_index_in_dim(stack, layer, keepdims=False)


def check(
    x, x_scale, w, w_scale, layer=None, bias=None, up=None, up_scale=None, activation=None, *,
    out_dtype: Any = jnp.bfloat16, **options: Any,
) -> bool:  # fmt: skip
    """Whether the product is gated.

    Raises:
        ValueError: the arguments of `int8_matmul` do not go together.
    """
    shapes.check("int8_matmul", x=(x, "int8 T K"), x_scale=(x_scale, "float32 T"))
    shapes.check_result("int8_matmul", out_dtype)
    lead = () if layer is None else (w.shape[0],)
    if w.ndim != 2 + len(lead) or w.shape[-1] != x.shape[1]:
        form = "[N, K]" if layer is None else "[L, N, K]"
        raise ValueError(f"w is {w.shape} with x {x.shape} and {layer=}: expected {form}")
    per_row = (*lead, w.shape[-2])
    gated = up is not None
    expected: list[tuple[str, Any, Any, Any]] = [
        ("w", w, w.shape, jnp.int8), ("w_scale", w_scale, per_row, jnp.float32),
    ]  # fmt: skip
    if gated:
        expected += [("up", up, w.shape, jnp.int8), ("up_scale", up_scale, per_row, jnp.float32)]
    if bias is not None:
        expected += [("bias", bias, per_row, bias.dtype)]
    for name, a, shape, dtype in expected:
        if a is None or a.shape != shape or a.dtype != dtype:
            seen = None if a is None else f"{a.dtype}{list(a.shape)}"
            raise ValueError(f"{name} is {seen}: expected {jnp.dtype(dtype)}{list(shape)}")
    if gated != (activation is not None) or (gated and bias is not None):
        raise ValueError(f"{activation=} goes with up, and bias without it")
    if gated and activation not in GATES:
        raise ValueError(f"{activation=}: expected one of {sorted(GATES)}")
    return gated
