"""What the three Hopper kernels share: sizes, the ring of tiles that TMA fills, products, masks.

Two warpgroups compute, 64 rows of the output each, and a third one brings tiles for both. A block
walks the tiles that have work: from the first that its first token sees to the diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.flash_attention.reference import last_queries
from kernels_pallas.op import UnsupportedError, tried
from kernels_pallas.tiling import fit
from kernels_pallas.wgmma import ROWS

LOG2E = math.log2(math.e)
GROUPS = 2  # that compute
BLOCK = ROWS * GROUPS


@dataclass(frozen=True)
class GpuTile:
    """tokens: in a tile that is brought, 64 or 128. stages: tiles on their way or in use."""

    tokens: int = tried(128, 64)
    stages: int = tried(2, 3, 4)


@dataclass(frozen=True)
class Shape:
    """Sizes of one call."""

    B: int
    N: int
    K: int
    T: int
    H: int
    Hv: int
    dtype: Any

    @property
    def G(self) -> int:
        """Heads that share keys."""
        return self.N // self.K

    @classmethod
    def of(cls, q: Array, k: Array, v: Array, scale: float, tile: GpuTile) -> Shape:
        (B, N, T, H), K, Hv = q.shape, k.shape[1], v.shape[3]
        if scale <= 0:
            raise UnsupportedError(f"{scale=}: above 0, or the largest product is not what counts")
        if not q.dtype == k.dtype == v.dtype == jnp.bfloat16:
            raise UnsupportedError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: only bfloat16")
        if N % K:
            raise UnsupportedError(f"{N=} heads cannot share {K=} KV heads evenly")
        if T % BLOCK:
            raise UnsupportedError(f"{T=} must be a multiple of {BLOCK}: pad with segment 0")
        if {H, Hv} - {64, 128}:
            raise UnsupportedError(f"heads of {H=} and {Hv=}: only 64 and 128")
        if tile.tokens not in (ROWS, BLOCK):
            raise UnsupportedError(f"{tile} must be of {ROWS} or {BLOCK} tokens")
        return cls(B, N, K, T, H, Hv, q.dtype)


@dataclass(frozen=True)
class Ring:
    """Slots of shared memory that one warpgroup fills and the others empty, in the same order."""

    tiles: Sequence[Any]  # [stages, ...] each
    ready: Any  # a barrier per slot, on which every tile arrives
    free: Any  # a barrier per slot, on which every warpgroup that computes arrives

    @classmethod
    def scratch(cls, stages: int, *tiles: tuple[tuple[int, ...], Any]) -> tuple[Any, ...]:
        """What a ring of tiles of these shapes and types is made of."""
        return (
            *(plgpu.SMEM((stages, *shape), dtype) for shape, dtype in tiles),
            plgpu.Barrier(num_arrivals=len(tiles), num_barriers=stages),
            plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
        )

    @classmethod
    def of(cls, refs: Sequence[Any]) -> Ring:
        return cls(refs[:-2], refs[-2], refs[-1])

    def take(self, step: Array) -> tuple[list[Any], Any]:
        """The tiles of a step once they are there, and the barrier on which to give them back."""
        slot = lax.rem(step, jnp.int32(self.tiles[0].shape[0]))
        plgpu.barrier_wait(self.ready.at[slot])
        return [tile.at[slot] for tile in self.tiles], self.free.at[slot]


Sources = Callable[[Array], Sequence[Any]]


def fill(count: Array, *rings: tuple[Ring, Sources]) -> None:
    """Brings the tiles of steps 0 to count, for the warpgroup that does nothing else.

    Args:
        rings: with what their tiles are copied from, by step. What is given back at different times
            has a ring of its own.
    """
    stages = rings[0][0].tiles[0].shape[0]

    @pl.loop(0, count + stages)  # until the last of them has been given back
    def _step(step: Array) -> None:
        slot = lax.rem(step, jnp.int32(stages))
        for ring, sources in rings:
            pl.when(step >= stages)(partial(plgpu.barrier_wait, ring.free.at[slot]))

            @pl.when(step < count)
            def _copy(ring: Ring = ring, sources: Sources = sources) -> None:
                for source, tile in zip(sources(step), ring.tiles, strict=True):
                    plgpu.copy_gmem_to_smem(source, tile.at[slot], ring.ready.at[slot])


def bend(s: Array, scale: float, soft_cap: float) -> Array:
    """Products as they are, or the hyperbolic tangent where there is a cap: times `unit`, what the
    softmax takes."""
    if not soft_cap:
        return s
    # from an exponential: the hardware's tanh is off by 5e-4, .02 of a logit where the cap is 50
    return 1.0 - 2.0 / (1.0 + jnp.exp2(s * (2 * LOG2E * scale / soft_cap)))


def unit(scale: float, soft_cap: float) -> float:
    """What makes logits in powers of 2 of `bend`: with a subtraction it is one instruction."""
    return (soft_cap or scale) * LOG2E


class Walk(NamedTuple):
    """The tiles of keys that a block of queries sees, or of queries that see any of a block of
    keys. Those at both ends need a mask and come first; then those between, which need none.

    Attributes:
        begin, end: of the tiles, one behind the last.
        whole, part: likewise, of those between.
    """

    begin: Array
    whole: Array
    part: Array
    end: Array

    @staticmethod
    def over_keys(first: Array, size: int) -> Array:
        """Of each block of queries [B, T / 128, 4], from `first_seen`."""
        part = jnp.arange(first.shape[1] // BLOCK, dtype=jnp.int32) * BLOCK // size
        begin = jnp.minimum(first[:, ::BLOCK] // size, part)
        whole = jnp.clip((first[:, BLOCK - 1 :: BLOCK] + size - 1) // size, begin, part)
        part = jnp.broadcast_to(part, begin.shape)
        return jnp.stack([begin, whole, part, part + BLOCK // size], -1)

    @staticmethod
    def over_queries(first: Array, size: int) -> Array:
        """Of each block of keys [B, T / 128, 4], from `first_seen`."""
        end = last_queries(first, size, BLOCK) + 1
        block = jnp.arange(first.shape[1] // BLOCK, dtype=jnp.int32) * BLOCK
        begin = jnp.broadcast_to(block // size, end.shape)
        whole = jnp.minimum(begin + BLOCK // size, end)
        part = jnp.sum(first[:, size - 1 :: size, None] <= block, 1, dtype=jnp.int32)
        return jnp.stack([begin, whole, jnp.clip(part, whole, end), end], -1)

    @classmethod
    def of(cls, table: Any, row: Array, block: Array) -> Walk:
        return cls(*(table[row, block, i] for i in range(4)))

    @property
    def steps(self) -> Array:
        return self.end - self.begin

    @property
    def masked(self) -> Array:
        """Tiles that need a mask."""
        return self.steps - (self.part - self.whole)

    def tile(self, step: Array) -> Array:
        end = jnp.where(step < self.masked, self.whole, self.end)
        tile = self.begin + step
        return tile + jnp.where(tile < self.whole, 0, self.part - end)

    def __call__(self, do: Callable[..., Any], state: Any) -> Any:
        """Runs do(step, tile, state, masked=...) over the tiles."""

        def some(low: Array | int, high: Array, state: Any, masked: bool) -> Any:
            return lax.fori_loop(
                low, high, lambda i, state: do(i, self.tile(i), state, masked=masked), state
            )

        state = some(0, self.masked, state, masked=True)
        return some(self.masked, self.steps, state, masked=False)


def seen(query: Array, key: Array, first: Array, shape: tuple[int, int], queries: int) -> Array:
    """Which of a tile's queries see which of its keys.

    Args:
        query, key: the first of each.
        first: `first_seen` of the queries.
        queries: the axis on which they lie.
    """
    query += lax.broadcasted_iota(jnp.int32, shape, queries)
    key += lax.broadcasted_iota(jnp.int32, shape, 1 - queries)
    return (lax.broadcast_in_dim(first, shape, (queries,)) <= key) & (key <= query)


def run(kernel: Any, operands: Sequence[Any], out: Any, grid: dict[str, int], scratch: Any, *,
        interpret: Any, name: str) -> Any:  # fmt: skip
    """Starts a kernel of two warpgroups that compute and one that brings."""
    tiles = [x for x in scratch if not isinstance(x, plgpu.Barrier)]
    taken = [math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in tiles]
    fit(taken, "tiles")
    return plgpu.kernel(
        kernel,
        out_type=out,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=GROUPS + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,  # sums of rows are a warp's own
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        interpret=interpret,
        kernel_name=name,
    )(*operands)
