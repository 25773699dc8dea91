"""Attention over pages on a TPU: pages come by double-buffered DMA, straight from the stack.

Heads of queries that share a head of keys are rows of one matrix, token by token, so that a tile of
the matrix unit is filled by tokens and heads alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.op import UnsupportedError, tried
from kernels_pallas.paged_attention.mosaic_tpu_kernel import LANES, Scalars, Shape, kernel
from kernels_pallas.paged_attention.ragged import Ragged
from kernels_pallas.weight import Weight, as_array

_TABLE = 2**17  # entries: half of a v5e's SMEM


@dataclass(frozen=True)
class TpuTile:
    """keys: and rows of queries attended at a time (rows: whole lanes); tokens: in a program;
    heads: of keys in a program, 0 for all. Two programs fill a chip of two cores (v4, v5p)."""

    keys: int = tried(512, 256, 1024)
    rows: int = tried(128, 256)
    tokens: int = 64
    heads: int = tried(0, 2, 4)


def page_attention(
    q: Array, k_pages: Array, v_pages: Array | None, layer: Array | int, batch: Ragged, *,
    scale: float, window: Array | int = 0, sinks: Weight | None = None, soft_cap: float = 0.0,
    value_dim: int | None = None, mass: bool = False, tile: TpuTile | None = None,
    interpret: Any = False,
) -> tuple[Array, ...]:  # fmt: skip
    """`reference.page_attention` as one TPU kernel."""
    T, N, H = q.shape
    K, W = k_pages.shape[2], k_pages.shape[-1]
    caches = [k_pages] if v_pages is None else [k_pages, v_pages]
    value_dim = value_dim or (H if v_pages is None else v_pages.shape[-1])
    values = pl.cdiv(value_dim, LANES) * LANES  # lanes past value_dim are cut off at the end
    squash, unit = (scale / soft_cap, soft_cap) if soft_cap else (0.0, scale)
    shape = _shape(tile or TpuTile(), T, N, caches, batch, values, squash, unit, mass)
    blocks, G = pl.cdiv(T, shape.tokens), shape.group
    tokens = shape.tokens if blocks == 1 else T  # a single program's rows fill tiles
    q = jnp.pad(q.astype(k_pages.dtype), ((0, tokens - T), (0, 0), (0, W - H)))
    queries = [q.reshape(tokens, K, G, W).swapaxes(0, 1).reshape(K, tokens * G, W)]
    if sinks is not None:
        row = as_array(sinks).astype(jnp.float32).reshape(K, 1, G, 1) / unit
        row = jnp.broadcast_to(row, (K, shape.tokens, G, LANES))
        queries.append(row.reshape(K, shape.tokens * G, LANES))
    scalars = Scalars(
        jnp.asarray(layer, jnp.int32).reshape(1), jnp.asarray(window, jnp.int32).reshape(1),
        batch.row_starts, batch.kv_lens, batch.tables.reshape(-1),
        *_items(batch, blocks, shape.tokens),
    )  # fmt: skip
    o, lse, *sums = _launch(scalars, queries, caches, shape, blocks, interpret)
    o = o.reshape(K, tokens, G, values).swapaxes(0, 1).reshape(tokens, N, values)
    lse = lse.reshape(K, tokens, G).swapaxes(0, 1).reshape(tokens, N)[:T]
    if not mass:
        return o[:T, :, :value_dim], lse
    found = jnp.moveaxis(sums[0].reshape(K, -1, tokens, G), (2, 0, 3, 1), (0, 1, 2, 3))
    found = found.reshape(tokens, N, -1)[:T, :, : shape.row]
    return o[:T, :, :value_dim], lse, jnp.exp(found - lse[..., None])


def _launch(
    scalars: Scalars, queries: list[Array], caches: list[Array], shape: Shape, blocks: int,
    interpret: Any,
) -> list[Array]:  # fmt: skip
    """o [K, rows, values], lse [K, 1, rows] and sums of pages [K, pages, rows]."""
    K, all_rows, W = queries[0].shape
    heads, rows, keys = shape.heads, shape.tokens * shape.group, shape.pages * shape.page

    def program(h: Array, b: Array, *scalars: Any):  # padding stays where the last real one was
        placed = Scalars(*scalars).blocks
        return h, jnp.minimum(b, placed[placed.shape[0] - 1])

    def by_row(*i: Any):
        return (*program(*i), 0)

    def by_lane(*i: Any):
        return program(*i)[0], 0, program(*i)[1]

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    out = [
        (array(K, all_rows, shape.value_dim), pl.BlockSpec((heads, rows, shape.value_dim), by_row)),
        (array(K, 1, all_rows), pl.BlockSpec((heads, 1, rows), by_lane)),
    ]
    if shape.mass:
        pages = pl.cdiv(shape.row, shape.pages) * shape.pages
        out.append((array(K, pages, all_rows), pl.BlockSpec((heads, pages, rows), by_lane)))
    sinks = [pl.BlockSpec((heads, rows, LANES), lambda h, b, *_: (h, 0, 0))]
    state = pltpu.VMEM((heads, rows, LANES), jnp.float32)
    return pl.pallas_call(
        partial(kernel, shape=shape, has_sinks=len(queries) > 1, caches=len(caches)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(K // heads, blocks),
            in_specs=[
                pl.BlockSpec((heads, rows, W), by_row),
                *sinks[: len(queries) - 1],
                *[pl.BlockSpec(memory_space=pltpu.MemorySpace.HBM)] * len(caches),
            ],
            out_specs=[spec for _, spec in out],
            scratch_shapes=[
                *(pltpu.VMEM((2, heads, keys, x.shape[-1]), x.dtype) for x in caches),
                state, state,
                pltpu.SemaphoreType.DMA((2, len(caches))), pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        out_shape=[shape for shape, _ in out],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=48 * 2**20
        ),
        interpret=interpret,
        name="page_attention",
    )(*scalars, *queries, *caches)  # fmt: skip


def _shape(
    tile: TpuTile, T: int, N: int, caches: list[Array], batch: Ragged, values: int,
    squash: float, unit: float, mass: bool,
) -> Shape:  # fmt: skip
    """The kernel's sizes, or what speaks against it."""
    dtype, (_, _, K, Z, _) = caches[0].dtype, caches[0].shape
    G = N // K
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise UnsupportedError(f"pages of {dtype}: keep them in bfloat16 or float32")
    sublanes = 32 // dtype.itemsize
    if Z % sublanes:
        raise UnsupportedError(f"{Z=} keys in a page of {dtype} must be a multiple of {sublanes}")
    lanes = [x.shape[-1] for x in caches]
    if any(n % LANES for n in lanes):  # by default they are laid out otherwise, and copied
        raise UnsupportedError(f"pages of {lanes} lanes: pad them to multiples of {LANES}")
    if batch.tables.size > _TABLE:
        raise UnsupportedError(
            f"a block table {batch.tables.shape} has more than {_TABLE} entries: take larger pages"
        )
    heads = tile.heads or K
    if K % heads:
        raise UnsupportedError(f"{K=} heads of keys are not groups of {heads}")
    few = sublanes // math.gcd(G, sublanes)
    some = math.lcm(few, tile.rows // math.gcd(G, tile.rows))
    tokens = pl.cdiv(T, few) * few
    if tokens > some:  # a block of lse is whole lanes
        tokens = pl.cdiv(min(tokens, tile.tokens), some) * some
    some = min(some, tokens)
    row = batch.tables.shape[1]
    pages = max(1, min(tile.keys // Z, row))
    if mass:
        few, pages = some, pl.cdiv(pages, 8) * 8
    return Shape(heads, G, tokens, few, some, Z, pages, row, values, squash, unit, mass)


def _items(batch: Ragged, blocks: int, tokens: int) -> tuple[Array, Array, Array]:
    """The sequence and the program of each item, and the first item of each program [blocks + 1].

    It is the same for all layers, so it leaves a loop over them.
    """
    starts, ends = batch.row_starts[:-1], batch.row_starts[1:]
    R = starts.shape[0]
    real = (jnp.arange(R) < batch.num_seqs) & (ends > starts)
    count = jnp.where(real, (ends - 1) // tokens - starts // tokens + 1, 0)
    before = jnp.cumsum(count, dtype=jnp.int32)
    i = jnp.arange(blocks + R, dtype=jnp.int32)
    seqs = jnp.minimum(jnp.sum(before <= i[:, None], 1), R - 1).astype(jnp.int32)
    block = (starts // tokens - before + count)[seqs] + i
    first = jnp.sum((block < jnp.arange(blocks + 1)[:, None]) & (i < before[-1]), 1)
    last = jnp.max(jnp.where(i < before[-1], block, 0))
    return seqs, jnp.where(i < before[-1], block, last), first.astype(jnp.int32)
