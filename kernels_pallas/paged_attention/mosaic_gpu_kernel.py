"""The Hopper kernel of attention over pages: what the warpgroups of a block of threads do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import versions
from kernels_pallas.hopper import ROWS, add_products, down, late
from kernels_pallas.paged_attention.mosaic_gpu_producer import produce
from kernels_pallas.paged_attention.mosaic_gpu_ring import Ring
from kernels_pallas.paged_attention.mosaic_gpu_shape import Shape
from kernels_pallas.paged_attention.mosaic_gpu_softmax import (
    mask,
    output_columns,
    row_sums,
    scores,
    softmax,
    store_masses,
    weights,
    zero_unseen,
)
from kernels_pallas.paged_attention.mosaic_gpu_work import Program, Work, visible_keys
from kernels_pallas.softmax import LOG2E, MASK_VALUE

_WIDEST = 128  # lanes of a product: more fill the registers


class Scratch(NamedTuple):
    """Shared memory of a block of threads, and barriers.

    Attributes:
        q: [tiles, rows, lanes], copied once; q_ready: a barrier for each tile.
        o: [tiles, rows, store_lanes], on their way to global memory or to another warpgroup.
        lse: [tiles, rows].
        partials: the maximum and the sum [consumers, 2, rows] of warpgroups that take turns.
        consumer_barrier: where consumers wait for each other.
        ring: blocks of keys and values.
    """

    q: Any
    o: Any
    lse: Any
    partials: Any
    q_ready: Any
    consumer_barrier: Any
    ring: Any

    @classmethod
    def of(cls, shape: Shape) -> Scratch:
        """What the kernel asks for."""
        return cls(
            plgpu.SMEM((shape.tiles, ROWS, shape.key_lanes), jnp.bfloat16),
            plgpu.SMEM((shape.tiles, ROWS, shape.store_lanes), shape.out_dtype),
            plgpu.SMEM((shape.tiles, ROWS), jnp.float32),
            plgpu.SMEM((shape.consumers, 2, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=shape.tiles),
            plgpu.Barrier(num_arrivals=shape.consumers),
            Ring.scratch(shape, consumers=shape.tiles),
        )

    def sync_consumers(self) -> None:
        """Waits until all consumers are here."""
        plgpu.barrier_arrive(self.consumer_barrier)
        plgpu.barrier_wait(self.consumer_barrier)


class _State(NamedTuple):
    """What the online softmax keeps: unnormalised outputs [ROWS, n] for each slice of the lanes of
    values, the maximum and the sum of each row [ROWS]."""

    o: tuple[Array, ...]
    row_max: Array
    row_sum: Array

    @classmethod
    def empty(cls, shape: Shape) -> _State:
        """Before any key."""
        o = (jnp.zeros((ROWS, n), jnp.float32) for _, n, _ in _slices(shape))
        return cls(
            tuple(o), jnp.full((ROWS,), MASK_VALUE, jnp.float32), jnp.zeros((ROWS,), jnp.float32)
        )


class _Consumer(NamedTuple):
    """A warpgroup that attends for a tile of rows.

    Attributes:
        tile: the tile of the block of threads.
        masses: [copies, ROWS] of the tile's rows in global memory, or no array at all.
    """

    program: Program
    tile: Any
    masses: list[Any]


def kernel(*refs: Any, shape: Shape, simulated: bool) -> None:
    """Attends for one item, one tile of heads and one split of the keys.

    Args:
        refs: see `Program`.
    """
    program = Program.of(*refs, shape=shape, simulated=simulated)

    @pl.when(program.item.seqs >= 0)
    def _() -> None:
        caches = [slice(i, i + 1) for i in range(2)] if shape.producers > 1 else [slice(None)]
        roles = [partial(_consume, program), *(partial(_produce, program, x) for x in caches)]
        lax.switch(jnp.maximum(lax.axis_index("wg") - shape.consumers + 1, 0), roles)


def _produce(program: Program, caches: slice) -> None:
    """A producer warpgroup, which copies some of the caches."""
    few, _ = program.shape.registers
    if few:
        plgpu.set_max_registers(few, action="decrease")
    produce(program, program.scratch.ring, program.work(), caches)


def _consume(program: Program) -> None:
    """A consumer warpgroup: it attends for its tile of rows, masked blocks first."""
    shape, scratch = program.shape, program.scratch
    _, many = shape.registers
    if many:
        plgpu.set_max_registers(many, action="increase")
    wg, turn, tile = _place(shape)
    _copy_queries(program, turn, tile)
    masses = [
        x.at[program.number, program.head, :, pl.ds(tile * ROWS, ROWS)] for x in program.masses
    ]
    consumer = _Consumer(program, tile, masses)

    def attend(state: _State, masked: bool) -> _State:
        work = program.work()  # computed anew for each loop, to keep registers free
        body = partial(_attend_block, consumer, work, masked=masked)
        return work.loop(body, state, masked=masked, turn=turn, turns=shape.turns)

    state = attend(_State.empty(shape), masked=True)
    if shape.ping_pong:  # the second warpgroup stays half a block behind
        pl.when(wg == 1)(scratch.sync_consumers)
    o, row_max, row_sum = attend(state, masked=False)
    if shape.ping_pong:
        pl.when(wg == 0)(scratch.sync_consumers)
    wg, _, tile = _place(shape)  # computed anew: no register is left in which to keep it
    scale, lse = _normalizer(row_max, row_sum, wg, scratch, shape)
    o = [x * down(scale, x.shape) for x in o]
    rows = pl.ds(tile * ROWS, ROWS)
    lse_rows = program.lse.at[program.split, program.number, program.head, rows]
    _store_results(program, o, lse, lse_rows, wg)


def _copy_queries(program: Program, turn: Any, tile: Any) -> None:
    """Copies a tile's queries to shared memory, once for all that take turns, and waits for
    them."""
    scratch, item = program.scratch, program.item
    rows = pl.ds(item.first_row(program.shape) + tile * ROWS, ROWS)
    queries = program.q.at[program.head, rows]

    @pl.when(turn == 0)
    def _() -> None:
        plgpu.copy_gmem_to_smem(queries, scratch.q.at[tile], scratch.q_ready.at[tile])

    plgpu.barrier_wait(scratch.q_ready.at[tile])


def _place(shape: Shape) -> tuple[Array, Any, Any]:
    """Of a consumer warpgroup: its number, its turn, and its tile of rows."""
    wg = lax.axis_index("wg")
    return (wg, wg, 0) if shape.turns > 1 else (wg, 0, wg)


def _slices(shape: Shape) -> list[tuple[int, int, int]]:
    return shape.value_slices(0, shape.value_lanes, _WIDEST)


def _attend_block(
    consumer: _Consumer, work: Work, step: Array, state: _State, *, masked: bool
) -> _State:
    """The state with the block of keys of one more step."""
    program, tile, masses = consumer
    shape, item, ring = program.shape, program.item, program.scratch.ring
    slot = lax.rem(step, jnp.int32(shape.stages))
    copy = work.copy_of_step(step, shape)
    first_key = copy * shape.keys_per_copy
    sync = program.scratch.sync_consumers if shape.ping_pong and not masked else None

    s, scales = _scores(consumer, step, slot, sync)
    # a slot of keys is also that of values, or scales of int4 values lie beside those of its keys
    read_to_the_end = shape.values_in_keys or shape.int4
    if not read_to_the_end:
        plgpu.barrier_arrive(ring.free[0].at[slot])

    hide, position = None, item.first_position() + tile * shape.tokens_per_tile
    if masked:
        hide = mask(position, first_key, visible_keys(program.window), shape)
    p, row_max, rescale = softmax(s, state.row_max, hide, shape)
    sums = row_sums(p, shape)
    for rows in masses:
        store_masses(rows, sums, row_max * shape.exp2_scale, copy)
    row_sum = state.row_sum * rescale + sum(sums)

    if not shape.values_in_keys:
        plgpu.barrier_wait(ring.ready[1].at[slot])
        scales = ring.scales_of(1, step, shape) if shape.scales_per_row else None
    values = ring.blocks[-1].at[slot, :, pl.ds(0, shape.value_lanes)]
    end = item.end_position() - first_key if masked else None  # no row sees keys from there on
    if end is not None and not shape.quantized:  # integers are never NaN
        pl.when(end < shape.keys_per_block)(partial(_zero_unseen, consumer, values, end))
    o = _add_values(program, state.o, rescale, weights(p, scales, end, shape), values, sync)
    for free in ring.free if read_to_the_end else ring.free[1:]:
        plgpu.barrier_arrive(free.at[slot])
    return _State(o, row_max, row_sum)


def _scores(
    consumer: _Consumer, step: Array, slot: Array, sync: Callable[[], None] | None
) -> tuple[Array, Any]:
    """Scores [ROWS, keys] of a step's block, once it is there, and the scales of its keys.

    Args:
        sync: is called while the products are under way, where warpgroups alternate.
    """
    shape, scratch = consumer.program.shape, consumer.program.scratch
    plgpu.barrier_wait(scratch.ring.ready[0].at[slot])
    scales = scratch.ring.scales_of(0, step, shape) if shape.scales_per_row else None
    q, keys = scratch.q.at[late(consumer.tile, step)], scratch.ring.blocks[0].at[slot]
    return scores(q, keys, scales, shape, sync), scales


def _zero_unseen(consumer: _Consumer, values: Any, end: Array) -> None:
    """`zero_unseen`, once for all tiles. Their warpgroups wait for each other before and after:
    values may be keys, which the other one may still read."""
    scratch, several = consumer.program.scratch, consumer.program.shape.tiles > 1
    if several:
        scratch.sync_consumers()
    pl.when(consumer.tile == 0)(lambda: zero_unseen(values, end))
    if several:
        scratch.sync_consumers()


def _add_values(
    program: Program, o: tuple[Array, ...], rescale: Array, by_part: list[Array], values: Any,
    sync: Callable[[], None] | None,
) -> tuple[Array, ...]:  # fmt: skip
    """Outputs, rescaled, plus products of weights, for each part of values, with a block."""
    scaled = [x * down(rescale, x.shape) for x in o]
    pairs = [
        (by_part[part], values.at[:, pl.ds(lane, n)]) for lane, n, part in _slices(program.shape)
    ]
    if sync is not None:
        sync()
    return add_products(scaled, pairs, simulated=program.simulated)


def _normalizer(
    row_max: Array, row_sum: Array, wg: Array, scratch: Scratch, shape: Shape
) -> tuple[Array, Array]:
    """What outputs are multiplied by to be means, and lse [ROWS]. Both include the keys of the
    other warpgroup, where two take turns."""
    own = None
    if shape.turns > 1:
        for i, x in enumerate((row_max, row_sum)):
            scratch.partials[wg, i] = x
        plgpu.commit_smem()
        scratch.sync_consumers()
        other_max, other_sum = (scratch.partials[1 - wg, i] for i in range(2))
        joint_max = jnp.maximum(row_max, other_max)
        own = jnp.exp2((row_max - joint_max) * shape.exp2_scale)
        row_sum = row_sum * own
        row_sum = row_sum + other_sum * jnp.exp2((other_max - joint_max) * shape.exp2_scale)
        row_max = joint_max
    row_sum = jnp.maximum(row_sum, 1e-30)
    scale = 1 / row_sum if own is None else own / row_sum
    return scale, (row_max * shape.exp2_scale + jnp.log2(row_sum)) * (1 / LOG2E)


def _store_results(program: Program, o: list[Array], lse: Array, lse_rows: Any, wg: Array) -> None:
    """Writes a tile's outputs and lse to global memory. Where two warpgroups take turns, the first
    adds to its outputs those of the second, which come through shared memory.

    Args:
        lse_rows: the rows of the tile in global memory.
    """
    shape, scratch = program.shape, program.scratch
    tile = 0 if shape.turns > 1 else wg
    out = _Output(
        program, tile, tile * shape.tokens_per_tile, program.o.at[program.split, program.head]
    )

    def store_lse() -> None:
        scratch.lse[tile] = lse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scratch.lse.at[tile], lse_rows)

    if shape.turns > 1:
        pl.when(wg == 0)(store_lse)
    else:
        store_lse()
    for x, (first, n, part) in zip(o, _slices(shape), strict=True):
        columns = output_columns(x, part, shape.store_lanes, shape)
        count = len(columns) * shape.store_lanes // n
        for i in range(0, len(columns), count):
            some = columns[i : i + count]
            lanes = pl.ds(first + i * n // len(columns), shape.store_lanes)
            if shape.turns == 1:
                out.put(some, adds=False)
                out.copy(lanes)
                continue
            pl.when(wg == 1)(partial(out.put, some, adds=False))
            scratch.sync_consumers()
            pl.when(wg == 0)(partial(out.add_and_copy, some, lanes))
            scratch.sync_consumers()


class _Output(NamedTuple):
    """The way of a tile's outputs through shared memory to global memory.

    Attributes:
        tile: the tile of the block of threads.
        first_token: of the item's tokens, the first in the tile.
        o: [rows, lanes] in global memory.
    """

    program: Program
    tile: Any
    first_token: Any
    o: Any

    def put(self, columns: list[Array], *, adds: bool) -> None:
        """Puts neighbouring columns into shared memory, or adds those that are there first."""
        shape, scratch = self.program.shape, self.program.scratch
        width = shape.store_lanes // len(columns)
        for i, x in enumerate(columns):
            some = scratch.o.at[self.tile, :, pl.ds(i * width, width)]
            if adds:
                other = versions.load_narrow(some, plgpu.Layout.WGMMA, self.program.simulated)
                x = x + other.astype(x.dtype)
            versions.store_narrow(some, x.astype(some.dtype))
        plgpu.commit_smem()

    def copy(self, lanes: Any) -> None:
        """Copies to lanes of the results what is in shared memory: the rows that hold a token."""
        shape, scratch, item = self.program.shape, self.program.scratch, self.program.item
        for row in range(0, ROWS, 8):

            @pl.when(
                item.first_position() + self.first_token + row // shape.heads_per_tile
                < item.end_position()
            )
            def _(row: int = row) -> None:
                target = pl.ds(item.first_row(shape) + self.tile * ROWS + row, 8)
                source = scratch.o.at[self.tile, pl.ds(row, 8)]
                plgpu.copy_smem_to_gmem(source, self.o.at[target, lanes])

        last = lanes.start + shape.store_lanes == shape.value_lanes
        plgpu.wait_smem_to_gmem(0, wait_read_only=not last)

    def add_and_copy(self, columns: list[Array], lanes: Any) -> None:
        """Copies the sum of columns and of what is in shared memory."""
        self.put(columns, adds=True)
        self.copy(lanes)
