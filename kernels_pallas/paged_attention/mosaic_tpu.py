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
from kernels_pallas.paged_attention.codec import (
    ROTATED,
    Int4Pages,
    Int8Pages,
    QuantizedPages,
    StaticInt8Pages,
    signs,
    turned_by_product,
    whole_scales,
)
from kernels_pallas.paged_attention.mosaic_tpu_kernel import (
    LANES,
    Scalars,
    Shape,
    Spans,
    kernel,
)
from kernels_pallas.paged_attention.ragged import SHARED_KEYS, Groups, Ragged
from kernels_pallas.weight import Weight, as_array

_TABLE = 2**17  # entries: half of a v5e's SMEM
_FAR = 2**29  # behind every position, and far from an overflow


@dataclass(frozen=True)
class TpuTile:
    """keys: and rows of queries attended at a time (rows: whole lanes), 0 keys for 512, or twice as
    many where a program has one head of them, and nothing else to do in its pauses; tokens: in a
    program; heads: of keys in a program, 0 for all, or for a share of them where there are several
    cores; mib: of VMEM for a program's queries and results, which bounds its tokens."""

    keys: int = tried(0, 256, 512, 1024)
    rows: int = tried(128, 256)
    tokens: int = 64
    heads: int = tried(0, 2, 4)
    cores: int = tried(1, 2)
    mib: int = 96

    @classmethod
    def wanted(cls, device: str) -> TpuTile | None:
        """One device of these kinds is a chip of two cores, each of which takes half of the heads;
        nothing else of the grid is shared among them. Their VMEM is half of the others'."""
        return cls(cores=2, mib=46) if device in ("v4", "v5p") else None


def page_attention(
    q: Array, k_pages: Any, v_pages: Any, layer: Array | int, batch: Ragged, *,
    scale: float, window: Array | int = 0, sinks: Weight | None = None, soft_cap: float = 0.0,
    value_dim: int | None = None, mass: bool = False, tile: TpuTile | None = None,
    interpret: Any = False,
) -> tuple[Array, ...]:  # fmt: skip
    """`reference.page_attention` as one TPU kernel."""
    T, N, H = q.shape
    K, W = k_pages.shape[2], k_pages.shape[-1]
    stacks = [k_pages] if v_pages is None else [k_pages, v_pages]
    value_dim = value_dim or int(stacks[-1].shape[-1] if v_pages is not None else H)
    if isinstance(k_pages, StaticInt8Pages):
        q = k_pages.fold(q, layer)
    caches, scales, dtype = _leaves(stacks)
    values = pl.cdiv(value_dim, LANES) * LANES  # lanes past value_dim are cut off at the end
    factor = scale * ROTATED**-0.5 if isinstance(k_pages, Int4Pages) else scale
    squash, unit = (factor / soft_cap, soft_cap) if soft_cap else (0.0, factor)
    shape = _shape(tile or TpuTile(), T, N, stacks, batch, values, squash, unit, mass)
    blocks, G = pl.cdiv(T, shape.tokens), shape.group
    tokens = shape.tokens if blocks == 1 else T  # a single program's rows fill tiles
    q = turned_by_product(k_pages, q.astype(dtype))
    q = jnp.pad(q, ((0, tokens - T), (0, 0), (0, W - q.shape[-1])))
    queries = [q.reshape(tokens, K, G, W).swapaxes(0, 1).reshape(K, tokens * G, W)]
    if sinks is not None:
        row = as_array(sinks).astype(jnp.float32).reshape(K, 1, G, 1) / unit
        row = jnp.broadcast_to(row, (K, shape.tokens, G, LANES))
        queries.append(row.reshape(K, shape.tokens * G, LANES))
    if isinstance(k_pages, Int4Pages):
        queries.append(jnp.asarray(signs(ROTATED), jnp.bfloat16))
    window = jnp.asarray(window, jnp.int32).reshape(1)
    items, spans = _plan(batch, window, blocks, shape)
    index = jnp.asarray(layer, jnp.int32).reshape(1)
    scalars = Scalars(index, window, batch.tables.reshape(-1), *items, *spans)
    o, lse, *sums = _launch(scalars, queries, caches, scales, shape, blocks, interpret)
    o = o.reshape(K, tokens, G, values).swapaxes(0, 1).reshape(tokens, N, values)
    if isinstance(stacks[-1], StaticInt8Pages):
        o = stacks[-1].fold(o, layer)
    lse = lse.reshape(K, tokens, G).swapaxes(0, 1).reshape(tokens, N)[:T]
    if not mass:
        return o[:T, :, :value_dim], lse
    found = jnp.moveaxis(sums[0].reshape(K, -1, tokens, G), (2, 0, 3, 1), (0, 1, 2, 3))
    found = found.reshape(tokens, N, -1)[:T, :, : shape.row]
    return o[:T, :, :value_dim], lse, jnp.exp(found - lse[..., None])


def _leaves(stacks: list[Any]) -> tuple[list[Array], list[Array], Any]:
    """Rows of pages, their scales where they have some, and the type of products with them."""
    if not isinstance(stacks[0], QuantizedPages):
        return stacks, [], stacks[0].dtype
    scales = [x.scale for x in stacks if isinstance(x, Int8Pages | Int4Pages)]
    return [x.values for x in stacks], scales, jnp.dtype(jnp.bfloat16)


def _launch(
    scalars: Scalars, queries: list[Array], caches: list[Array], scales: list[Array],
    shape: Shape, blocks: int, interpret: Any,
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
    has_sinks = len(queries) > 1 + shape.nibbles
    sinks = [pl.BlockSpec((heads, rows, LANES), lambda h, b, *_: (h, 0, 0))] * has_sinks
    turn = [pl.BlockSpec((ROTATED, ROTATED), lambda *_: (0, 0))] * shape.nibbles
    state = pltpu.VMEM((heads, rows, LANES), jnp.float32)
    return pl.pallas_call(
        partial(kernel, shape=shape, has_sinks=has_sinks, caches=len(caches),
                scales=len(scales)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(K // heads, blocks),
            in_specs=[
                pl.BlockSpec((heads, rows, W), by_row),
                *sinks,
                *turn,
                *[pl.BlockSpec(memory_space=pltpu.MemorySpace.HBM)] * len(caches + scales),
            ],
            out_specs=[spec for _, spec in out],
            scratch_shapes=[
                *(pltpu.VMEM((2, heads, shape.pages * x.shape[3], x.shape[-1]), x.dtype)
                  for x in caches),
                *(pltpu.VMEM((2, x.shape[2], keys), x.dtype) for x in scales),
                state, state,
                pltpu.SemaphoreType.DMA((2, len(caches + scales))), pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        out_shape=[shape for shape, _ in out],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=48 * 2**20,
            disable_bounds_checks=True,  # a third of what it takes to begin a page's copy
        ),
        interpret=interpret,
        name="page_attention",
    )(*scalars, *queries, *caches, *scales)  # fmt: skip


def _shape(
    tile: TpuTile, T: int, N: int, stacks: list[Any], batch: Ragged, values: int,
    squash: float, unit: float, mass: bool,
) -> Shape:  # fmt: skip
    """The kernel's sizes, or what speaks against it."""
    (_, _, K, Z, _), parts = stacks[0].shape, _parts(stacks)
    G, dtype = N // K, _leaves(stacks)[2]
    sublanes = 32 // dtype.itemsize
    whole = LANES if parts[0] else 32 // stacks[0].dtype.itemsize
    if Z % whole:
        raise UnsupportedError(
            f"{Z=} keys in a page of {stacks[0].dtype} must be a multiple of {whole}"
        )
    lanes = [x.shape[-1] for x in stacks]
    if any(n % LANES for n in lanes):  # by default they are laid out otherwise, and copied
        raise UnsupportedError(f"pages of {lanes} lanes: pad them to multiples of {LANES}")
    if batch.tables.size > _TABLE:
        raise UnsupportedError(
            f"a block table {batch.tables.shape} has more than {_TABLE} entries: take larger pages"
        )
    heads = tile.heads or (K if parts[0] else K // math.gcd(K, tile.cores))
    if K % heads or (parts[0] and heads < K):  # scales of all heads come in one copy
        raise UnsupportedError(f"{K=} heads of keys are not groups of {heads}")
    few = sublanes // math.gcd(G, sublanes)
    some = math.lcm(few, tile.rows // math.gcd(G, tile.rows))
    tokens = pl.cdiv(T, few) * few
    if tokens > some:  # a block of lse is whole lanes
        held = 2 * (lanes[0] * dtype.itemsize + 4 * values) + 8 * LANES  # of a row, in two buffers
        most = max(some, tile.mib * 2**20 // (heads * G * held) // some * some)
        even = pl.cdiv(T, pl.cdiv(T, most))  # so that two programs are no larger than need be
        tokens = pl.cdiv(min(even, tile.tokens), some) * some
    some = min(some, tokens)
    row = batch.tables.shape[1]
    keys = tile.keys or SHARED_KEYS["tpu"] * (1 + (heads == 1))
    pages = max(1, min(keys // Z, row))
    if mass:
        few, pages = some, pl.cdiv(pages, 8) * 8
    nibbles = isinstance(stacks[0], Int4Pages)
    return Shape(
        heads, G, tokens, few, some, Z, pages, row, values, squash, unit, mass, *parts, nibbles
    )


def _parts(stacks: list[Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of keys and of values, parts with scales of their own; and what speaks against the type."""
    dtype, first = stacks[0].dtype, stacks[0]
    if not isinstance(first, QuantizedPages) and dtype not in (jnp.bfloat16, jnp.float32):
        raise UnsupportedError(f"pages of {dtype}: keep them in bfloat16 or float32")
    parts = [x.parts if isinstance(x, Int8Pages | Int4Pages) else () for x in stacks]
    if any(n % LANES for each in parts for n in each):
        raise UnsupportedError(f"{parts=} of rows must be multiples of {LANES} lanes")
    if isinstance(first, Int4Pages) and any(n != ROTATED for each in parts for n in each):
        raise UnsupportedError(f"{parts=} of rows in four bits must be of {ROTATED} lanes")
    rows = [x.scale.shape[2] for x in stacks if isinstance(x, Int8Pages | Int4Pages)]
    if any(n != whole_scales(n) for n in rows):  # they would be copied
        raise UnsupportedError(f"{rows} rows of scales: pad them to 1, 2, 4 or eights")
    return parts[0], parts[-1]


def _plan(
    batch: Ragged, window: Array, blocks: int, shape: Shape
) -> tuple[tuple[Array, Array, Array], Spans]:
    """The span and the program of each item, the first item of each program [blocks + 1]; spans.

    Without groups items are the same for all layers, so they leave a loop over them.
    """
    spans = _sequences(batch)
    span, block = _items(spans, blocks, shape.tokens)
    if batch.groups is not None:
        shared, spans = _groups(batch, batch.groups, spans, window, shape)
        first = _items(shared, blocks, shape.tokens)
        spans = Spans(*map(_joined, shared, spans))
        span, block = _joined(first[0], span + len(shared.rows)), _joined(first[1], block)
        order = jnp.argsort(block, stable=True)  # by program, in each of them groups go first
        span, block = span[order], block[order]
    none = block == blocks  # these stay where the last real one was
    firsts = jnp.sum(block < jnp.arange(blocks + 1)[:, None], 1).astype(jnp.int32)
    return (span, jnp.where(none, jnp.max(jnp.where(none, 0, block)), block), firsts), spans


def _joined(*x: Array) -> Array:
    return jnp.concatenate(x)


def _sequences(batch: Ragged) -> Spans:
    starts, ends = batch.row_starts[:-1], batch.row_starts[1:]
    r = jnp.arange(starts.shape[0], dtype=jnp.int32)
    ends = jnp.where(r < batch.num_seqs, ends, starts)
    none, far = jnp.zeros_like(r), jnp.full_like(r, _FAR)
    return Spans(starts, ends, batch.kv_lens - ends, none, far, r)


def _groups(
    batch: Ragged, groups: Groups, seqs: Spans, window: Array, shape: Shape
) -> tuple[Spans, Spans]:
    """Groups, and the sequences without the pages that pass by their groups.

    Pages pass by in the blocks in which they would pass by each member, so that no bit depends on
    a group. A window moves those blocks, and leaves little to share: then none is.
    """
    member = (groups.firsts[:, None] <= seqs.rows) & (seqs.rows < groups.ends[:, None])  # [C, R]
    before = (seqs.firsts + seqs.shifts) // shape.page  # whole pages without a token of this step
    pages = jnp.minimum(groups.pages, jnp.min(jnp.where(member, before, _FAR), 1))
    pages = jnp.where(window > 0, 0, pages // shape.pages * shape.pages)
    firsts = batch.row_starts[groups.firsts]
    ends = jnp.where(pages > 0, batch.row_starts[groups.ends], firsts)
    far, none = jnp.full_like(pages, _FAR), jnp.zeros_like(pages)
    begin = jnp.sum(jnp.where(member, pages[:, None], 0), 0, dtype=jnp.int32)
    return Spans(firsts, ends, far, none, pages, groups.firsts), seqs._replace(pages=begin)


def _items(spans: Spans, blocks: int, tokens: int) -> tuple[Array, Array]:
    """The span and the program of each part of a span; `blocks` where there is none."""
    starts, ends = spans.firsts, spans.ends
    count = jnp.where(ends > starts, (ends - 1) // tokens - starts // tokens + 1, 0)
    before = jnp.cumsum(count, dtype=jnp.int32)
    i = jnp.arange(blocks + len(starts), dtype=jnp.int32)
    span = jnp.minimum(jnp.sum(before <= i[:, None], 1), len(starts) - 1).astype(jnp.int32)
    block = (starts // tokens - before + count)[span] + i
    return span, jnp.where(i < before[-1], block, blocks)
