"""The Hopper kernel of attention over pages: what one block of threads does."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import versions
from kernels_pallas.hopper import ROWS, across, add_products, down, late, product, within
from kernels_pallas.paged_attention.codec import block_of
from kernels_pallas.paged_attention.mosaic_gpu_blocks import Item, Ring, Shape, Work, reach
from kernels_pallas.paged_attention.mosaic_gpu_bringing import bring

TINY = 1e-37
HIDDEN = -1e30  # finite: a row that has seen nothing yet must not become NaN
LOG2E = math.log2(math.e)
WIDEST = 128  # lanes of a product: more fill the registers


def scores(
    q: Any, keys: Any, scales: Any, shape: Shape, meanwhile: Callable[[], None] | None = None
) -> Array:
    """Products of queries with a block of keys [ROWS, keys], times scales where keys have some."""
    if scales is None:
        return product(q, keys.T, meanwhile)

    def add(b: Any, s: Array, first: Any, n: int) -> Array:
        lanes = pl.ds(first, n)
        part = product(q.at[:, lanes], keys.at[:, lanes].T)
        by = scales[b]
        by = by * block_of(n) ** -0.5 if shape.nibbles else by
        return s + part * lax.broadcast_in_dim(by, part.shape, (1,))

    s, b, lane = jnp.zeros((ROWS, shape.keys), jnp.float32), 0, 0
    for n, alike in groupby(shape.key_parts):
        count = len(list(alike))
        if count > 1:  # unrolled, addresses of all operands would be kept in registers
            s = lax.fori_loop(
                0, count, lambda i, s, b=b, lane=lane, n=n: add(b + i, s, lane + i * n, n), s
            )
        else:
            for i in range(count):
                s = add(b + i, s, lane + i * n, n)
        b, lane = b + count, lane + count * n
    return s


def pieces(x: Array, part: int, width: int, shape: Shape) -> list[Array]:
    """Columns of x [ROWS, n], which are of that part of values, as they are stored: so many at a
    time, or eight of what is turned back as far as registers go. Steps within eight columns, which
    several threads hold, are left (`mosaic_gpu.page_attention`)."""
    if not shape.nibbles:
        return [x[:, i : i + width] for i in range(0, x.shape[1], width)]
    columns, block = [x[:, i : i + 8] for i in range(0, x.shape[1], 8)], shape.block(part)
    step = 1
    while step < min(block // 8, len(columns)):
        for i in (i for i in range(len(columns)) if not i & step):
            a, b = columns[i], columns[i + step]
            columns[i], columns[i + step] = a + b, a - b
        step *= 2
    return [column * block**-0.5 for column in columns]


def weigh(p: Array, scales: Any, past: Array | None, shape: Shape) -> list[Array]:
    """What values are multiplied with, for each part of them that has scales of its own. Scales
    from `past` on nobody may see: they might be NaN."""
    if scales is None:
        return [p.astype(jnp.bfloat16)]

    def by(part: int) -> Array:
        scale = scales[part]
        if past is not None:
            key = shape.key_of(lax.broadcasted_iota(jnp.int32, scale.shape, 0))
            scale = jnp.where(key < past, scale, 0.0)
        return across(scale, p.shape)

    return [(p * by(part)).astype(jnp.bfloat16) for part in range(shape.weights)]


def softmax(
    s: Array, top: Array, hidden: Callable[[Array], Array] | None, shape: Shape
) -> tuple[Array, Array, Array]:
    """Of products with a block of keys: exponentials, the highest so far, and what it shrinks.

    Args:
        top: the highest before, in the units of products (`Shape.unit`), as the one that is given.
        hidden: hides what rows do not see; none where they see all.
    """
    s = jnp.tanh(s * shape.factor) if shape.cap else s
    s = s if hidden is None else hidden(s)
    now = jnp.maximum(top, jnp.max(s, 1))
    if hidden is None:  # one instruction, and rows that have seen something
        p = jnp.exp2(s * shape.unit - down(now * shape.unit, s.shape))
    else:
        p = jnp.exp2((s - down(now, s.shape)) * shape.unit)
    return p, now, jnp.exp2((top - now) * shape.unit)


def mask(position: Array, key: Array, seen: Array, shape: Shape) -> Callable[[Array], Array]:
    """Hides products of rows with keys that they do not see.

    Args:
        position: of the first row.
        key: the first of the block.
        seen: keys that a row sees, back from its own.
    """

    def hidden(s: Array) -> Array:
        row = lax.broadcasted_iota(jnp.int32, s.shape, 0)
        back = position + lax.div(row, jnp.full_like(row, shape.group))
        back = back - key - shape.key_of(lax.broadcasted_iota(jnp.int32, s.shape, 1))
        return jnp.where(within(back, seen), s, HIDDEN)

    return hidden


def part_sums(p: Array, shape: Shape) -> list[Array]:
    """Of exponentials, for each part of a block of keys."""
    columns = (shape.columns(part) for part in range(shape.count))
    return [sum((jnp.sum(p[:, a:b], 1) for a, b in each[1:]), jnp.sum(p[:, slice(*each[0])], 1))
            for each in columns]  # fmt: skip


def keep_masses(masses: Any, sums: list[Array], top: Array, first: Array) -> None:
    """Logarithms to base 2 of sums relative to `top`, since what all of them add up to comes last.

    Args:
        masses: [parts, rows].
        first: the part that begins the block. Behind a sequence's last part there is room.
    """
    for i, total in enumerate(sums):
        masses[first + i] = top + jnp.log2(jnp.maximum(total, TINY))


class Scratch(NamedTuple):
    """Shared memory of a block of threads, and barriers.

    Attributes:
        q: [groups, rows, lanes], brought once; `arrived`, a barrier each, says so.
        o: [groups, rows, stored], on their way out or to another warpgroup; lse: [groups, rows].
        told: the highest product and the sum [readers, 2, rows] of those that take turns.
        met: where warpgroups that compute wait for each other.
    """

    q: Any
    o: Any
    lse: Any
    told: Any
    arrived: Any
    met: Any
    ring: Any

    @classmethod
    def of(cls, shape: Shape) -> Scratch:
        return cls(
            plgpu.SMEM((shape.groups, ROWS, shape.lanes), jnp.bfloat16),
            plgpu.SMEM((shape.groups, ROWS, shape.stored), shape.said),
            plgpu.SMEM((shape.groups, ROWS), jnp.float32),
            plgpu.SMEM((shape.readers, 2, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=shape.groups),
            plgpu.Barrier(num_arrivals=shape.readers),
            Ring.scratch(shape, readers=shape.groups),
        )

    def meet(self) -> None:
        plgpu.barrier_arrive(self.met)
        plgpu.barrier_wait(self.met)


def kernel(
    layer: Any, window: Any, tables: Any, items: Any, q_ref: Any, *refs: Any,
    shape: Shape, simulated: bool,
) -> None:  # fmt: skip
    stacks, scales, (o_ref, lse_ref, *mass_refs), (scratch,) = by_kind(refs, shape)
    head, split, number = (lax.axis_index(name) for name in ("head", "split", "item"))
    item, (few, many) = Item(items), shape.registers

    def bring_pages(caches: slice) -> None:
        if few:
            plgpu.set_max_registers(few, action="decrease")
        work = Work.of(shape, window, item)
        ring = scratch.ring
        bring(work, shape, layer, tables, stacks, scales, ring, caches, simulated=simulated)

    def compute() -> None:
        if few:
            plgpu.set_max_registers(many, action="increase")
        wg, turn, tile = place(shape)
        queries = q_ref.at[head, pl.ds(item.row(shape) + tile * ROWS, ROWS)]

        @pl.when(turn == 0)
        def _() -> None:
            plgpu.copy_gmem_to_smem(queries, scratch.q.at[tile], scratch.arrived.at[tile])

        plgpu.barrier_wait(scratch.arrived.at[tile])
        masses = [x.at[number, head, :, pl.ds(tile * ROWS, ROWS)] for x in mass_refs]

        def walk(state: Any, masked: bool) -> Any:
            work = Work.of(shape, window, item)
            attend = partial(
                attended, item, window, work, tile, scratch, shape,
                masked=masked, masses=masses, simulated=simulated,
            )  # fmt: skip
            return work.walk(attend, state, masked=masked, turn=turn, turns=shape.turns)

        state = walk(nothing(shape), masked=True)
        pl.when(wg == 1)(scratch.meet) if shape.apart else None  # and is half a block behind
        value, top, total = walk(state, masked=False)
        pl.when(wg == 0)(scratch.meet) if shape.apart else None
        wg, _, tile = place(shape)  # anew: no register is left in which to keep it
        scale, lse = normal(top, total, wg, scratch, shape)
        value = [x * down(scale, x.shape) for x in value]
        outs = lse_ref.at[split, number, head, pl.ds(tile * ROWS, ROWS)], o_ref.at[split, head]
        hand_out(value, lse, item, wg, scratch, outs, shape, simulated=simulated)

    @pl.when(item.seqs >= 0)
    def _() -> None:
        shares = [slice(i, i + 1) for i in range(2)] if shape.bringers > 1 else [slice(None)]
        roles = [compute, *(partial(bring_pages, caches) for caches in shares)]
        lax.switch(jnp.maximum(lax.axis_index("wg") - shape.readers + 1, 0), roles)


def place(shape: Shape) -> tuple[Array, Any, Any]:
    """Of a warpgroup that computes: its number, when it takes blocks, and its tile of rows."""
    wg = lax.axis_index("wg")
    return (wg, wg, 0) if shape.turns > 1 else (wg, 0, wg)


def nothing(shape: Shape) -> tuple[Any, ...]:
    """Before any key: sums of values, the highest product, the sum of exponentials."""
    sums = (jnp.zeros((ROWS, n), jnp.float32) for _, n, _ in shape.shares(0, shape.values, WIDEST))
    return tuple(sums), jnp.full((ROWS,), HIDDEN, jnp.float32), jnp.zeros((ROWS,), jnp.float32)


def attended(
    item: Item, window: Any, work: Work, tile: Any, scratch: Scratch, shape: Shape,
    step: Array, state: tuple[Any, ...], *, masked: bool, masses: list[Any], simulated: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """`nothing` and what follows, with a block of keys."""
    value, top, total = state
    ring, slot = scratch.ring, lax.rem(step, jnp.int32(shape.stages))
    part = work.at(step, shape)
    key = part * shape.part
    plgpu.barrier_wait(ring.ready[0].at[slot])
    scales = ring.steps(0, step, shape) if shape.scales else None
    apart = shape.apart and not masked
    meet = scratch.meet if apart else None
    s = scores(scratch.q.at[late(tile, step)], ring.blocks[0].at[slot], scales, shape, meet)
    late_keys = shape.in_keys or shape.nibbles  # are values, or have their scales beside them
    if not late_keys:
        plgpu.barrier_arrive(ring.free[0].at[slot])
    position = item.position() + tile * shape.tokens
    hidden = mask(position, key, reach(window), shape) if masked else None
    p, now, shrink = softmax(s, top, hidden, shape)
    sums = part_sums(p, shape) if shape.mass else [jnp.sum(p, 1)]
    for each in masses:
        keep_masses(each, sums, now * shape.unit, part)
    total = total * shrink + sum(sums)
    if not shape.in_keys:
        plgpu.barrier_wait(ring.ready[1].at[slot])
        scales = ring.steps(1, step, shape) if shape.scales else None
    values = ring.blocks[-1].at[slot, :, pl.ds(0, shape.values)]
    past = item.behind() - key if masked else None  # nobody sees keys from there on

    def quiet(past: Array) -> None:
        scratch.meet() if shape.groups > 1 else None  # where values are keys, others may read them
        pl.when(tile == 0)(lambda: silence(values, past))
        scratch.meet() if shape.groups > 1 else None

    if past is not None and not shape.ahead:  # integers are finite
        pl.when(past < shape.keys)(partial(quiet, past))
    weights = weigh(p, scales, past, shape)
    value = [x * down(shrink, x.shape) for x in value]
    shares = shape.shares(0, shape.values, WIDEST)
    pairs = [(weights[i], values.at[:, pl.ds(at, n)]) for at, n, i in shares]
    scratch.meet() if apart else None
    value = add_products(value, pairs, simulated=simulated)
    for free in ring.free if late_keys else ring.free[1:]:
        plgpu.barrier_arrive(free.at[slot])
    return value, now, total


def normal(
    top: Array, total: Array, wg: Array, scratch: Scratch, shape: Shape
) -> tuple[Array, Array]:
    """What makes of sums of values a share of the mean, and lse. Those who took turns agree."""
    mine = None
    if shape.turns > 1:
        for i, x in enumerate((top, total)):
            scratch.told[wg, i] = x
        plgpu.commit_smem()
        scratch.meet()
        other, others = (scratch.told[1 - wg, i] for i in range(2))
        now = jnp.maximum(top, other)
        mine = jnp.exp2((top - now) * shape.unit)
        total = total * mine + others * jnp.exp2((other - now) * shape.unit)
        top = now
    total = jnp.maximum(total, 1e-30)
    scale = 1 / total if mine is None else mine / total
    return scale, (top * shape.unit + jnp.log2(total)) * (1 / LOG2E)


def hand_out(
    value: list[Array], lse: Array, item: Item, wg: Array, scratch: Scratch,
    outs: tuple[Any, Any], shape: Shape, *, simulated: bool,
) -> None:  # fmt: skip
    """Results to global memory; if two took turns, the second one's through the first one's hands.

    Args:
        outs: lse [rows], and values [pieces of rows, lanes].
    """
    lse_ref, o_ref = outs
    at = 0 if shape.turns > 1 else wg
    first = at * shape.tokens  # of the item's tokens, the first in these rows

    def put_lse() -> None:
        scratch.lse[at] = lse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scratch.lse.at[at], lse_ref)

    pl.when(wg == 0)(put_lse) if shape.turns > 1 else put_lse()

    def put(columns: list[Array], *, adds: bool) -> None:
        width = shape.stored // len(columns)
        for i, x in enumerate(columns):
            some = scratch.o.at[at, :, pl.ds(i * width, width)]
            if adds:
                other = versions.load_narrow(some, plgpu.Layout.WGMMA, simulated)
                x = x + other.astype(x.dtype)
            versions.store_narrow(some, x.astype(some.dtype))
        plgpu.commit_smem()

    def out(lanes: Any) -> None:
        for row in range(0, ROWS, 8):  # none without a token

            @pl.when(item.position() + first + row // shape.group < item.behind())
            def _(row: int = row) -> None:
                there = pl.ds(item.row(shape) + at * ROWS + row, 8)
                plgpu.copy_smem_to_gmem(scratch.o.at[at, pl.ds(row, 8)], o_ref.at[there, lanes])

        last = lanes.start + shape.stored == shape.values
        plgpu.wait_smem_to_gmem(0, wait_read_only=not last)

    shares = shape.shares(0, shape.values, WIDEST)
    for x, (start, n, part) in zip(value, shares, strict=True):
        columns = pieces(x, part, shape.stored, shape)
        count = len(columns) * shape.stored // n
        for i in range(0, len(columns), count):
            some, lanes = columns[i : i + count], pl.ds(start + i * n // len(columns), shape.stored)
            if shape.turns == 1:
                put(some, adds=False)
                out(lanes)
                continue
            pl.when(wg == 1)(partial(put, some, adds=False))
            scratch.meet()

            @pl.when(wg == 0)
            def _(some: Any = some, lanes: Any = lanes) -> None:
                put(some, adds=True)
                out(lanes)

            scratch.meet()


def by_kind(refs: tuple[Any, ...], shape: Shape) -> tuple[Any, ...]:
    """References to the caches, their scales, the results and what is left."""
    ends = accumulate((len(shape.widths), len(shape.scales), 3 if shape.mass else 2))
    a, b, c = ends
    return refs[:a], refs[a:b], refs[b:c], refs[c:]


def silence(values: Any, past: Array) -> None:
    """Zeros behind the last value that is seen: a weight of 0 would not silence a NaN there, in a
    slot that nobody has written since its page changed hands."""

    @pl.loop(0, values.shape[1] // 64)  # more at a time would take too many registers
    def _(i: Array) -> None:
        some = values.at[:, pl.ds(i * 64, 64)]
        x = some[...]
        key = lax.broadcasted_iota(jnp.int32, x.shape, 0)
        some[...] = jnp.where(key < past, x, jnp.zeros_like(x))

    plgpu.commit_smem()
