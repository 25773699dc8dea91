"""The forward pass on a TPU: a softmax in progress for each block of queries."""

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
    LOG2E,
    Blocks,
    Shape,
    TpuTile,
    columns,
    in_turn,
    is_turned,
    logits,
    part_of,
    rows,
    width_axis,
)
from kernels_pallas.tiling import product

_NOTHING = -1e30  # a maximum before any logit: finite, so that hidden logits of -inf weigh 0


def forward(
    q: Array, k: Array, v: Array, segments: Array, *,
    scale: float, window: Array | int = 0, sinks: Array | None = None, soft_cap: float = 0.0,
    tile: TpuTile | None = None, interpret: Any = False,
) -> tuple[Array, Array]:  # fmt: skip
    """`reference.attend`, without its slopes."""
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
    *sinks, o_ref, lse_ref, value_ref, top_ref, total_ref = refs
    shape = blocks.shape
    head, step = pl.program_id(0), pl.program_id(1)
    flags = flags_ref[step]

    @pl.when(flags & FIRST != 0)
    def _start():
        value_ref[...] = jnp.zeros_like(value_ref)
        total_ref[...] = jnp.full_like(total_ref, 1.0 if sinks else 0.0)
        for g in range(shape.G):
            sink = sinks[0][head * shape.G + g] * LOG2E if sinks else _NOTHING
            top_ref[g] = jnp.full((1, shape.bq), sink, jnp.float32)

    def attend(masked: bool) -> None:
        seen = blocks.seen(outer_ref[step], inner_ref[step], first_ref[0]) if masked else None
        k, v = rows(k_ref[0, 0], shape.H), columns(v_ref[0, 0], shape.Hv)

        def scores(g: int, at: slice) -> Array:  # [bk, part of bq]
            return product(k, part_of(q_ref, shape.H, g, at), (1, width_axis(shape.H)))

        for g, at, s in in_turn(shape, scores, ahead=3):
            s = logits(s, scale, soft_cap)
            s = s if seen is None else jnp.where(seen[:, at], s, -jnp.inf)
            before = top_ref[g, :, at]
            top = jnp.maximum(before, jnp.max(s, 0, keepdims=True))
            p, shrink = jnp.exp2(s - top), jnp.exp2(before - top)
            top_ref[g, :, at] = top
            total_ref[g, :, at] = total_ref[g, :, at] * shrink + jnp.sum(p, 0, keepdims=True)
            value = product(v, p.astype(v.dtype), (1, 0))
            value_ref[g, :, at] = value_ref[g, :, at] * shrink + value

    pl.when(flags & MASKED != 0)(partial(attend, True))
    pl.when(flags & MASKED == 0)(partial(attend, False))

    @pl.when(flags & LAST != 0)
    def _finish():
        for g in range(shape.G):
            total = total_ref[g]
            some = jnp.where(total > 0, total, 1.0)
            lse = jnp.where(total > 0, top_ref[g] * (1 / LOG2E) + jnp.log(some), -jnp.inf)
            o = value_ref[g] * (1 / some)
            o_ref[0, g] = (o if is_turned(shape.Hv) else o.T).astype(o_ref.dtype)
            lse_ref[0, 0, g : g + 1] = lse
