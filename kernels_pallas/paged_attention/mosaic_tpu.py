"""Attention over pages on a TPU: pages come by double-buffered DMA, straight from the stack.

A program is given some consecutive tokens of the step (and some heads of keys). Each sequence that
has tokens among them is an *item*: its pages pass by, a block of keys at a time, and while a block
is attended the next one is on its way, be it of the next item or of the next program. The softmax
of all tokens of a program is kept in VMEM; an item changes the rows of its own tokens only.

Few tokens (decode rows) are attended as one aligned tile of rows, more by larger ones. Logits
stay as the product gives them, in units of `Shape.unit`, so that exp costs one multiplication.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.op import UnsupportedError
from kernels_pallas.paged_attention.ragged import Ragged
from kernels_pallas.weight import Weight, as_array

_HIDDEN = -1e30  # finite: a row that has seen nothing yet must not become NaN
_LANES = 128
_TABLE = 2**17  # entries: half of a v5e's SMEM


@dataclass(frozen=True)
class TpuTile:
    """keys: and rows of queries attended at a time (rows: whole lanes); tokens: in a program;
    heads: of keys in a program, 0 for all."""

    keys: int = 512
    rows: int = 128
    tokens: int = 64
    heads: int = 0


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


def page_attention(
    q: Array, k_pages: Array, v_pages: Array | None, layer: Array | int, batch: Ragged, *,
    scale: float, window: Array | int = 0, sinks: Weight | None = None, soft_cap: float = 0.0,
    value_dim: int | None = None, tile: TpuTile | None = None, interpret: Any = False,
) -> tuple[Array, Array]:  # fmt: skip
    """`reference.page_attention` as one TPU kernel."""
    T, K, G = q.shape[0], k_pages.shape[2], q.shape[1] // k_pages.shape[2]
    caches = [k_pages] if v_pages is None else [k_pages, v_pages]
    value_dim = value_dim or (q.shape[2] if v_pages is None else v_pages.shape[-1])
    values = pl.cdiv(value_dim, _LANES) * _LANES  # lanes past value_dim are cut off at the end
    squash, unit = (scale / soft_cap, soft_cap) if soft_cap else (0.0, scale)
    shape = _shape(tile or TpuTile(), T, K, G, caches, batch, values, squash, unit)
    blocks = pl.cdiv(T, shape.tokens)
    H, tokens = k_pages.shape[-1], shape.tokens if blocks == 1 else T  # one block fills tiles
    q = jnp.pad(q.astype(k_pages.dtype), ((0, tokens - T), (0, 0), (0, H - q.shape[2])))
    queries = q.reshape(-1, K, G, H).swapaxes(0, 1).reshape(K, -1, H)
    heads, rows, keys = shape.heads, shape.tokens * G, shape.pages * shape.page
    o = jax.ShapeDtypeStruct((K, queries.shape[1], values), jnp.float32)
    lse = jax.ShapeDtypeStruct((K, 1, queries.shape[1]), jnp.float32)
    scalars = (
        jnp.asarray(layer, jnp.int32).reshape(1), jnp.asarray(window, jnp.int32).reshape(1),
        batch.row_starts, batch.kv_lens, batch.tables.reshape(-1),
        *_items(batch, blocks, shape.tokens),
    )  # fmt: skip

    def at(h: Array, b: Array, *scalars: Any):  # padding stays where the last real program was
        return h, jnp.minimum(b, scalars[6][scalars[6].shape[0] - 1])

    buffers = [pltpu.VMEM((2, heads, keys, x.shape[-1]), x.dtype) for x in caches]
    state = pltpu.VMEM((heads, rows, _LANES), jnp.float32)
    extra, extra_specs = (), ()
    if sinks is not None:
        row = as_array(sinks).astype(jnp.float32).reshape(K, 1, G) / unit
        row = jnp.broadcast_to(row, (K, shape.tokens, G)).reshape(K, rows, 1)
        extra = (jnp.broadcast_to(row, (K, rows, _LANES)),)
        extra_specs = (pl.BlockSpec((heads, rows, _LANES), lambda h, b, *_: (h, 0, 0)),)
    o, lse = pl.pallas_call(
        partial(_kernel, shape=shape, has_sinks=sinks is not None, caches=len(caches)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(K // heads, blocks),
            in_specs=[
                pl.BlockSpec((heads, rows, H), lambda *i: (*at(*i), 0)),
                *extra_specs,
                *(pl.BlockSpec(memory_space=pltpu.MemorySpace.HBM) for _ in caches),
            ],
            out_specs=[
                pl.BlockSpec((heads, rows, values), lambda *i: (*at(*i), 0)),
                pl.BlockSpec((heads, 1, rows), lambda *i: (at(*i)[0], 0, at(*i)[1])),
            ],
            scratch_shapes=[
                *buffers, state, state,
                pltpu.SemaphoreType.DMA((2, len(caches))), pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        out_shape=[o, lse],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=64 * 2**20
        ),
        interpret=interpret,
        name="page_attention",
    )(*scalars, queries, *extra, *caches)  # fmt: skip
    o = o.reshape(K, -1, G, values).swapaxes(0, 1).reshape(-1, K * G, values)
    return o[:T, :, :value_dim], lse.reshape(K, -1, G).swapaxes(0, 1).reshape(-1, K * G)[:T]


def _shape(
    tile: TpuTile, T: int, K: int, G: int, caches: list[Array], batch: Ragged, values: int,
    squash: float, unit: float,
) -> Shape:  # fmt: skip
    """The kernel's sizes, or what speaks against it."""
    dtype, Z = caches[0].dtype, caches[0].shape[3]
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise UnsupportedError(f"pages of {dtype}: keep them in bfloat16 or float32")
    sublanes = 32 // dtype.itemsize
    if Z % sublanes:
        raise UnsupportedError(f"{Z=} keys in a page of {dtype} must be a multiple of {sublanes}")
    lanes = [x.shape[-1] for x in caches]
    if any(n % _LANES for n in lanes):  # by default they are laid out otherwise, and copied
        raise UnsupportedError(f"pages of {lanes} lanes: pad them to multiples of {_LANES}")
    if batch.tables.size > _TABLE:
        raise UnsupportedError(
            f"a block table {batch.tables.shape} has more than {_TABLE} entries: take larger pages"
        )
    heads = tile.heads or K
    if K % heads:
        raise UnsupportedError(f"{K=} heads of keys are not groups of {heads}")
    few = sublanes // math.gcd(G, sublanes)
    some = math.lcm(few, tile.rows // math.gcd(G, tile.rows))
    tokens = pl.cdiv(T, few) * few
    if tokens > some:  # a block of lse is whole lanes
        tokens = pl.cdiv(min(tokens, tile.tokens), some) * some
    some = min(some, tokens)
    row = batch.tables.shape[1]
    pages = max(1, min(tile.keys // Z, row))
    return Shape(heads, G, tokens, few, some, Z, pages, row, values, squash, unit)


def _items(batch: Ragged, blocks: int, tokens: int) -> tuple[Array, Array, Array]:
    """The sequence and the program of each item, and the first item of each program [blocks + 1].

    It is the same for all layers, so it leaves a loop over them.
    """
    starts, ends = batch.row_starts[:-1], batch.row_starts[1:]
    R = starts.shape[0]
    real = (jnp.arange(R) < batch.num_seqs) & (ends > starts)
    count = jnp.where(real, (ends - 1) // tokens - starts // tokens + 1, 0)
    before = jnp.cumsum(count, dtype=jnp.int32)
    i = jnp.arange(blocks + R, dtype=jnp.int32)
    seqs = jnp.minimum(jnp.sum(before <= i[:, None], 1), R - 1).astype(jnp.int32)
    block = (starts // tokens - before + count)[seqs] + i
    first = jnp.sum((block < jnp.arange(blocks + 1)[:, None]) & (i < before[-1]), 1)
    last = jnp.max(jnp.where(i < before[-1], block, 0))
    return seqs, jnp.where(i < before[-1], block, last), first.astype(jnp.int32)


class _Item(NamedTuple):
    """The tokens of one sequence in one program. Token t has position t + shift."""

    seq: Array
    first: Array
    end: Array
    shift: Array
    page: Array  # the first one that a token sees
    end_page: Array


class _Scalars(NamedTuple):
    layer: Any
    window: Any
    starts: Any
    lens: Any
    tables: Any
    seqs: Any
    blocks: Any
    first: Any

    def item(self, i: Array, shape: Shape) -> _Item:
        seq, block = self.seqs[i], self.blocks[i]
        first = jnp.maximum(self.starts[seq], block * shape.tokens)
        end = jnp.minimum(self.starts[seq + 1], (block + 1) * shape.tokens)
        shift = self.lens[seq] - self.starts[seq + 1]
        window = self.window[0]
        seen = jnp.where(window > 0, jnp.maximum(first + shift - window + 1, 0), 0)
        return _Item(
            seq, first, end, shift, _div(seen, shape.page), _div(end - 1 + shift, shape.page) + 1
        )


def _kernel(*refs: Any, shape: Shape, has_sinks: bool, caches: int) -> None:
    scalars, refs = _Scalars(*refs[:8]), iter(refs[8:])
    q, sinks = next(refs), next(refs) if has_sinks else None
    stacks = [next(refs) for _ in range(caches)]
    o, lse = next(refs), next(refs)
    buffers = [next(refs) for _ in range(caches)]
    top, total, arrived, turn = refs
    head = pl.program_id(0) * shape.heads
    program = pl.program_id(1)
    num_items = scalars.first[pl.num_programs(1)]

    def copies(seq: Array, page: Array, p: Array, slot: Array) -> list[Any]:
        """The copy of the p-th page of a block that begins at `page`, from each cache."""
        at = scalars.layer[0], scalars.tables[seq * shape.row + page + p], pl.ds(head, shape.heads)
        to = slot, slice(None), pl.ds(pl.multiple_of(p * shape.page, shape.page), shape.page)
        return [
            pltpu.make_async_copy(stack.at[at], buffer.at[to], arrived.at[slot, c])
            for c, (stack, buffer) in enumerate(zip(stacks, buffers, strict=True))
        ]

    def each(item: _Item, page: Array, slot: Array, act: str) -> None:
        @pl.loop(0, jnp.minimum(shape.pages, item.end_page - page))
        def _(p: Array) -> None:
            for copy in copies(item.seq, page, p, slot):
                getattr(copy, act)()

    @pl.when((program == 0) & (num_items > 0))
    def _() -> None:
        turn[0] = 0
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
            pl.when(~more)(lambda: _silence(buffers[-1].at[slot], item, page, shape))
            blocks = [buffer.at[slot] for buffer in buffers]
            attend = partial(
                _attend, q, blocks[0], blocks[-1], top, total, o, shape, item, page,
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
                none = jnp.full((count, _LANES), _HIDDEN, jnp.float32)
                top[at] = none if sinks is None else sinks[at]
                total[at] = jnp.full_like(none, 0.0 if sinks is None else 1.0)
                o[at] = jnp.zeros((count, o.shape[-1]), jnp.float32)

        turn[0] = lax.fori_loop(first, end, attend_item, turn[0])

        @tiles[0]
        def _(h: Array) -> None:
            @tiles[1]
            def _(i: Array) -> None:
                rows = pl.ds(pl.multiple_of(i * count, count), count)
                sum_ = jnp.maximum(total[h, rows], 1e-30)
                o[h, rows] = o[h, rows] / _lanes(sum_, o.shape[-1])
                found = top[h, rows] * shape.unit + jnp.log(sum_)
                lse[h, :, rows] = jnp.transpose(found)[:1]


def _silence(values: Any, item: _Item, page: Array, shape: Shape) -> None:
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
    q: Any, keys: Any, values: Any, top: Any, total: Any, o: Any, shape: Shape, item: _Item,
    page: Array, window: Array, base: Array, i: Array, tokens: int,
) -> None:  # fmt: skip
    """Adds a block of keys to the softmax of the i-th `tokens` of a program, whose first one is
    the step's `base`, as far as they are the item's."""
    count, S = tokens * shape.group, keys.shape[1]
    rows = pl.ds(pl.multiple_of(i * count, count), count)
    first, key = base + i * tokens, page * shape.page
    at = first + item.shift, first + tokens - 1 + item.shift  # positions of the outermost tokens
    reach = jnp.where(window > 0, window, 2**30)
    all_own = (first >= item.first) & (first + tokens <= item.end)
    all_seen = all_own & (key + S - 1 <= at[0]) & (key > at[1] - reach)
    precision = lax.Precision.HIGHEST if keys.dtype == jnp.float32 else None
    dot = partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)

    def head(h: Array, masked: bool) -> None:
        s = dot(q[h, rows], keys[h], (((1,), (1,)), ((), ())))  # [rows, S]
        s = jnp.tanh(s * shape.squash) if shape.squash else s
        if masked:
            t = first + _div(lax.broadcasted_iota(jnp.int32, (count, 1), 0), shape.group)
            own = (t >= item.first) & (t < item.end)
            last = jnp.where(own, t + item.shift, -1) - key  # of the block's keys, the last seen
            z = lax.broadcasted_iota(jnp.int32, s.shape, 1)
            s = jnp.where((z <= last) & (z > last - reach), s, _HIDDEN)
        before = top[h, rows]  # in every lane the same
        now = jnp.maximum(before, jnp.max(s, 1, keepdims=True))
        p = _exp(s - _lanes(now, S), shape.unit)
        shrink = _exp(before - now, shape.unit)
        top[h, rows] = now
        total[h, rows] = total[h, rows] * shrink + jnp.sum(p, 1, keepdims=True)
        v = values[h][:, : shape.value_dim]
        added = dot(p.astype(v.dtype), v, (((1,), (0,)), ((), ())))
        added += o[h, rows] * _lanes(shrink, shape.value_dim)
        # others' rows have no business with these values, which might be NaN
        o[h, rows] = jnp.where(own, added, o[h, rows]) if masked else added

    pl.when(all_seen)(lambda: pl.loop(0, shape.heads)(partial(head, masked=False)))
    some_seen = ~all_seen & (key <= jnp.minimum(at[1], item.end - 1 + item.shift))
    pl.when(some_seen)(lambda: pl.loop(0, shape.heads)(partial(head, masked=True)))


def _div(x: Array, by: int) -> Array:
    """Of what is not negative: `//` would ask for signs, whose lowering asks for a device."""
    return lax.div(x, jnp.full_like(x, by))


def _exp(x: Array, unit: float) -> Array:
    return jnp.exp2(x * (unit * math.log2(math.e)))


def _lanes(x: Array, width: int) -> Array:
    """x [rows, 128], in every lane the same, with another width."""
    return jnp.concatenate([x] * pl.cdiv(width, _LANES), 1)[:, :width]
