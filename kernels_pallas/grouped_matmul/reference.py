"""The contract of the grouped product, in plain JAX."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from kernels_pallas import shapes
from kernels_pallas.grouped_matmul.visits import blocks

_BLOCK = 16  # rows per product; `lax.ragged_dot` is dense except on TPUs: E times the work


def grouped_matmul(
    x: Array,  # [M, K]
    w: Array,  # [E, N, K], or [L, E, N, K]
    group_sizes: Array,  # [E] int32
    *,
    layer: Array | int | None = None,
    x_scale: Array | None = None,  # [M] float32
    w_scale: Array | None = None,  # [E, N] float32, or [L, E, N]
    out_dtype: Any = jnp.bfloat16,
) -> Array:  # [M, N]
    """Rows sorted by expert, each times its own expert's weight: x[i] @ w[expert of i].T.

    The first group_sizes[0] rows belong to expert 0, and so on; any size may be 0. Rows past the
    sum of all sizes are padding, whose result is 0.

    Args:
        layer: which of the stacked weights to use; None if w belongs to one layer.
        x_scale, w_scale: given if x and w are int8, as `quantize_rows` makes them. Products of
            int8 are summed in int32, others in float32.
        out_dtype: bfloat16 or float32.

    Raises:
        ValueError: shapes and types do not go together.
    """
    check(x, w, group_sizes, layer, x_scale, w_scale, out_dtype=out_dtype)
    (M, N), E = (x.shape[0], w.shape[-2]), group_sizes.shape[0]
    if M == 0:  # from which nothing can be gathered, not even for padding
        return jnp.zeros((M, N), out_dtype)
    total = jnp.int32 if x.dtype == jnp.int8 else jnp.float32

    def block(y: Array, part) -> tuple[Array, None]:
        group, start, size = part
        at = jnp.where(jnp.arange(_BLOCK) < size, start + jnp.arange(_BLOCK), M)
        rows, weight = x.at[at].get(mode="fill", fill_value=0), _of(w, layer, group)
        sums = lax.dot_general(rows, weight, (((1,), (1,)), ((), ())), preferred_element_type=total)
        if x_scale is not None and w_scale is not None:
            row_scale = x_scale.at[at].get(mode="fill", fill_value=0)[:, None]
            sums = sums.astype(jnp.float32) * row_scale * _of(w_scale, layer, group)
        sums = jnp.where(group < E, sums, 0)  # padding was multiplied by some expert
        return y.at[at].set(sums.astype(out_dtype), mode="drop"), None

    parts = blocks(group_sizes, M, _BLOCK)
    return lax.scan(block, jnp.zeros((M, N), out_dtype), parts)[0]


def _of(stack: Array, layer: Array | int | None, expert: Array) -> Array:
    """One expert's array, sliced from the stack in one step, so that no layer is copied."""
    lead = (expert,) if layer is None else (layer, expert)
    size = (*[1] * len(lead), *stack.shape[len(lead) :])
    start = (*lead, *[0] * (stack.ndim - len(lead)))
    return lax.dynamic_slice(stack, start, size).reshape(stack.shape[len(lead) :])


def check(
    x, w, group_sizes, layer=None, x_scale=None, w_scale=None, *,
    out_dtype: Any = jnp.bfloat16, **options: Any,
) -> None:  # fmt: skip
    """Raises ValueError where the arguments of `grouped_matmul` do not go together."""
    shapes.check("grouped_matmul", x=(x, "any M K"))
    shapes.check_result("grouped_matmul", out_dtype)
    stacked = layer is not None
    if w.ndim != 3 + stacked or w.shape[-1] != x.shape[-1] or w.dtype != x.dtype:
        expected = "[L, E, N, K]" if stacked else "[E, N, K]"
        raise ValueError(
            f"w is {w.dtype}{list(w.shape)} with x {x.dtype}{list(x.shape)} and {layer=}: "
            f"expected {expected} of x's type"
        )
    if group_sizes.shape != (w.shape[-3],) or group_sizes.dtype != jnp.int32:
        seen = f"{group_sizes.dtype}{list(group_sizes.shape)}"
        raise ValueError(f"group_sizes is {seen}: expected int32[{w.shape[-3]}]")
    if x.dtype == jnp.int8:
        for name, scale, shape in (
            ("x_scale", x_scale, x.shape[:1]),
            ("w_scale", w_scale, w.shape[:-1]),
        ):
            if scale is None or scale.shape != shape or scale.dtype != jnp.float32:
                seen = None if scale is None else f"{scale.dtype}{list(scale.shape)}"
                raise ValueError(f"{name} is {seen}: expected float32{list(shape)} with int8 rows")
    elif x_scale is not None or w_scale is not None:
        raise ValueError(f"scales go with int8 rows, and x is {x.dtype}")
