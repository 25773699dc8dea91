"""The Hopper kernel where values are many lanes of the keys, as latent attention has them.

Outputs of 64 rows and 512 lanes are more than a warpgroup's registers hold, so two consumers share
the lanes. The first one also computes scores and softmax, and hands weights and the factors that
rescale outputs to the other one through shared memory. It has fewer lanes of values than the
other, or it would spill. While it works on the next weights, the other one still adds values up. A
third warpgroup is the producer.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.hopper import ROWS, add_products, down, late, store_rows
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

_WIDEST = 256  # lanes that wgmma takes
_Slices = list[tuple[int, int, int]]


class Scratch(NamedTuple):
    """Shared memory of a block of threads, and barriers.

    Attributes:
        q: [1, rows, lanes], copied once; q_ready says so.
        p: weights [weights of a key, rows, keys].
        rescale: what outputs so far are multiplied by, and at last the reciprocal sum [rows].
        weights_ready: `p` and `rescale` are filled.
        weights_free: the second consumer has read them.
        ring: blocks of keys.
    """

    q: Any
    p: Any
    rescale: Any
    q_ready: Any
    weights_ready: Any
    weights_free: Any
    ring: Any

    @classmethod
    def of(cls, shape: Shape) -> Scratch:
        """What the kernel asks for."""
        return cls(
            plgpu.SMEM((1, ROWS, shape.key_lanes), jnp.bfloat16),
            plgpu.SMEM((shape.weights_per_key, ROWS, shape.keys_per_block), jnp.bfloat16),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(),
            plgpu.Barrier(),
            plgpu.Barrier(),
            Ring.scratch(shape, consumers=2),
        )


class _State(NamedTuple):
    """What the first consumer keeps: its slices of unnormalised outputs [ROWS, n], the maximum and
    the sum of each row [ROWS]."""

    o: tuple[Array, ...]
    row_max: Array
    row_sum: Array


def kernel(*refs: Any, shape: Shape, simulated: bool) -> None:
    """Attends for one item, one tile of heads and one split of the keys.

    Args:
        refs: see `Program`.
    """
    program = Program.of(*refs, shape=shape, simulated=simulated)
    wg = lax.axis_index("wg")

    @pl.when(program.item.seqs >= 0)
    def _() -> None:
        work, roles = program.work(), (_attend, _add_values, _produce)
        lax.switch(wg, [partial(role, program, work) for role in roles])


def _slices(shape: Shape) -> tuple[_Slices, _Slices]:
    """The lanes of values that either consumer keeps, as `Shape.value_slices` has them."""
    first = shape.value_parts[0] if shape.int4 else shape.value_lanes // 4 // 64 * 64
    rest = shape.value_slices(first, shape.value_lanes, _WIDEST)
    return shape.value_slices(0, first, _WIDEST), rest


def _registers(shape: Shape) -> tuple[int, int, int]:
    """Of a thread of either consumer and of the producer: all that three warpgroups have
    (`wgmma.registers`)."""
    return (240, 224, 40) if shape.quantized else (240, 240, 24)


def _produce(program: Program, work: Work) -> None:
    """The third warpgroup."""
    plgpu.set_max_registers(_registers(program.shape)[2], action="decrease")
    produce(program, program.scratch.ring, work)


def _attend(program: Program, work: Work) -> None:
    """The first consumer: scores, softmax and a few lanes of values."""
    shape, scratch, (own, _) = program.shape, program.scratch, _slices(program.shape)
    plgpu.set_max_registers(_registers(shape)[0], action="increase")
    queries = program.q.at[program.head, pl.ds(program.item.first_row(shape), ROWS)]
    plgpu.copy_gmem_to_smem(queries, scratch.q.at[0], scratch.q_ready)
    plgpu.barrier_wait(scratch.q_ready)
    state = _State(_zeros(own), *(jnp.full((ROWS,), x, jnp.float32) for x in (MASK_VALUE, 0.0)))
    for masked in (True, False):
        body = partial(_attend_block, program, work, masked=masked)
        state = work.loop(body, state, masked=masked, turn=0, turns=1)
    o, row_max, row_sum = state
    row_sum = jnp.maximum(row_sum, 1e-30)
    pl.when(work.blocks > 0)(lambda: plgpu.barrier_wait(scratch.weights_free))
    scratch.rescale[...] = 1 / row_sum
    plgpu.commit_smem()
    plgpu.barrier_arrive(scratch.weights_ready)
    lse = (row_max * shape.exp2_scale + jnp.log2(row_sum)) * (1 / LOG2E)
    program.lse[program.split, program.number, program.head] = lse
    _store(program, o, 1 / row_sum, own)


def _attend_block(
    program: Program, work: Work, step: Array, state: _State, *, masked: bool
) -> _State:
    """The state with the block of keys of one more step, whose weights the other consumer gets."""
    shape, scratch, item = program.shape, program.scratch, program.item
    keys, free = _take_block(program, step)
    copy = work.copy_of_step(step, shape)
    first_key = copy * shape.keys_per_copy
    scales = scratch.ring.scales_of(0, step, shape) if program.sources.scales else None
    s = scores(scratch.q.at[late(0, step)], keys, scales, shape)
    hide = None
    if masked:
        hide = mask(item.first_position(), first_key, visible_keys(program.window), shape)
    p, row_max, rescale = softmax(s, state.row_max, hide, shape)
    sums = row_sums(p, shape)
    for masses in program.masses:
        rows = masses.at[program.number, program.head]
        store_masses(rows, sums, row_max * shape.exp2_scale, copy)
    row_sum = state.row_sum * rescale + sum(sums)
    end = item.end_position() - first_key if masked else None  # no row sees keys from there on
    if end is not None and not shape.quantized:  # integers are never NaN
        values = keys.at[:, pl.ds(0, shape.value_lanes)]
        pl.when(end < shape.keys_per_block)(lambda: zero_unseen(values, end))
    pl.when(step > 0)(lambda: plgpu.barrier_wait(scratch.weights_free))
    for part, of_part in enumerate(weights(p, scales, end, shape)):
        scratch.p[part] = of_part
    scratch.rescale[...] = rescale
    plgpu.commit_smem()
    plgpu.barrier_arrive(scratch.weights_ready)
    o = _add_products(program, step, state.o, rescale, keys, _slices(shape)[0])
    plgpu.barrier_arrive(free)
    return _State(o, row_max, row_sum)


def _add_values(program: Program, work: Work) -> None:
    """The second consumer: the other lanes of values."""
    shape, scratch, (_, own) = program.shape, program.scratch, _slices(program.shape)
    plgpu.set_max_registers(_registers(shape)[1], action="increase")

    def add_block(step: Array, o: tuple[Array, ...]) -> tuple[Array, ...]:
        keys, free = _take_block(program, step)
        plgpu.barrier_wait(scratch.weights_ready)
        o = _add_products(program, step, o, scratch.rescale[...], keys, own)
        plgpu.barrier_arrive(scratch.weights_free)
        plgpu.barrier_arrive(free)
        return o

    o = lax.fori_loop(0, work.blocks, add_block, _zeros(own))
    plgpu.barrier_wait(scratch.weights_ready)
    _store(program, o, scratch.rescale[...], own)


def _zeros(slices: _Slices) -> tuple[Array, ...]:
    return tuple(jnp.zeros((ROWS, n), jnp.float32) for _, n, _ in slices)


def _take_block(program: Program, step: Array) -> tuple[Any, Any]:
    """A step's block of keys, once it is there, and the barrier on which it is given back."""
    (blocks,), (ready,), (free,) = (
        getattr(program.scratch.ring, name) for name in ("blocks", "ready", "free")
    )
    slot = lax.rem(step, jnp.int32(program.shape.stages))
    slot = late(slot, step) if program.shape.stages == 1 else slot
    plgpu.barrier_wait(ready.at[slot])
    return blocks.at[slot], free.at[slot]


def _add_products(
    program: Program, step: Array, o: tuple[Array, ...], rescale: Array, keys: Any, slices: _Slices
) -> tuple[Array, ...]:
    """Outputs, rescaled, plus products of weights with slices of a step's block."""
    p, scaled = program.scratch.p, [x * down(rescale, x.shape) for x in o]
    pairs = [(p.at[late(part, step)], keys.at[:, pl.ds(at, n)]) for at, n, part in slices]
    return add_products(scaled, pairs, simulated=program.simulated)


def _store(program: Program, o: tuple[Array, ...], scale: Array, slices: _Slices) -> None:
    """Writes slices of outputs, times scale [ROWS], to global memory: those of rows with a token.
    Behind them begin the rows of the next item."""
    shape, item = program.shape, program.item
    rows = pl.ds(item.first_row(shape), ROWS)
    end = (item.token_ends - item.token_begins) * shape.heads_per_tile
    for x, (first, n, part) in zip(o, slices, strict=True):
        columns = output_columns(x * down(scale, x.shape), part, n, shape)
        width, pairs = n // len(columns), []
        for i, some in enumerate(columns):
            lanes = pl.ds(first + i * width, width)
            target = program.o.at[program.split, program.head, rows, lanes]
            pairs.append((target, some.astype(program.o.dtype)))
        store_rows(pairs, end, simulated=program.simulated)
