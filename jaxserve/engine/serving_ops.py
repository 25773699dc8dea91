"""The operations of a serving step: which kernels a plan runs, over this step's batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array

import kernels_pallas.cpu as cpu
from jaxserve.cache.attend import paged
from jaxserve.engine.sampler import argmax
from jaxserve.models.ops import Ops
from jaxserve.plan import Plan
from kernels_pallas.linear import gated_linear as gated_linear_reference
from kernels_pallas.linear import linear as linear_reference
from kernels_pallas.op import with_reference_gradient
from kernels_pallas.paged_attention import Ragged, gathered
from kernels_pallas.rms_norm import rms_norm as rms_norm_reference
from kernels_pallas.rope import Table
from kernels_pallas.rope import rotate as rotate_reference
from kernels_pallas.weight import StackedWeight, Weight, as_array
from moe.experts import Experts
from moe.experts import experts as experts_reference


def serving_ops(plan: Plan, batch: Ragged) -> Ops:
    """Operations for the plan's kernels; native ones skip the padding of a bucket."""
    if plan.kernels == "reference":
        return Ops(attend=paged(batch), dtype=plan.activation_dtype)
    return _native(batch.row_starts[batch.num_seqs], plan.activation_dtype, batch)


def head_ops(plan: Plan, num_rows: Array) -> Ops:
    """Operations for `logits`, which see sequences instead of tokens."""
    if plan.kernels == "reference":
        return Ops(attend=_no_attention, dtype=plan.activation_dtype)
    return _native(num_rows, plan.activation_dtype, None)


def argmax_op(plan: Plan, num_rows: Array) -> Callable[[Array], tuple[Array, Array]]:
    """`sampler.argmax` for the plan's kernels."""
    return argmax if plan.kernels == "reference" else partial(cpu.argmax, num_rows=num_rows)


def _native(num_rows: Array, dtype: Any, batch: Ragged | None) -> Ops:
    """The C++ kernels of `kernels_pallas.cpu`, given arrays as the models shape them.

    They have the references' gradients, for rows that are not padding.
    """
    op = partial(with_reference_gradient, num_rows=num_rows)
    return Ops(
        attend=_no_attention if batch is None else paged(batch, _attention),
        dtype=dtype,
        linear=op(_linear, linear_reference),
        gated_linear=op(_gated_linear, gated_linear_reference),
        rms_norm=op(_rms_norm, rms_norm_reference),
        rotate=op(_rotate, rotate_reference),
        experts=op(_experts, experts_reference),
    )


def _linear(x: Array, *weights: Weight, num_rows: Array, num_in: int = 1) -> Any:
    if any(_layer(w)[0].dtype not in (jnp.float32, jnp.bfloat16) for w in weights):
        return linear_reference(x, *weights, num_in=num_in)
    layer = _layer(weights[0])[1]
    lead = x.shape[: x.ndim - num_in]
    flat = tuple(_matrix(_layer(w)[0], num_in, layer is not None) for w in weights)
    ys = cpu.linear(x.reshape(-1, flat[0].shape[-1]), flat, layer=layer, num_rows=num_rows)
    outs = tuple(
        y.astype(x.dtype).reshape(*lead, *w.shape[: len(w.shape) - num_in])
        for y, w in zip(ys, weights, strict=True)
    )
    return outs if len(weights) > 1 else outs[0]


def _gated_linear(
    x: Array, w_gate: Weight, w_up: Weight, *, num_rows: Array, activation: str
) -> Array:
    (gate, layer), (up, _) = _layer(w_gate), _layer(w_up)
    flat = x.reshape(-1, x.shape[-1])
    y = cpu.gated_linear(flat, gate, up, layer=layer, num_rows=num_rows, activation=activation)
    return y.astype(x.dtype).reshape(*x.shape[:-1], -1)


def _rms_norm(
    x: Array, scale: Weight, *, num_rows: Array, eps: float, offset: float = 0.0
) -> Array:
    flat = x.reshape(-1, x.shape[-1])
    per_row = flat.shape[0] // (x.shape[0] * x.shape[1])  # heads, where heads are normed
    y = cpu.rms_norm(flat, as_array(scale), eps=eps, offset=offset, num_rows=num_rows * per_row)
    return y.astype(x.dtype).reshape(x.shape)


def _rotate(x: Array, table: Table, *, num_rows: Array, interleaved: bool = False) -> Array:
    cos, sin = (t.reshape(-1, t.shape[-1]) for t in table)
    flat = x.reshape(-1, *x.shape[2:])
    y = cpu.rope(flat, cos, sin, num_rows=num_rows, interleaved=interleaved)
    return y.astype(x.dtype).reshape(x.shape)


def _experts(
    x: Array, ids: Array, weights: Array, p: Experts, *, num_rows: Array, activation: str
) -> Array:
    if p.b_gate is not None:
        return experts_reference(x, ids, weights, p, activation=activation)
    (gate, layer), (up, _), (down, _) = _layer(p.w_gate), _layer(p.w_up), _layer(p.w_down)
    options = {"layer": layer, "num_rows": num_rows, "activation": activation}
    return cpu.experts(x, ids, weights, gate, up, down, **options).astype(x.dtype)


def _native_attention(q, k, v, k_pages, v_pages, layer, batch: Ragged, *, sinks=None, **options):
    sinks = None if sinks is None else as_array(sinks)
    return cpu.paged_attention(q, k, v, k_pages, v_pages, layer, *batch, sinks=sinks, **options)


_attention = with_reference_gradient(_native_attention, gathered.paged_attention)


def _layer(w: Weight) -> tuple[Array, Array | int | None]:
    return (w.stack, w.index) if isinstance(w, StackedWeight) else (as_array(w), None)


def _matrix(w: Array, num_in: int, stacked: bool) -> Array:
    """[*out, *in] as [out, in], a stack of them as [L, out, in]."""
    inner = 1
    for size in w.shape[w.ndim - num_in :]:
        inner *= size
    return w.reshape(w.shape[0], -1, inner) if stacked else w.reshape(-1, inner)


def _no_attention(*_: Any, **__: Any) -> Any:
    raise AssertionError("the head of a model does not attend")
