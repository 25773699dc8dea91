"""The Hopper kernel where values are wide lanes of the keys, as latent attention has them.

Sums of 64 rows and 512 lanes are more than a warpgroup's registers hold, so two of them share the
lanes. The first one also multiplies queries with keys and turns products into weights, which it
hands to the other one through shared memory, with what shrinks the sums so far. It has the fewer
lanes, or it would spill. While it works on the next weights, the other one still adds values up.
A third one brings pages.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import versions
from kernels_pallas.hopper import ROWS, add_products, down, late
from kernels_pallas.paged_attention.mosaic_gpu_blocks import Item, Ring, Shape, Work, reach
from kernels_pallas.paged_attention.mosaic_gpu_bringing import bring
from kernels_pallas.paged_attention.mosaic_gpu_kernel import (
    HIDDEN,
    LOG2E,
    by_kind,
    keep_masses,
    mask,
    part_sums,
    pieces,
    scores,
    silence,
    softmax,
    weigh,
)

_WIDEST = 256  # lanes that wgmma takes
_Shares = list[tuple[int, int, int]]


def _shares(shape: Shape) -> tuple[_Shares, _Shares]:
    """The sums that either warpgroup keeps, as `Shape.shares` has them."""
    first = shape.value_parts[0] if shape.nibbles else shape.values // 4 // 64 * 64
    return shape.shares(0, first, _WIDEST), shape.shares(first, shape.values, _WIDEST)


def _registers(shape: Shape) -> tuple[int, int, int]:
    """Of a thread that keeps scores, that adds values, and that brings pages: all that three
    warpgroups have (`wgmma.registers`)."""
    return (240, 224, 40) if shape.ahead else (240, 240, 24)


def scratch(shape: Shape) -> list[Any]:
    """What `kernel` asks for."""
    return [
        plgpu.SMEM((1, ROWS, shape.lanes), jnp.bfloat16),
        plgpu.SMEM((shape.weights, ROWS, shape.keys), jnp.bfloat16),
        plgpu.SMEM((ROWS,), jnp.float32),
        plgpu.Barrier(),
        plgpu.Barrier(),
        plgpu.Barrier(),
        Ring.scratch(shape, readers=2),
    ]


def kernel(
    layer: Any, window: Any, tables: Any, items: Any, q_ref: Any, *refs: Any,
    shape: Shape, simulated: bool,
) -> None:  # fmt: skip
    stacks, scales, (o_ref, lse_ref, *mass_refs), refs = by_kind(refs, shape)
    q_smem, p_smem, shrink_smem, arrived, weighed, added, ring = refs
    (blocks,), (ready,), (free,) = ring.blocks, ring.ready, ring.free
    head, split, number = (lax.axis_index(name) for name in ("head", "split", "item"))
    item, wg, (few, many) = Item(items), lax.axis_index("wg"), _shares(shape)
    for_scores, for_values, to_bring = _registers(shape)

    def take(step: Array) -> tuple[Any, Any]:
        """A block of keys, once it is there, and the barrier on which it is given back."""
        slot = lax.rem(step, jnp.int32(shape.stages))
        slot = late(slot, step) if shape.stages == 1 else slot
        plgpu.barrier_wait(ready.at[slot])
        return blocks.at[slot], free.at[slot]

    def store(sums: Any, scale: Array, share: Any) -> None:
        rows = pl.ds(item.row(shape), ROWS)
        for x, (first, n, part) in zip(sums, share, strict=True):
            columns = pieces(x * down(scale, x.shape), part, n, shape)
            width = n // len(columns)
            for i, some in enumerate(columns):
                lanes = pl.ds(first + i * width, width)
                there = o_ref.at[split, head, rows, lanes]
                versions.store_narrow(there, some.astype(o_ref.dtype))

    def add(step: Array, sums: Any, shrink: Array, keys: Any, share: _Shares) -> tuple[Array, ...]:
        sums = [x * down(shrink, x.shape) for x in sums]
        pairs = [(p_smem.at[late(part, step)], keys.at[:, pl.ds(at, n)]) for at, n, part in share]
        return add_products(sums, pairs, simulated=simulated)

    def nothing(share: Any) -> tuple[Array, ...]:
        return tuple(jnp.zeros((ROWS, n), jnp.float32) for _, n, _ in share)

    @pl.when(item.seqs >= 0)
    def _() -> None:
        work = Work.of(shape, window, item)

        def bring_pages() -> None:
            plgpu.set_max_registers(to_bring, action="decrease")
            bring(work, shape, layer, tables, stacks, scales, ring, simulated=simulated)

        def keep_scores() -> None:
            plgpu.set_max_registers(for_scores, action="increase")
            queries = q_ref.at[head, pl.ds(item.row(shape), ROWS)]
            plgpu.copy_gmem_to_smem(queries, q_smem.at[0], arrived)
            plgpu.barrier_wait(arrived)

            def attend(step: Array, state: tuple[Any, ...], masked: bool) -> tuple[Any, ...]:
                sums, top, total = state
                keys, done = take(step)
                at = work.at(step, shape)
                key = at * shape.part
                steps = ring.steps(0, step, shape) if scales else None
                s = scores(q_smem.at[late(0, step)], keys, steps, shape)
                hidden = mask(item.position(), key, reach(window), shape) if masked else None
                p, now, shrink = softmax(s, top, hidden, shape)
                parts = part_sums(p, shape) if shape.mass else [jnp.sum(p, 1)]
                for masses in mass_refs:
                    keep_masses(masses.at[number, head], parts, now * shape.unit, at)
                total = total * shrink + sum(parts)
                past = item.behind() - key if masked else None  # nobody sees these keys
                if past is not None and not shape.ahead:  # integers are finite
                    values = keys.at[:, pl.ds(0, shape.values)]
                    pl.when(past < shape.keys)(lambda: silence(values, past))
                pl.when(step > 0)(lambda: plgpu.barrier_wait(added))  # the weights before these
                for part, weights in enumerate(weigh(p, steps, past, shape)):
                    p_smem[part] = weights
                shrink_smem[...] = shrink
                plgpu.commit_smem()
                plgpu.barrier_arrive(weighed)
                sums = add(step, sums, shrink, keys, few)
                plgpu.barrier_arrive(done)
                return sums, now, total

            state = nothing(few), *(jnp.full((ROWS,), x, jnp.float32) for x in (HIDDEN, 0.0))
            for masked in (True, False):
                state = work.walk(
                    partial(attend, masked=masked), state, masked=masked, turn=0, turns=1
                )
            sums, top, total = state
            total = jnp.maximum(total, 1e-30)
            pl.when(work.steps > 0)(lambda: plgpu.barrier_wait(added))
            shrink_smem[...] = 1 / total
            plgpu.commit_smem()
            plgpu.barrier_arrive(weighed)
            lse_ref[split, number, head] = (top * shape.unit + jnp.log2(total)) * (1 / LOG2E)
            store(sums, 1 / total, few)

        def add_values() -> None:
            plgpu.set_max_registers(for_values, action="increase")

            def attend(step: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
                keys, done = take(step)
                plgpu.barrier_wait(weighed)
                sums = add(step, sums, shrink_smem[...], keys, many)
                plgpu.barrier_arrive(added)
                plgpu.barrier_arrive(done)
                return sums

            sums = lax.fori_loop(0, work.steps, attend, nothing(many))
            plgpu.barrier_wait(weighed)
            store(sums, shrink_smem[...], many)

        lax.switch(wg, (keep_scores, add_values, bring_pages))
