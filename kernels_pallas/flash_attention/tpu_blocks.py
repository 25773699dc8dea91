"""What the three TPU kernels share: sizes, blocks of arrays, and a grid of the blocks with work.

A grid step is a pair of blocks, of queries and of keys, that see each other at all. Which pairs
those are depends on the documents, so the grid's length is read as the kernel starts and a list of
pairs lies in scalar memory. Nothing is spent on pairs that a mask would erase.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.flash_attention.reference import Steps
from kernels_pallas.op import UnsupportedError

LOG2E = math.log2(math.e)
LANES = 128
_MOST_STEPS = 64 * 1024  # three words each, in a scalar memory of 1 MiB


@dataclass(frozen=True)
class TpuTile:
    """q, k: tokens in a block of queries and of keys. Both are lowered to what divides T."""

    q: int = 512
    k: int = 512


@dataclass(frozen=True)
class Shape:
    """Sizes of one call."""

    B: int
    N: int
    K: int
    T: int
    H: int
    Hv: int
    bq: int
    bk: int

    @property
    def G(self) -> int:
        """Heads that share keys. They are computed together, so that keys are read once."""
        return self.N // self.K

    @classmethod
    def of(cls, q: Array, k: Array, v: Array, tile: TpuTile) -> Shape:
        (B, N, T, H), K, Hv = q.shape, k.shape[1], v.shape[3]
        if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
            types = f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}"
            raise UnsupportedError(f"{types}: all must be bfloat16, or all float32")
        if N % K:
            raise UnsupportedError(f"{N=} heads cannot share {K=} KV heads evenly")
        if T % LANES:
            raise UnsupportedError(f"{T=} must be a multiple of {LANES}: pad with segment 0")
        bq = min(tile.q, max(LANES, 4 * tile.q * K // N))  # blocks of many heads fill VMEM sooner
        return cls(B, N, K, T, H, Hv, _dividing(T, bq), _dividing(T, tile.k))


def _dividing(T: int, wanted: int) -> int:
    """The largest multiple of 128 up to `wanted` that divides T."""
    return max(n for n in range(LANES, max(LANES, wanted) + 1, LANES) if T % n == 0)


@dataclass(frozen=True)
class Blocks:
    """How blocks of arrays follow the list of steps.

    Attributes:
        keys_inside: the outer axis of the steps is that of queries.
    """

    shape: Shape
    keys_inside: bool

    def queries(self, width: int) -> pl.BlockSpec:
        """Of [B, N, T, width]: the tokens of all heads that share keys."""
        s = self.shape
        return self._spec((1, s.G, s.bq, width), lambda b, h, i, j: (b, h, i, 0))

    def keys(self, width: int) -> pl.BlockSpec:
        """Of [B, K, T, width]."""
        return self._spec((1, 1, self.shape.bk, width), lambda b, h, i, j: (b, h, j, 0))

    def rows(self) -> pl.BlockSpec:
        """Of [B, K, G, T]: a number per query."""
        s = self.shape
        return self._spec((1, 1, s.G, s.bq), lambda b, h, i, j: (b, h, 0, i))

    def first(self) -> pl.BlockSpec:
        """Of [B, 1, T]: `first_seen` of each query."""
        return self._spec((1, 1, self.shape.bq), lambda b, h, i, j: (b, 0, i))

    def _spec(self, block: tuple[int, ...], index: Any) -> pl.BlockSpec:
        def at(h: Array, step: Array, outer: Any, inner: Any, flags: Any) -> tuple[Array, ...]:
            return index(*self._place(outer[step], h, inner[step]))

        return pl.BlockSpec(block, at)

    def _place(self, outer: Array, h: Array, inner: Array) -> tuple[Array, ...]:
        """(row of the batch, KV head, block of queries, block of keys)."""
        size = self.shape.T // (self.shape.bq if self.keys_inside else self.shape.bk)
        row, mine = lax.div(outer, size), lax.rem(outer, size)
        return (row, h, mine, inner) if self.keys_inside else (row, h, inner, mine)

    def starts(self, outer: Array, inner: Array) -> tuple[Array, Array]:
        """The first query and the first key of a step."""
        _, _, i, j = self._place(outer, 0, inner)
        return i * self.shape.bq, j * self.shape.bk

    def run(
        self, kernel: Any, steps: Steps, operands: Sequence[tuple[Array, pl.BlockSpec]],
        out: Sequence[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]], scratch: Sequence[Any],
        *, name: str, interpret: Any,
    ) -> Any:  # fmt: skip
        """A kernel's results over all KV heads and steps."""
        if steps.outer.size > _MOST_STEPS:
            raise UnsupportedError(
                f"T={self.shape.T} has {steps.outer.size} pairs of blocks, of which scalar memory "
                f"holds {_MOST_STEPS}: use larger tiles"
            )
        grid = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(self.shape.K, steps.count),
            in_specs=[spec for _, spec in operands],
            out_specs=[spec for _, spec in out],
            scratch_shapes=scratch,
        )
        semantics = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"))
        return pl.pallas_call(
            kernel, grid_spec=grid, out_shape=[shape for shape, _ in out],
            compiler_params=semantics, interpret=interpret, name=name,
        )(*steps[:3], *(x for x, _ in operands))  # fmt: skip


def logits(s: Array, scale: float, soft_cap: float) -> Array:
    """Scores as the softmax takes them, in powers of 2, which saves a multiplication each."""
    if not soft_cap:
        return s * (scale * LOG2E)
    return jnp.tanh(s * (scale / soft_cap)) * (soft_cap * LOG2E)


def product(a: Array, b: Array, over: tuple[int, int]) -> Array:
    """Sums of products over one axis of each, in float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None  # else it is rounded
    axes = (((over[0],), (over[1],)), ((), ()))
    return lax.dot_general(a, b, axes, precision, preferred_element_type=jnp.float32)


def column(row: Array) -> Array:
    """[1, n] as [n, 128], the same in every lane."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T
