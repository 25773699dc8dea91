"""Blocks of keys and values in shared memory on Hopper: whose they are, and how they are brought.

Pages of floats arrive as they are multiplied. Those of eight bits arrive in a ring of their own,
and the warpgroup that brings them makes bfloat16 of them on their way to the other one, which is
exact: wgmma multiplies no floats by integers. Scales stay what they are, for logits and weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


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
        ahead: blocks of eight bits on their way; 0 where pages are floats.
        key_parts: lanes of the parts of keys that have scales of their own, as far as they are
            brought. Values have one.
        owned: scales that a head has of a row of each cache, brought or not.
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
    ahead: int
    key_parts: tuple[int, ...]
    owned: tuple[int, ...]
    mass: bool
    factor: float
    cap: float

    @property
    def keys(self) -> int:
        return self.count * self.part

    @property
    def widths(self) -> tuple[int, ...]:
        """Lanes of a block of each cache."""
        return (self.lanes,) if self.in_keys else (self.lanes, self.values)

    @property
    def scales(self) -> tuple[int, ...]:
        """Scales of a row of each cache, if rows have some."""
        return (len(self.key_parts), *(1 for _ in self.widths[1:])) if self.key_parts else ()


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


class Ring(NamedTuple):
    """Shared memory that blocks pass through, an entry for each cache, and barriers.

    Attributes:
        blocks: [stages, keys, lanes], as they are multiplied.
        raw: [ahead, keys, lanes], as they lie in pages of eight bits.
        scales: [ahead + stages, scales, keys] of rows that have some. They stay until their block
            is free, so nobody copies them.
        free: whoever has read a block says so here.
        ready, arrived, scaled: of `blocks`, `raw` and `scales`.
    """

    blocks: tuple[Any, ...]
    raw: tuple[Any, ...]
    scales: tuple[Any, ...]
    free: Any
    ready: tuple[Any, ...]
    arrived: tuple[Any, ...]
    scaled: tuple[Any, ...]

    @classmethod
    def scratch(cls, shape: Shape, readers: int) -> Ring:
        """What a kernel asks for."""
        turns = shape.ahead + shape.stages
        rounded = shape.widths if shape.ahead else ()
        told = 1 if shape.ahead else shape.count  # by a warpgroup, or by copies

        def barriers(number: int, arrivals: int) -> Any:
            return plgpu.Barrier(num_arrivals=arrivals, num_barriers=number)

        return cls(
            tuple(plgpu.SMEM((shape.stages, shape.keys, n), jnp.bfloat16) for n in shape.widths),
            tuple(plgpu.SMEM((shape.ahead, shape.keys, n), jnp.int8) for n in rounded),
            tuple(plgpu.SMEM((turns, n, shape.keys), jnp.float32) for n in shape.scales),
            barriers(shape.stages, readers),
            tuple(barriers(shape.stages, told) for _ in shape.widths),
            tuple(barriers(shape.ahead, shape.count) for _ in rounded),
            tuple(barriers(turns, shape.count * n) for n in shape.scales),
        )

    def steps(self, cache: int, step: Array) -> Any:
        """The scales [scales, keys] of a block, once they are there."""
        turn = lax.rem(step, jnp.int32(self.scales[cache].shape[0]))
        plgpu.barrier_wait(self.scaled[cache].at[turn])
        return self.scales[cache].at[turn]


def bring(work: Work, shape: Shape, layer, tables, stacks, scales, ring: Ring) -> None:
    """Copies blocks of keys, and of values, to shared memory as room becomes free.

    Args:
        stacks, scales: in global memory. Only rows of eight bits have scales, if they have any.
    """
    head = lax.div(lax.axis_index("head"), jnp.int32(shape.heads))

    def parts(step: Array) -> Any:
        """Where the parts of a block lie: pages, keys in them, and keys of the block."""
        for p in range(shape.count):  # none is left out, since barriers count
            at = jnp.minimum(work.part + step * shape.count + p, work.end_part - 1)
            page = tables[work.seq * shape.row + lax.div(at, jnp.int32(shape.parts))]
            z = pl.ds(lax.rem(at, jnp.int32(shape.parts)) * shape.part, shape.part)
            yield page, z, pl.ds(p * shape.part, shape.part)

    def copy(step: Array, blocks: tuple[Any, ...], there: tuple[Any, ...]) -> None:
        slot = lax.rem(step, jnp.int32(blocks[0].shape[0]))
        for page, z, to in parts(step):
            for stack, block, told in zip(stacks, blocks, there, strict=True):
                where = stack.at[layer[0], page, head, z, pl.ds(0, block.shape[-1])]
                plgpu.copy_gmem_to_smem(where, block.at[slot, to], told.at[slot])

    def copy_scales(step: Array) -> None:
        for stack, own, block, told in zip(
            scales, shape.owned, ring.scales, ring.scaled, strict=True
        ):
            turn = lax.rem(step, jnp.int32(block.shape[0]))
            for page, z, to in parts(step):
                for b in range(block.shape[1]):
                    where = stack.at[layer[0], page, head * own + b, z]
                    plgpu.copy_gmem_to_smem(where, block.at[turn, b, to], told.at[turn])

    def begin(step: Array) -> None:
        copy(step, ring.raw, ring.arrived)
        copy_scales(step)

    pl.loop(0, jnp.minimum(work.steps, shape.ahead))(begin) if shape.ahead else None

    def finish(step: Array) -> None:
        at, slot = (lax.rem(step, jnp.int32(n)) for n in (shape.ahead, shape.stages))
        for raw, arrived, block, ready in zip(
            ring.raw, ring.arrived, ring.blocks, ring.ready, strict=True
        ):
            plgpu.barrier_wait(arrived.at[at])
            widen(raw.at[at], block.at[slot], 32 if shape.wide else 64)  # few registers are left
            plgpu.barrier_arrive(ready.at[slot])
        pl.when(step + shape.ahead < work.steps)(lambda: begin(step + shape.ahead))

    @pl.loop(0, work.steps + shape.stages)  # simulators want even the last block's freedom seen
    def _step(step: Array) -> None:
        slot = lax.rem(step, jnp.int32(shape.stages))
        pl.when(step >= shape.stages)(lambda: plgpu.barrier_wait(ring.free.at[slot]))

        @pl.when(step < work.steps)
        def _() -> None:
            finish(step) if shape.ahead else copy(step, ring.blocks, ring.ready)


def widen(raw: Any, block: Any, lanes: int) -> None:
    """Rows of eight bits as bfloat16, so many lanes at a time, four of them in a thread."""

    @pl.loop(0, raw.shape[1] // lanes)  # unrolled it takes too many registers
    def _(i: Array) -> None:
        at = pl.ds(i * lanes, lanes)
        x = plgpu.layout_cast(raw[:, at], plgpu.Layout.WGMMA_UPCAST_2X)
        block[:, at] = x.astype(block.dtype)

    plgpu.commit_smem()
