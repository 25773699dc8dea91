"""The forward pass on a TPU: an online softmax for each block of queries."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.flash_attention.reference import (
    FIRST,
    LAST,
    MASKED,
    first_seen,
    query_major,
)
from kernels_pallas.flash_attention.tpu_blocks import (
    Blocks,
    Shape,
    TpuTile,
    columns,
    is_transposed,
    logits,
    part_of,
    parts_ahead,
    rows,
    width_axis,
)
from kernels_pallas.softmax import LOG2E, begin
from kernels_pallas.tpu import dot


def forward(
    q: Array, k: Array, v: Array, segments: Array, *,
    scale: float, window: Array | int = 0, sinks: Array | None = None, soft_cap: float = 0.0,
    tile: TpuTile | None = None, interpret: Any = False,
) -> tuple[Array, Array]:  # fmt: skip
    """`reference.attend` as a TPU kernel, without a gradient.

    Raises:
        UnsupportedError: see `Shape.of` and `Blocks.run`.
    """
    shape = Shape.of(q, k, v, tile or TpuTile())
    B, N, K, T, G, bq, Hv = shape.B, shape.N, shape.K, shape.T, shape.G, shape.bq, shape.Hv
    first = first_seen(segments, window)
    operands = [("queries", q), ("keys", k), ("keys", v), ("first", first[:, None])]
    if sinks is not None:
        operands.append(("scalars", sinks.astype(jnp.float32)))
    blocks = Blocks(shape, keys_inside=True)
    o, lse = blocks.run(
        partial(_kernel, blocks=blocks, scale=scale, soft_cap=soft_cap),
        query_major(first, bq, shape.bk),
        operands,
        [
            ("queries", jax.ShapeDtypeStruct((B, N, T, Hv), q.dtype)),
            ("rows", jax.ShapeDtypeStruct((B, K, G, T), jnp.float32)),
        ],
        [
            pltpu.VMEM((G, Hv, bq), jnp.float32),
            pltpu.VMEM((G, 1, bq), jnp.float32),
            pltpu.VMEM((G, 1, bq), jnp.float32),
        ],
        name="flash_attention",
        interpret=interpret,
    )
    return o, lse.reshape(B, N, T)


def _kernel(
    outer_ref, inner_ref, flags_ref, q_ref, k_ref, v_ref, first_ref, *refs,
    blocks: Blocks, scale: float, soft_cap: float,
):  # fmt: skip
    """One pair of blocks of queries and keys.

    Args:
        refs: the sinks if there are any, o, lse, and the state of the softmax in base 2: sums of
            values, row maxima and row sums.
    """
    *sinks, o_ref, lse_ref, values_ref, row_max_ref, row_sum_ref = refs
    shape = blocks.shape
    head, step = pl.program_id(0), pl.program_id(1)
    flags = flags_ref[step]

    @pl.when(flags & FIRST != 0)
    def _start():
        values_ref[...] = jnp.zeros_like(values_ref)
        for g in range(shape.G):
            sink = sinks[0][head * shape.G + g] if sinks else None
            row_max, row_sum = begin(sink, LOG2E)
            row_max_ref[g] = jnp.full((1, shape.bq), row_max, jnp.float32)
            row_sum_ref[g] = jnp.full((1, shape.bq), row_sum, jnp.float32)

    def attend(masked: bool) -> None:
        seen = blocks.seen(outer_ref[step], inner_ref[step], first_ref[0]) if masked else None
        k, v = rows(k_ref[0, 0], shape.H), columns(v_ref[0, 0], shape.Hv)

        def scores(g: int, at: slice) -> Array:  # [bk, part of bq]
            return dot(k, part_of(q_ref, shape.H, g, at), (1, width_axis(shape.H)))

        for g, at, s in parts_ahead(shape, scores, ahead=3):
            s = logits(s, scale, soft_cap)
            s = s if seen is None else jnp.where(seen[:, at], s, -jnp.inf)
            old_max = row_max_ref[g, :, at]
            row_max = jnp.maximum(old_max, jnp.max(s, 0, keepdims=True))
            p, rescale = jnp.exp2(s - row_max), jnp.exp2(old_max - row_max)
            row_max_ref[g, :, at] = row_max
            row_sum_ref[g, :, at] = row_sum_ref[g, :, at] * rescale + jnp.sum(p, 0, keepdims=True)
            values = dot(v, p.astype(v.dtype), (1, 0))
            values_ref[g, :, at] = values_ref[g, :, at] * rescale + values

    pl.when(flags & MASKED != 0)(partial(attend, True))
    pl.when(flags & MASKED == 0)(partial(attend, False))

    @pl.when(flags & LAST != 0)
    def _finish():
        for g in range(shape.G):
            row_sum = row_sum_ref[g]
            some = jnp.where(row_sum > 0, row_sum, 1.0)
            lse = jnp.where(row_sum > 0, row_max_ref[g] * (1 / LOG2E) + jnp.log(some), -jnp.inf)
            o = values_ref[g] * (1 / some)
            o_ref[0, g] = (o if is_transposed(shape.Hv) else o.T).astype(o_ref.dtype)
            lse_ref[0, 0, g : g + 1] = lse
