"""Sizes of the TPU kernel of attention over pages, and what a program is given to attend."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.tpu import divisor

_MOST_HEADS = 8  # KV heads computed side by side, at most
_MOST_LOGITS = 2**18  # of heads side by side, at most: four times what registers hold


@dataclass(frozen=True)
class Shape:
    """Static sizes of a program.

    Attributes:
        heads: KV heads of a program.
        group: query heads of each KV head.
        tokens: tokens of a program.
        small_tile: the fewest tokens whose rows fill whole registers. A decode row is attended in
            such a tile.
        tile: tokens whose rows are attended at a time otherwise.
        page_size: keys in a page.
        block_pages: pages in a block of keys.
        table_width: entries of a sequence in the block table.
        value_dim: lanes of the outputs.
        logit_scale: what products of queries and keys are multiplied by to be logits.
        soft_cap: logits become cap * tanh(logits / cap); 0 leaves them.
        mass: whether the sum of every page is kept. Then blocks of pages and tiles of rows are
            whole tiles of that array, whose sublanes are pages.
        has_sinks: whether the softmax starts with a logit for each head.
        num_caches: 2 for keys and values, 1 where values are lanes of keys.
        key_parts, value_parts: lanes of the parts of quantized rows that have scales of their own;
            empty where rows have none.
        int4: whether rows have four bits, and their outputs are rotated back.
    """

    heads: int
    group: int
    tokens: int
    small_tile: int
    tile: int
    page_size: int
    block_pages: int
    table_width: int
    value_dim: int
    logit_scale: float
    soft_cap: float
    mass: bool
    has_sinks: bool = False
    num_caches: int = 2
    key_parts: tuple[int, ...] = ()
    value_parts: tuple[int, ...] = ()
    int4: bool = False

    @property
    def block_keys(self) -> int:
        """Keys in a block."""
        return self.page_size * self.block_pages

    @property
    def num_scales(self) -> int:
        """Arrays of scales: one for each cache, or none."""
        return self.num_caches if self.key_parts else 0

    @property
    def unit(self) -> float:
        """The unit in which the softmax keeps logits: they stay as the product (or tanh) gives
        them, so that exp costs one multiplication."""
        return self.soft_cap or self.logit_scale

    def heads_at_once(self, rows: int) -> int:
        """KV heads that are computed side by side, for tiles of `rows` rows. A head waits a few
        hundred cycles for its products and its sums across lanes, which no other head needs."""
        most = _MOST_LOGITS // (rows * self.block_keys)
        return divisor(self.heads, min(most, _MOST_HEADS), 1)


class Spans(NamedTuple):
    """Consecutive tokens of the step that attend the same pages: those of a sequence, or the ones
    that a group of sequences shares. All int32 [V].

    Attributes:
        token_begins, token_ends: the tokens.
        shifts: the token t of the step has position t + shift.
        page_begins, page_ends: entries of the sequence's row of the block table. A span ends before
            page_ends where its last token sees fewer.
        seqs: the sequence whose row it is.
    """

    token_begins: Any
    token_ends: Any
    shifts: Any
    page_begins: Any
    page_ends: Any
    seqs: Any


class Item(NamedTuple):
    """The part of a span in one program. All int32.

    Attributes:
        seq: whose row of the block table names the pages.
        token_begin, token_end: the tokens, as the step numbers them.
        shift: from a token to its position.
        page_begin, page_end: entries of the row, from the first page that a token sees.
    """

    seq: Array
    token_begin: Array
    token_end: Array
    shift: Array
    page_begin: Array
    page_end: Array

    def owns(self, token: Array) -> Array:
        """Whether tokens of the step are the item's."""
        return (token >= self.token_begin) & (token < self.token_end)


class Scalars(NamedTuple):
    """What the kernel reads from SMEM. All int32.

    Attributes:
        layer, window: [1].
        tables: the block table, flat [R * table_width].
        item_spans: the span of each item.
        item_programs: its program. Those past the last item repeat the last real program.
        item_starts: the first item of each program, and the number of items [programs + 1].
        spans: of which items are parts.
    """

    layer: Any
    window: Any
    tables: Any
    item_spans: Any
    item_programs: Any
    item_starts: Any
    spans: Spans

    @classmethod
    def of(cls, refs: tuple[Any, ...]) -> Scalars:
        """From the leaves of a `Scalars`, in order."""
        layer, window, tables, item_spans, item_programs, item_starts, *spans = refs
        return cls(layer, window, tables, item_spans, item_programs, item_starts, Spans(*spans))

    def item(self, i: Array, shape: Shape) -> Item:
        """The i-th item."""
        s, program, spans = self.item_spans[i], self.item_programs[i], self.spans
        begin = jnp.maximum(spans.token_begins[s], program * shape.tokens)
        end = jnp.minimum(spans.token_ends[s], (program + 1) * shape.tokens)
        shift, window = spans.shifts[s], self.window[0]
        page = jnp.where(window > 0, jnp.maximum(begin + shift - window + 1, 0), 0)
        page = div(page, shape.page_size)
        page = div(page, shape.block_pages) * shape.block_pages if shape.mass else page
        page_end = jnp.minimum(div(end - 1 + shift, shape.page_size) + 1, spans.page_ends[s])
        page = jnp.maximum(page, spans.page_begins[s])
        return Item(spans.seqs[s], begin, end, shift, page, page_end)


NUM_SCALARS = len(Scalars._fields) - 1 + len(Spans._fields)


class Rows(NamedTuple):
    """The rows of a block of keys or values, S of them.

    Attributes:
        values: [heads, S, W]; of four bits [heads, S / 2, W] in uint8. The words of a register hold
            consecutive rows, the first one lowest, be they four of bytes or eight of nibbles: so a
            register read as nibbles keeps its bits.
        parts: lanes of each part that has scales of its own; empty where rows have none.
        scales: [heads * parts, S], or None.
    """

    values: Any
    parts: tuple[int, ...]
    scales: Any

    def split(self, h: Array, lanes: int, dtype: Any) -> list[tuple[slice, Array, Array | None]]:
        """The first `lanes` lanes of a head's rows, by parts.

        Returns:
            For each part its lanes, those lanes of the rows [S, n] in `dtype`, and their scales
            [1, S].
        """
        x = self.values[h]
        x = pltpu.bitcast(x, jnp.int4) if x.dtype == jnp.uint8 else x
        x = x if x.dtype == dtype else x.astype(jnp.float32).astype(dtype)
        if not self.parts:
            return [(slice(0, lanes), x[:, :lanes], None)]
        ends = list(accumulate(self.parts))
        each = [slice(end - n, min(end, lanes)) for n, end in zip(self.parts, ends, strict=True)]
        n = len(self.parts)
        return [
            (at, x[:, at], self.scales[pl.ds(h * n + b, 1)])
            for b, at in enumerate(each) if at.start < lanes
        ]  # fmt: skip


def div(x: Array, by: int) -> Array:
    """x / by rounded down, for x >= 0. `//` also handles signs, which is dearer, and its lowering
    asks for a device."""
    return lax.div(x, jnp.full_like(x, by))
