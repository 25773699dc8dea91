"""The forward pass on Hopper: a softmax in progress for 64 queries of a head in each warpgroup.

While one warpgroup is at its exponentials, the other one has the matrix unit: they meet twice in
each tile, as FlashAttention-3 (section 3.1) has them do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.flash_attention.gpu_blocks import (
    BLOCK,
    GROUPS,
    LOG2E,
    GpuTile,
    Ring,
    Shape,
    Walk,
    bend,
    fill,
    run,
    seen,
    unit,
)
from kernels_pallas.flash_attention.reference import first_seen
from kernels_pallas.op import tried
from kernels_pallas.wgmma import ROWS, add_products, down, product

_NOTHING = -1e30  # a maximum before any logit: finite, so that hidden logits of -inf weigh 0


@dataclass(frozen=True)
class ForwardTile(GpuTile):
    """apart: whether warpgroups take turns at the matrix unit, 1 or 0."""

    apart: int = tried(1, 0)


def forward(
    q: Array, k: Array, v: Array, segments: Array, *,
    scale: float, window: Array | int = 0, sinks: Array | None = None, soft_cap: float = 0.0,
    tile: ForwardTile | None = None, interpret: Any = False,
) -> tuple[Array, Array]:  # fmt: skip
    """`reference.attend`, without its slopes."""
    tile = tile or ForwardTile()
    shape = Shape.of(q, k, v, scale, tile)
    B, N, T, H, Hv, dtype = shape.B, shape.N, shape.T, shape.H, shape.Hv, shape.dtype
    first, size = first_seen(segments, window), tile.tokens
    operands = [q, k, v, first, Walk.over_keys(first, size)]
    if sinks is not None:
        operands.append(sinks.astype(jnp.float32))
    scratch = [
        *(plgpu.SMEM((GROUPS, ROWS, n), dtype) for n in dict.fromkeys((H, Hv))),
        plgpu.SMEM((GROUPS, ROWS), jnp.int32),
        plgpu.SMEM((GROUPS, ROWS), jnp.float32),
        plgpu.Barrier(num_arrivals=2, num_barriers=GROUPS),
        plgpu.Barrier(num_arrivals=GROUPS),
        *Ring.scratch(tile.stages, ((size, H), dtype)),
        *Ring.scratch(tile.stages, ((size, Hv), dtype)),
    ]
    known = {"shape": shape, "size": size, "scale": scale, "soft_cap": soft_cap}
    known |= {"apart": bool(tile.apart)}
    return run(
        partial(_kernel, **known, sunk=sinks is not None, simulated=bool(interpret)),
        operands,
        [jax.ShapeDtypeStruct((B, N, T, Hv), dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)],
        {"head": N, "block": T // BLOCK, "row": B},
        scratch,
        name="flash_attention",
        interpret=interpret,
    )


def _kernel(
    q_ref, k_ref, v_ref, first_ref, walk_ref, *refs,
    shape: Shape, size: int, scale: float, soft_cap: float, apart: bool, sunk: bool,
    simulated: bool,
):  # fmt: skip
    sinks_ref, refs = (refs[0], refs[1:]) if sunk else (None, refs)
    o_ref, lse_ref, *rows, first_smem, lse_smem, arrived, met = refs[:-6]
    k_ring, v_ring = Ring.of(refs[-6:-3]), Ring.of(refs[-3:])  # keys are given back first
    to_logits = unit(scale, soft_cap)
    tile = ROWS, size
    q_smem, o_smem = rows[0], rows[-1]  # the same, where both are as wide
    wg, row, head = lax.axis_index("wg"), lax.axis_index("row"), lax.axis_index("head")
    block = shape.T // BLOCK - 1 - lax.axis_index("block")  # those with the most work begin first
    walk = Walk.of(walk_ref, row, block)
    at = block * BLOCK + wg * ROWS

    @pl.when(wg == GROUPS)
    def _bring():
        plgpu.set_max_registers(24, action="decrease")

        def source(ref: Any, step: Array) -> list[Any]:
            return [ref.at[row, lax.div(head, shape.G), pl.ds(walk.tile(step) * size, size)]]

        fill(walk.steps, (k_ring, partial(source, k_ref)), (v_ring, partial(source, v_ref)))

    @pl.when(wg < GROUPS)
    def _compute():
        plgpu.set_max_registers(240, action="increase")
        queries = pl.ds(at, ROWS)
        plgpu.copy_gmem_to_smem(q_ref.at[row, head, queries], q_smem.at[wg], arrived.at[wg])
        plgpu.copy_gmem_to_smem(first_ref.at[row, queries], first_smem.at[wg], arrived.at[wg])
        plgpu.barrier_wait(arrived.at[wg])

        def meet() -> None:
            plgpu.barrier_arrive(met)
            plgpu.barrier_wait(met)

        def attend(step: Array, i: Array, state: Any, masked: bool) -> Any:
            value, top, total = state
            (k_smem,), free = k_ring.take(step)
            s = product(q_smem.at[wg], k_smem.T, meet if apart else None)
            plgpu.barrier_arrive(free)
            s = bend(s, scale, soft_cap)
            if masked:
                s = jnp.where(seen(at, i * size, first_smem[wg], tile, 0), s, -jnp.inf)
            before, top = top, jnp.maximum(top, jnp.max(s, 1))
            p = jnp.exp2(s * to_logits - down(top * to_logits, tile))
            shrink = jnp.exp2((before - top) * to_logits)
            total = total * shrink + jnp.sum(p, 1)
            value = value * down(shrink, value.shape)
            p = p.astype(shape.dtype)
            (v_smem,), free = v_ring.take(step)
            meet() if apart else None
            (value,) = add_products([value], [(p, v_smem)], simulated=simulated)
            plgpu.barrier_arrive(free)
            return value, top, total

        sink = jnp.float32(_NOTHING) if sinks_ref is None else sinks_ref[head] * (LOG2E / to_logits)
        pl.when(wg == 1)(meet) if apart else None  # and so it is half a tile behind
        value, top, total = walk(attend, (
            jnp.zeros((ROWS, shape.Hv), jnp.float32),
            jnp.full((ROWS,), sink, jnp.float32),
            jnp.full((ROWS,), 1.0 if sunk else 0.0, jnp.float32),
        ))  # fmt: skip
        pl.when(wg == 0)(meet) if apart else None
        some = jnp.where(total > 0, total, 1.0)
        o_smem[wg] = (value / down(some, value.shape)).astype(shape.dtype)
        lse_smem[wg] = jnp.where(
            total > 0, (top * to_logits + jnp.log2(some)) * (1 / LOG2E), -jnp.inf
        )
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_smem.at[wg], o_ref.at[row, head, queries])
        plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[row, head, queries])
        plgpu.wait_smem_to_gmem(0)
