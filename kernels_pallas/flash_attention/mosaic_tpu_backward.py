"""The backward pass on a TPU: one kernel per block of queries, one per block of keys.

Both make the probabilities again from lse, so neither adds to what the other writes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.flash_attention.gradient import delta, finite, sinks_gradient
from kernels_pallas.flash_attention.reference import (
    FIRST,
    LAST,
    MASKED,
    first_seen,
    key_major,
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


def backward(
    q: Array, k: Array, v: Array, segments: Array, o: Array, lse: Array, do: Array, dlse: Array, *,
    scale: float, window: Array | int = 0, sinks: Array | None = None, soft_cap: float = 0.0,
    tile: TpuTile | None = None, interpret: Any = False,
) -> tuple[Array, Array, Array, Array | None]:  # fmt: skip
    """`reference.gradient`."""
    shape = Shape.of(q, k, v, tile or TpuTile())
    first = first_seen(segments, window)
    taken = delta(o, do, dlse)
    by_group = (shape.B, shape.K, shape.G, shape.T)
    rows = (finite(lse) * LOG2E).reshape(by_group), taken.reshape(by_group)
    operands = (q, k, v, do.astype(q.dtype), *rows, first[:, None])
    run = partial(_run, operands, shape, scale=scale, soft_cap=soft_cap, interpret=interpret)
    bq, bk, H, Hv = shape.bq, shape.bk, shape.H, shape.Hv
    columns = [pltpu.VMEM((shape.G, bq, LANES), jnp.float32) for _ in rows]
    (dq,) = run(
        _queries_kernel, query_major(first, bq, bk), True, [q],
        [pltpu.VMEM((shape.G, bq, H), jnp.float32), *columns, pltpu.VMEM((bq, LANES), jnp.int32)],
        name="flash_attention_dq",
    )  # fmt: skip
    dk, dv = run(
        _keys_kernel, key_major(first, bq, bk), False, [k, v],
        [pltpu.VMEM((bk, H), jnp.float32), pltpu.VMEM((bk, Hv), jnp.float32)],
        name="flash_attention_dkv",
    )  # fmt: skip
    return dq, dk, dv, sinks_gradient(sinks, lse, taken)


def _run(operands, shape, kernel, steps, keys_inside, like, scratch, *, scale, soft_cap, **options):
    """A kernel's results, of the types of the arrays in `like`."""
    blocks = Blocks(shape, keys_inside)
    q, k, v, do = blocks.queries, blocks.keys, blocks.keys, blocks.queries
    specs = [q(shape.H), k(shape.H), v(shape.Hv), do(shape.Hv)]
    specs += [blocks.rows(), blocks.rows(), blocks.first()]
    out = [
        (jax.ShapeDtypeStruct(x.shape, x.dtype), (q if keys_inside else k)(x.shape[-1]))
        for x in like
    ]
    kernel = partial(kernel, blocks=blocks, scale=scale, soft_cap=soft_cap)
    return blocks.run(
        kernel, steps, list(zip(operands, specs, strict=True)), out, scratch, **options
    )


def _slope(s: Array, dp: Array, taken: Array, p: Array, soft_cap: float) -> Array:
    """Slopes of products of q and k, but for the scale, from those of probabilities."""
    ds = p * (dp - taken)
    if soft_cap:
        bent = s * (1 / (soft_cap * LOG2E))  # the hyperbolic tangent
        ds = ds * (1.0 - bent * bent)
    return ds


def _queries_kernel(
    outer_ref, inner_ref, flags_ref, q_ref, k_ref, v_ref, do_ref, lse_ref, taken_ref, first_ref,
    dq_ref, sum_ref, lse_column_ref, taken_column_ref, first_column_ref, *,
    blocks: Blocks, scale: float, soft_cap: float,
):  # fmt: skip
    G, bq, bk = blocks.shape.G, blocks.shape.bq, blocks.shape.bk
    step = pl.program_id(1)
    flags = flags_ref[step]

    @pl.when(flags & FIRST != 0)
    def _start():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        for g in range(G):
            lse_column_ref[g] = column(lse_ref[0, 0, g : g + 1])
            taken_column_ref[g] = column(taken_ref[0, 0, g : g + 1])
        first_column_ref[...] = column(first_ref[0])

    def add(masked: bool) -> None:
        if masked:
            query, key = blocks.starts(outer_ref[step], inner_ref[step])
            query += lax.broadcasted_iota(jnp.int32, (bq, bk), 0)
            key += lax.broadcasted_iota(jnp.int32, (bq, bk), 1)
            seen = (first_column_ref[:, :1] <= key) & (key <= query)
        for g in range(G):
            s = logits(product(q_ref[0, g], k_ref[0, 0], (1, 1)), scale, soft_cap)  # [bq, bk]
            p = jnp.exp2(s - lse_column_ref[g, :, :1])
            p = jnp.where(seen, p, 0.0) if masked else p
            dp = product(do_ref[0, g], v_ref[0, 0], (1, 1))
            ds = _slope(s, dp, taken_column_ref[g, :, :1], p, soft_cap)
            sum_ref[g] += product(ds.astype(k_ref.dtype), k_ref[0, 0], (1, 0))

    pl.when(flags & MASKED != 0)(partial(add, True))
    pl.when(flags & MASKED == 0)(partial(add, False))

    @pl.when(flags & LAST != 0)
    def _finish():
        dq_ref[0] = (sum_ref[...] * scale).astype(dq_ref.dtype)


def _keys_kernel(
    outer_ref, inner_ref, flags_ref, q_ref, k_ref, v_ref, do_ref, lse_ref, taken_ref, first_ref,
    dk_ref, dv_ref, k_sum_ref, v_sum_ref, *,
    blocks: Blocks, scale: float, soft_cap: float,
):  # fmt: skip
    """Keys lie in rows and queries in lanes, so that both sums need no transposition."""
    G, bq, bk = blocks.shape.G, blocks.shape.bq, blocks.shape.bk
    step = pl.program_id(1)
    flags = flags_ref[step]

    @pl.when(flags & FIRST != 0)
    def _start():
        k_sum_ref[...] = jnp.zeros_like(k_sum_ref)
        v_sum_ref[...] = jnp.zeros_like(v_sum_ref)

    def add(masked: bool) -> None:
        if masked:
            query, key = blocks.starts(outer_ref[step], inner_ref[step])
            query += lax.broadcasted_iota(jnp.int32, (bk, bq), 1)
            key += lax.broadcasted_iota(jnp.int32, (bk, bq), 0)
            seen = (first_ref[0] <= key) & (key <= query)
        for g in range(G):
            s = logits(product(k_ref[0, 0], q_ref[0, g], (1, 1)), scale, soft_cap)  # [bk, bq]
            p = jnp.exp2(s - lse_ref[0, 0, g : g + 1])
            p = jnp.where(seen, p, 0.0) if masked else p
            v_sum_ref[...] += product(p.astype(do_ref.dtype), do_ref[0, g], (1, 0))
            dp = product(v_ref[0, 0], do_ref[0, g], (1, 1))
            ds = _slope(s, dp, taken_ref[0, 0, g : g + 1], p, soft_cap)
            k_sum_ref[...] += product(ds.astype(q_ref.dtype), q_ref[0, g], (1, 0))

    pl.when(flags & MASKED != 0)(partial(add, True))
    pl.when(flags & MASKED == 0)(partial(add, False))

    @pl.when(flags & LAST != 0)
    def _finish():
        dk_ref[0, 0] = (k_sum_ref[...] * scale).astype(dk_ref.dtype)
        dv_ref[0, 0] = v_sum_ref[...].astype(dv_ref.dtype)
