"""What the three Hopper kernels share: sizes, the ring of tiles that TMA fills, masks.

Two warpgroups compute 64 rows of the output each, and a third one loads tiles for both. A block
walks only the tiles that have work: from the first that its first token sees to the diagonal.
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
from kernels_pallas.hopper import ROWS, fit
from kernels_pallas.op import UnsupportedError, tried
from kernels_pallas.softmax import LOG2E

GROUPS = 2  # warpgroups that compute
BLOCK = ROWS * GROUPS  # tokens of a block of the grid


@dataclass(frozen=True)
class GpuTile:
    """Tiles that are loaded.

    Attributes:
        tokens: in a tile, 64 or 128.
        stages: tiles that are in use or being loaded.
    """

    tokens: int = tried(128, 64)
    stages: int = tried(2, 3, 4)


@dataclass(frozen=True)
class Shape:
    """Sizes of one call: q is [B, N, T, H], k [B, K, T, H], v [B, K, T, Hv]."""

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
        """The sizes of these arrays.

        Raises:
            UnsupportedError: scale is not positive, an array is not bfloat16, N is no multiple of
                K or T of 128, heads are neither 64 nor 128 wide, or a tile has neither 64 nor 128
                tokens.
        """
        (B, N, T, H), K, Hv = q.shape, k.shape[1], v.shape[3]
        if scale <= 0:
            raise UnsupportedError(f"{scale=} must be above 0, so that logits order as products")
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
    """Slots of shared memory that one warpgroup fills and the others read, in the same order."""

    tiles: Sequence[Any]  # [stages, ...] each
    ready: Any  # a barrier per slot: all its tiles are loaded
    free: Any  # a barrier per slot: all warpgroups that compute have read it

    @classmethod
    def scratch(cls, stages: int, *tiles: tuple[tuple[int, ...], Any]) -> tuple[Any, ...]:
        """The scratch that a ring of tiles of these shapes and types takes."""
        return (
            *(plgpu.SMEM((stages, *shape), dtype) for shape, dtype in tiles),
            plgpu.Barrier(num_arrivals=len(tiles), num_barriers=stages),
            plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
        )

    @classmethod
    def of(cls, refs: Sequence[Any]) -> Ring:
        """The ring of these refs, in the order of `scratch`."""
        return cls(refs[:-2], refs[-2], refs[-1])

    def take(self, step: Array) -> tuple[list[Any], Any]:
        """Waits for the tiles of a step. Returns them, and the barrier to arrive on after use."""
        slot = lax.rem(step, jnp.int32(self.tiles[0].shape[0]))
        plgpu.barrier_wait(self.ready.at[slot])
        return [tile.at[slot] for tile in self.tiles], self.free.at[slot]


Sources = Callable[[Array], Sequence[Any]]
"""step -> the parts of global memory that the tiles of a ring are copied from."""


def fill(count: Array, *rings: tuple[Ring, Sources]) -> None:
    """Loads the tiles of all `count` steps, in the warpgroup that does nothing else.

    Args:
        rings: each with its sources. Tiles that are released at different times have rings of
            their own.
    """
    stages = rings[0][0].tiles[0].shape[0]

    @pl.loop(0, count + stages)  # until the last tiles are released
    def _step(step: Array) -> None:
        slot = lax.rem(step, jnp.int32(stages))
        for ring, sources in rings:
            pl.when(step >= stages)(partial(plgpu.barrier_wait, ring.free.at[slot]))

            @pl.when(step < count)
            def _copy(ring: Ring = ring, sources: Sources = sources) -> None:
                for source, tile in zip(sources(step), ring.tiles, strict=True):
                    plgpu.copy_gmem_to_smem(source, tile.at[slot], ring.ready.at[slot])


def capped(s: Array, scale: float, soft_cap: float) -> Array:
    """Products of q and k; if there is a cap, tanh(s * scale / soft_cap) of them.

    `Options.logit_scale` takes either to logits in base 2.
    """
    if not soft_cap:
        return s
    # From an exponential: the hardware's tanh is off by 5e-4, .02 of a logit with a cap of 50.
    return 1.0 - 2.0 / (1.0 + jnp.exp2(s * (2 * LOG2E * scale / soft_cap)))


@dataclass(frozen=True)
class Options:
    """What a kernel is compiled for; `size` is the number of tokens in a loaded tile."""

    shape: Shape
    size: int
    scale: float
    soft_cap: float
    simulated: bool

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of a tile of scores: of a warpgroup's own tokens and of loaded ones."""
        return ROWS, self.size

    @property
    def logit_scale(self) -> float:
        """The factor from what `capped` returns to logits in base 2.

        It is applied where the maximum is subtracted: both are one instruction.
        """
        return (self.soft_cap or self.scale) * LOG2E


class Walk(NamedTuple):
    """The tiles of keys that a block of queries sees, or of queries that see any of a block of
    keys. Those at both ends need a mask and are visited first; those between need none.

    Attributes:
        begin, end: the first of all tiles, and one past the last.
        whole, part: the first of those between, and one past the last of them.
    """

    begin: Array
    whole: Array
    part: Array
    end: Array

    @staticmethod
    def over_keys(first: Array, size: int) -> Array:
        """The walk of each block of queries [B, T / 128, 4].

        Args:
            first: `first_seen` [B, T].
            size: tokens in a tile.
        """
        part = jnp.arange(first.shape[1] // BLOCK, dtype=jnp.int32) * BLOCK // size
        begin = jnp.minimum(first[:, ::BLOCK] // size, part)
        whole = jnp.clip((first[:, BLOCK - 1 :: BLOCK] + size - 1) // size, begin, part)
        part = jnp.broadcast_to(part, begin.shape)
        return jnp.stack([begin, whole, part, part + BLOCK // size], -1)

    @staticmethod
    def over_queries(first: Array, size: int) -> Array:
        """The walk of each block of keys [B, T / 128, 4]; arguments as in `over_keys`."""
        end = last_queries(first, size, BLOCK) + 1
        block = jnp.arange(first.shape[1] // BLOCK, dtype=jnp.int32) * BLOCK
        begin = jnp.broadcast_to(block // size, end.shape)
        whole = jnp.minimum(begin + BLOCK // size, end)
        part = jnp.sum(first[:, size - 1 :: size, None] <= block, 1, dtype=jnp.int32)
        return jnp.stack([begin, whole, jnp.clip(part, whole, end), end], -1)

    @classmethod
    def of(cls, table: Any, row: Array, block: Array) -> Walk:
        """The walk of one block, from a table that `over_keys` or `over_queries` made."""
        return cls(*(table[row, block, i] for i in range(4)))

    @property
    def steps(self) -> Array:
        """All tiles."""
        return self.end - self.begin

    @property
    def masked(self) -> Array:
        """Tiles that need a mask."""
        return self.steps - (self.part - self.whole)

    def tile(self, step: Array) -> Array:
        """The tile that a step visits."""
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
    """Which of a tile's queries see which of its keys: bool of the given shape.

    Args:
        query, key: the first of each.
        first: `first_seen` of the queries.
        queries: the axis of the queries; the other one is that of the keys.
    """
    query += lax.broadcasted_iota(jnp.int32, shape, queries)
    key += lax.broadcasted_iota(jnp.int32, shape, 1 - queries)
    return (lax.broadcast_in_dim(first, shape, (queries,)) <= key) & (key <= query)


def run(kernel: Any, operands: Sequence[Any], out: Any, grid: dict[str, int], scratch: Any, *,
        interpret: Any, name: str) -> Any:  # fmt: skip
    """Runs a kernel of two warpgroups that compute and one that loads.

    Args:
        kernel: takes the refs of operands, outputs and scratch.
        out: types and shapes of the results.
        grid: the size of each axis.

    Raises:
        UnsupportedError: scratch is larger than shared memory.
    """
    tiles = [x for x in scratch if not isinstance(x, plgpu.Barrier)]
    fit([math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in tiles], "tiles")
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
            reduction_scratch_bytes=0,  # a row is summed within one warp
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        interpret=interpret,
        kernel_name=name,
    )(*operands)
