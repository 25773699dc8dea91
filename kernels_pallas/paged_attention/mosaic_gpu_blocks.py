"""Blocks of keys and values in shared memory on Hopper: whose they are, and what they pass through.

Pages of floats arrive as they are multiplied. Those of eight or four bits arrive in a ring of their
own, and the warpgroup that brings them makes bfloat16 of them on their way to the others, which is
exact: wgmma multiplies no floats by integers. Scales stay what they are, for logits and weights.

Two keys of four bits share a byte, and registers cannot interleave rows. So keys of such a block
come in another order, first all whose number is a multiple of four, then those behind them, and so
on: copies sort pairs into even and odd ones, and halves of bytes do the rest. Nothing in attention
depends on the order, if scales and masks follow it (`Shape.key_of`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.hopper import ROWS, registers
from kernels_pallas.paged_attention.codec import block_of

SORTED = 4  # kinds of keys of four bits: by the half of a byte, and even or odd bytes
_APART = 8  # lines: if scales filled their array, Mosaic would take a transposed view for flat


@dataclass(frozen=True)
class Shape:
    """What the kernel knows while it is traced.

    Attributes:
        group: heads of queries in a tile of rows.
        heads: such groups for each head of keys.
        tokens: in a tile of rows.
        groups: tiles of rows in a block of threads.
        turns: warpgroups that attend to the same rows, each to every other block of keys.
        apart: whether those of two tiles of rows take turns at the matrix unit.
        part: keys that are brought by one copy: those of a page, or fewer.
        parts: of a page.
        count: parts in a block of keys.
        row: entries in a row of the block table.
        shared: shares of the keys that a group has in common, at most; 0: groups are passed over.
        lanes, values: of keys and of values that are brought.
        in_keys: whether values are lanes of keys.
        wide: whether two warpgroups share these.
        ahead: blocks of eight or four bits on their way; 0 where pages are floats.
        nibbles: whether rows have four bits.
        key_parts, value_parts: lanes of the parts of keys and of values that have scales of their
            own, as far as they are brought.
        owned: scales that a head has of a row of each cache, brought or not.
        mass: whether sums of exponentials are kept, by part.
        factor: of logits, inside tanh where there is a `cap`.
    """

    group: int
    heads: int
    tokens: int
    groups: int
    turns: int
    apart: bool
    stages: int
    splits: int
    shared: int
    part: int
    parts: int
    count: int
    row: int
    lanes: int
    values: int
    in_keys: bool
    wide: bool
    ahead: int
    nibbles: bool
    key_parts: tuple[int, ...]
    value_parts: tuple[int, ...]
    owned: tuple[int, ...]
    mass: bool
    factor: float
    cap: float

    @property
    def keys(self) -> int:
        return self.count * self.part

    @property
    def readers(self) -> int:
        """Warpgroups that compute."""
        return self.groups * self.turns

    @property
    def bringers(self) -> int:
        """Warpgroups that bring pages: where rows become bfloat16 on their way, keys and values
        have one each, or it would be what all others wait for."""
        return 2 if self.ahead and not self.in_keys else 1

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread that brings, and of one that computes; 0: two warpgroups have enough as it
        is. Masks take more where keys are sorted."""
        warpgroups = self.readers + self.bringers
        if warpgroups == 2:
            return 0, 0
        few = (40 if self.nibbles else 48) if self.ahead else 24
        left = registers(warpgroups) - self.bringers * few
        return few, min(248, left // self.readers // 8 * 8)

    @property
    def unit(self) -> float:
        """What products of queries and keys, or tanh of them, are in logits of base 2."""
        return self.cap or self.factor

    @property
    def piece(self) -> int:
        """Rows of queries and of results that are kept together: a wide kernel stores whole tiles
        from registers, another one copies what holds a token from shared memory."""
        return ROWS if self.wide else 8

    @property
    def widths(self) -> tuple[int, ...]:
        """Lanes of a block of each cache."""
        return (self.lanes,) if self.in_keys else (self.lanes, self.values)

    @property
    def scales(self) -> tuple[int, ...]:
        """Scales of a row of each cache, if rows have some."""
        parts = (self.key_parts,) if self.in_keys else (self.key_parts, self.value_parts)
        return tuple(len(each) for each in parts) if self.key_parts else ()

    @property
    def weights(self) -> int:
        """Weights of a key: values whose parts have scales of their own are multiplied by as
        many."""
        return max(1, len(self.value_parts))

    @property
    def rows_of_scales(self) -> int:
        """Of a block of four bits, those of keys and of values together: an even number, since 128
        threads sort them, and a row may have 64."""
        return -(-sum(self.scales) // 2) * 2

    @property
    def unsorted(self) -> tuple[int, int, int]:
        """Scales of a block of four bits as they arrive, and some room."""
        return self.rows_of_scales, self.keys // SORTED + _APART, SORTED

    @property
    def said(self) -> Any:
        """The type of outputs. Shares of wide rows are written and read as often as many keys in
        four bits, whose own rounding is ninety times that of bfloat16."""
        return jnp.bfloat16 if self.nibbles and self.splits > 1 else jnp.float32

    @property
    def stored(self) -> int:
        """Lanes of outputs that are turned over to a copy at a time: 128 bytes of a row."""
        return 128 // jnp.dtype(self.said).itemsize

    def shares(self, first: int, end: int, widest: int) -> list[tuple[int, int, int]]:
        """Lanes of values as products take them: (first lane, lanes, the part that they are of)."""
        ends = list(accumulate(self.value_parts)) or [self.values]
        return [
            (at, min(widest, b - at, end - at), part)
            for part, (a, b) in enumerate(zip([0, *ends], ends, strict=False))
            for at in range(max(a, first), min(b, end), widest)
        ]

    def block(self, part: int) -> int:
        """The lanes of a part of values in four bits that turn together."""
        return block_of(self.value_parts[part])

    def key_of(self, column: Array) -> Array:
        """The key of a block that a column of its logits is of."""
        if not self.nibbles:
            return column
        size = jnp.full_like(column, self.keys // SORTED)
        return SORTED * lax.rem(column, size) + lax.div(column, size)

    def columns(self, part: int) -> list[tuple[int, int]]:
        """Where the keys of a part of a block lie: (first column, behind the last one)."""
        kinds = SORTED if self.nibbles else 1
        n = self.part // kinds
        starts = range(part * n, self.keys, self.keys // kinds)
        return [(start, start + n) for start in starts]


class Items(NamedTuple):
    """What blocks of threads are given. All int32 [items].

    Attributes:
        seqs: whose row of the block table leads to the pages; -1: there is no such item.
        firsts, ends: its tokens, of one sequence or of neighbours in a group.
        shifts: from a token to its position; in a group, to one behind all that it shares.
        begins, stops: the parts of pages that it is about, as far as its tokens see them.
        places: pieces of rows of queries, and of results, that lie before its own.
    """

    seqs: Any
    firsts: Any
    ends: Any
    shifts: Any
    begins: Any
    stops: Any
    places: Any

    def table(self) -> Array:
        """What `Item` reads, [items, 7]."""
        return jnp.stack(self, 1)


class Item(NamedTuple):
    """The item of a block of threads. Its numbers are read where they are needed: registers are
    few, and an array for each of them would take two for its address."""

    table: Any

    def __getattr__(self, name: str) -> Array:
        """Of `Items`."""
        return self.table[lax.axis_index("item"), Items._fields.index(name)]

    def row(self, shape: Shape) -> Array:
        """The first row of its queries and results."""
        return self.places * shape.piece

    def position(self) -> Array:
        """Of its first token."""
        return self.firsts + self.shifts

    def behind(self) -> Array:
        """The position behind its last token."""
        return self.ends + self.shifts


def reach(window: Any) -> Array:
    """Keys that a token sees, back from its own."""
    return jnp.where(window[0] > 0, window[0], 2**30)


class Work(NamedTuple):
    """The share of an item's keys that a block of threads attends to.

    Attributes:
        part, end_part: the first of the share, and the one behind the last of the item.
        steps: blocks of keys.
        whole, partial: the first block that all rows see whole, and the one behind the last. The
            others need a mask, and come first.
    """

    seq: Array
    part: Array
    end_part: Array
    steps: Array
    whole: Array
    partial: Array

    @classmethod
    def of(cls, shape: Shape, window: Any, item: Item) -> Work:
        split, position, seen = lax.axis_index("split"), item.position(), reach(window)
        part = lax.div(jnp.maximum(position - seen + 1, 0), jnp.int32(shape.part))
        part = jnp.maximum(part, item.begins)
        end_part = lax.div(item.behind() - 1, jnp.int32(shape.part)) + 1
        end_part = jnp.minimum(end_part, item.stops)
        share = lax.div(end_part - part + shape.count - 1, jnp.int32(shape.count))  # in blocks
        share = lax.div(share + shape.splits - 1, jnp.int32(shape.splits)) * shape.count
        part = part + split * share
        share = jnp.maximum(jnp.minimum(share, end_part - part), 0)
        steps = lax.div(share + shape.count - 1, jnp.int32(shape.count))
        first = position - part * shape.part  # row, counted from the first key
        partial = lax.div(jnp.maximum(first + 1, 0), jnp.int32(shape.keys))
        partial = jnp.minimum(partial, steps)
        hidden = jnp.maximum(first + shape.groups * shape.tokens - seen, 0)  # from the last row
        whole = lax.div(hidden + shape.keys - 1, jnp.int32(shape.keys))
        return cls(item.seqs, part, end_part, steps, jnp.minimum(whole, partial), partial)

    @property
    def masked(self) -> Array:
        """Blocks that need a mask."""
        return self.steps - (self.partial - self.whole)

    def at(self, step: Array, shape: Shape) -> Array:
        """The first part of the block that a step is about."""
        end = jnp.where(step < self.masked, self.whole, self.steps)
        skipped = jnp.where(step < self.whole, 0, self.partial - end)
        return self.part + (step + skipped) * shape.count

    def walk(
        self, do: Callable[[Array, Any], Any], state: Any, *, masked: bool, turn: Any, turns: int
    ) -> Any:
        """Runs do(step, state) over the steps that need a mask or those that do not, as far as it
        is their turn."""
        low, high = (0, self.masked) if masked else (self.masked, self.steps)
        if turns == 1:
            return lax.fori_loop(low, high, do, state)
        first = low + lax.rem(turn + low * (turns - 1), jnp.int32(turns))
        count = lax.div(high - first + turns - 1, jnp.int32(turns))
        return lax.fori_loop(0, count, lambda i, state: do(first + i * turns, state), state)


class Ring(NamedTuple):
    """Shared memory that blocks pass through, an entry for each cache, and barriers.

    Attributes:
        blocks: [stages, keys, lanes], as they are multiplied.
        raw: [ahead, keys, lanes], as they lie in pages of eight bits; [ahead, keys / 2, lanes] of
            four, even pairs of keys before odd ones.
        scales: [ahead + stages, scales, keys] of rows that have some. They stay until their block
            is free, so nobody copies them. Of four bits they are one array for all caches, sorted
            like keys: [stages, scales, keys].
        unsorted: [ahead, scales, keys / 4, 4], these as they arrive, and some room.
        free: whoever has read a block says so here; keys are read first.
        ready, arrived, scaled: of `blocks`, `raw`, and `scales` or `unsorted`.
    """

    blocks: tuple[Any, ...]
    raw: tuple[Any, ...]
    scales: tuple[Any, ...]
    unsorted: tuple[Any, ...]
    free: tuple[Any, ...]
    ready: tuple[Any, ...]
    arrived: tuple[Any, ...]
    scaled: tuple[Any, ...]

    @classmethod
    def scratch(cls, shape: Shape, readers: int) -> Ring:
        """What a kernel asks for."""
        turns = shape.ahead + shape.stages
        rounded = shape.widths if shape.ahead else ()
        told = 1 if shape.ahead else shape.count  # by a warpgroup, or by copies
        rows, dtype, copies = shape.keys, jnp.int8, shape.count
        scales = [(turns, n, shape.keys) for n in shape.scales]
        arrivals, unsorted = [(turns, shape.count * n) for n in shape.scales], []
        if shape.nibbles:
            rows, dtype, copies = shape.keys // 2, jnp.uint8, 2 * shape.count
            n = shape.rows_of_scales
            scales = [(shape.stages, n, shape.keys)]
            unsorted = [(shape.ahead, *shape.unsorted)]
            arrivals = [(shape.ahead, shape.count * sum(shape.scales))]

        def barriers(number: int, arrivals: int) -> Any:
            return plgpu.Barrier(num_arrivals=arrivals, num_barriers=number)

        return cls(
            tuple(plgpu.SMEM((shape.stages, shape.keys, n), jnp.bfloat16) for n in shape.widths),
            tuple(plgpu.SMEM((shape.ahead, rows, n), dtype) for n in rounded),
            tuple(plgpu.SMEM(x, jnp.float32) for x in scales),
            tuple(plgpu.SMEM(x, jnp.float32) for x in unsorted),
            tuple(barriers(shape.stages, readers) for _ in shape.widths),
            tuple(barriers(shape.stages, told) for _ in shape.widths),
            tuple(barriers(shape.ahead, copies) for _ in rounded),
            tuple(barriers(*x) for x in arrivals),
        )

    def of(self, caches: slice) -> Ring:
        """What some of the caches pass through. Scales of four bits are one array for all."""
        names = ["blocks", "raw", "free", "ready", "arrived"]
        names += [] if self.unsorted else ["scales", "scaled"]
        return self._replace(**{name: getattr(self, name)[caches] for name in names})

    def steps(self, cache: int, step: Array, shape: Shape) -> Any:
        """The scales [scales, keys] of a block that is there, once they are."""
        if shape.nibbles:
            rows = pl.ds(sum(shape.scales[:cache]), shape.scales[cache])
            return self.scales[0].at[lax.rem(step, jnp.int32(shape.stages)), rows]
        turn = lax.rem(step, jnp.int32(self.scales[cache].shape[0]))
        plgpu.barrier_wait(self.scaled[cache].at[turn])
        return self.scales[cache].at[turn]
