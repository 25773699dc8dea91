"""Bringing blocks of keys and values to shared memory on Hopper, and what is done on their way."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.paged_attention.mosaic_gpu_blocks import SORTED, Ring, Shape, Work
from kernels_pallas.paged_attention.mosaic_gpu_widening import unpack, widen


def bring(
    work: Work, shape: Shape, layer: Any, tables: Any, stacks: Any, scales: Any, ring: Ring,
    caches: slice = slice(None), *, simulated: bool,
) -> None:  # fmt: skip
    """Copies blocks of keys, and of values, to shared memory as room becomes free.

    Args:
        stacks, scales: in global memory. Only rows of eight or four bits have scales, if they have
            any. Rows of four bits lie [L, P, K, Z / 4, 2, W], their scales [L, P, n, Z / 4, 4].
        caches: those that this warpgroup brings. Who brings keys of four bits brings all scales.
    """
    ring, stacks, owned = ring.of(caches), stacks[caches], shape.owned
    if not shape.nibbles:
        scales, owned = scales[caches], owned[caches]
    sorts = shape.nibbles and not caches.start
    head = lax.div(lax.axis_index("head"), jnp.int32(shape.heads))

    def parts(step: Array, of: int = 1) -> Any:
        """Where the parts of a block lie: pages, keys in them, and keys of the block, or groups of
        `of` keys."""
        size, first = shape.part // of, work.at(step, shape)
        for p in range(shape.count):  # none is left out, since barriers count
            at = jnp.minimum(first + p, work.end_part - 1)
            page = tables[work.seq * shape.row + lax.div(at, jnp.int32(shape.parts))]
            z = pl.ds(lax.rem(at, jnp.int32(shape.parts)) * size, size)
            yield page, z, pl.ds(p * size, size)

    def copy(step: Array, *places: tuple[Any, Any, Any]) -> None:
        slot = lax.rem(step, jnp.int32(places[0][1].shape[0]))
        for page, z, to in parts(step):
            for stack, block, told in places:
                where = stack.at[layer[0], page, head, z, pl.ds(0, block.shape[-1])]
                plgpu.copy_gmem_to_smem(where, block.at[slot, to], told.at[slot])

    def copy_pairs(step: Array) -> None:
        slot, half = lax.rem(step, jnp.int32(shape.ahead)), shape.keys // SORTED
        for page, z, to in parts(step, SORTED):
            for stack, raw, told in zip(stacks, ring.raw, ring.arrived, strict=True):
                for odd in range(2):
                    where = stack.at[layer[0], page, head, z, odd, pl.ds(0, raw.shape[-1])]
                    here = raw.at[slot, pl.ds(odd * half + to.start, to.size)]
                    plgpu.copy_gmem_to_smem(where, here, told.at[slot])

    def copy_scales(step: Array) -> None:
        for stack, own, block, told in zip(scales, owned, ring.scales, ring.scaled, strict=True):
            turn = lax.rem(step, jnp.int32(block.shape[0]))
            for page, z, to in parts(step):
                for b in range(block.shape[1]):
                    where = stack.at[layer[0], page, head * own + b, z]
                    plgpu.copy_gmem_to_smem(where, block.at[turn, b, to], told.at[turn])

    def copy_unsorted_scales(step: Array) -> None:
        (block,), (told,), row = ring.unsorted, ring.scaled, 0
        turn = lax.rem(step, jnp.int32(shape.ahead))
        for stack, own, n in zip(scales, owned, shape.scales, strict=True):
            for page, z, to in parts(step, SORTED):
                for b in range(n):
                    where = stack.at[layer[0], page, head * own + b, z]
                    plgpu.copy_gmem_to_smem(where, block.at[turn, row + b, to], told.at[turn])
            row += n

    def begin(step: Array) -> None:
        if shape.nibbles:
            copy_unsorted_scales(step) if sorts else None
            copy_pairs(step)
        else:
            copy(step, *zip(stacks, ring.raw, ring.arrived, strict=True))
            copy_scales(step)

    pl.loop(0, jnp.minimum(work.steps, shape.ahead))(begin) if shape.ahead else None

    def finish(step: Array) -> None:
        at, slot = (lax.rem(step, jnp.int32(n)) for n in (shape.ahead, shape.stages))
        if sorts:
            plgpu.barrier_wait(ring.scaled[0].at[at])
            sort(ring.unsorted[0].at[at], ring.scales[0].at[slot])
        for raw, arrived, block, ready in zip(
            ring.raw, ring.arrived, ring.blocks, ring.ready, strict=True
        ):
            plgpu.barrier_wait(arrived.at[at])
            if shape.nibbles:
                unpack(raw.at[at], block.at[slot], SORTED, simulated=simulated)
            else:  # few registers are left
                lanes = 64 if shape.wide else 128
                widen(raw.at[at], block.at[slot], lanes, simulated=simulated)
            plgpu.barrier_arrive(ready.at[slot])
        pl.when(step + shape.ahead < work.steps)(lambda: begin(step + shape.ahead))

    @pl.loop(0, work.steps + shape.stages)  # simulators want even the last block's freedom seen
    def _step(step: Array) -> None:
        slot = lax.rem(step, jnp.int32(shape.stages))
        for free, *place in zip(ring.free, stacks, ring.blocks, ring.ready, strict=True):
            pl.when(step >= shape.stages)(partial(plgpu.barrier_wait, free.at[slot]))
            if not shape.ahead:
                pl.when(step < work.steps)(partial(copy, step, tuple(place)))
        if shape.ahead:
            pl.when(step < work.steps)(partial(finish, step))


def sort(unsorted: Any, scales: Any) -> None:
    """Scales [n, keys / 4, 4] in the order of keys [n, keys]: a thread takes one at a time."""
    turned = unsorted.at[:, pl.ds(0, scales.shape[1] // SORTED)].transpose((0, 2, 1))
    x = plgpu.layout_cast(turned[...], plgpu.Layout.WG_STRIDED(turned.shape, vec_size=1))
    scales[...] = x.reshape(scales.shape)
