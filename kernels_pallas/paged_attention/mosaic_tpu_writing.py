"""Writing a step's keys and values into their pages on a TPU, in place; rounded on their way where
pages have eight or four bits.

Memory moves in tiles of rows, and a new key is one row. So an *item* is an aligned group of slots
of one sequence that gets new rows: it is read, filled and written back. Where rows have scales it
is a page, of which only such groups come and go; its scales do as a whole, since they lie along
lanes. Several items are on their way at once. No two share a slot: only its owner writes a page.

Rows are filled in by *blocks* of consecutive slots, as few as there are rows in a register: a step
that decodes has one new row for each sequence, and all others of its tile would be turned and
rounded for nothing. The heads of a block are filled in side by side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
from kernels_pallas.tpu import divisor

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
        item: slots of an item.
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
    item: int
    group: int
    tile: int
    block: int
    row: int
    align: int
    heads: int
    depth: int
    vmem: int
    parts: tuple[tuple[int, ...], ...]

    def held(self, leaf: Array) -> tuple[int, ...]:
        """The shape of an item of a cache: values [K, item, W], or scales of a page."""
        _, _, *heads, rows, lanes = leaf.shape
        return (*heads, rows * self.item // self.page, lanes)


def page_write(
    k_pages: Any, v_pages: Any, k: Array, v: Array | None, layer: Array | int, batch: Ragged, *,
    tile: TpuTile | None = None, interpret: Any = False,
) -> tuple[Any, Any]:  # fmt: skip
    """`reference.page_write` as a TPU kernel."""
    stacks = [k_pages] if v_pages is None else [k_pages, v_pages]
    new = [k] if v is None else [k, v]
    T, dtype = k.shape[0], _dtype(k, stacks)
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
        batch.tables.reshape(-1), *_items(batch, T, shape.item),
    )  # fmt: skip
    name = "page_write" + _SUFFIXES.get(stacks[0].dtype, "")
    out = iter(_launch(scalars, rows_in, steps, leaves, shape, name, interpret))
    results = [
        pages.with_written([next(out) for _ in pages.written])
        if isinstance(pages, QuantizedPages)
        else next(out)
        for pages in stacks
    ]
    return results[0], None if v_pages is None else results[1]


def _launch(
    scalars: Sequence[Array], new: list[Array], steps: list[Array], leaves: list[Array],
    shape: Shape, name: str, interpret: Any,
) -> list[Array]:  # fmt: skip
    """The caches' leaves, with new rows [K, T, W] in their places."""
    hbm, vmem = (pl.BlockSpec(memory_space=m) for m in (pltpu.MemorySpace.HBM, pltpu.VMEM))
    first, copies = len(scalars) + len(new) + len(steps), shape.item // shape.align + 1

    def fresh(x: Array) -> tuple[int, ...]:
        return shape.depth, copies, x.shape[0], shape.align, x.shape[2]

    return pl.pallas_call(
        partial(_kernel, shape=shape),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(1,),
            in_specs=[*[hbm] * len(new), *[vmem] * len(steps), *[hbm] * len(leaves)],
            out_specs=[hbm] * len(leaves),
            scratch_shapes=[
                *(pltpu.VMEM(fresh(x), x.dtype) for x in new),
                *(pltpu.VMEM((shape.depth, *shape.held(leaf)), leaf.dtype) for leaf in leaves),
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
        name=name,
    )(*scalars, *new, *steps, *leaves)


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
    item = Z if any(parts) else group
    held = (item + align) * jnp.dtype(dtype).itemsize + item * stacks[0].dtype.itemsize
    held *= sum(lanes) * K
    depth = min(tile.items, _VMEM // held)
    if depth < 2:
        raise UnsupportedError(f"two times {item} slots of {K=} heads do not fit into VMEM")
    heads = _AT_ONCE // (2 * align // rounding.SUBLANES * max(lanes) // _LANES)
    heads, vmem = divisor(K, min(heads, _SIDE), 1), depth * held + _SPARE
    return Shape(Z, item, group, least, block, M, align, heads, depth, vmem, parts)


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


def _items(batch: Ragged, T: int, slots: int) -> tuple[Array, Array, Array]:
    """The sequence of each item, which of its items it is, and how many there are."""
    starts, ends = batch.row_starts[:-1], batch.row_starts[1:]
    R = starts.shape[0]
    real = (jnp.arange(R) < batch.num_seqs) & (ends > starts)
    item = (batch.kv_lens - (ends - starts)) // slots
    count = jnp.where(real, (batch.kv_lens - 1) // slots - item + 1, 0)
    before = jnp.cumsum(count, dtype=jnp.int32)
    i = jnp.arange(pl.cdiv(T, slots) + 2 * R, dtype=jnp.int32)  # a chunk may begin and end anywhere
    seqs = jnp.minimum(jnp.sum(before <= i[:, None], 1), R - 1).astype(jnp.int32)
    return seqs, (item - before + count)[seqs] + i, before[-1:]


class _Place(NamedTuple):
    """Where an item lies: in groups of a page from `group`. Slot s is that of token `token` + s of
    the step, if first <= s < end; the token `base` is the first one that is copied."""

    page: Array
    group: Array
    token: Array
    first: Array
    end: Array
    base: Array


class _Block(NamedTuple):
    """Consecutive slots [block, 1] of an item from `first`, and which of them are filled in. Their
    new rows are the first of those in copies `begin` and the next, rolled by `back`."""

    first: Array
    slots: Array
    own: Array
    begin: Array
    back: Array


class _Cache(NamedTuple):
    """An item of one cache while it is here: copies of new rows [copies, K, align, W], values
    [K, item, W] with half as many rows of four bits, scales [K * parts, Z], known steps [K, W]."""

    new: Any
    values: Any
    scale: Any
    steps: Any
    parts: tuple[int, ...]


def _kernel(*refs: Any, shape: Shape) -> None:
    layer, starts, lens, tables, seqs, items, count, *rest = refs
    stacks = len(shape.parts)
    leaves = sum(2 if parts else 1 for parts in shape.parts)
    known = len(rest) - 1 - 2 * stacks - 3 * leaves  # steps that were calibrated
    new, steps, rest = rest[:stacks], rest[stacks : stacks + known], rest[stacks + known :]
    caches, rest = rest[leaves : 2 * leaves], rest[2 * leaves :]  # those that come in go out
    fresh, old, arrived = rest[:stacks], rest[stacks:-1], rest[-1]
    owned, count = _owned(shape.parts), count[0]
    values, scales = [x for x, _ in owned], [x for _, x in owned if x is not None]
    nibbles = old[0].dtype == jnp.uint8

    def place(i: Array) -> _Place:
        seq, begin = seqs[i], items[i] * shape.item
        shift = lens[seq] - starts[seq + 1]
        first = jnp.maximum(starts[seq] + shift - begin, 0)
        end = jnp.minimum(lens[seq] - begin, shape.item)
        page = tables[seq * shape.row + lax.div(begin, jnp.int32(shape.page))]
        group = lax.div(lax.rem(begin, jnp.int32(shape.page)), jnp.int32(shape.group))
        token = begin - shift
        base = lax.div(token + first, jnp.int32(shape.align)) * shape.align
        return _Place(page, group, token, first, end, base)

    def move(i: Array, at: _Place, act: str, out: bool) -> None:
        """Starts or awaits what an item begins with, or what it ends with."""
        n = lax.rem(i, jnp.int32(shape.depth))

        def copy(there: Any, here: Any) -> None:
            ends = (here, there) if out else (there, here)
            getattr(pltpu.make_async_copy(*ends, arrived.at[int(out), n]), act)()

        for scale in scales:
            copy(caches[scale].at[layer[0], at.page], old[scale].at[n])

        @_over(at, shape.group, shape)
        def _(g: Array) -> None:
            for leaf in values:
                size = old[leaf].shape[2] * shape.group // shape.item  # two slots may share a row

                def rows(g: Array, size: int = size) -> Any:
                    return pl.ds(pl.multiple_of(g * size, size), size)

                there = caches[leaf].at[layer[0], at.page, :, rows(at.group + g)]
                copy(there, old[leaf].at[n, :, rows(g)])

        if not out:

            @pl.loop(0, lax.div(at.token + at.end - 1 - at.base, shape.align) + 1)
            def _(b: Array) -> None:
                begin = pl.multiple_of(at.base + b * shape.align, shape.align)
                for there, here in zip(new, fresh, strict=True):
                    copy(there.at[:, pl.ds(begin, shape.align)], here.at[n, b])

    def merge(i: Array, at: _Place) -> None:
        n = lax.rem(i, jnp.int32(shape.depth))
        here = [
            _Cache(
                fresh[c].at[n], old[leaf].at[n], None if scale is None else old[scale].at[n],
                steps[c] if steps else None, shape.parts[c],
            )
            for c, (leaf, scale) in enumerate(owned)
        ]  # fmt: skip

        @_over(at, shape.block, shape)
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

    def begin(i: Array) -> None:
        move(i, place(i), "start", out=False)

    def end(i: Array) -> None:
        move(i, place(i), "wait", out=True)

    ahead = shape.depth // 2
    pl.loop(0, jnp.minimum(ahead, count))(begin)

    @pl.loop(0, count)
    def _(i: Array) -> None:
        free, at = i + ahead - shape.depth, place(i)
        pl.when((free >= 0) & (i + ahead < count))(lambda: end(free))
        pl.when(i + ahead < count)(lambda: begin(i + ahead))
        move(i, at, "wait", out=False)
        merge(i, at)
        move(i, at, "start", out=True)

    pl.loop(jnp.maximum(count - shape.depth, 0), count)(end)


def _owned(parts: tuple[tuple[int, ...], ...]) -> list[tuple[int, int | None]]:
    """For each cache, which leaf its values are and which its scales."""
    ends = list(accumulate(2 if each else 1 for each in parts))
    return [(e - 2, e - 1) if each else (e - 1, None) for e, each in zip(ends, parts, strict=True)]


def _over(at: _Place, unit: int, shape: Shape) -> Any:
    """A loop over as many slots of an item as new rows fall into; none where that is all."""
    if unit == shape.item:
        return lambda body: body(jnp.int32(0))
    return pl.loop(lax.div(at.first, jnp.int32(unit)), lax.div(at.end - 1, jnp.int32(unit)) + 1)


def _block(at: _Place, slot: Array, shape: Shape) -> _Block:
    slots = slot + lax.broadcasted_iota(jnp.int32, (shape.block, 1), 0)
    own = (slots >= at.first) & (slots < at.end)
    row, size = at.token + slot - at.base, 2 * shape.align
    begin = jnp.clip(lax.div(row, jnp.int32(shape.align)), 0, shape.item // shape.align - 1)
    back = lax.rem(begin * shape.align - row + size, jnp.int32(size))
    return _Block(slot, slots, own, begin, back)


def _rows(cache: _Cache, h: Array, block: _Block, shape: Shape) -> Array:
    """New rows [block, W] of a head for the slots of a block; what is not own is anything."""
    rows = jnp.concatenate([cache.new[block.begin, h], cache.new[block.begin + 1, h]])
    return pltpu.roll(rows.astype(jnp.float32), block.back, 0)[: shape.block]  # of whole words


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
    size, tile = values.shape[1] * shape.tile // shape.item, jnp.int32(shape.tile)
    where = h, pl.ds(pl.multiple_of(lax.div(block.first, tile) * size, size), size)
    first = lax.rem(block.first, tile)
    yield values, where, rounding.replaced(values[where], rows, first, block.own)
