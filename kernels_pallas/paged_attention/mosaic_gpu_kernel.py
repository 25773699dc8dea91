"""The Hopper kernel of attention over pages: what one block of threads does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TINY = 1e-37
HIDDEN = -1e30  # finite: a row that has seen nothing yet must not become NaN
LOG2E = math.log2(math.e)
ROWS = 64  # of a warpgroup: what wgmma fixes
STORED = 64  # lanes that are turned over to a copy at a time


@dataclass(frozen=True)
class Shape:
    """What the kernel knows while it is traced.

    Attributes:
        group: heads of queries in a tile of rows.
        heads: such groups for each head of keys.
        tokens: in a tile of rows.
        groups: tiles of rows in a block of threads.
        part: keys that are brought by one copy: those of a page, or fewer.
        parts: of a page.
        count: parts in a block of keys.
        row: entries in a row of the block table.
        lanes, values: of keys and of values that are brought.
        in_keys: whether values are lanes of keys.
        wide: whether two warpgroups share these.
        mass: whether sums of exponentials are kept, by part.
        factor: of logits, inside tanh where there is a `cap`.
    """

    group: int
    heads: int
    tokens: int
    groups: int
    stages: int
    splits: int
    part: int
    parts: int
    count: int
    row: int
    lanes: int
    values: int
    in_keys: bool
    wide: bool
    mass: bool
    factor: float
    cap: float

    @property
    def keys(self) -> int:
        return self.count * self.part


class Work(NamedTuple):
    """The share of a sequence's keys that a block of threads attends to.

    Attributes:
        first, end: its tokens.
        shift: from a token to its position.
        reach: keys that a token sees, back from its own.
        part, end_part: the first of the share, and the one behind the last of the sequence.
        steps: blocks of keys.
    """

    seq: Array
    first: Array
    end: Array
    shift: Array
    reach: Array
    part: Array
    end_part: Array
    steps: Array

    @classmethod
    def of(cls, shape: Shape, window, starts, lens, seqs, firsts) -> Work:
        item, split = lax.axis_index("item"), lax.axis_index("split")
        seq, first = seqs[item], firsts[item]
        shift = lens[seq] - starts[seq + 1]
        end = jnp.minimum(first + shape.groups * shape.tokens, starts[seq + 1])
        reach = jnp.where(window[0] > 0, window[0], 2**30)
        part = lax.div(jnp.maximum(first + shift - reach + 1, 0), jnp.int32(shape.part))
        end_part = lax.div(end - 1 + shift, jnp.int32(shape.part)) + 1
        share = lax.div(end_part - part + shape.count - 1, jnp.int32(shape.count))  # in blocks
        share = lax.div(share + shape.splits - 1, jnp.int32(shape.splits)) * shape.count
        part = part + split * share
        share = jnp.maximum(jnp.minimum(share, end_part - part), 0)
        steps = lax.div(share + shape.count - 1, jnp.int32(shape.count))
        return cls(seq, first, end, shift, reach, part, end_part, steps)

    def key(self, step: Array, shape: Shape) -> Array:
        """The first of a block."""
        return (self.part + step * shape.count) * shape.part


def bring(work: Work, shape: Shape, layer, tables, stacks, blocks, ready, free) -> None:
    """Copies blocks of keys, and of values, to shared memory as room becomes free."""
    head = lax.div(lax.axis_index("head"), jnp.int32(shape.heads))

    @pl.loop(0, work.steps)
    def _step(step: Array) -> None:
        slot = lax.rem(step, jnp.int32(shape.stages))
        pl.when(step >= shape.stages)(lambda: plgpu.barrier_wait(free.at[slot]))
        for p in range(shape.count):  # none is left out, since barriers count
            at = jnp.minimum(work.part + step * shape.count + p, work.end_part - 1)
            page = tables[work.seq * shape.row + lax.div(at, jnp.int32(shape.parts))]
            z = pl.ds(lax.rem(at, jnp.int32(shape.parts)) * shape.part, shape.part)
            to = slot, pl.ds(p * shape.part, shape.part)
            for stack, block, there in zip(stacks, blocks, ready, strict=True):
                lanes = pl.ds(0, block.shape[-1])
                where = stack.at[layer[0], page, head, z, lanes]
                plgpu.copy_gmem_to_smem(where, block.at[to], there.at[slot])


def logits(s: Array, position: Array, key: Array, reach: Array, shape: Shape) -> Array:
    """Of products with a block of keys, in powers of 2; `position` is that of the first row."""
    s = s * shape.factor
    s = jnp.tanh(s) * shape.cap if shape.cap else s
    row = lax.broadcasted_iota(jnp.int32, s.shape, 0)
    back = position + lax.div(row, jnp.full_like(row, shape.group))
    back = back - key - lax.broadcasted_iota(jnp.int32, s.shape, 1)
    return jnp.where((back >= 0) & (back < reach), s, HIDDEN)


def part_sums(p: Array, shape: Shape) -> list[Array]:
    """Of exponentials, for each part of a block of keys."""
    starts = range(0, shape.keys, shape.part)
    return [jnp.sum(p[:, start : start + shape.part], 1) for start in starts]


def keep_masses(masses: Any, sums: list[Array], top: Array, first: Array) -> None:
    """Logarithms to base 2 of sums relative to `top`, since what all of them add up to comes last.

    Args:
        masses: [parts, rows].
        first: the part that begins the block. Behind a sequence's last part there is room.
    """
    for i, total in enumerate(sums):
        masses[first + i] = top + jnp.log2(jnp.maximum(total, TINY))


def kernel(
    layer, window, starts, lens, tables, seqs, firsts, q_ref, *refs, shape: Shape
) -> None:  # fmt: skip
    n, outs = 1 if shape.in_keys else 2, 3 if shape.mass else 2
    stacks, (o_ref, lse_ref, *mass_refs), refs = refs[:n], refs[n : n + outs], refs[n + outs :]
    q_smem, p_smem, o_smem, lse_smem, arrived, silenced, free, *rest = refs
    blocks, ready = rest[:n], rest[n:]
    head, split, item = (lax.axis_index(name) for name in ("head", "split", "item"))
    wg = lax.axis_index("wg")

    @pl.when(seqs[item] >= 0)
    def _() -> None:
        work = Work.of(shape, window, starts, lens, seqs, firsts)

        @pl.when(wg == shape.groups)
        def _bring() -> None:
            if shape.groups > 1:
                plgpu.set_max_registers(40, action="decrease")
            bring(work, shape, layer, tables, stacks, blocks, ready, free)

        @pl.when(wg < shape.groups)
        def _compute() -> None:
            if shape.groups > 1:
                plgpu.set_max_registers(232, action="increase")
            base = work.first + wg * shape.tokens
            lanes = 128 if shape.values % 128 == 0 else 64  # of a product: more fill the registers
            rows = pl.ds(wg * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(q_ref.at[item, head, rows], q_smem.at[wg], arrived.at[wg])
            plgpu.barrier_wait(arrived.at[wg])

            def together() -> None:
                plgpu.barrier_arrive(silenced)
                plgpu.barrier_wait(silenced)

            def attend(step: Array, state: tuple[Any, ...]) -> tuple[Any, ...]:
                value, top, total = state
                slot = lax.rem(step, jnp.int32(shape.stages))
                key = work.key(step, shape)
                plgpu.barrier_wait(ready[0].at[slot])
                s = product(q_smem.at[wg], blocks[0].at[slot].T, (ROWS, shape.keys))
                s = logits(s, base + work.shift, key, work.reach, shape)
                now = jnp.maximum(top, jnp.max(s, 1))
                p, shrink = jnp.exp2(s - down(now, s.shape)), jnp.exp2(top - now)
                sums = part_sums(p, shape) if shape.mass else [jnp.sum(p, 1)]
                for masses in mass_refs:
                    at = work.part + step * shape.count
                    keep_masses(masses.at[item, head, :, rows], sums, now, at)
                total = total * shrink + sum(sums)
                plgpu.barrier_wait(ready[-1].at[slot]) if n == 2 else None
                values = blocks[-1].at[slot, :, pl.ds(0, shape.values)]
                past = work.end + work.shift - key  # the first of the block's keys that nobody sees

                @pl.when(past < shape.keys)
                def _() -> None:
                    together()  # where values are keys, others may still read them
                    pl.when(wg == 0)(lambda: silence(values, past))
                    together()

                p_smem[wg] = p.astype(values.dtype)
                plgpu.commit_smem()
                value = tuple(
                    x * down(shrink, x.shape)
                    + product(p_smem.at[wg], values.at[:, pl.ds(i * lanes, lanes)], x.shape)
                    for i, x in enumerate(value)
                )
                plgpu.barrier_arrive(free.at[slot])
                return value, now, total

            nothing = [jnp.zeros((ROWS, lanes), jnp.float32)] * (shape.values // lanes)
            state = tuple(nothing), *(jnp.full((ROWS,), x, jnp.float32) for x in (HIDDEN, 0.0))
            value, top, total = lax.fori_loop(0, work.steps, attend, state)
            total = jnp.maximum(total, 1e-30)
            value = [x / down(total, x.shape) for x in value]
            lse = (top + jnp.log2(total)) * (1 / LOG2E)

            lse_smem[wg] = lse
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[split, item, head, rows])
            for begin in range(0, shape.values, STORED):
                at = begin % lanes
                o_smem[wg] = value[begin // lanes][:, at : at + STORED]
                plgpu.commit_smem()
                columns = pl.ds(begin, STORED)
                for row in range(0, ROWS, 8):  # none without a token

                    @pl.when(base + row // shape.group < work.end)
                    def _(row: int = row, columns: Any = columns) -> None:
                        out = o_ref.at[split, item, head, pl.ds(wg * ROWS + row, 8), columns]
                        plgpu.copy_smem_to_gmem(o_smem.at[wg, pl.ds(row, 8)], out)

                plgpu.wait_smem_to_gmem(0, wait_read_only=begin + STORED < shape.values)


def silence(values: Any, past: Array) -> None:
    """Zeros behind the last value that is seen: a weight of 0 would not silence a NaN there, in a
    slot that nobody has written since its page changed hands."""
    for begin in range(0, values.shape[1], 64):  # more at a time would take too many registers
        some = values.at[:, pl.ds(begin, 64)]
        x = some[...]
        key = lax.broadcasted_iota(jnp.int32, x.shape, 0)
        some[...] = jnp.where(key < past, x, jnp.zeros_like(x))
    plgpu.commit_smem()


def product(a: Any, b: Any, shape: tuple[int, ...]) -> Array:
    """a @ b [64, n] in float32; b is a tile in shared memory."""

    def scope(total: Any) -> Array:
        plgpu.wgmma(total, a, b)
        return total[...]

    return pl.run_scoped(scope, plgpu.WGMMAAccumulatorRef((shape[0], shape[1]), jnp.float32))


def down(column: Array, shape: tuple[int, ...]) -> Array:
    """A number per row."""
    return lax.broadcast_in_dim(column, shape, (0,))
