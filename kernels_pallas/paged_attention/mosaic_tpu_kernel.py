"""The TPU kernel of attention over pages: what one program does.

A program is given some consecutive tokens of the step (and some heads of keys). Each sequence that
has tokens among them is an *item*: its pages pass by, a block of keys at a time, and while a block
is attended the next one is on its way, be it of the next item or of the next program. The softmax
of all tokens of a program is kept in VMEM; an item changes the rows of its own tokens only.

Pages that a group of sequences has in common are one more item, before those of its members, whose
tokens are all of theirs. Its members go on from the softmax that it leaves, so nothing is merged.

Few tokens (decode rows) are attended as one aligned tile of rows, more by larger ones. Logits
stay as the product gives them, in units of `Shape.unit`, so that exp costs one multiplication.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.tpu import divisor
from kernels_pallas.tpu import dot as product

HIDDEN = -1e30  # finite: a row that has seen nothing yet must not become NaN
LANES = 128
_SIDE = 8  # heads of keys side by side, at most
_AT_ONCE = 2**18  # logits, at most: four times what registers hold


@dataclass(frozen=True)
class Shape:
    """What a program knows while it is traced.

    Attributes:
        heads: of keys.
        group: heads of queries for each of them.
        tokens: of the step.
        few: tokens whose rows fill tiles; a decode row is attended in such a group.
        some: tokens whose rows are attended at a time otherwise.
        page: keys in a page.
        pages: in a block of keys.
        row: entries in a row of the block table.
        value_dim: of the outputs.
        squash: what logits are multiplied with before tanh; 0 for no tanh.
        unit: of the logits as the softmax keeps them.
        key_parts, value_parts: lanes of the parts of rows in eight or four bits that have scales of
            their own, keys along the lanes of an array; none where rows have none.
        mass: whether the sum of every page is kept. Then blocks of pages and tiles of rows are
            whole tiles of that array, pages along its sublanes.
        nibbles: whether rows have four bits, whose outputs are turned back.
    """

    heads: int
    group: int
    tokens: int
    few: int
    some: int
    page: int
    pages: int
    row: int
    value_dim: int
    squash: float
    unit: float
    mass: bool
    key_parts: tuple[int, ...] = ()
    value_parts: tuple[int, ...] = ()
    nibbles: bool = False

    def side(self, rows: int) -> int:
        """Heads that are computed side by side: one waits a few hundred cycles for its products
        and for sums across lanes, which are nothing to do with another's."""
        most = _AT_ONCE // (rows * self.page * self.pages)
        return divisor(self.heads, min(most, _SIDE), 1)


class Spans(NamedTuple):
    """What passes by which tokens of the step: pages of a sequence, or those of a group [V]."""

    firsts: Any  # the tokens
    ends: Any
    shifts: Any  # token t has position t + shift
    pages: Any  # entries of a row of the block table
    end_pages: Any  # at most: others end with the last token
    rows: Any


class Rows(NamedTuple):
    """A block of keys or values [heads, S, W]; the scales of their parts [heads * parts, S].

    Of four bits it is [heads, S / 2, W] in uint8. A register's words hold consecutive rows, the
    first one lowest, be they four of bytes or eight of nibbles: read as nibbles, its bits stay.
    """

    values: Any
    parts: tuple[int, ...]
    scales: Any

    def split(self, h: Array, lanes: int, dtype: Any) -> list[tuple[slice, Array, Array | None]]:
        """Which lanes of a head's rows, those rows, and their scales [1, S]."""
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


class Item(NamedTuple):
    """The part of a span in one program."""

    row: Array
    first: Array
    end: Array
    shift: Array
    page: Array  # the first one that a token sees
    end_page: Array

    def owns(self, token: Array) -> Array:
        return (token >= self.first) & (token < self.end)


class Scalars(NamedTuple):
    layer: Any
    window: Any
    tables: Any
    spans: Any
    blocks: Any
    first: Any
    firsts: Any
    ends: Any
    shifts: Any
    pages: Any
    end_pages: Any
    rows: Any

    def item(self, i: Array, shape: Shape) -> Item:
        s, block = self.spans[i], self.blocks[i]
        first = jnp.maximum(self.firsts[s], block * shape.tokens)
        end = jnp.minimum(self.ends[s], (block + 1) * shape.tokens)
        shift, window = self.shifts[s], self.window[0]
        page = jnp.where(window > 0, jnp.maximum(first + shift - window + 1, 0), 0)
        page = _div(page, shape.page)
        page = _div(page, shape.pages) * shape.pages if shape.mass else page
        end_page = jnp.minimum(_div(end - 1 + shift, shape.page) + 1, self.end_pages[s])
        page = jnp.maximum(page, self.pages[s])
        return Item(self.rows[s], first, end, shift, page, end_page)


def kernel(*refs: Any, shape: Shape, has_sinks: bool, caches: int, scales: int) -> None:
    scalars, rest = Scalars(*refs[: len(Scalars._fields)]), iter(refs[len(Scalars._fields) :])
    q, sinks = next(rest), next(rest) if has_sinks else None
    turn = next(rest) if shape.nibbles else None
    stacks = [next(rest) for _ in range(caches + scales)]
    o, lse, mass = next(rest), next(rest), next(rest) if shape.mass else None
    buffers = [next(rest) for _ in range(caches + scales)]
    top, total, arrived, turns = rest
    head = pl.program_id(0) * shape.heads
    program = pl.program_id(1)
    num_items = scalars.first[pl.num_programs(1)]

    def copies(row: Array, page: Array, p: Array, slot: Array) -> list[Any]:
        """The copy of the p-th page of a block that begins at `page`, from each cache."""
        at = scalars.layer[0], scalars.tables[row * shape.row + page + p]
        heads = [pl.ds(head, shape.heads)] * caches + [slice(None)] * scales

        def to(n: int) -> tuple[Any, ...]:  # rows of a page: keys, or pairs of them in four bits
            return slot, slice(None), pl.ds(pl.multiple_of(p * n, n), n)

        return [
            pltpu.make_async_copy(
                stack.at[*at, part], buffer.at[to(stack.shape[3])], arrived.at[slot, c]
            )
            for c, (stack, buffer, part) in enumerate(zip(stacks, buffers, heads, strict=True))
        ]

    def each(item: Item, page: Array, slot: Array, act: str) -> None:
        @pl.loop(0, jnp.minimum(shape.pages, item.end_page - page))
        def _(p: Array) -> None:
            for copy in copies(item.row, page, p, slot):
                getattr(copy, act)()

    @pl.when((program == 0) & (num_items > 0))
    def _() -> None:
        turns[0] = 0
        item = scalars.item(jnp.int32(0), shape)
        each(item, item.page, jnp.int32(0), "start")

    def attend_item(i: Array, slot: Array) -> Array:
        item = scalars.item(i, shape)
        following = scalars.item(jnp.minimum(i + 1, num_items - 1), shape)

        def attend_block(j: Array, slot: Array) -> Array:
            page = item.page + j * shape.pages
            more = page + shape.pages < item.end_page
            ahead = jax.tree.map(partial(jnp.where, more), item, following)

            @pl.when(more | (i + 1 < num_items))
            def _() -> None:
                each(ahead, jnp.where(more, page + shape.pages, ahead.page), 1 - slot, "start")

            each(item, page, slot, "wait")
            blocks = [buffer.at[slot] for buffer in buffers]
            if blocks[-1].dtype != jnp.int8:  # which cannot be NaN
                quiet = _silence_scales if scales else _silence
                pl.when(~more)(partial(quiet, blocks[-1], item, page, shape))
            keys = Rows(blocks[0], shape.key_parts, blocks[caches] if scales else None)
            values = Rows(blocks[caches - 1], shape.value_parts, blocks[-1] if scales else None)
            attend = partial(
                _attend, q, keys, values, top, total, o, mass, shape, item, page,
                scalars.window[0], program * shape.tokens,
            )  # fmt: skip
            first, last = (t - program * shape.tokens for t in (item.first, item.end - 1))
            few = (_div(first, shape.few) == _div(last, shape.few)) & (shape.few < shape.some)
            pl.when(few)(lambda: attend(_div(first, shape.few), shape.few))

            @pl.when(~few)
            def _() -> None:
                tiles = pl.loop(_div(first, shape.some), _div(last, shape.some) + 1)
                tiles(partial(attend, tokens=shape.some))

            return 1 - slot

        blocks = _div(item.end_page - item.page + shape.pages - 1, shape.pages)
        return lax.fori_loop(0, blocks, attend_block, slot)

    first, end = scalars.first[program], scalars.first[program + 1]

    @pl.when(first < end)
    def _() -> None:
        count = shape.some * shape.group
        tiles = pl.loop(0, shape.heads), pl.loop(0, shape.tokens // shape.some)

        @tiles[0]
        def _(h: Array) -> None:
            @tiles[1]
            def _(i: Array) -> None:
                at = h, pl.ds(pl.multiple_of(i * count, count), count)
                none = jnp.full((count, LANES), HIDDEN, jnp.float32)
                top[at] = none if sinks is None else sinks[at]
                total[at] = jnp.full_like(none, 0.0 if sinks is None else 1.0)
                o[at] = jnp.zeros((count, o.shape[-1]), jnp.float32)
                if mass is not None:
                    mass[h, :, at[1]] = jnp.full((mass.shape[1], count), HIDDEN, jnp.float32)

        turns[0] = lax.fori_loop(first, end, attend_item, turns[0])

        @tiles[0]
        def _(h: Array) -> None:
            @tiles[1]
            def _(i: Array) -> None:
                rows = pl.ds(pl.multiple_of(i * count, count), count)
                sum_ = jnp.maximum(total[h, rows], 1e-30)
                o[h, rows] = o[h, rows] / _lanes(sum_, o.shape[-1])
                if turn is not None:
                    _turn_back(o, h, i * count, count, turn)
                found = top[h, rows] * shape.unit + jnp.log(sum_)
                lse[h, :, rows] = jnp.transpose(found)[:1]


def _turn_back(o: Any, h: Array, first: Array, count: int, turn: Any) -> None:
    """Rows of sums, each part of them times a matrix. Around the kernel that would be copies of all
    outputs."""
    n = math.gcd(count, 32)  # few registers are left
    tiles = pl.loop(0, count // n), pl.loop(0, o.shape[-1] // LANES)  # a part has so many lanes

    @tiles[0]
    def _(r: Array) -> None:
        @tiles[1]
        def _(i: Array) -> None:
            rows = pl.ds(pl.multiple_of(first + r * n, n), n)
            at = h, rows, pl.ds(pl.multiple_of(i * LANES, LANES), LANES)
            x, turned = o[at], jnp.zeros((n, LANES), jnp.float32)
            for _ in range(3):  # signs are exact in bfloat16, and so are three parts of a float
                part = x.astype(jnp.bfloat16)
                x = x - part.astype(jnp.float32)
                turned += lax.dot(part, turn[...], preferred_element_type=jnp.float32)
            o[at] = turned * np.float32(LANES**-0.5)


def _silence_scales(scales: Any, item: Item, page: Array, shape: Shape) -> None:
    """The same for rows in eight or four bits: it is their scales that might be NaN."""
    end = item.end + item.shift - page * shape.page
    x = scales[...]
    scales[...] = jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 1) < end, x, 0.0)


def _silence(values: Any, item: Item, page: Array, shape: Shape) -> None:
    """Zeros behind the last value that an item sees: a weight of 0 would not silence a NaN there,
    in a slot that nobody has written since its page changed hands."""
    end = item.end + item.shift - page * shape.page

    @pl.loop(_div(end, shape.page), shape.pages)
    def _(p: Array) -> None:
        at = slice(None), pl.ds(pl.multiple_of(p * shape.page, shape.page), shape.page)
        x = values[at]
        slot = p * shape.page + lax.broadcasted_iota(jnp.int32, x.shape, 1)
        values[at] = jnp.where(slot < end, x, jnp.zeros_like(x))


def _attend(
    q: Any, keys: Rows, values: Rows, top: Any, total: Any, o: Any, mass: Any, shape: Shape,
    item: Item, page: Array, window: Array, base: Array, i: Array, tokens: int,
) -> None:  # fmt: skip
    """Adds a block of keys to the softmax of the i-th `tokens` of a program, whose first one is
    the step's `base`, as far as they are the item's."""
    count, S = tokens * shape.group, shape.page * shape.pages
    rows = pl.ds(pl.multiple_of(i * count, count) if tokens < shape.tokens else 0, count)
    first, key = base + i * tokens, page * shape.page
    at = first + item.shift, first + tokens - 1 + item.shift  # positions of the outermost tokens
    reach = jnp.where(window > 0, window, 2**30)
    all_own = (first >= item.first) & (first + tokens <= item.end)
    all_seen = all_own & (key + S - 1 <= at[0]) & (key > at[1] - reach)

    def token(shape_: tuple[int, ...], axis: int) -> Array:  # the step's, of each row
        return first + _div(lax.broadcasted_iota(jnp.int32, shape_, axis), shape.group)

    def mask() -> tuple[Array, Array]:
        own = item.owns(token((count, 1), 0))
        last = jnp.where(own, token((count, 1), 0) + item.shift, -1) - key  # of the block's keys
        z = lax.broadcasted_iota(jnp.int32, (count, S), 1)
        return own, (z <= last) & (z > last - reach)

    def attend(n: Array, masked: bool) -> None:
        own, seen = mask() if masked else (None, None)
        side = shape.side(count)
        heads = [n * side + k for k in range(side)]
        # The matrix unit keeps to this order, and nothing is read behind what is written: so all
        # wait for their results at once.
        scores = [_scores(q[h, rows], keys, h, shape) for h in heads]
        found = [_weigh(s, seen, top[h, rows], shape) for h, s in zip(heads, scores, strict=True)]
        sums = [
            total[h, rows] * w.shrink + jnp.sum(w.p, 1, keepdims=True)
            for h, w in zip(heads, found, strict=True)
        ]
        added = [
            _outputs(w.p, values, h, q.dtype, shape)
            + o[h, rows] * _lanes(w.shrink, shape.value_dim)
            for h, w in zip(heads, found, strict=True)
        ]
        if own is not None:  # others' rows have no business with these values, which might be NaN
            added = [jnp.where(own, x, o[h, rows]) for h, x in zip(heads, added, strict=True)]
        for h, w, sum_, x in zip(heads, found, sums, added, strict=True):
            top[h, rows], total[h, rows], o[h, rows] = w.top, sum_, x
            if mass is not None:
                at = h, pl.ds(pl.multiple_of(page, shape.pages), shape.pages), rows
                each = _page_sums(w.p, w.top, shape)
                mass[at] = jnp.where(item.owns(token(each.shape, 1)), each, mass[at])

    loop = pl.loop(0, shape.heads // shape.side(count))
    pl.when(all_seen)(lambda: loop(partial(attend, masked=False)))
    some_seen = ~all_seen & (key <= jnp.minimum(at[1], item.end - 1 + item.shift))
    pl.when(some_seen)(lambda: loop(partial(attend, masked=True)))


class Weights(NamedTuple):
    """What a block of keys brings a head's rows.

    Attributes:
        p: exponentials [rows, S].
        top: the largest logits by now, and `shrink` what all before becomes for them, both
            [rows, LANES] and in every lane the same.
    """

    p: Array
    top: Array
    shrink: Array


def _scores(asked: Array, keys: Rows, h: Array, shape: Shape) -> Array:
    """Logits of a head's rows [rows, S], before tanh."""
    parts = list[Array]()
    for lanes, k, by in keys.split(h, asked.shape[1], asked.dtype):
        part = product(asked[:, lanes], k, (1, 1))
        parts.append(part if by is None else part * by)
    return sum(parts[1:], parts[0])


def _weigh(s: Array, seen: Array | None, before: Array, shape: Shape) -> Weights:
    s = jnp.tanh(s * shape.squash) if shape.squash else s
    s = s if seen is None else jnp.where(seen, s, HIDDEN)
    now = jnp.maximum(before, jnp.max(s, 1, keepdims=True))
    p = _exp(s - _lanes(now, s.shape[1]), shape.unit)
    return Weights(p, now, _exp(before - now, shape.unit))


def _outputs(p: Array, values: Rows, h: Array, dtype: Any, shape: Shape) -> Array:
    """Sums of a head's weighted values [rows, value_dim]."""
    sums = list[Array]()
    for _, v, by in values.split(h, shape.value_dim, dtype):
        sums.append(product((p if by is None else p * by).astype(v.dtype), v, (1, 0)))
    return sums[0] if len(sums) == 1 else jnp.concatenate(sums, 1)


def _page_sums(p: Array, top: Array, shape: Shape) -> Array:
    """Logarithms of the sums of the exponentials of each page [pages, rows]."""
    page = lax.broadcasted_iota(jnp.int32, (shape.pages, p.shape[1]), 0) * shape.page
    back = lax.broadcasted_iota(jnp.int32, page.shape, 1) - page
    pick = jnp.where((back >= 0) & (back < shape.page), 1.0, 0.0)
    sums = lax.dot_general(
        pick, p, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    return jnp.log(jnp.maximum(sums, 1e-30)) + jnp.transpose(top)[:1] * shape.unit


def _div(x: Array, by: int) -> Array:
    """Of what is not negative: `//` would ask for signs, whose lowering asks for a device."""
    return lax.div(x, jnp.full_like(x, by))


def _exp(x: Array, unit: float) -> Array:
    return jnp.exp2(x * (unit * math.log2(math.e)))


def _lanes(x: Array, width: int) -> Array:
    """x [rows, 128], in every lane the same, with another width."""
    return jnp.concatenate([x] * pl.cdiv(width, LANES), 1)[:, :width]
