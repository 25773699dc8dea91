"""The C++ kernels of `kernels_pallas.cpu`, given arrays as the models shape them.

They have the references' gradients, for rows that are not padding.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array

import kernels_pallas.cpu as cpu
from jaxserve.models.ops import Attend, Ops
from kernels_pallas.cpu import bodies
from kernels_pallas.linear import gated_linear as gated_linear_reference
from kernels_pallas.linear import linear as linear_reference
from kernels_pallas.op import with_reference_gradient
from kernels_pallas.paged_attention import gathered
from kernels_pallas.quantize import Int8Rows
from kernels_pallas.rms_norm import rms_norm as rms_norm_reference
from kernels_pallas.rope import Table
from kernels_pallas.rope import rotate as rotate_reference
from kernels_pallas.weight import Int8Weight, Weight, as_array
from moe.experts import Experts
from moe.experts import experts as experts_reference
from moe.experts import experts_on_rows as experts_on_rows_reference


def ops(attend: Attend, dtype: Any, num_rows: Array) -> Ops:
    """Operations for as many real rows of tokens."""
    op = partial(with_reference_gradient, num_rows=num_rows)
    return Ops(
        attend=attend,
        dtype=dtype,
        linear=op(bodies.linear, linear_reference),
        gated_linear=op(bodies.gated_linear, gated_linear_reference),
        rms_norm=op(bodies.rms_norm, rms_norm_reference),
        rotate=op(_rotate, rotate_reference),
        experts=op(_experts, experts_reference),
        experts_on_rows=with_reference_gradient(experts_on_rows, experts_on_rows_reference),
    )


def _rotate(
    x: Array, table: Table, *, norm: Weight | None = None, num_rows: Array, **options: Any
) -> Array:
    cos, sin = (  # one table may serve all sequences
        jnp.broadcast_to(t, (*x.shape[:2], *t.shape[2:])).reshape(-1, t.shape[-1]) for t in table
    )
    flat = x.reshape(-1, *x.shape[2:])
    scale = None if norm is None else as_array(norm)
    y = cpu.rope(flat, cos, sin, norm=scale, num_rows=num_rows, **options)
    return y.astype(x.dtype).reshape(x.shape)


def _experts(
    x: Array, ids: Array, weights: Array, p: Experts, *, num_rows: Array, activation: str
) -> Array:
    if p.b_gate is not None:
        return experts_reference(x, ids, weights, p, activation=activation)
    layer = bodies.layer_of(p.w_gate)[1]
    stored = [bodies.layer_of(w)[0] for w in (p.w_gate, p.w_up, p.w_down)]
    values = (w.values if isinstance(w, Int8Weight) else w for w in stored)
    scales = tuple(w.scale for w in stored if isinstance(w, Int8Weight))
    options = {"layer": layer, "num_rows": num_rows, "activation": activation}
    return cpu.experts(x, ids, weights, *values, scales=scales, **options).astype(x.dtype)


def experts_on_rows(x: Array | Int8Rows, sizes: Array, p: Experts, *, activation: str) -> Array:
    """`moe.experts.experts_on_rows` with the C++ kernel.

    It rounds rows for itself, and rows of eight bits come out of that as they were.
    """
    rows = x.dequantized() if isinstance(x, Int8Rows) else x
    slot = jnp.repeat(jnp.arange(len(sizes), dtype=jnp.int32), sizes, total_repeat_length=len(rows))
    ones = jnp.ones((len(rows), 1), jnp.float32)
    return _experts(rows, slot[:, None], ones, p, num_rows=sizes.sum(), activation=activation)


attention = with_reference_gradient(bodies.paged_attention, gathered.paged_attention)
