"""The TPU kernel that writes new rows into pages: what its one program does.

Several items are in flight at a time. While one is filled, those after it are read and those
before it are written back.

Rows are filled in by *blocks* of consecutive slots, as few as a register has rows: a decode step
has one new row for each sequence, and all other rows of its tile would be rotated and quantized for
nothing. The heads of a block are filled in side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.paged_attention import mosaic_tpu_quantize as quantize


@dataclass(frozen=True)
class Shape:
    """Static sizes.

    Attributes:
        page_size: slots in a page.
        item_slots: slots of an item.
        copy_slots: slots of an item that are copied at a time.
        tile_slots: slots that are rewritten at a time, the fewest that fill a tile: of four bits
            two slots share a row.
        block_slots: slots that are filled in at a time.
        table_width: entries of a sequence in the block table.
        align: tokens in a copy of new rows, which begins at a multiple of them.
        heads_at_once: KV heads that are filled in side by side.
        depth: items in flight at a time.
        vmem_bytes: for these items and for the compiler.
        parts: of each cache, lanes of the parts of its rows that have scales of their own; () where
            rows have none.
    """

    page_size: int
    item_slots: int
    copy_slots: int
    tile_slots: int
    block_slots: int
    table_width: int
    align: int
    heads_at_once: int
    depth: int
    vmem_bytes: int
    parts: tuple[tuple[int, ...], ...]

    def item_shape(self, leaf: Array) -> tuple[int, ...]:
        """Of an item of a cache's array: values [K, rows, W], or scales [K * parts, slots]."""
        _, _, *heads, rows, lanes = leaf.shape
        return (*heads, rows * self.item_slots // self.page_size, lanes)

    @property
    def leaves(self) -> list[tuple[int, int | None]]:
        """Of each cache, the number of its array of values, and that of its scales, if any."""
        ends = accumulate(2 if parts else 1 for parts in self.parts)
        return [
            (end - 2, end - 1) if parts else (end - 1, None)
            for end, parts in zip(ends, self.parts, strict=True)
        ]


class Refs(NamedTuple):
    """What the kernel reads and writes.

    Attributes:
        layer: [1], as all up to `count` in SMEM.
        row_starts, kv_lens, tables: of the step; the block table is flat.
        item_seqs, item_numbers: of each item its sequence, and which of the sequence's it is.
        count: items [1].
        new: rows for each cache [K, T, W], in HBM.
        steps: of calibrated pages, what rows are multiplied by to be quantized, for each cache
            [K, W]; otherwise empty.
        caches: the caches' arrays in HBM, which are written in place.
        new_here: copies of new rows for each cache [depth, copies, K, align, W].
        old: items of the caches' arrays, [depth, *item_shape].
        arrived: semaphores of what is read and what is written [2, depth].
    """

    layer: Any
    row_starts: Any
    kv_lens: Any
    tables: Any
    item_seqs: Any
    item_numbers: Any
    count: Any
    new: tuple[Any, ...]
    steps: tuple[Any, ...]
    caches: tuple[Any, ...]
    new_here: tuple[Any, ...]
    old: tuple[Any, ...]
    arrived: Any

    @classmethod
    def of(cls, refs: tuple[Any, ...], shape: Shape) -> Refs:
        """From the kernel's refs: scalars, operands, results and scratch."""
        layer, starts, lens, tables, seqs, numbers, count, *rest = refs
        caches, leaves = len(shape.parts), sum(2 if parts else 1 for parts in shape.parts)
        steps = len(rest) - 1 - 2 * caches - 3 * leaves
        each = iter(rest)
        new, steps, _, written, new_here, old, (arrived,) = (
            tuple(next(each) for _ in range(n))
            for n in (caches, steps, leaves, leaves, caches, leaves, 1)
        )  # the caches come in as they go out, so the former are not needed
        return cls(
            layer, starts, lens, tables, seqs, numbers, count, new, steps, written, new_here, old,
            arrived,
        )  # fmt: skip


class Item(NamedTuple):
    """An aligned group of slots of a sequence that gets new rows.

    Attributes:
        page: of the cache.
        first_copy: the first of its copies in the page: slots `first_copy * copy_slots` and on.
        token: slot s of the item belongs to token `token` + s of the step,
        begin, end: if begin <= s < end. The other slots keep their rows.
        first_token: of those whose new rows are copied, a multiple of `align`.
    """

    page: Array
    first_copy: Array
    token: Array
    begin: Array
    end: Array
    first_token: Array


class Block(NamedTuple):
    """Consecutive slots of an item that are filled in at a time.

    Attributes:
        first: the first of them.
        slots: they, [block_slots, 1].
        own: which of them get new rows [block_slots, 1].
        copy: their new rows are among those of this copy and the next,
        roll: and are the first of these once they are rolled by so many rows.
    """

    first: Array
    slots: Array
    own: Array
    copy: Array
    roll: Array


class Cache(NamedTuple):
    """An item of one cache while it is in VMEM.

    Attributes:
        new: copies of new rows [copies, K, align, W].
        values: [K, item_slots, W], half as many rows of four bits.
        scale: [K * parts, item_slots], or None.
        steps: of calibrated pages [K, W], or None.
        parts: lanes of each part with scales of its own.
    """

    new: Any
    values: Any
    scale: Any
    steps: Any
    parts: tuple[int, ...]


def kernel(*refs: Any, shape: Shape) -> None:
    """Reads, fills and writes back all items, `Shape.depth` of them at a time.

    Args:
        refs: as `Refs.of` takes them.
    """
    r = Refs.of(refs, shape)
    count, ahead = r.count[0], shape.depth // 2

    def read(i: Array) -> None:
        _move(r, i, _item(r, i, shape), "start", False, shape)

    def await_written(i: Array) -> None:
        _move(r, i, _item(r, i, shape), "wait", True, shape)

    pl.loop(0, jnp.minimum(ahead, count))(read)

    @pl.loop(0, count)
    def _(i: Array) -> None:
        last, item = i + ahead - shape.depth, _item(r, i, shape)  # the buffer's last item
        pl.when((last >= 0) & (i + ahead < count))(lambda: await_written(last))
        pl.when(i + ahead < count)(lambda: read(i + ahead))
        _move(r, i, item, "wait", False, shape)
        _fill(r, i, item, shape)
        _move(r, i, item, "start", True, shape)

    pl.loop(jnp.maximum(count - shape.depth, 0), count)(await_written)


def _item(r: Refs, i: Array, shape: Shape) -> Item:
    """The i-th item."""
    seq, begin = r.item_seqs[i], r.item_numbers[i] * shape.item_slots
    shift = r.kv_lens[seq] - r.row_starts[seq + 1]
    first = jnp.maximum(r.row_starts[seq] + shift - begin, 0)
    end = jnp.minimum(r.kv_lens[seq] - begin, shape.item_slots)
    page = r.tables[seq * shape.table_width + _div(begin, shape.page_size)]
    copy = _div(lax.rem(begin, jnp.int32(shape.page_size)), shape.copy_slots)
    token = begin - shift
    first_token = _div(token + first, shape.align) * shape.align
    return Item(page, copy, token, first, end, first_token)


def _move(r: Refs, i: Array, item: Item, act: str, out: bool, shape: Shape) -> None:
    """Starts or awaits the copies that bring the i-th item and its new rows to VMEM, or those that
    take the item back."""
    n = lax.rem(i, jnp.int32(shape.depth))

    def copy(there: Any, here: Any) -> None:
        ends = (here, there) if out else (there, here)
        getattr(pltpu.make_async_copy(*ends, r.arrived.at[int(out), n]), act)()

    for scale in [scale for _, scale in shape.leaves if scale is not None]:
        copy(r.caches[scale].at[r.layer[0], item.page], r.old[scale].at[n])

    @_for_each(item, shape.copy_slots, shape)
    def _(c: Array) -> None:
        for values in [values for values, _ in shape.leaves]:
            # Two slots of four bits share a row.
            size = r.old[values].shape[2] * shape.copy_slots // shape.item_slots

            def rows(c: Array, size: int = size) -> Any:
                return pl.ds(pl.multiple_of(c * size, size), size)

            cache = r.caches[values]
            there = cache.at[r.layer[0], item.page, :, rows(item.first_copy + c)]
            copy(there, r.old[values].at[n, :, rows(c)])

    if not out:
        tokens = item.token + item.end - 1 - item.first_token

        @pl.loop(0, lax.div(tokens, shape.align) + 1)
        def _(b: Array) -> None:
            begin = pl.multiple_of(item.first_token + b * shape.align, shape.align)
            for there, here in zip(r.new, r.new_here, strict=True):
                copy(there.at[:, pl.ds(begin, shape.align)], here.at[n, b])


def _fill(r: Refs, i: Array, item: Item, shape: Shape) -> None:
    """Puts new rows into their slots of the i-th item, block by block."""
    n = lax.rem(i, jnp.int32(shape.depth))
    caches = [
        Cache(
            r.new_here[c].at[n], r.old[values].at[n], None if scale is None else r.old[scale].at[n],
            r.steps[c] if r.steps else None, shape.parts[c],
        )
        for c, (values, scale) in enumerate(shape.leaves)
    ]  # fmt: skip

    @_for_each(item, shape.block_slots, shape)
    def _(b: Array) -> None:
        block = _block(item, b * shape.block_slots, shape)
        pl.loop(0, r.new[0].shape[0] // shape.heads_at_once)(
            partial(_fill_heads, caches, block, shape)
        )


def _fill_heads(caches: list[Cache], block: Block, shape: Shape, s: Array) -> None:
    """Puts new rows into a block of every cache, for the s-th of the sets of heads that are filled
    in side by side. No ref is read after another is written, so they wait at the same time."""
    heads = range(shape.heads_at_once)
    each = [(cache, s * shape.heads_at_once + k) for cache in caches for k in heads]
    rows = [_new_rows(cache, h, block, shape) for cache, h in each]
    if caches[0].values.dtype == jnp.uint8:
        rows = quantize.rotated(rows, [cache.parts for cache, _ in each])
    written = [
        update
        for (cache, h), x in zip(each, rows, strict=True)
        for update in _updates(cache, h, x, block, shape)
    ]
    for ref, where, x in written:
        ref[where] = x


def _for_each(item: Item, slots: int, shape: Shape) -> Any:
    """A loop over the parts of so many slots of an item that get new rows; no loop if the item is
    one part."""
    if slots == shape.item_slots:
        return lambda body: body(jnp.int32(0))
    return pl.loop(_div(item.begin, slots), _div(item.end - 1, slots) + 1)


def _block(item: Item, slot: Array, shape: Shape) -> Block:
    """The block that begins at a slot of an item."""
    slots = slot + lax.broadcasted_iota(jnp.int32, (shape.block_slots, 1), 0)
    own = (slots >= item.begin) & (slots < item.end)
    row, size = item.token + slot - item.first_token, 2 * shape.align
    last = shape.item_slots // shape.align - 1
    copy = jnp.clip(_div(row, shape.align), 0, last)
    roll = lax.rem(copy * shape.align - row + size, jnp.int32(size))
    return Block(slot, slots, own, copy, roll)


def _new_rows(cache: Cache, h: Array, block: Block, shape: Shape) -> Array:
    """New rows [block_slots, W] of a head, float32; undefined where slots are not `Block.own`."""
    rows = jnp.concatenate([cache.new[block.copy, h], cache.new[block.copy + 1, h]])
    rows = pltpu.roll(rows.astype(jnp.float32), block.roll, 0)  # which takes whole words
    return rows[: shape.block_slots]


def _updates(
    cache: Cache, h: Array, rows: Array, block: Block, shape: Shape
) -> Iterator[tuple[Any, Any, Array]]:
    """Stores that put a head's new rows into a block: a ref, where in it, and what."""
    values, parts = cache.values, cache.parts
    if parts:
        rows, steps = quantize.over_steps(rows, parts, values.dtype)
        for i, step in enumerate(steps):
            where = pl.ds(h * len(parts) + i, 1)
            scales = cache.scale[where]
            yield cache.scale, where, quantize.with_steps(scales, step, block.slots, block.own)
    elif cache.steps is not None:
        rows = jnp.clip(rows * cache.steps[pl.ds(h, 1)], -127.0, 127.0)
    size = values.shape[1] * shape.tile_slots // shape.item_slots
    tile = jnp.int32(shape.tile_slots)
    where = h, pl.ds(pl.multiple_of(lax.div(block.first, tile) * size, size), size)
    first = lax.rem(block.first, tile)
    yield values, where, quantize.with_rows(values[where], rows, first, block.own)


def _div(x: Array, by: int) -> Array:
    return lax.div(x, jnp.int32(by))
