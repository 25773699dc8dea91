"""The backward pass on Hopper: one kernel for dq, by blocks of queries, one for dk and dv, by keys.

Both recompute the probabilities from lse, so that neither needs atomic additions.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.flash_attention.gpu_blocks import (
    BLOCK,
    GROUPS,
    GpuTile,
    Ring,
    Shape,
    Walk,
    capped,
    fill,
    logit_scale,
    run,
    seen,
)
from kernels_pallas.flash_attention.gradient import finite, sinks_gradient, softmax_delta
from kernels_pallas.flash_attention.reference import first_seen
from kernels_pallas.softmax import LOG2E
from kernels_pallas.tiling import late
from kernels_pallas.wgmma import ROWS, across, add_products, down, product


def backward(
    q: Array, k: Array, v: Array, segments: Array, o: Array, lse: Array, do: Array, dlse: Array, *,
    scale: float, window: Array | int = 0, sinks: Array | None = None, soft_cap: float = 0.0,
    tile: GpuTile | None = None, interpret: Any = False,
) -> tuple[Array, Array, Array, Array | None]:  # fmt: skip
    """`reference.gradient` as two Hopper kernels.

    Raises:
        UnsupportedError: see `Shape.of`; or the tile needs more shared memory than there is.
    """
    tile = tile or GpuTile(tokens=64)  # registers hold no more
    shape = Shape.of(q, k, v, scale, tile)
    dtype, size, H, Hv = shape.dtype, tile.tokens, shape.H, shape.Hv
    first, delta = first_seen(segments, window), softmax_delta(o, do, dlse)
    operands = [q, k, v, do.astype(dtype), finite(lse) * LOG2E, delta, first]
    options = {"shape": shape, "size": size, "scale": scale, "soft_cap": soft_cap}
    options |= {"simulated": bool(interpret)}
    tiles = [((size, H), dtype), ((size, Hv), dtype)]
    block = [plgpu.SMEM((GROUPS, ROWS, H), dtype), plgpu.SMEM((GROUPS, ROWS, Hv), dtype)]
    numbers = [jnp.float32, jnp.float32, jnp.int32]  # lse, delta and `first` of a query
    dq = run(
        partial(_queries_kernel, **options),
        [*operands, Walk.over_keys(first, size)],
        jax.ShapeDtypeStruct(q.shape, dtype),
        {"head": shape.N, "block": shape.T // BLOCK, "row": shape.B},
        [
            *block,
            *(plgpu.SMEM((GROUPS, ROWS), t) for t in numbers),
            plgpu.Barrier(num_arrivals=5, num_barriers=GROUPS),
            *Ring.scratch(tile.stages, *tiles),
        ],
        name="flash_attention_dq",
        interpret=interpret,
    )
    dk, dv = run(
        partial(_keys_kernel, **options),
        [*operands, Walk.over_queries(first, size)],
        [jax.ShapeDtypeStruct(k.shape, dtype), jax.ShapeDtypeStruct(v.shape, dtype)],
        {"head": shape.K, "block": shape.T // BLOCK, "row": shape.B},
        [
            *block,
            plgpu.Barrier(num_arrivals=2, num_barriers=GROUPS),
            *Ring.scratch(tile.stages, *tiles, *(((size,), t) for t in numbers)),
        ],
        name="flash_attention_dkv",
        interpret=interpret,
    )
    return dq, dk, dv, sinks_gradient(sinks, lse, delta)


def _gradient_of_scores(s: Array, p: Array, dp: Array, delta: Array, soft_cap: float) -> Array:
    """ds: the gradient of the products of q and k, not yet scaled. s is what `capped` returned."""
    ds = p * (dp - delta)
    if soft_cap:
        ds = ds * (1.0 - s * s)  # the derivative of tanh, of which s is the value
    return ds


def _queries_kernel(
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, first_ref, walk_ref, dq_ref,
    q_smem, do_smem, lse_smem, delta_smem, first_smem, arrived, *ring,
    shape: Shape, size: int, scale: float, soft_cap: float, simulated: bool,
):  # fmt: skip
    """dq of 64 queries of a head in each warpgroup."""
    ring, tile = Ring.of(ring), (ROWS, size)
    wg, row, head = lax.axis_index("wg"), lax.axis_index("row"), lax.axis_index("head")
    block = shape.T // BLOCK - 1 - lax.axis_index("block")  # blocks with the most work come first
    walk = Walk.of(walk_ref, row, block)
    at = block * BLOCK + wg * ROWS

    @pl.when(wg == GROUPS)
    def _load():
        plgpu.set_max_registers(24, action="decrease")

        def sources(step: Array) -> tuple[Any, Any]:
            where = row, lax.div(head, shape.G), pl.ds(walk.tile(step) * size, size)
            return k_ref.at[where], v_ref.at[where]

        fill(walk.steps, (ring, sources))

    @pl.when(wg < GROUPS)
    def _compute():
        plgpu.set_max_registers(240, action="increase")
        where = row, head, pl.ds(at, ROWS)
        sources = [x.at[where] for x in (q_ref, do_ref, lse_ref, delta_ref)]
        sources.append(first_ref.at[row, where[2]])
        places = q_smem, do_smem, lse_smem, delta_smem, first_smem
        for source, place in zip(sources, places, strict=True):
            plgpu.copy_gmem_to_smem(source, place.at[wg], arrived.at[wg])
        plgpu.barrier_wait(arrived.at[wg])

        def add(step: Array, i: Array, dq: Array, masked: bool) -> Array:
            (k_smem, v_smem), free = ring.take(step)
            s = capped(product(q_smem.at[wg], k_smem.T), scale, soft_cap)
            p = jnp.exp2(s * logit_scale(scale, soft_cap) - down(lse_smem[wg], tile))
            if masked:
                p = jnp.where(seen(at, i * size, first_smem[wg], tile, 0), p, 0.0)
            dp = product(do_smem.at[wg], v_smem.T)
            ds = _gradient_of_scores(s, p, dp, down(delta_smem[wg], tile), soft_cap)
            pair = ds.astype(shape.dtype), k_smem
            (dq,) = add_products([dq], [pair], simulated=simulated)
            plgpu.barrier_arrive(free)
            return dq

        dq = walk(add, jnp.zeros((ROWS, shape.H), jnp.float32))
        q_smem[wg] = (dq * scale).astype(shape.dtype)  # queries are no longer needed
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[wg], dq_ref.at[where])
        plgpu.wait_smem_to_gmem(0)


def _keys_kernel(
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, first_ref, walk_ref, dk_ref, dv_ref,
    k_smem, v_smem, arrived, *ring,
    shape: Shape, size: int, scale: float, soft_cap: float, simulated: bool,
):  # fmt: skip
    """dk and dv of 64 keys of a KV head in each warpgroup.

    Scores have keys in rows and queries in columns, so that both sums need no transposition.
    """
    ring, tile = Ring.of(ring), (ROWS, size)
    wg, row, head = lax.axis_index("wg"), lax.axis_index("row"), lax.axis_index("head")
    block = lax.axis_index("block")  # which have the most work first
    at = block * BLOCK + wg * ROWS
    walk = Walk.of(walk_ref, row, block)  # the same for each head that shares the keys

    @pl.when(wg == GROUPS)
    def _load():
        plgpu.set_max_registers(24, action="decrease")

        def sources(step: Array) -> list[Any]:
            queries = pl.ds(walk.tile(lax.rem(step, walk.steps)) * size, size)
            where = row, head * shape.G + lax.div(step, walk.steps), queries
            by_head = [x.at[where] for x in (q_ref, do_ref, lse_ref, delta_ref)]
            return [*by_head, first_ref.at[row, queries]]

        fill(walk.steps * shape.G, (ring, sources))

    @pl.when(wg < GROUPS)
    def _compute():
        plgpu.set_max_registers(240, action="increase")
        where = row, head, pl.ds(at, ROWS)
        plgpu.copy_gmem_to_smem(k_ref.at[where], k_smem.at[wg], arrived.at[wg])
        plgpu.copy_gmem_to_smem(v_ref.at[where], v_smem.at[wg], arrived.at[wg])
        plgpu.barrier_wait(arrived.at[wg])

        def add(_: Array, i: Array, state: tuple[Array, ...], masked: bool) -> tuple[Array, ...]:
            step, dk, dv = state
            (q_smem, do_smem, lse_smem, delta_smem, first_smem), free = ring.take(step)
            s = capped(product(k_smem.at[wg], q_smem.T), scale, soft_cap)
            p = jnp.exp2(s * logit_scale(scale, soft_cap) - across(lse_smem[...], tile))
            if masked:
                here = late(at, step)
                p = jnp.where(seen(i * size, here, first_smem[...], tile, 1), p, 0.0)
            dp = product(v_smem.at[wg], do_smem.T)
            ds = _gradient_of_scores(s, p, dp, across(delta_smem[...], tile), soft_cap)
            pairs = (ds.astype(shape.dtype), q_smem), (p.astype(shape.dtype), do_smem)
            dk, dv = add_products([dk, dv], pairs, simulated=simulated)
            plgpu.barrier_arrive(free)
            return step + 1, dk, dv

        def add_head(_: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
            walk = Walk.of(walk_ref, late(row, state[0]), late(block, state[0]))
            return walk(add, state)

        zeros = (jnp.zeros((ROWS, n), jnp.float32) for n in (shape.H, shape.Hv))
        steps, dk, dv = lax.fori_loop(0, shape.G, add_head, (jnp.int32(0), *zeros))
        mine = late(wg, steps)
        k_smem[mine] = (dk * scale).astype(shape.dtype)  # keys and values are no longer needed
        v_smem[mine] = dv.astype(shape.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_smem.at[wg], dk_ref.at[where])
        plgpu.copy_smem_to_gmem(v_smem.at[wg], dv_ref.at[where])
        plgpu.wait_smem_to_gmem(0)
