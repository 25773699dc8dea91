"""The forward pass on Hopper: each warpgroup keeps an online softmax of 64 queries of a head.

While one warpgroup computes exponentials, the other one has the tensor cores. They synchronize
twice per tile of keys: the ping-pong schedule of FlashAttention-3 (section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.flash_attention.gpu_blocks import (
    BLOCK,
    GROUPS,
    GpuTile,
    Options,
    Ring,
    Shape,
    Walk,
    capped,
    fill,
    run,
    seen,
)
from kernels_pallas.flash_attention.reference import first_seen
from kernels_pallas.hopper import ROWS, add_products, down, product
from kernels_pallas.op import tried
from kernels_pallas.softmax import LOG2E, begin


@dataclass(frozen=True)
class ForwardTile(GpuTile):
    """ping_pong: 1 if the warpgroups alternate at the tensor cores, 0 if each runs freely."""

    ping_pong: int = tried(1, 0)


@dataclass(frozen=True)
class _Options(Options):
    ping_pong: bool
    has_sinks: bool


def forward(
    q: Array, k: Array, v: Array, segments: Array, *,
    scale: float, window: Array | int = 0, sinks: Array | None = None, soft_cap: float = 0.0,
    tile: ForwardTile | None = None, interpret: Any = False,
) -> tuple[Array, Array]:  # fmt: skip
    """`reference.attend` as a Hopper kernel, without a gradient.

    Raises:
        UnsupportedError: see `Shape.of`; or the tile needs more shared memory than there is.
    """
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
    options = _Options(
        shape, size, scale, soft_cap, bool(interpret), bool(tile.ping_pong), sinks is not None
    )
    return run(
        partial(_kernel, options=options),
        operands,
        [jax.ShapeDtypeStruct((B, N, T, Hv), dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)],
        {"head": N, "block": T // BLOCK, "row": B},
        scratch,
        name="flash_attention",
        interpret=interpret,
    )


class _Refs(NamedTuple):
    """What the kernel is given: arrays in global memory, then those in shared memory."""

    q: Any  # [B, N, T, H]
    k: Any  # [B, K, T, H]
    v: Any  # [B, K, T, Hv]
    first: Any  # [B, T], of `first_seen`
    walk: Any  # [B, T / 128, 4], of `Walk.over_keys`
    sinks: Any  # [N], or None
    o: Any  # [B, N, T, Hv]
    lse: Any  # [B, N, T]
    q_smem: Any  # [2, 64, H]
    o_smem: Any  # [2, 64, Hv]; q_smem itself if H == Hv, since queries are read before
    first_smem: Any  # [2, 64]
    lse_smem: Any  # [2, 64]
    loaded: Any  # a barrier per warpgroup, for its queries and `first`
    met: Any  # the barrier of the ping-pong
    k_ring: Ring  # of its own, since keys are released before values
    v_ring: Ring

    @classmethod
    def of(cls, refs: Sequence[Any], has_sinks: bool) -> _Refs:
        q, k, v, first, walk, *sinks = refs[: 5 + has_sinks]
        o, lse, *heads, first_smem, lse_smem, loaded, met = refs[5 + has_sinks : -6]
        return cls(
            q, k, v, first, walk, sinks[0] if sinks else None, o, lse,
            heads[0], heads[-1], first_smem, lse_smem, loaded, met,
            Ring.of(refs[-6:-3]), Ring.of(refs[-3:]),
        )  # fmt: skip


class _Share(NamedTuple):
    """What one warpgroup computes: 64 queries, from `begin` on, of a head of a row of the batch."""

    wg: Any
    row: Array
    head: Array
    walk: Walk
    begin: Array

    @property
    def queries(self) -> tuple[Array, Array, Any]:
        """Where they lie in [B, N, T]."""
        return self.row, self.head, pl.ds(self.begin, ROWS)


def _kernel(*args, options: _Options):
    refs = _Refs.of(args, options.has_sinks)
    wg, row, head = lax.axis_index("wg"), lax.axis_index("row"), lax.axis_index("head")
    last = options.shape.T // BLOCK - 1
    block = last - lax.axis_index("block")  # blocks with the most work come first
    walk = Walk.of(refs.walk, row, block)
    share = _Share(wg, row, head, walk, block * BLOCK + wg * ROWS)

    @pl.when(wg == GROUPS)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        _load_keys(refs, options, share)

    @pl.when(wg < GROUPS)
    def _():
        plgpu.set_max_registers(240, action="increase")
        _load_queries(refs, share)
        _store(refs, options, share, *_attend(refs, options, share))


def _load_keys(refs: _Refs, options: _Options, share: _Share) -> None:
    """Fills the rings with the tiles of keys and values that the block walks."""
    size = options.size

    def source(ref: Any, step: Array) -> list[Any]:
        head = lax.div(share.head, options.shape.G)
        return [ref.at[share.row, head, pl.ds(share.walk.tile(step) * size, size)]]

    rings = (refs.k_ring, partial(source, refs.k)), (refs.v_ring, partial(source, refs.v))
    fill(share.walk.steps, *rings)


def _load_queries(refs: _Refs, share: _Share) -> None:
    """Loads a warpgroup's queries, and the first key that each of them sees."""
    wg, row, _, queries = share.wg, *share.queries
    loaded = refs.loaded.at[wg]
    plgpu.copy_gmem_to_smem(refs.q.at[share.queries], refs.q_smem.at[wg], loaded)
    plgpu.copy_gmem_to_smem(refs.first.at[row, queries], refs.first_smem.at[wg], loaded)
    plgpu.barrier_wait(loaded)


def _meet(barrier: Any) -> None:
    """Waits for the other warpgroup."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def _attend(refs: _Refs, options: _Options, share: _Share) -> tuple[Array, Array, Array]:
    """The online softmax of all tiles: sums of values [64, Hv], row maxima and row sums [64]."""
    sink = refs.sinks[share.head] if options.has_sinks else None
    row_max, row_sum = begin(sink, LOG2E / options.logit_scale)
    if options.ping_pong:  # warpgroup 1 waits here, and stays half a tile behind

        @pl.when(share.wg == 1)
        def _():
            _meet(refs.met)

    state = share.walk(partial(_add_tile, refs, options, share), (
        jnp.zeros((ROWS, options.shape.Hv), jnp.float32),
        jnp.full((ROWS,), row_max, jnp.float32),
        jnp.full((ROWS,), row_sum, jnp.float32),
    ))  # fmt: skip
    if options.ping_pong:

        @pl.when(share.wg == 0)
        def _():
            _meet(refs.met)

    return state


def _add_tile(
    refs: _Refs, options: _Options, share: _Share, step: Array, tile: Array,
    state: tuple[Array, Array, Array], masked: bool,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Adds one tile of keys to the state of `_attend`."""
    values, row_max, row_sum = state
    (k_smem,), free = refs.k_ring.take(step)
    meanwhile = partial(_meet, refs.met) if options.ping_pong else None
    s = product(refs.q_smem.at[share.wg], k_smem.T, meanwhile)
    plgpu.barrier_arrive(free)
    s = capped(s, options.scale, options.soft_cap)
    if masked:
        first_key, first = tile * options.size, refs.first_smem[share.wg]
        s = jnp.where(seen(share.begin, first_key, first, options.tile, 0), s, -jnp.inf)
    old_max, row_max = row_max, jnp.maximum(row_max, jnp.max(s, 1))
    p = jnp.exp2(s * options.logit_scale - down(row_max * options.logit_scale, options.tile))
    rescale = jnp.exp2((old_max - row_max) * options.logit_scale)
    row_sum = row_sum * rescale + jnp.sum(p, 1)
    values = values * down(rescale, values.shape)
    p = p.astype(options.shape.dtype)
    (v_smem,), free = refs.v_ring.take(step)
    if options.ping_pong:
        _meet(refs.met)
    (values,) = add_products([values], [(p, v_smem)], simulated=options.simulated)
    plgpu.barrier_arrive(free)
    return values, row_max, row_sum


def _store(
    refs: _Refs, options: _Options, share: _Share, values: Array, row_max: Array, row_sum: Array
) -> None:
    """Stores o and lse of a warpgroup's queries."""
    wg = share.wg
    some = jnp.where(row_sum > 0, row_sum, 1.0)
    refs.o_smem[wg] = (values / down(some, values.shape)).astype(options.shape.dtype)
    refs.lse_smem[wg] = jnp.where(
        row_sum > 0, (row_max * options.logit_scale + jnp.log2(some)) * (1 / LOG2E), -jnp.inf
    )
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(refs.o_smem.at[wg], refs.o.at[share.queries])
    plgpu.copy_smem_to_gmem(refs.lse_smem.at[wg], refs.lse.at[share.queries])
    plgpu.wait_smem_to_gmem(0)
