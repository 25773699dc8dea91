"""Writing a step's keys and values into their pages on a TPU, in place; rounded on their way where
pages have eight or four bits.

Memory moves in tiles of rows, and a new key is one row. So an *item* is a page of one sequence that
gets new rows: those groups of its slots that they fall into are read, filled and written back. Its
scales come and go whole, since they lie along lanes. Several items are on their way at once, and no
two have a page in common, since only its owner writes it.

Rows are filled in by *blocks* of consecutive slots, as few as there are rows in a register: a step
that decodes has one new row for each sequence, and all others of its tile would be turned and
rounded for nothing. The heads of a block are filled in side by side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.op import UnsupportedError, tried
from kernels_pallas.paged_attention import mosaic_tpu_rounding as rounding
from kernels_pallas.paged_attention.codec import (
    Int4Pages,
    Int8Pages,
    QuantizedPages,
    StaticInt8Pages,
    whole_scales,
)
from kernels_pallas.paged_attention.ragged import Ragged
from kernels_pallas.tiling import divisor

_LANES = 128
_TABLE = 2**17  # entries: half of a v5e's SMEM
_VMEM, _SPARE = 32 * 2**20, 4 * 2**20
_SUFFIXES = {jnp.dtype(jnp.int8): "_int8", jnp.dtype(jnp.uint8): "_int4"}  # of names
_SIDE, _AT_ONCE = 8, 32  # heads that are filled in side by side, and registers of their rows


@dataclass(frozen=True)
class TpuTile:
    """slots: of a copy, 0 for few where rows decode and many where prompts are long, and of rounded
    pages always a tile; items: on their way at a time."""

    slots: int = tried(0, 16, 32, 64)
    items: int = tried(8, 4, 16)


@dataclass(frozen=True)
class Shape:
    """What the kernel knows while it is traced.

    Attributes:
        page: slots in a page.
        group: slots that come and go by one copy.
        tile: slots of a tile, the least that does: of four bits two share a row.
        block: slots that are filled in at a time.
        row: entries in a row of the block table.
        align: tokens that a copy of new rows begins at multiples of, and has.
        heads: that are filled in side by side.
        depth: items on their way at a time.
        vmem: bytes that they take, and what the compiler needs.
        parts: of the rows of each cache; none where rows have no scales of their own.
    """

    page: int
    group: int
    tile: int
    block: int
    row: int
    align: int
    heads: int
    depth: int
    vmem: int
    parts: tuple[tuple[int, ...], ...]


def page_write(
    k_pages: Any, v_pages: Any, k: Array, v: Array | None, layer: Array | int, batch: Ragged, *,
    tile: TpuTile | None = None, interpret: Any = False,
) -> tuple[Any, Any]:  # fmt: skip
    """`reference.page_write` as a TPU kernel."""
    stacks = [k_pages] if v_pages is None else [k_pages, v_pages]
    new = [k] if v is None else [k, v]
    (T, K, _), dtype = k.shape, _dtype(k, stacks)
    shape = _shape(stacks, batch, T, dtype, tile or TpuTile())
    tokens = pl.cdiv(T, shape.align) * shape.align

    def rows(x: Array, pages: Any) -> Array:  # [K, T, W]
        padding = (0, tokens - T), (0, 0), (0, pages.shape[-1] - x.shape[-1])
        return jnp.pad(x.astype(dtype), padding).swapaxes(0, 1)

    rows_in = [rows(x, pages) for x, pages in zip(new, stacks, strict=True)]
    steps = [pages.steps(layer) for pages in stacks if isinstance(pages, StaticInt8Pages)]
    leaves = [leaf for pages in stacks for leaf in _written(pages)]
    scalars = (
        jnp.asarray(layer, jnp.int32).reshape(1), batch.row_starts, batch.kv_lens,
        batch.tables.reshape(-1), *_items(batch, T, shape.page),
    )  # fmt: skip
    hbm, vmem = (pl.BlockSpec(memory_space=m) for m in (pltpu.MemorySpace.HBM, pltpu.VMEM))
    first, fresh = len(scalars) + len(rows_in) + len(steps), shape.page + shape.align
    out = iter(
        pl.pallas_call(
            partial(_kernel, shape=shape),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=(1,),
                in_specs=[*[hbm] * len(rows_in), *[vmem] * len(steps), *[hbm] * len(leaves)],
                out_specs=[hbm] * len(leaves),
                scratch_shapes=[
                    *(pltpu.VMEM((shape.depth, K, fresh, x.shape[-1]), x.dtype) for x in rows_in),
                    *(pltpu.VMEM((shape.depth, *leaf.shape[2:]), leaf.dtype) for leaf in leaves),
                    pltpu.SemaphoreType.DMA((2, shape.depth)),
                ],
            ),
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves],
            input_output_aliases={first + i: i for i in range(len(leaves))},
            compiler_params=pltpu.CompilerParams(
                vmem_limit_bytes=shape.vmem,  # no more: XLA keeps new rows in the rest
                disable_bounds_checks=True,  # half of what it takes to begin a copy
            ),
            interpret=interpret,
            name="page_write" + _SUFFIXES.get(stacks[0].dtype, ""),
        )(*scalars, *rows_in, *steps, *leaves)
    )
    results = [
        pages.with_written([next(out) for _ in pages.written])
        if isinstance(pages, QuantizedPages)
        else next(out)
        for pages in stacks
    ]
    return results[0], None if v_pages is None else results[1]


def _dtype(new: Array, stacks: list[Any]) -> Any:
    """Of new rows on their way. What pages round is not rounded before."""
    if not isinstance(stacks[0], QuantizedPages):
        return stacks[0].dtype
    return new.dtype if new.dtype == jnp.bfloat16 else jnp.dtype(jnp.float32)


def _written(pages: Any) -> list[Any]:
    return pages.written if isinstance(pages, QuantizedPages) else [pages]


def _shape(stacks: list[Any], batch: Ragged, T: int, dtype: Any, tile: TpuTile) -> Shape:
    """The kernel's sizes, or what speaks against it."""
    (_, _, K, Z, _), (R, M) = stacks[0].shape, batch.tables.shape
    align, lanes = 32 // jnp.dtype(dtype).itemsize, [pages.shape[-1] for pages in stacks]
    _check(stacks, lanes, batch.tables.shape)
    parts = tuple(p.parts if isinstance(p, Int8Pages | Int4Pages) else () for p in stacks)
    if isinstance(stacks[0], QuantizedPages):
        block, least = rounding.SUBLANES, 64 if isinstance(stacks[0], Int4Pages) else 32
        group, whole = least, _LANES if any(parts) else least
        if Z % whole:
            raise UnsupportedError(
                f"{Z=} keys in a page of {stacks[0].dtype} must be a multiple of {whole}"
            )
    else:
        block = least = align
        group = min(tile.slots or max(16, 1 << (T // R).bit_length() - 1), Z)
        if Z % group or group % align:
            raise UnsupportedError(
                f"groups of {group} slots: take a divisor of {Z=}, whole {align}s"
            )
    held = (Z + align) * jnp.dtype(dtype).itemsize + Z * stacks[0].dtype.itemsize
    held *= sum(lanes) * K
    depth = min(tile.items, _VMEM // held)
    if depth < 2:
        raise UnsupportedError(f"two pages of {K=} heads, {Z=} slots do not fit into VMEM")
    heads = _AT_ONCE // (2 * align // rounding.SUBLANES * max(lanes) // _LANES)
    heads, vmem = divisor(K, min(heads, _SIDE), 1), depth * held + _SPARE
    return Shape(Z, group, least, block, M, align, heads, depth, vmem, parts)


def _check(stacks: list[Any], lanes: list[int], table: tuple[int, ...]) -> None:
    kinds, first = {type(pages) for pages in stacks}, stacks[0]
    quantized = isinstance(first, QuantizedPages)
    if quantized and len(kinds) > 1:
        raise UnsupportedError(f"keys and values in {kinds}: keep both in one")
    if not quantized and first.dtype not in (jnp.bfloat16, jnp.float32):
        raise UnsupportedError(f"pages of {first.dtype}: keep them in bfloat16 or float32")
    if any(n % _LANES for n in lanes):
        raise UnsupportedError(f"pages of {lanes} lanes: pad them to multiples of {_LANES}")
    if math.prod(table) > _TABLE:
        raise UnsupportedError(
            f"a block table {table} has more than {_TABLE} entries: take larger pages"
        )
    scaled = [pages for pages in stacks if isinstance(pages, Int8Pages | Int4Pages)]
    parts, rows = [pages.parts for pages in scaled], [pages.scale.shape[2] for pages in scaled]
    if any(n % _LANES for each in parts for n in each):
        raise UnsupportedError(f"{parts=} of rows must be multiples of {_LANES} lanes")
    if any(n != whole_scales(n) for n in rows):  # they would be copied
        raise UnsupportedError(f"{rows} rows of scales: pad them to 1, 2, 4 or eights")


def _items(batch: Ragged, T: int, Z: int) -> tuple[Array, Array, Array]:
    """The sequence of each item, which of its pages it is, and how many items there are."""
    starts, ends = batch.row_starts[:-1], batch.row_starts[1:]
    R = starts.shape[0]
    real = (jnp.arange(R) < batch.num_seqs) & (ends > starts)
    page = (batch.kv_lens - (ends - starts)) // Z
    count = jnp.where(real, (batch.kv_lens - 1) // Z - page + 1, 0)
    before = jnp.cumsum(count, dtype=jnp.int32)
    i = jnp.arange(pl.cdiv(T, Z) + 2 * R, dtype=jnp.int32)  # a chunk may begin and end anywhere
    seqs = jnp.minimum(jnp.sum(before <= i[:, None], 1), R - 1).astype(jnp.int32)
    return seqs, (page - before + count)[seqs] + i, before[-1:]


class _Place(NamedTuple):
    """Where an item lies: slot s is that of token `token` + s of the step, if first <= s < end.
    The token `base` is the first one that is copied."""

    page: Array
    token: Array
    first: Array
    end: Array
    base: Array


class _Block(NamedTuple):
    """Consecutive slots [block, 1] of a page from `first`, and those among them that are filled in.
    Their new rows are the first ones of those from `begin`, once these are rolled by `back`."""

    first: Array
    slots: Array
    own: Array
    begin: Array
    back: Array


class _Cache(NamedTuple):
    """An item of one cache while it is here: new rows [K, tokens, W], values [K, Z, W] with half as
    many rows of four bits, scales [K * parts, Z] of those, or calibrated steps [K, W]."""

    new: Any
    values: Any
    scale: Any
    steps: Any
    parts: tuple[int, ...]


def _kernel(*refs: Any, shape: Shape) -> None:
    layer, starts, lens, tables, seqs, pages, count, *rest = refs
    stacks = len(shape.parts)
    leaves = sum(2 if parts else 1 for parts in shape.parts)
    known = len(rest) - 1 - 2 * stacks - 3 * leaves  # steps that were calibrated
    new, steps, rest = rest[:stacks], rest[stacks : stacks + known], rest[stacks + known :]
    caches, rest = rest[leaves : 2 * leaves], rest[2 * leaves :]  # those that come in go out
    fresh, old, arrived = rest[:stacks], rest[stacks:-1], rest[-1]
    owned, count = _owned(shape.parts), count[0]
    nibbles = old[0].dtype == jnp.uint8

    def place(i: Array) -> _Place:
        seq, begin = seqs[i], pages[i] * shape.page
        shift = lens[seq] - starts[seq + 1]
        first = jnp.maximum(starts[seq] + shift - begin, 0)
        end = jnp.minimum(lens[seq] - begin, shape.page)
        page, token = tables[seq * shape.row + pages[i]], begin - shift
        return _Place(page, token, first, end, _down(token + first, shape.align))

    def move(i: Array, act: str, out: bool) -> None:
        """Starts or awaits what an item begins with, or what it ends with."""
        at, n = place(i), lax.rem(i, jnp.int32(shape.depth))

        def copy(there: Any, here: Any) -> None:
            ends = (here, there) if out else (there, here)
            getattr(pltpu.make_async_copy(*ends, arrived.at[int(out), n]), act)()

        for values, scale in owned:
            if scale is not None:
                copy(caches[scale].at[layer[0], at.page], old[scale].at[n])
            size = shape.group * old[values].shape[2] // shape.page  # two slots may share a row

            @pl.loop(lax.div(at.first, shape.group), lax.div(at.end - 1, shape.group) + 1)
            def _(g: Array, values: int = values, size: int = size) -> None:
                rows = pl.ds(pl.multiple_of(g * size, size), size)
                copy(caches[values].at[layer[0], at.page, :, rows], old[values].at[n, :, rows])

        if not out:

            @pl.loop(0, lax.div(at.token + at.end - 1 - at.base, shape.align) + 1)
            def _(b: Array) -> None:
                def rows(first: Array | int) -> Any:
                    begin = pl.multiple_of(first + b * shape.align, shape.align)
                    return pl.ds(begin, shape.align)

                for there, here in zip(new, fresh, strict=True):
                    copy(there.at[:, rows(at.base)], here.at[n, :, rows(0)])

    def merge(i: Array) -> None:
        at, n = place(i), lax.rem(i, jnp.int32(shape.depth))
        here = [
            _Cache(
                fresh[c].at[n], old[values].at[n], None if scale is None else old[scale].at[n],
                steps[c] if steps else None, shape.parts[c],
            )
            for c, (values, scale) in enumerate(owned)
        ]  # fmt: skip

        @pl.loop(lax.div(at.first, shape.block), lax.div(at.end - 1, shape.block) + 1)
        def _(b: Array) -> None:
            block = _block(at, b * shape.block, shape)

            @pl.loop(0, new[0].shape[0] // shape.heads)
            def _(s: Array) -> None:
                each = [(c, s * shape.heads + k) for c in here for k in range(shape.heads)]
                rows = [_rows(c, h, block, shape) for c, h in each]
                if nibbles:
                    rows = rounding.turned(rows, [c.parts for c, _ in each])
                # Nothing is read behind what is written, so that all heads wait at once.
                filled = [
                    replaced
                    for (c, h), x in zip(each, rows, strict=True)
                    for replaced in _filled(c, h, x, block, shape)
                ]
                for ref, where, x in filled:
                    ref[where] = x

    ahead = shape.depth // 2
    pl.loop(0, jnp.minimum(ahead, count))(partial(move, act="start", out=False))

    @pl.loop(0, count)
    def _(i: Array) -> None:
        @pl.when(i + ahead < count)
        def _() -> None:
            free = i + ahead - shape.depth
            pl.when(free >= 0)(lambda: move(free, "wait", True))
            move(i + ahead, "start", False)

        move(i, "wait", False)
        merge(i)
        move(i, "start", True)

    pl.loop(jnp.maximum(count - shape.depth, 0), count)(partial(move, act="wait", out=True))


def _owned(parts: tuple[tuple[int, ...], ...]) -> list[tuple[int, int | None]]:
    """For each cache, which leaf its values are and which its scales."""
    ends = list(accumulate(2 if each else 1 for each in parts))
    return [(e - 2, e - 1) if each else (e - 1, None) for e, each in zip(ends, parts, strict=True)]


def _down(x: Array, unit: int) -> Array:
    """A multiple of `unit`; of what is less than 0, the next one upwards."""
    return lax.div(x, jnp.int32(unit)) * unit


def _block(at: _Place, slot: Array, shape: Shape) -> _Block:
    slots = slot + lax.broadcasted_iota(jnp.int32, (shape.block, 1), 0)
    own = (slots >= at.first) & (slots < at.end)
    row, size = at.token + slot - at.base, 2 * shape.align
    begin = jnp.clip(_down(row, shape.align), 0, shape.page + shape.align - size)
    back = lax.rem(begin - row + size, jnp.int32(size))
    return _Block(slot, slots, own, pl.multiple_of(begin, shape.align), back)


def _rows(cache: _Cache, h: Array, block: _Block, shape: Shape) -> Array:
    """New rows [block, W] of a head for the slots of a block; what is not own is anything."""
    window = h, pl.ds(block.begin, 2 * shape.align)
    rows = pltpu.roll(cache.new[window].astype(jnp.float32), block.back, 0)  # of whole words
    return rows[: shape.block]


def _filled(
    cache: _Cache, h: Array, rows: Array, block: _Block, shape: Shape
) -> Iterator[tuple[Any, Any, Array]]:
    """What is written, and where, for a head's rows of a block."""
    values, parts = cache.values, cache.parts
    if parts:
        rows, steps = rounding.coded(rows, parts, values.dtype)
        for i, step in enumerate(steps):
            where = pl.ds(h * len(parts) + i, 1)
            scales = cache.scale[where]
            yield cache.scale, where, rounding.along_lanes(scales, step, block.slots, block.own)
    elif cache.steps is not None:
        rows = jnp.clip(rows * cache.steps[pl.ds(h, 1)], -127.0, 127.0)
    size, tile = shape.tile * values.shape[1] // shape.page, jnp.int32(shape.tile)
    where = h, pl.ds(pl.multiple_of(lax.div(block.first, tile) * size, size), size)
    first = lax.rem(block.first, tile)
    yield values, where, rounding.replaced(values[where], rows, first, block.own)
