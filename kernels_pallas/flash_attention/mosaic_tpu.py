"""The forward pass on a TPU: a softmax in progress for each block of queries."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.flash_attention.gradient import with_gradient
from kernels_pallas.flash_attention.mosaic_tpu_backward import backward
from kernels_pallas.flash_attention.reference import (
    FIRST,
    LAST,
    MASKED,
    first_seen,
    query_major,
)
from kernels_pallas.flash_attention.tpu_blocks import (
    LANES,
    LOG2E,
    Blocks,
    Shape,
    TpuTile,
    column,
    logits,
    product,
)

_NOTHING = -1e30  # a maximum before any logit: finite, so that hidden logits of -inf weigh 0


def tpu(
    q: Array, k: Array, v: Array, segments: Array, *,
    scale: float, window: Array | int = 0, sinks: Array | None = None, soft_cap: float = 0.0,
    tile: TpuTile | None = None, interpret: Any = False,
) -> tuple[Array, Array]:  # fmt: skip
    """`reference.attend`, with a backward pass of its own."""
    return with_gradient(forward, backward)(
        q, k, v, segments, scale=scale, window=window, sinks=sinks, soft_cap=soft_cap,
        tile=tile, interpret=interpret,
    )  # fmt: skip


def forward(
    q: Array, k: Array, v: Array, segments: Array, *,
    scale: float, window: Array, sinks: Array | None, soft_cap: float,
    tile: TpuTile | None, interpret: Any,
) -> tuple[Array, Array]:  # fmt: skip
    shape = Shape.of(q, k, v, tile or TpuTile())
    B, N, K, T, G, bq = shape.B, shape.N, shape.K, shape.T, shape.G, shape.bq
    blocks = Blocks(shape, keys_inside=True)
    first = first_seen(segments, window)
    operands = [
        (q, blocks.queries(shape.H)),
        (k, blocks.keys(shape.H)),
        (v, blocks.keys(shape.Hv)),
        (first[:, None], blocks.first()),
    ]
    if sinks is not None:
        operands.append((sinks.astype(jnp.float32), pl.BlockSpec(memory_space=pltpu.SMEM)))
    o, lse = blocks.run(
        partial(_kernel, blocks=blocks, scale=scale, soft_cap=soft_cap),
        query_major(first, bq, shape.bk),
        operands,
        [
            (jax.ShapeDtypeStruct((B, N, T, shape.Hv), q.dtype), blocks.queries(shape.Hv)),
            (jax.ShapeDtypeStruct((B, K, G, T), jnp.float32), blocks.rows()),
        ],
        [
            pltpu.VMEM((G, bq, shape.Hv), jnp.float32),
            pltpu.VMEM((G, bq, LANES), jnp.float32),
            pltpu.VMEM((G, bq, LANES), jnp.float32),
            pltpu.VMEM((bq, LANES), jnp.int32),
        ],
        name="flash_attention",
        interpret=interpret,
    )
    return o, lse.reshape(B, N, T)


def _kernel(
    outer_ref, inner_ref, flags_ref, q_ref, k_ref, v_ref, first_ref, *refs,
    blocks: Blocks, scale: float, soft_cap: float,
):  # fmt: skip
    *sinks, o_ref, lse_ref, value_ref, top_ref, total_ref, first_column_ref = refs
    G, bq, bk = blocks.shape.G, blocks.shape.bq, blocks.shape.bk
    head, step = pl.program_id(0), pl.program_id(1)
    flags = flags_ref[step]

    @pl.when(flags & FIRST != 0)
    def _start():
        value_ref[...] = jnp.zeros_like(value_ref)
        total_ref[...] = jnp.full_like(total_ref, 1.0 if sinks else 0.0)
        for g in range(G):
            sink = sinks[0][head * G + g] * LOG2E if sinks else _NOTHING
            top_ref[g] = jnp.full((bq, LANES), sink, jnp.float32)
        first_column_ref[...] = column(first_ref[0])

    def attend(masked: bool) -> None:
        if masked:
            query, key = blocks.starts(outer_ref[step], inner_ref[step])
            query += lax.broadcasted_iota(jnp.int32, (bq, bk), 0)
            key += lax.broadcasted_iota(jnp.int32, (bq, bk), 1)
            seen = (first_column_ref[:, :1] <= key) & (key <= query)
        for g in range(G):
            s = logits(product(q_ref[0, g], k_ref[0, 0], (1, 1)), scale, soft_cap)  # [bq, bk]
            s = jnp.where(seen, s, -jnp.inf) if masked else s
            before = top_ref[g, :, :1]
            top = jnp.maximum(before, jnp.max(s, 1, keepdims=True))
            p, shrink = jnp.exp2(s - top), jnp.exp2(before - top)
            total = total_ref[g, :, :1] * shrink + jnp.sum(p, 1, keepdims=True)
            value = product(p.astype(v_ref.dtype), v_ref[0, 0], (1, 0))
            value_ref[g] = value_ref[g] * shrink + value
            top_ref[g] = jnp.broadcast_to(top, (bq, LANES))
            total_ref[g] = jnp.broadcast_to(total, (bq, LANES))

    pl.when(flags & MASKED != 0)(partial(attend, True))
    pl.when(flags & MASKED == 0)(partial(attend, False))

    @pl.when(flags & LAST != 0)
    def _finish():
        for g in range(G):
            total = total_ref[g]
            some = jnp.where(total > 0, total, 1.0)
            lse = jnp.where(total > 0, top_ref[g] * (1 / LOG2E) + jnp.log(some), -jnp.inf)
            o_ref[0, g] = (value_ref[g] / some[:, :1]).astype(o_ref.dtype)
            lse_ref[0, 0, g : g + 1] = lse.T[:1]
