"""The backward pass on Hopper: one kernel for dq, by blocks of queries, one for dk and dv, by keys.

Both recompute the probabilities from lse, so that neither needs atomic additions.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.flash_attention.gpu_blocks import (
    BLOCK,
    GROUPS,
    GpuTile,
    Options,
    Ring,
    Shape,
    Walk,
    capped,
    fill,
    run,
    seen,
)
from kernels_pallas.flash_attention.gradient import finite, sinks_gradient, softmax_delta
from kernels_pallas.flash_attention.reference import first_seen
from kernels_pallas.hopper import ROWS, across, add_products, down, late, product
from kernels_pallas.softmax import LOG2E


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
    first, delta = first_seen(segments, window), softmax_delta(o, lse, do, dlse)
    operands = [q, k, v, do.astype(dtype), finite(lse) * LOG2E, delta, first]
    options = Options(shape, size, scale, soft_cap, bool(interpret))
    tiles = [((size, H), dtype), ((size, Hv), dtype)]
    block = [plgpu.SMEM((GROUPS, ROWS, H), dtype), plgpu.SMEM((GROUPS, ROWS, Hv), dtype)]
    numbers = [jnp.float32, jnp.float32, jnp.int32]  # lse, delta and `first` of a query
    dq = run(
        partial(_queries_kernel, options=options),
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
        partial(_keys_kernel, options=options),
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


class _Inputs(NamedTuple):
    """Arrays in global memory; lse is in base 2."""

    q: Any  # [B, N, T, H]
    k: Any  # [B, K, T, H]
    v: Any  # [B, K, T, Hv]
    do: Any  # [B, N, T, Hv]
    lse: Any  # [B, N, T]
    delta: Any  # [B, N, T]
    first: Any  # [B, T], of `first_seen`
    walk: Any  # [B, T / 128, 4], of `Walk`

    def of_queries(self, row: Array, head: Array, queries: Any) -> list[Any]:
        """What there is for some queries: q, do, lse, delta and first."""
        where = row, head, queries
        by_head = [x.at[where] for x in (self.q, self.do, self.lse, self.delta)]
        return [*by_head, self.first.at[row, queries]]


def _gradient_of_scores(s: Array, p: Array, dp: Array, delta: Array, soft_cap: float) -> Array:
    """ds: the gradient of the products of q and k, not yet scaled. s is what `capped` returned."""
    ds = p * (dp - delta)
    if soft_cap:
        ds = ds * (1.0 - s * s)  # the derivative of tanh, of which s is the value
    return ds


class _QueryScratch(NamedTuple):
    """Shared memory of the kernel of dq: what belongs to the queries of each warpgroup."""

    q: Any  # [2, 64, H]; dq in the end
    do: Any  # [2, 64, Hv]
    lse: Any  # [2, 64]
    delta: Any  # [2, 64]
    first: Any  # [2, 64]
    loaded: Any  # a barrier per warpgroup, for these five


def _queries_kernel(*refs, options: Options):
    """dq of 64 queries of a head in each warpgroup."""
    shape, size = options.shape, options.size
    inputs, dq_ref, smem, ring = _Inputs(*refs[:8]), refs[8], refs[9:15], Ring.of(refs[15:])
    smem = _QueryScratch(*smem)
    wg, row, head = lax.axis_index("wg"), lax.axis_index("row"), lax.axis_index("head")
    block = shape.T // BLOCK - 1 - lax.axis_index("block")  # blocks with the most work come first
    walk = Walk.of(inputs.walk, row, block)
    begin = block * BLOCK + wg * ROWS

    @pl.when(wg == GROUPS)
    def _load():
        plgpu.set_max_registers(24, action="decrease")

        def sources(step: Array) -> tuple[Any, Any]:
            where = row, lax.div(head, shape.G), pl.ds(walk.tile(step) * size, size)
            return inputs.k.at[where], inputs.v.at[where]

        fill(walk.steps, (ring, sources))

    @pl.when(wg < GROUPS)
    def _compute():
        plgpu.set_max_registers(240, action="increase")
        queries = pl.ds(begin, ROWS)
        sources = inputs.of_queries(row, head, queries)
        for source, place in zip(sources, smem[:5], strict=True):
            plgpu.copy_gmem_to_smem(source, place.at[wg], smem.loaded.at[wg])
        plgpu.barrier_wait(smem.loaded.at[wg])
        zeros = jnp.zeros((ROWS, shape.H), jnp.float32)
        dq = walk(partial(_add_to_queries, smem, ring, options, wg, begin), zeros)
        smem.q[wg] = (dq * options.scale).astype(shape.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem.q.at[wg], dq_ref.at[row, head, queries])
        plgpu.wait_smem_to_gmem(0)


def _add_to_queries(
    smem: _QueryScratch, ring: Ring, options: Options, wg: Array, begin: Array,
    step: Array, tile: Array, dq: Array, masked: bool,
) -> Array:  # fmt: skip
    """Adds one tile of keys to dq of the 64 queries from `begin` on."""
    (k_smem, v_smem), free = ring.take(step)
    s = capped(product(smem.q.at[wg], k_smem.T), options.scale, options.soft_cap)
    p = jnp.exp2(s * options.logit_scale - down(smem.lse[wg], options.tile))
    if masked:
        first_key, first = tile * options.size, smem.first[wg]
        p = jnp.where(seen(begin, first_key, first, options.tile, 0), p, 0.0)
    dp = product(smem.do.at[wg], v_smem.T)
    ds = _gradient_of_scores(s, p, dp, down(smem.delta[wg], options.tile), options.soft_cap)
    pair = ds.astype(options.shape.dtype), k_smem
    (dq,) = add_products([dq], [pair], simulated=options.simulated)
    plgpu.barrier_arrive(free)
    return dq


class _KeyScratch(NamedTuple):
    """Shared memory of the kernel of dk and dv: what belongs to the keys of each warpgroup."""

    k: Any  # [2, 64, H]; dk in the end
    v: Any  # [2, 64, Hv]; dv in the end
    loaded: Any  # a barrier per warpgroup, for both


def _keys_kernel(*refs, options: Options):
    """dk and dv of 64 keys of a KV head in each warpgroup.

    Scores have keys in rows and queries in columns, so that both sums need no transposition.
    """
    shape, size = options.shape, options.size
    inputs, dk_ref, dv_ref, ring = _Inputs(*refs[:8]), refs[8], refs[9], Ring.of(refs[13:])
    smem = _KeyScratch(*refs[10:13])
    wg, row, head = lax.axis_index("wg"), lax.axis_index("row"), lax.axis_index("head")
    block = lax.axis_index("block")  # which have the most work first
    begin = block * BLOCK + wg * ROWS
    walk = Walk.of(inputs.walk, row, block)  # the same for each head that shares the keys

    @pl.when(wg == GROUPS)
    def _load():
        plgpu.set_max_registers(24, action="decrease")

        def sources(step: Array) -> list[Any]:
            queries = pl.ds(walk.tile(lax.rem(step, walk.steps)) * size, size)
            return inputs.of_queries(row, head * shape.G + lax.div(step, walk.steps), queries)

        fill(walk.steps * shape.G, (ring, sources))

    @pl.when(wg < GROUPS)
    def _compute():
        plgpu.set_max_registers(240, action="increase")
        where = row, head, pl.ds(begin, ROWS)
        plgpu.copy_gmem_to_smem(inputs.k.at[where], smem.k.at[wg], smem.loaded.at[wg])
        plgpu.copy_gmem_to_smem(inputs.v.at[where], smem.v.at[wg], smem.loaded.at[wg])
        plgpu.barrier_wait(smem.loaded.at[wg])

        def add_head(_: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
            walk = Walk.of(inputs.walk, late(row, state[0]), late(block, state[0]))
            return walk(partial(_add_to_keys, smem, ring, options, wg, begin), state)

        zeros = (jnp.zeros((ROWS, n), jnp.float32) for n in (shape.H, shape.Hv))
        steps, dk, dv = lax.fori_loop(0, shape.G, add_head, (jnp.int32(0), *zeros))
        mine = late(wg, steps)
        smem.k[mine] = (dk * options.scale).astype(shape.dtype)
        smem.v[mine] = dv.astype(shape.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem.k.at[wg], dk_ref.at[where])
        plgpu.copy_smem_to_gmem(smem.v.at[wg], dv_ref.at[where])
        plgpu.wait_smem_to_gmem(0)


def _add_to_keys(
    smem: _KeyScratch, ring: Ring, options: Options, wg: Array, begin: Array,
    _: Array, tile: Array, state: tuple[Array, ...], masked: bool,
) -> tuple[Array, ...]:  # fmt: skip
    """Adds one tile of queries to the steps done, dk and dv of the 64 keys from `begin` on."""
    step, dk, dv = state
    (q_smem, do_smem, lse_smem, delta_smem, first_smem), free = ring.take(step)
    s = capped(product(smem.k.at[wg], q_smem.T), options.scale, options.soft_cap)
    p = jnp.exp2(s * options.logit_scale - across(lse_smem[...], options.tile))
    if masked:
        first_key, first_query = late(begin, step), tile * options.size
        p = jnp.where(seen(first_query, first_key, first_smem[...], options.tile, 1), p, 0.0)
    dp = product(smem.v.at[wg], do_smem.T)
    ds = _gradient_of_scores(s, p, dp, across(delta_smem[...], options.tile), options.soft_cap)
    dtype = options.shape.dtype
    pairs = (ds.astype(dtype), q_smem), (p.astype(dtype), do_smem)
    dk, dv = add_products([dk, dv], pairs, simulated=options.simulated)
    plgpu.barrier_arrive(free)
    return step + 1, dk, dv
