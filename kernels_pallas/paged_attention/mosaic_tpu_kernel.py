"""The TPU kernel of attention over pages: what one program does.

A program is given consecutive tokens of the step (and some KV heads). Each sequence that has tokens
among them is an *item*: the program attends its pages, a block of keys at a time, and while it
attends one block the next one is copied, be it the next item's or the next program's. The softmax
of all tokens of a program stays in VMEM; an item changes the rows of its own tokens only.

Pages that a group of sequences shares are one more item, before those of the group's members, and
its tokens are those of all members. The members continue the softmax that it leaves, so nothing is
merged.

Few tokens (decode rows) are attended as one small aligned tile of rows, more by larger ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.paged_attention.mosaic_tpu_blocks import (
    NUM_SCALARS,
    Item,
    Rows,
    Scalars,
    Shape,
    div,
)
from kernels_pallas.softmax import LOG2E, MASK_VALUE
from kernels_pallas.tpu import LANES, dot


class Program(NamedTuple):
    """A program's sizes, its place in the grid, and its refs.

    A row is a query head of a token, and rows of a KV head lie token by token.

    Attributes:
        first_head: the first of its KV heads.
        number: of the program among those of the same heads.
        num_items: of all programs of the same heads.
        scalars: in SMEM.
        q: queries [heads, rows, W].
        sinks: the logits with which the softmax starts [heads, rows, LANES], or None.
        signs: Sylvester's matrix, which rotates outputs back [LANES, LANES], or None.
        stacks: caches [L, P, K, Z, W], then their scales [L, P, K * parts, Z], in HBM.
        o, lse: outputs [heads, rows, value_dim], which hold weighted sums of values until the end,
            and [heads, 1, rows].
        mass: sums of pages [heads, pages, rows], or None.
        buffers: for two blocks of each stack, [2, heads, block_keys, W] and
            [2, K * parts, block_keys].
        row_max, row_sum: of the softmax, the largest logit yet and the sum of exponentials relative
            to it [heads, rows, LANES], the same in every lane.
        arrived: semaphores of copies [2, stacks].
        slot: the buffer of the next block [1], in SMEM: it goes from program to program.
    """

    shape: Shape
    first_head: Array
    number: Array
    num_items: Array
    scalars: Scalars
    q: Any
    sinks: Any
    signs: Any
    stacks: list[Any]
    o: Any
    lse: Any
    mass: Any
    buffers: list[Any]
    row_max: Any
    row_sum: Any
    arrived: Any
    slot: Any

    @classmethod
    def of(cls, refs: tuple[Any, ...], shape: Shape) -> Program:
        """From the kernel's refs: scalars, operands, results and scratch."""
        scalars, rest = Scalars.of(refs[:NUM_SCALARS]), iter(refs[NUM_SCALARS:])
        count = shape.num_caches + shape.num_scales
        q, sinks = next(rest), next(rest) if shape.has_sinks else None
        signs = next(rest) if shape.int4 else None
        stacks = [next(rest) for _ in range(count)]
        o, lse, mass = next(rest), next(rest), next(rest) if shape.mass else None
        buffers = [next(rest) for _ in range(count)]
        first_head = pl.program_id(0) * shape.heads
        number = pl.program_id(1)
        num_items = scalars.item_starts[pl.num_programs(1)]
        return cls(
            shape, first_head, number, num_items, scalars, q, sinks, signs, stacks, o, lse, mass,
            buffers, *rest,
        )  # fmt: skip

    @property
    def first_token(self) -> Array:
        """The program's first token, as the step numbers them."""
        return self.number * self.shape.tokens


class Block(NamedTuple):
    """A block of keys that an item attends.

    Attributes:
        item: whose it is.
        page: its first page, as an entry of the item's row of the block table.
        window: keys at least this far back are hidden; 0 hides none.
        first_token: of the program.
    """

    item: Item
    page: Array
    keys: Rows
    values: Rows
    window: Array
    first_token: Array


class Tile(NamedTuple):
    """Rows of a program that are attended together.

    Attributes:
        rows: a slice of the program's rows.
        first_token: theirs, as the step numbers them.
        first_key: position of the block's first key.
        reach: keys that a token sees, back from its own.
    """

    rows: Any
    first_token: Array
    first_key: Array
    reach: Array


class Weights(NamedTuple):
    """What a block of keys adds to the softmax of a head's rows.

    Attributes:
        p: exponentials [rows, S].
        row_max: the largest logits by now [rows, LANES], in every lane the same.
        rescale: what sums so far are multiplied by to be relative to it, likewise.
    """

    p: Array
    row_max: Array
    rescale: Array


def kernel(*refs: Any, shape: Shape) -> None:
    """One program: resets its softmax, attends its items block by block, writes o and lse.

    Args:
        refs: as `Program.of` takes them.
    """
    prog = Program.of(refs, shape)
    _start_first_copies(prog)
    starts, number = prog.scalars.item_starts, prog.number
    begin, end = starts[number], starts[number + 1]

    @pl.when(begin < end)
    def _() -> None:
        _for_each_tile(shape, partial(_reset, prog))
        prog.slot[0] = lax.fori_loop(begin, end, partial(_attend_item, prog), prog.slot[0])
        _for_each_tile(shape, partial(_finish, prog))


def _for_each_tile(shape: Shape, act: Callable[[Array, Array], None]) -> None:
    """Acts on the i-th tile of each head h of a program, as act(h, i)."""

    @pl.loop(0, shape.heads)
    def _(h: Array) -> None:
        pl.loop(0, shape.tokens // shape.tile)(partial(act, h))


def _reset(prog: Program, h: Array, i: Array) -> None:
    """Empties the softmax of a tile: it holds the sinks, if there are any."""
    count = prog.shape.tile * prog.shape.group
    at = h, pl.ds(pl.multiple_of(i * count, count), count)
    none = jnp.full((count, LANES), MASK_VALUE, jnp.float32)
    prog.row_max[at] = none if prog.sinks is None else prog.sinks[at]
    prog.row_sum[at] = jnp.full_like(none, 0.0 if prog.sinks is None else 1.0)
    prog.o[at] = jnp.zeros((count, prog.o.shape[-1]), jnp.float32)
    if prog.mass is not None:
        pages = prog.mass.shape[1]
        prog.mass[h, :, at[1]] = jnp.full((pages, count), MASK_VALUE, jnp.float32)


def _finish(prog: Program, h: Array, i: Array) -> None:
    """Divides the outputs of a tile by the sums of its softmax, and writes lse."""
    count, o = prog.shape.tile * prog.shape.group, prog.o
    rows = pl.ds(pl.multiple_of(i * count, count), count)
    row_sum = jnp.maximum(prog.row_sum[h, rows], 1e-30)
    o[h, rows] = o[h, rows] / _lanes(row_sum, o.shape[-1])
    if prog.signs is not None:
        _rotate_back(o, h, i * count, count, prog.signs)
    lse = prog.row_max[h, rows] * prog.shape.unit + jnp.log(row_sum)
    prog.lse[h, :, rows] = jnp.transpose(lse)[:1]


def _rotate_back(o: Any, h: Array, first: Array, count: int, signs: Any) -> None:
    """Multiplies each part of rows of sums by the Hadamard matrix. Outside the kernel that would
    copy all outputs."""
    n = math.gcd(count, 32)  # few registers are left

    @pl.loop(0, count // n)
    def _(r: Array) -> None:
        @pl.loop(0, o.shape[-1] // LANES)  # a part has so many lanes
        def _(i: Array) -> None:
            rows = pl.ds(pl.multiple_of(first + r * n, n), n)
            at = h, rows, pl.ds(pl.multiple_of(i * LANES, LANES), LANES)
            x, rotated = o[at], jnp.zeros((n, LANES), jnp.float32)
            for _ in range(3):  # signs are exact in bfloat16, and three parts of it hold a float
                part = x.astype(jnp.bfloat16)
                x = x - part.astype(jnp.float32)
                rotated += lax.dot(part, signs[...], preferred_element_type=jnp.float32)
            o[at] = rotated * np.float32(LANES**-0.5)


def _start_first_copies(prog: Program) -> None:
    """Starts the copies of the first block: every other one is started while another is attended,
    be it by the program before."""

    @pl.when((prog.number == 0) & (prog.num_items > 0))
    def _() -> None:
        prog.slot[0] = 0
        item = prog.scalars.item(jnp.int32(0), prog.shape)
        _copy_block(prog, item, item.page_begin, jnp.int32(0), "start")


def _copy_block(prog: Program, item: Item, page: Array, slot: Array, act: str) -> None:
    """Starts or awaits the copies of an item's block that begins at `page` of its row."""

    @pl.loop(0, jnp.minimum(prog.shape.block_pages, item.page_end - page))
    def _(p: Array) -> None:
        for copy in _page_copies(prog, item, page, p, slot):
            getattr(copy, act)()


def _page_copies(prog: Program, item: Item, page: Array, p: Array, slot: Array) -> list[Any]:
    """The copy of the p-th page of a block that begins at `page`, from each stack."""
    shape = prog.shape
    at = prog.scalars.layer[0], prog.scalars.tables[item.seq * shape.table_width + page + p]
    heads = pl.ds(prog.first_head, shape.heads)
    parts = [heads] * shape.num_caches + [slice(None)] * shape.num_scales  # scales of all heads

    def to(n: int) -> tuple[Any, ...]:  # rows of a page: keys, or pairs of them in four bits
        return slot, slice(None), pl.ds(pl.multiple_of(p * n, n), n)

    return [
        pltpu.make_async_copy(
            stack.at[*at, part], buffer.at[to(stack.shape[3])], prog.arrived.at[slot, i]
        )
        for i, (stack, buffer, part) in enumerate(
            zip(prog.stacks, prog.buffers, parts, strict=True)
        )
    ]


def _attend_item(prog: Program, i: Array, slot: Array) -> Array:
    """Attends the blocks of the i-th item, from the buffer `slot` on, and returns the next slot."""
    item = prog.scalars.item(i, prog.shape)
    following = prog.scalars.item(jnp.minimum(i + 1, prog.num_items - 1), prog.shape)
    pages = prog.shape.block_pages
    blocks = div(item.page_end - item.page_begin + pages - 1, pages)
    attend = partial(_attend_block, prog, i, item, following)
    return lax.fori_loop(0, blocks, attend, slot)


def _attend_block(
    prog: Program, i: Array, item: Item, following: Item, j: Array, slot: Array
) -> Array:
    """Attends the j-th block of the i-th item, and returns the slot of the next block, whose copy
    it starts first."""
    shape = prog.shape
    page = item.page_begin + j * shape.block_pages
    more = page + shape.block_pages < item.page_end
    ahead = jax.tree.map(partial(jnp.where, more), item, following)

    @pl.when(more | (i + 1 < prog.num_items))
    def _() -> None:
        next_page = jnp.where(more, page + shape.block_pages, ahead.page_begin)
        _copy_block(prog, ahead, next_page, 1 - slot, "start")

    _copy_block(prog, item, page, slot, "wait")
    buffers = [buffer.at[slot] for buffer in prog.buffers]
    if buffers[-1].dtype != jnp.int8:  # which cannot be NaN
        silence = _silence_scales if shape.num_scales else _silence_values
        pl.when(~more)(partial(silence, buffers[-1], item, page, shape))
    n, scales = shape.num_caches, shape.num_scales > 0
    block = Block(
        item, page,
        Rows(buffers[0], shape.key_parts, buffers[n] if scales else None),
        Rows(buffers[n - 1], shape.value_parts, buffers[-1] if scales else None),
        prog.scalars.window[0], prog.first_token,
    )  # fmt: skip
    _attend_tiles(prog, block)
    return 1 - slot


def _silence_values(values: Any, item: Item, page: Array, shape: Shape) -> None:
    """Zeros values past the last one that an item sees. A slot that nobody has written since its
    page changed hands may hold a NaN, which a weight of 0 does not silence."""
    end = item.token_end + item.shift - page * shape.page_size

    @pl.loop(div(end, shape.page_size), shape.block_pages)
    def _(p: Array) -> None:
        n = shape.page_size
        at = slice(None), pl.ds(pl.multiple_of(p * n, n), n)
        x = values[at]
        slot = p * n + lax.broadcasted_iota(jnp.int32, x.shape, 1)
        values[at] = jnp.where(slot < end, x, jnp.zeros_like(x))


def _silence_scales(scales: Any, item: Item, page: Array, shape: Shape) -> None:
    """As `_silence_values` for quantized rows, where scales may be NaN, and values may not."""
    end = item.token_end + item.shift - page * shape.page_size
    x = scales[...]
    scales[...] = jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 1) < end, x, 0.0)


def _attend_tiles(prog: Program, block: Block) -> None:
    """Adds a block of keys to the softmax of its item's tokens: in one small tile if they lie in
    one, otherwise by larger tiles."""
    shape, item = prog.shape, block.item
    first, last = (t - prog.first_token for t in (item.token_begin, item.token_end - 1))
    small, large = shape.small_tile, shape.tile
    one = (div(first, small) == div(last, small)) & (small < large)
    pl.when(one)(lambda: _attend_tile(prog, block, small, div(first, small)))

    @pl.when(~one)
    def _() -> None:
        tiles = pl.loop(div(first, large), div(last, large) + 1)
        tiles(partial(_attend_tile, prog, block, large))


def _attend_tile(prog: Program, block: Block, tokens: int, i: Array) -> None:
    """Adds a block of keys to the softmax of the i-th `tokens` tokens of a program, as far as they
    are the item's. Keys are masked only where some row does not see all of them."""
    shape, item, count = prog.shape, block.item, tokens * prog.shape.group
    rows = pl.ds(pl.multiple_of(i * count, count) if tokens < shape.tokens else 0, count)
    first, key = block.first_token + i * tokens, block.page * shape.page_size
    low, high = first + item.shift, first + tokens - 1 + item.shift  # positions of its tokens
    tile = Tile(rows, first, key, jnp.where(block.window > 0, block.window, 2**30))
    all_own = (first >= item.token_begin) & (first + tokens <= item.token_end)
    all_seen = all_own & (key + shape.block_keys - 1 <= low) & (key > high - tile.reach)
    heads = pl.loop(0, shape.heads // shape.heads_at_once(count))
    attend = partial(_attend_heads, prog, block, tile, count)
    pl.when(all_seen)(lambda: heads(partial(attend, False)))
    some_seen = ~all_seen & (key <= jnp.minimum(high, item.token_end - 1 + item.shift))
    pl.when(some_seen)(lambda: heads(partial(attend, True)))


def _attend_heads(
    prog: Program, block: Block, tile: Tile, count: int, masked: bool, n: Array
) -> None:
    """Adds a block of keys to the softmax of `count` rows, for the n-th of the sets of heads that
    are computed side by side.

    The matrix unit keeps to this order, and no ref is read after another is written: so the heads
    wait for their results at the same time.
    """
    shape, rows, o = prog.shape, tile.rows, prog.o
    own, seen = _mask(block.item, tile, count, shape) if masked else (None, None)
    at_once = shape.heads_at_once(count)
    heads = [n * at_once + k for k in range(at_once)]
    scores = [_scores(prog.q[h, rows], block.keys, h) for h in heads]
    found = [
        _weights(s, seen, prog.row_max[h, rows], shape) for h, s in zip(heads, scores, strict=True)
    ]
    row_sums = [
        prog.row_sum[h, rows] * w.rescale + jnp.sum(w.p, 1, keepdims=True)
        for h, w in zip(heads, found, strict=True)
    ]
    outputs = [
        _weighted_values(w.p, block.values, h, prog.q.dtype, shape)
        + o[h, rows] * _lanes(w.rescale, shape.value_dim)
        for h, w in zip(heads, found, strict=True)
    ]
    if own is not None:  # rows of others must not take these values, which might be NaN
        outputs = [jnp.where(own, x, o[h, rows]) for h, x in zip(heads, outputs, strict=True)]
    for h, w, row_sum, x in zip(heads, found, row_sums, outputs, strict=True):
        prog.row_max[h, rows], prog.row_sum[h, rows], o[h, rows] = w.row_max, row_sum, x
        if prog.mass is not None:
            _keep_mass(prog, block, tile, h, w)


def _tokens(shape: tuple[int, ...], axis: int, tile: Tile, group: int) -> Array:
    """The token of the step of each row along an axis."""
    return tile.first_token + div(lax.broadcasted_iota(jnp.int32, shape, axis), group)


def _mask(item: Item, tile: Tile, count: int, shape: Shape) -> tuple[Array, Array]:
    """Which rows are the item's [count, 1], and which keys of the block they see [count, S]."""
    token = partial(_tokens, (count, 1), 0, tile, shape.group)
    own = item.owns(token())
    last = jnp.where(own, token() + item.shift, -1) - tile.first_key  # of the block's keys
    z = lax.broadcasted_iota(jnp.int32, (count, shape.block_keys), 1)
    return own, (z <= last) & (z > last - tile.reach)


def _keep_mass(prog: Program, block: Block, tile: Tile, h: Array, weights: Weights) -> None:
    """Stores the sums of a block's pages for the rows of a head."""
    pages = prog.shape.block_pages
    at = h, pl.ds(pl.multiple_of(block.page, pages), pages), tile.rows
    sums = _page_sums(weights.p, weights.row_max, prog.shape)
    own = block.item.owns(_tokens(sums.shape, 1, tile, prog.shape.group))
    prog.mass[at] = jnp.where(own, sums, prog.mass[at])


def _scores(q: Array, keys: Rows, h: Array) -> Array:
    """Products of a head's rows with keys [rows, S]: logits over `Shape.logit_scale`."""
    parts = list[Array]()
    for lanes, k, scales in keys.split(h, q.shape[1], q.dtype):
        part = dot(q[:, lanes], k, (1, 1))
        parts.append(part if scales is None else part * scales)
    return sum(parts[1:], parts[0])


def _weights(s: Array, seen: Array | None, row_max: Array, shape: Shape) -> Weights:
    """The softmax's step for scores [rows, S], from its maximum before."""
    s = jnp.tanh(s * (shape.logit_scale / shape.soft_cap)) if shape.soft_cap else s
    s = s if seen is None else jnp.where(seen, s, MASK_VALUE)
    now = jnp.maximum(row_max, jnp.max(s, 1, keepdims=True))
    p = _exp(s - _lanes(now, s.shape[1]), shape.unit)
    return Weights(p, now, _exp(row_max - now, shape.unit))


def _weighted_values(p: Array, values: Rows, h: Array, dtype: Any, shape: Shape) -> Array:
    """Sums of a head's weighted values [rows, value_dim]."""
    sums = list[Array]()
    for _, v, scales in values.split(h, shape.value_dim, dtype):
        sums.append(dot((p if scales is None else p * scales).astype(v.dtype), v, (1, 0)))
    return sums[0] if len(sums) == 1 else jnp.concatenate(sums, 1)


def _page_sums(p: Array, row_max: Array, shape: Shape) -> Array:
    """Logarithms of the sums of the exponentials of each page [pages, rows]."""
    begin = lax.broadcasted_iota(jnp.int32, (shape.block_pages, p.shape[1]), 0) * shape.page_size
    key = lax.broadcasted_iota(jnp.int32, begin.shape, 1) - begin
    pick = jnp.where((key >= 0) & (key < shape.page_size), 1.0, 0.0)
    sums = lax.dot_general(
        pick, p, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    return jnp.log(jnp.maximum(sums, 1e-30)) + jnp.transpose(row_max)[:1] * shape.unit


def _exp(x: Array, unit: float) -> Array:
    """exp of logits in units of `unit`."""
    return jnp.exp2(x * (unit * LOG2E))


def _lanes(x: Array, width: int) -> Array:
    """x [rows, LANES], the same in every lane, with another width."""
    return jnp.concatenate([x] * pl.cdiv(width, LANES), 1)[:, :width]
