"""The C++ kernels of `kernels_pallas.cpu`, given arrays as the models shape them.

They have the references' gradients, for rows that are not padding.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array

import kernels_pallas.cpu as cpu
from jaxserve.models.ops import Attend, Ops
from kernels_pallas.linear import gated_linear as gated_linear_reference
from kernels_pallas.linear import linear as linear_reference
from kernels_pallas.op import with_reference_gradient
from kernels_pallas.paged_attention import Ragged, gathered
from kernels_pallas.rms_norm import rms_norm as rms_norm_reference
from kernels_pallas.rope import Table
from kernels_pallas.rope import rotate as rotate_reference
from kernels_pallas.weight import Int8Weight, StackedWeight, Weight, as_array
from moe.experts import Experts
from moe.experts import experts as experts_reference

_NATIVE = (jnp.float32, jnp.bfloat16, jnp.int8)


def ops(attend: Attend, dtype: Any, num_rows: Array) -> Ops:
    """Operations for as many real rows of tokens."""
    op = partial(with_reference_gradient, num_rows=num_rows)
    return Ops(
        attend=attend,
        dtype=dtype,
        linear=op(_linear, linear_reference),
        gated_linear=op(_gated_linear, gated_linear_reference),
        rms_norm=op(_rms_norm, rms_norm_reference),
        rotate=op(_rotate, rotate_reference),
        experts=op(_experts, experts_reference),
    )


def _linear(x: Array, *weights: Weight, num_rows: Array, num_in: int = 1) -> Any:
    if any(w.dtype not in _NATIVE for w in weights):
        return linear_reference(x, *weights, num_in=num_in)
    layer = _layer(weights[0])[1]
    lead = x.shape[: x.ndim - num_in]
    flat, scales = _matrices([_layer(w)[0] for w in weights], num_in, layer is not None)
    rows = x.reshape(-1, flat[0].shape[-1])
    ys = cpu.linear(rows, flat, scales=scales, layer=layer, num_rows=num_rows)
    outs = tuple(
        y.astype(x.dtype).reshape(*lead, *w.shape[: len(w.shape) - num_in])
        for y, w in zip(ys, weights, strict=True)
    )
    return outs if len(weights) > 1 else outs[0]


def _gated_linear(
    x: Array, w_gate: Weight, w_up: Weight, *, num_rows: Array, activation: str
) -> Array:
    layer = _layer(w_gate)[1]
    pair, scales = _matrices([_layer(w)[0] for w in (w_gate, w_up)], 1, layer is not None)
    options = {"layer": layer, "num_rows": num_rows, "activation": activation}
    y = cpu.gated_linear(x.reshape(-1, x.shape[-1]), *pair, scales=scales, **options)
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
    layer = _layer(p.w_gate)[1]
    stored = [_layer(w)[0] for w in (p.w_gate, p.w_up, p.w_down)]
    values = (w.values if isinstance(w, Int8Weight) else w for w in stored)
    scales = tuple(w.scale for w in stored if isinstance(w, Int8Weight))
    options = {"layer": layer, "num_rows": num_rows, "activation": activation}
    return cpu.experts(x, ids, weights, *values, scales=scales, **options).astype(x.dtype)


def _attention(q, k, v, k_pages, v_pages, layer, batch: Ragged, *, sinks=None, **options):
    sinks, step = None if sinks is None else as_array(sinks), batch[:4]  # groups are passed over
    return cpu.paged_attention(q, k, v, k_pages, v_pages, layer, *step, sinks=sinks, **options)


attention = with_reference_gradient(_attention, gathered.paged_attention)


def _layer(w: Weight) -> tuple[Any, Array | int | None]:
    """What is stored, and which layer of it is meant if it is a stack."""
    if isinstance(w, StackedWeight):
        return w.stack, w.index
    return (w if isinstance(w, Int8Weight) else as_array(w)), None


def _matrices(weights: list[Any], num_in: int, stacked: bool) -> tuple[tuple[Array, ...], Any]:
    """Weights [*out, *in] as [out, in], stacks of them as [L, out, in]; and scales alike."""
    lead = 1 if stacked else 0

    def flat(w: Array) -> Array:
        inner = math.prod(w.shape[w.ndim - num_in :])
        return w.reshape(*w.shape[:lead], -1, inner)

    values = tuple(flat(w.values if isinstance(w, Int8Weight) else w) for w in weights)
    scales = (w.scale for w in weights if isinstance(w, Int8Weight))
    return values, tuple(s.reshape(*s.shape[:lead], -1) for s in scales)
