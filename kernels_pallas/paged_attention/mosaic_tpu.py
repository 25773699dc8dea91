"""Attention over pages on a TPU: pages come by double-buffered DMA, straight from the stack.

Query heads that share a KV head are rows of one matrix, token by token, so that tokens and heads
together fill a tile of the matrix unit.
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
from kernels_pallas.paged_attention.codec import (
    ROTATED,
    Int4Pages,
    Int8Pages,
    QuantizedPages,
    StaticInt8Pages,
    rotated_by_product,
    signs,
)
from kernels_pallas.paged_attention.mosaic_tpu_blocks import Scalars, Shape
from kernels_pallas.paged_attention.mosaic_tpu_items import plan
from kernels_pallas.paged_attention.mosaic_tpu_kernel import kernel
from kernels_pallas.paged_attention.mosaic_tpu_pages import check, parts_of
from kernels_pallas.paged_attention.ragged import SHARED_KEYS, Ragged
from kernels_pallas.tpu import LANES
from kernels_pallas.weight import Weight, as_array


@dataclass(frozen=True)
class TpuTile:
    """How the kernel cuts its work.

    Attributes:
        keys: in a block of keys; 0 for 512, or 1024 where a program has one KV head and so nothing
            else to compute while it waits.
        rows: of queries that are attended at a time, a multiple of 128.
        tokens: of a program, at most, rounded up to whole tiles of rows.
        heads: KV heads of a program; 0 for all, or for a share of them where there are several
            cores.
        cores: that share the KV heads.
        mib: MiB of VMEM that a program's queries and outputs (both in two buffers) and its softmax
            may take, which bounds its tokens.
    """

    keys: int = tried(0, 256, 512, 1024)
    rows: int = tried(128, 256)
    tokens: int = 64
    heads: int = tried(0, 2, 4)
    cores: int = tried(1, 2)
    mib: int = 96

    @classmethod
    def wanted(cls, device: str) -> TpuTile | None:
        """The tile for a kind of device, or None for the defaults. A v4 or v5p is a chip of two
        cores, each of which takes half of the heads: nothing else of the grid is divided between
        them. Their VMEM is half as large as that of other kinds."""
        return cls(cores=2, mib=46) if device in ("v4", "v5p") else None


def page_attention(
    q: Array, k_pages: Any, v_pages: Any, layer: Array | int, batch: Ragged, *,
    scale: float, window: Array | int = 0, sinks: Weight | None = None, soft_cap: float = 0.0,
    value_dim: int | None = None, mass: bool = False, tile: TpuTile | None = None,
    interpret: Any = False,
) -> tuple[Array, ...]:  # fmt: skip
    """`reference.page_attention` as one TPU kernel.

    Raises:
        UnsupportedError: `mosaic_tpu_pages.check` refuses the pages; scale is not above 0, or
            soft_cap is below; a part of rows in four bits has other than 128 lanes; the tile's
            heads do not divide the KV heads, or are not all of them where pages hold scales.
    """
    T, N, H = q.shape
    K, W = k_pages.shape[2], k_pages.shape[-1]
    stacks = [k_pages] if v_pages is None else [k_pages, v_pages]
    value_dim = value_dim or int(stacks[-1].shape[-1] if v_pages is not None else H)
    check(stacks, batch.tables.shape)
    if scale <= 0 or soft_cap < 0:
        raise UnsupportedError(
            f"{scale=}, {soft_cap=}: the largest product must have the largest logit"
        )
    if isinstance(k_pages, StaticInt8Pages):
        q = k_pages.fold(q, layer)
    caches, scales, dtype = _leaves(stacks)
    values = pl.cdiv(value_dim, LANES) * LANES  # lanes past value_dim are cut off at the end
    options = {
        "value_dim": values, "soft_cap": soft_cap, "mass": mass, "has_sinks": sinks is not None,
        "logit_scale": scale * ROTATED**-0.5 if isinstance(k_pages, Int4Pages) else scale,
    }  # fmt: skip
    shape = _shape(tile or TpuTile(), T, N, stacks, batch, **options)
    programs, G = pl.cdiv(T, shape.tokens), shape.group
    tokens = shape.tokens if programs == 1 else T  # a single program's rows fill tiles
    q = rotated_by_product(k_pages, q.astype(dtype))
    q = jnp.pad(q, ((0, tokens - T), (0, 0), (0, W - q.shape[-1])))
    queries = [q.reshape(tokens, K, G, W).swapaxes(0, 1).reshape(K, tokens * G, W)]
    if sinks is not None:
        row = as_array(sinks).astype(jnp.float32).reshape(K, 1, G, 1) / shape.unit
        row = jnp.broadcast_to(row, (K, shape.tokens, G, LANES))
        queries.append(row.reshape(K, shape.tokens * G, LANES))
    if isinstance(k_pages, Int4Pages):
        queries.append(jnp.asarray(signs(ROTATED), jnp.bfloat16))
    window = jnp.asarray(window, jnp.int32).reshape(1)
    items, spans = plan(batch, window, programs, shape)
    index = jnp.asarray(layer, jnp.int32).reshape(1)
    scalars = Scalars(index, window, batch.tables.reshape(-1), *items, spans)
    o, lse, *sums = _launch(scalars, queries, caches, scales, shape, programs, interpret)
    o = o.reshape(K, tokens, G, values).swapaxes(0, 1).reshape(tokens, N, values)
    if isinstance(stacks[-1], StaticInt8Pages):
        o = stacks[-1].fold(o, layer)
    lse = lse.reshape(K, tokens, G).swapaxes(0, 1).reshape(tokens, N)[:T]
    if not mass:
        return o[:T, :, :value_dim], lse
    found = jnp.moveaxis(sums[0].reshape(K, -1, tokens, G), (2, 0, 3, 1), (0, 1, 2, 3))
    found = found.reshape(tokens, N, -1)[:T, :, : shape.table_width]
    return o[:T, :, :value_dim], lse, jnp.exp(found - lse[..., None])


def _leaves(stacks: list[Any]) -> tuple[list[Array], list[Array], Any]:
    """The caches' arrays, their scales where they have some, and the type of products with them."""
    if not isinstance(stacks[0], QuantizedPages):
        return stacks, [], stacks[0].dtype
    scales = [x.scale for x in stacks if isinstance(x, Int8Pages | Int4Pages)]
    return [x.values for x in stacks], scales, jnp.dtype(jnp.bfloat16)


def _launch(
    scalars: Scalars, queries: list[Array], caches: list[Array], scales: list[Array],
    shape: Shape, programs: int, interpret: Any,
) -> list[Array]:  # fmt: skip
    """o [K, rows, values], lse [K, 1, rows] and, with masses, sums of pages [K, pages, rows].

    Args:
        queries: rows [K, rows, W]; then sinks [K, rows of a program, 128] and Sylvester's matrix,
            where there are any.
        programs: for each set of heads.
    """
    K, all_rows, W = queries[0].shape
    heads, rows = shape.heads, shape.tokens * shape.group
    leaves, stacks = jax.tree.leaves(scalars), caches + scales
    outs = _outputs(K, all_rows, shape)
    sinks = [pl.BlockSpec((heads, rows, LANES), lambda h, b, *_: (h, 0, 0))] * shape.has_sinks
    rotation = [pl.BlockSpec((ROTATED, ROTATED), lambda *_: (0, 0))] * shape.int4
    softmax = pltpu.VMEM((heads, rows, LANES), jnp.float32)
    return pl.pallas_call(
        partial(kernel, shape=shape),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(leaves),
            grid=(K // heads, programs),
            in_specs=[
                pl.BlockSpec((heads, rows, W), _by_row),
                *sinks,
                *rotation,
                *[pl.BlockSpec(memory_space=pltpu.MemorySpace.HBM)] * len(stacks),
            ],
            out_specs=[spec for _, spec in outs],
            scratch_shapes=[
                *(pltpu.VMEM((2, heads, shape.block_pages * x.shape[3], x.shape[-1]), x.dtype)
                  for x in caches),
                *(pltpu.VMEM((2, x.shape[2], shape.block_keys), x.dtype) for x in scales),
                softmax, softmax,
                pltpu.SemaphoreType.DMA((2, len(stacks))), pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        out_shape=[out for out, _ in outs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=48 * 2**20,
            disable_bounds_checks=True,  # they take a third of the time to start a page's copy
        ),
        interpret=interpret,
        name="page_attention",
    )(*leaves, *queries, *stacks)  # fmt: skip


def _outputs(
    K: int, all_rows: int, shape: Shape
) -> list[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]]:
    """Shapes of the kernel's outputs, and their blocks."""
    heads, rows, values = shape.heads, shape.tokens * shape.group, shape.value_dim

    def array(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    outs = [
        (array(K, all_rows, values), pl.BlockSpec((heads, rows, values), _by_row)),
        (array(K, 1, all_rows), pl.BlockSpec((heads, 1, rows), _by_lane)),
    ]
    if shape.mass:
        pages = pl.cdiv(shape.table_width, shape.block_pages) * shape.block_pages
        block = pl.BlockSpec((heads, pages, rows), _by_lane)
        outs.append((array(K, pages, all_rows), block))
    return outs


def _program(h: Array, b: Array, *scalars: Any) -> tuple[Array, Array]:
    """Programs past the last real one keep its blocks, so that nothing is copied for them."""
    programs = Scalars.of(scalars).item_programs
    return h, jnp.minimum(b, programs[programs.shape[0] - 1])


def _by_row(*index: Any) -> tuple[Any, ...]:
    """The block of an array whose rows are its second axis."""
    return (*_program(*index), 0)


def _by_lane(*index: Any) -> tuple[Any, ...]:
    """The block of an array whose rows are its last axis."""
    return _program(*index)[0], 0, _program(*index)[1]


def _shape(
    tile: TpuTile, T: int, N: int, stacks: list[Any], batch: Ragged, *, value_dim: int,
    mass: bool, **options: Any,
) -> Shape:  # fmt: skip
    """The kernel's sizes.

    Args:
        value_dim: whole lanes.
        options: other fields of `Shape`.

    Raises:
        UnsupportedError: as `page_attention` says.
    """
    (_, _, K, Z, W), parts = stacks[0].shape, parts_of(stacks)
    int4 = isinstance(stacks[0], Int4Pages)
    if int4 and any(n != ROTATED for each in parts for n in each):
        raise UnsupportedError(f"{parts=} of rows in four bits must be of {ROTATED} lanes")
    heads = tile.heads or (K if parts[0] else K // math.gcd(K, tile.cores))
    if K % heads or (parts[0] and heads < K):  # scales of all heads come in one copy
        raise UnsupportedError(f"{K=} heads of keys are not groups of {heads}")
    G, itemsize = N // K, _leaves(stacks)[2].itemsize
    # Of a row: query and output in two buffers each, and two registers' lanes of the softmax.
    row_bytes = 2 * (W * itemsize + 4 * value_dim) + 8 * LANES
    tokens, small, large = _tokens(tile, T, G, 32 // itemsize, heads * G * row_bytes)
    table_width = batch.tables.shape[1]
    keys = tile.keys or SHARED_KEYS["tpu"] * (1 + (heads == 1))
    pages = max(1, min(keys // Z, table_width))
    if mass:
        small, pages = large, pl.cdiv(pages, 8) * 8
    return Shape(
        heads=heads, group=G, tokens=tokens, small_tile=small, tile=large, page_size=Z,
        block_pages=pages, table_width=table_width, value_dim=value_dim, mass=mass,
        num_caches=len(stacks), key_parts=parts[0], value_parts=parts[-1], int4=int4, **options,
    )  # fmt: skip


def _tokens(tile: TpuTile, T: int, G: int, sublanes: int, bytes_: int) -> tuple[int, int, int]:
    """Tokens of a program, of a small tile, and of a tile: see `Shape`.

    Args:
        sublanes: rows of a register.
        bytes_: of VMEM that a token takes.
    """
    small = sublanes // math.gcd(G, sublanes)
    large = math.lcm(small, tile.rows // math.gcd(G, tile.rows))
    tokens = pl.cdiv(T, small) * small
    if tokens > large:  # a block of lse is whole lanes
        most = max(large, tile.mib * 2**20 // bytes_ // large * large)
        even = pl.cdiv(T, pl.cdiv(T, most))  # so that two programs are no larger than need be
        tokens = pl.cdiv(min(even, tile.tokens), large) * large
    return tokens, small, min(large, tokens)
