"""What a block of threads of Hopper's page attention is told to do, as its kernel reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from kernels_pallas.paged_attention.mosaic_gpu_shape import Shape


class Items(NamedTuple):
    """What blocks of threads are given. All int32 [items].

    Attributes:
        seqs: the sequence whose row of the block table is read; -1 where there is no item.
        token_begins, token_ends: its tokens, of one sequence or of neighbours in a group.
        shifts: from a token of the step to its position; in a group, to a position behind all keys
            that the group shares.
        copy_begins, copy_ends: its keys, counted in `Shape.keys_per_copy`, as far as its tokens see
            them.
        row_begins: rows of queries and results before its own, counted in `Shape.row_align`.
    """

    seqs: Any
    token_begins: Any
    token_ends: Any
    shifts: Any
    copy_begins: Any
    copy_ends: Any
    row_begins: Any

    def table(self) -> Array:
        """What `Item` reads, [items, 7]."""
        return jnp.stack(self, 1)


class Item(NamedTuple):
    """The item of this block of threads.

    Its numbers are read where they are needed: registers are few, and a separate array for each
    number would take two more for its address.
    """

    table: Any

    def __getattr__(self, name: str) -> Array:
        """The item's entry of a field of `Items`."""
        return self.table[lax.axis_index("item"), Items._fields.index(name)]

    def first_row(self, shape: Shape) -> Array:
        """The first row of its queries and results."""
        return self.row_begins * shape.row_align

    def first_position(self) -> Array:
        """The position of its first token."""
        return self.token_begins + self.shifts

    def end_position(self) -> Array:
        """The position behind its last token."""
        return self.token_ends + self.shifts


def visible_keys(window: Any) -> Array:
    """Keys that a token sees, back from its own."""
    return jnp.where(window[0] > 0, window[0], 2**30)


class Work(NamedTuple):
    """The split of an item's keys that this block of threads attends to.

    Attributes:
        seq: the sequence whose row of the block table is read.
        copy: the first copy of the split.
        end_copy: the copy behind the item's last one.
        blocks: blocks of keys in the split.
        unmasked_begin, unmasked_end: blocks that all rows see whole. The others need a mask, and
            are attended first.
    """

    seq: Array
    copy: Array
    end_copy: Array
    blocks: Array
    unmasked_begin: Array
    unmasked_end: Array

    @classmethod
    def of(cls, shape: Shape, window: Any, item: Item) -> Work:
        """The work of this block of threads, whose grid axes are "item" and "split"."""
        per_copy, per_block = jnp.int32(shape.keys_per_copy), jnp.int32(shape.copies_per_block)
        split, position, visible = (
            lax.axis_index("split"), item.first_position(), visible_keys(window)
        )  # fmt: skip
        copy = lax.div(jnp.maximum(position - visible + 1, 0), per_copy)
        copy = jnp.maximum(copy, item.copy_begins)
        end_copy = lax.div(item.end_position() - 1, per_copy) + 1
        end_copy = jnp.minimum(end_copy, item.copy_ends)
        copies = lax.div(end_copy - copy + shape.copies_per_block - 1, per_block)  # in blocks
        copies = lax.div(copies + shape.splits - 1, jnp.int32(shape.splits))
        copies = copies * shape.copies_per_block  # of a split
        copy = copy + split * copies
        copies = jnp.maximum(jnp.minimum(copies, end_copy - copy), 0)
        blocks = lax.div(copies + shape.copies_per_block - 1, per_block)
        first = position - copy * shape.keys_per_copy  # the first row, counted from the first key
        end = lax.div(jnp.maximum(first + 1, 0), jnp.int32(shape.keys_per_block))
        end = jnp.minimum(end, blocks)
        unseen = jnp.maximum(first + shape.tokens_per_item - visible, 0)  # by the last row
        begin = lax.div(unseen + shape.keys_per_block - 1, jnp.int32(shape.keys_per_block))
        return cls(item.seqs, copy, end_copy, blocks, jnp.minimum(begin, end), end)

    @property
    def masked_blocks(self) -> Array:
        """How many blocks need a mask."""
        return self.blocks - (self.unmasked_end - self.unmasked_begin)

    def copy_of_step(self, step: Array, shape: Shape) -> Array:
        """The first copy of the block that a step attends to: of masked blocks before the unmasked
        ones, then of masked blocks behind them, then of the unmasked ones."""
        end = jnp.where(step < self.masked_blocks, self.unmasked_begin, self.blocks)
        skipped = jnp.where(step < self.unmasked_begin, 0, self.unmasked_end - end)
        return self.copy + (step + skipped) * shape.copies_per_block

    def loop(
        self, body: Callable[[Array, Any], Any], state: Any, *, masked: bool, turn: Any, turns: int
    ) -> Any:
        """The state after body(step, state) for each step whose block needs a mask, or for each
        other one, as far as it is this warpgroup's turn."""
        first, end = (0, self.masked_blocks) if masked else (self.masked_blocks, self.blocks)
        if turns == 1:
            return lax.fori_loop(first, end, body, state)
        # the first step that is `turn` modulo `turns`, of at most two turns
        first = first + lax.rem(turn + first * (turns - 1), jnp.int32(turns))
        count = lax.div(end - first + turns - 1, jnp.int32(turns))
        return lax.fori_loop(0, count, lambda i, state: body(first + i * turns, state), state)


class Sources(NamedTuple):
    """What is copied to shared memory, all in global memory.

    Attributes:
        layer: int32 [1].
        tables: the block table, int32 [R * M].
        pages: [L, P, K, Z, W] of each cache; of int4 pages [L, P, K, Z / 4, 2, W], even and odd
            pairs of keys.
        scales: of each cache whose rows have some, [L, P, scales, Z]; of int4 pages
            [L, P, scales, Z / 4, 4].
    """

    layer: Any
    tables: Any
    pages: tuple[Any, ...]
    scales: tuple[Any, ...]


class Program(NamedTuple):
    """What all warpgroups of a block of threads know.

    Attributes:
        shape: static sizes.
        simulated: whether the simulator runs the kernel.
        item, window: the item, and the window int32 [1] of visible keys; 0 for all.
        head, split, number: the place in the grid: a tile of heads, a split and an item.
        sources: pages and their scales.
        q: [heads, rows, lanes].
        o: [splits, heads, rows, value_lanes].
        lse: [splits, items, heads, rows of an item].
        masses: [items, heads, copies, rows of an item], or no array at all.
        scratch: shared memory and barriers.
    """

    shape: Shape
    simulated: bool
    item: Item
    window: Any
    head: Array
    split: Array
    number: Array
    sources: Sources
    q: Any
    o: Any
    lse: Any
    masses: tuple[Any, ...]
    scratch: Any

    @classmethod
    def of(
        cls, layer: Any, window: Any, tables: Any, items: Any, q: Any, *refs: Any,
        shape: Shape, simulated: bool,
    ) -> Program:  # fmt: skip
        """From a kernel's references: operands, results and scratch."""
        *sources_and_results, scratch = refs
        pages, scales = len(shape.cache_lanes), len(shape.scales_per_row)
        sources = Sources(layer, tables, refs[:pages], refs[pages : pages + scales])
        o, lse, *masses = sources_and_results[pages + scales :]
        head, split, number = (lax.axis_index(name) for name in ("head", "split", "item"))
        item = Item(items)
        return cls(
            shape, simulated, item, window, head, split, number, sources, q, o, lse,
            tuple(masses), scratch,
        )  # fmt: skip

    def work(self) -> Work:
        """The split of the item's keys; computed anew by each call, to keep registers free."""
        return Work.of(self.shape, self.window, self.item)
