"""The Pallas kernels of a TPU or a GPU, given arrays as the models shape them.

Products of floats are XLA's own, which is as fast as the hardware there; products of eight bits,
experts, attention over pages and drawing are kernels. A kernel that declines leaves its place to
the op's reference, and all have the references' gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxserve.models.ops import Attend, Ops
from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.int8_matmul import int8_matmul
from kernels_pallas.linear import GATES, added
from kernels_pallas.linear import gated_linear as gated_linear_reference
from kernels_pallas.linear import linear as linear_reference
from kernels_pallas.op import with_reference_gradient
from kernels_pallas.paged_attention import Ragged, gathered
from kernels_pallas.paged_attention.ops import page_attention, page_write
from kernels_pallas.quantize import Int8Rows, quantize_rows
from kernels_pallas.sample import sample
from kernels_pallas.target import Target
from kernels_pallas.weight import Int8Weight, StackedWeight, Weight
from moe.experts import Experts
from moe.experts import experts as experts_reference
from moe.experts import experts_on_rows as rows_reference


def ops(target: Target, attend: Attend, dtype: Any, num_rows: Array) -> Ops:
    """Operations for as many real rows of tokens."""

    def op(kernel: Callable[..., Any], reference: Callable[..., Any], **context: Any) -> Any:
        return with_reference_gradient(partial(kernel, target), reference, **context)

    return Ops(
        attend=attend,
        dtype=dtype,
        linear=op(_linear, linear_reference),
        gated_linear=op(_gated_linear, gated_linear_reference),
        experts=op(_experts, experts_reference, num_rows=num_rows),
        experts_on_rows=op(experts_on_rows, rows_reference),
    )


def attention(target: Target) -> Callable[..., Any]:
    """`paged_attention` with the target's kernels."""
    return with_reference_gradient(partial(_attention, target), gathered.paged_attention)


def draw(target: Target, *args: Array) -> Array:
    """`kernels_pallas.draw.draw` with the target's kernel."""
    return sample(*args, target=target)


def _attention(
    target: Target, q, k, v, k_pages, v_pages, layer, batch: Ragged, *, value_dim=None, **options
):
    k_pages, v_pages = page_write(k_pages, v_pages, k, v, layer, batch, target=target)
    options |= {"value_dim": value_dim if v is None else v.shape[-1], "target": target}
    o, lse = page_attention(q, k_pages, v_pages, layer, batch, **options)
    return o, lse, k_pages, v_pages


def _linear(target: Target, x: Array, *weights: Weight, residual: Array | None = None) -> Any:
    if not all(isinstance(_stored(w), Int8Weight) for w in weights):
        return linear_reference(x, *weights, residual=residual)
    values, scale = quantize_rows(x.reshape(-1, x.shape[-1]))

    def product(w: Weight) -> Array:
        y = int8_matmul(values, scale, *_matrix(w), layer=_layer(w), target=target, **_out(x))
        return y.astype(x.dtype).reshape(*x.shape[:-1], *w.shape[:-1])

    return added([product(w) for w in weights], residual)


def _gated_linear(
    target: Target, x: Array, w_gate: Weight, w_up: Weight, *, activation: str
) -> Array:
    if not isinstance(_stored(w_gate), Int8Weight):
        return gated_linear_reference(x, w_gate, w_up, activation=activation)
    values, scale = quantize_rows(x.reshape(-1, x.shape[-1]))
    up, up_scale = _matrix(w_up)
    y = int8_matmul(
        values, scale, *_matrix(w_gate), layer=_layer(w_gate), up=up, up_scale=up_scale,
        activation=activation, target=target, **_out(x),
    )  # fmt: skip
    return y.astype(x.dtype).reshape(*x.shape[:-1], -1)


def _experts(
    target: Target, x: Array, ids: Array, weights: Array, p: Experts, *, num_rows: Array,
    activation: str,
) -> Array:  # fmt: skip
    """Tokens are sorted by expert, so that each expert's rows lie together."""
    if p.b_gate is not None:
        return experts_reference(x, ids, weights, p, activation=activation)
    (T, A), E = ids.shape, p.w_gate.shape[0]
    real = (jnp.arange(T) < num_rows)[:, None] & (ids >= 0) & (ids < E)
    expert = jnp.where(real, ids, E).reshape(-1)  # padding goes behind the last, to no expert
    order = jnp.argsort(expert, stable=True)
    sizes = jnp.sum(expert[:, None] == jnp.arange(E), 0, dtype=jnp.int32)
    y = _answers(target, sizes, x, order // A, p, activation)
    y = y[jnp.argsort(order)].reshape(T, A, -1).astype(jnp.float32)  # rows of padding are 0
    return jnp.sum(y * weights[..., None], 1).astype(x.dtype)


def experts_on_rows(
    target: Target, x: Array | Int8Rows, sizes: Array, p: Experts, *, activation: str
) -> Array:
    """`moe.experts.experts_on_rows` with the target's kernels."""
    if p.b_gate is not None:
        return rows_reference(x, sizes, p, activation=activation)
    return _answers(target, sizes, x, None, p, activation)


def _answers(
    target: Target, sizes: Array, x: Array | Int8Rows, rows: Array | None, p: Experts,
    activation: str,
) -> Array:  # fmt: skip
    """What experts say of rows of x that are sorted by expert, `sizes` of each."""
    product = partial(_grouped, target, sizes)
    gate, up = product(x, rows, p.w_gate, p.w_up)
    hidden = GATES[activation](gate.astype(jnp.float32), up.astype(jnp.float32)).astype(gate.dtype)
    return product(hidden, None, p.w_down)[0]


def _grouped(
    target: Target, sizes: Array, x: Array | Int8Rows, rows: Array | None, *weights: Weight
) -> list[Array]:
    """Rows of x, or some of them, times their experts' weights."""

    def take(a: Array) -> Array:
        return a if rows is None else a[rows]

    out = {"out_dtype": jnp.bfloat16} if isinstance(x, Int8Rows) else _out(x)
    run = partial(grouped_matmul, target=target, **out)
    if not isinstance(_stored(weights[0]), Int8Weight):
        x = x.dequantized() if isinstance(x, Int8Rows) else x
        x = take(x.astype(weights[0].dtype))
        return [run(x, _stored(w), sizes, layer=_layer(w)) for w in weights]
    known = (x.values, x.scale) if isinstance(x, Int8Rows) else quantize_rows(x)
    values, scale = map(take, known)  # each token once, however many experts it has
    return [
        run(values, s.values, sizes, layer=_layer(w), x_scale=scale, w_scale=s.scale)
        for w, s in ((w, _stored(w)) for w in weights)
    ]


def _stored(w: Weight) -> Any:
    """The array, or the pair of arrays, that lies in memory: the whole stack if there is one."""
    return w.stack if isinstance(w, StackedWeight) else w


def _layer(w: Weight) -> Array | int | None:
    return w.index if isinstance(w, StackedWeight) else None


def _matrix(w: Weight) -> tuple[Array, Array]:
    """Values [..., N, K] and scales [..., N], where all axes of the output are one."""
    stored, lead = _stored(w), int(isinstance(w, StackedWeight))
    scale = stored.scale.reshape(*stored.scale.shape[:lead], -1)
    return stored.values.reshape(*scale.shape, -1), scale


def _out(x: Array) -> dict[str, Any]:
    """The type of a product's result, which is rounded once more if x is narrower otherwise."""
    return {"out_dtype": x.dtype if x.dtype == jnp.bfloat16 else jnp.float32}
