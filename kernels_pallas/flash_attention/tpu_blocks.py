"""What the three TPU kernels share: sizes, blocks of arrays, and a grid of the blocks with work.

A grid step is a pair of blocks, of queries and of keys, that see each other at all. Which pairs
those are depends on the documents, so the grid's length is read as the kernel starts and a list of
pairs lies in scalar memory. Nothing is spent on pairs that a mask would erase.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.flash_attention.reference import Steps
from kernels_pallas.op import UnsupportedError, tried
from kernels_pallas.tiling import divisor

LOG2E = math.log2(math.e)
LANES = 128
_PART = 256
_MOST_STEPS = 64 * 1024  # three words each, in a scalar memory of 1 MiB


@dataclass(frozen=True)
class TpuTile:
    """q, k: tokens in a block of queries and of keys. Both are lowered to what divides T."""

    q: int = tried(512, 256, 1024)
    k: int = tried(512, 256, 1024)


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
        return cls(B, N, K, T, H, Hv, divisor(T, bq, LANES), divisor(T, tile.k, LANES))


@dataclass(frozen=True)
class Blocks:
    """How blocks of arrays follow the list of steps.

    Scores lie with keys in rows and queries in lanes: the softmax then adds whole registers rather
    than lanes of one, and a number per query is a row of it, as it is in memory.

    Attributes:
        keys_inside: the outer axis of the steps is that of queries.
    """

    shape: Shape
    keys_inside: bool

    def run(
        self, kernel: Any, steps: Steps, operands: Sequence[tuple[str, Array]],
        out: Sequence[tuple[str, Array | jax.ShapeDtypeStruct]], scratch: Sequence[Any],
        *, name: str, interpret: Any,
    ) -> list[Array]:  # fmt: skip
        """A kernel's results over all KV heads and steps.

        Args:
            operands: what each array is (see `_spec`), and the array.
            out: the same, with types and shapes of the results.
        """
        if steps.outer.size > _MOST_STEPS:
            raise UnsupportedError(
                f"T={self.shape.T} has {steps.outer.size} pairs of blocks, of which scalar memory "
                f"holds {_MOST_STEPS}: use larger tiles"
            )
        grid = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(self.shape.K, steps.total),
            in_specs=[self._spec(kind, x) for kind, x in operands],
            out_specs=[self._spec(kind, x) for kind, x in out],
            scratch_shapes=scratch,
        )
        results = pl.pallas_call(
            kernel,
            grid_spec=grid,
            out_shape=[jax.eval_shape(partial(_laid, kind, x.shape[-1]), x) for kind, x in out],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            interpret=interpret,
            name=name,
        )(*steps[:3], *(_laid(kind, x.shape[-1], x) for kind, x in operands))
        return [_laid(kind, y.shape[-1], x) for (kind, y), x in zip(out, results, strict=True)]

    def _spec(self, kind: str, x: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
        """The block of an array that a step is given.

        queries [B, N, T, H or Hv], keys [B, K, T, H or Hv], rows [B, K, G, T] of a number per
        query, first [B, 1, T] from `first_seen`, scalars of any shape.
        """
        s, width = self.shape, x.shape[-1]
        if kind == "scalars":
            return pl.BlockSpec(memory_space=pltpu.SMEM)
        block, index = {
            "queries": ((1, s.G, s.bq, width), lambda b, h, i, j: (b, h, i, 0)),
            "keys": ((1, 1, s.bk, width), lambda b, h, i, j: (b, h, j, 0)),
            "rows": ((1, 1, s.G, s.bq), lambda b, h, i, j: (b, h, 0, i)),
            "first": ((1, 1, s.bq), lambda b, h, i, j: (b, 0, i)),
        }[kind]
        turned = kind in ("queries", "keys") and is_turned(width)

        def at(h: Array, step: Array, outer: Any, inner: Any, flags: Any) -> tuple[Any, ...]:
            where = index(*self._place(outer[step], h, inner[step]))
            return _swapped(where) if turned else where

        return pl.BlockSpec(_swapped(block) if turned else block, at)

    def _place(self, outer: Array, h: Array | int, inner: Array) -> tuple[Any, ...]:
        """(row of the batch, KV head, block of queries, block of keys)."""
        size = self.shape.T // (self.shape.bq if self.keys_inside else self.shape.bk)
        row, mine = lax.div(outer, size), lax.rem(outer, size)
        return (row, h, mine, inner) if self.keys_inside else (row, h, inner, mine)

    def seen(self, outer: Array, inner: Array, first: Array) -> Array:
        """Which keys of a step its queries see [bk, bq], from `first_seen` of those [1, bq]."""
        _, _, i, j = self._place(outer, 0, inner)
        at = (self.shape.bk, self.shape.bq)
        key = j * self.shape.bk + lax.broadcasted_iota(jnp.int32, at, 0)
        query = i * self.shape.bq + lax.broadcasted_iota(jnp.int32, at, 1)
        return (first <= key) & (key <= query)


def is_turned(width: int) -> bool:
    """Whether heads of this width come with tokens in lanes.

    Lanes are 128, and narrow heads would fill half of each row in memory.
    """
    return width % LANES != 0


def width_axis(width: int) -> int:
    """Which axis of a block of one head is its width; the other is that of tokens."""
    return 0 if is_turned(width) else 1


def _swapped(x: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*x[:-2], x[-1], x[-2])


def _laid(kind: str, width: int, x: Array) -> Array:
    """An operand as the kernel takes it, or a result as the op gives it."""
    return jnp.swapaxes(x, -1, -2) if kind in ("queries", "keys") and is_turned(width) else x


def rows(block: Array, width: int) -> Array:
    """A block of one head as [tokens, width]."""
    return block.T if is_turned(width) else block


def columns(block: Array, width: int) -> Array:
    """A block of one head as [width, tokens]."""
    return block if is_turned(width) else block.T


def part_of(ref: Any, width: int, g: int, at: slice) -> Array:
    """Some queries of a head, from a block of "queries"."""
    return ref[0, g, :, at] if is_turned(width) else ref[0, g, at]


def in_turn(
    shape: Shape, begin: Callable[[int, slice], Any], ahead: int
) -> Iterator[tuple[int, slice, Any]]:
    """Heads of a block and parts of their queries, with what `begin` has made of each.

    A part is some 256 queries: its scores are twice what registers hold, and a matrix unit is as
    wide. So many parts `ahead` have begun when one is given out: the matrix unit has their scores
    to compute while the softmax is at work. More of them hide more, and spill more.
    """
    size = divisor(shape.bq, _PART, LANES)
    parts = [(g, slice(i, i + size)) for g in range(shape.G) for i in range(0, shape.bq, size)]
    begun = [begin(*part) for part in parts[:ahead]]
    for n, part in enumerate(parts):
        begun += [begin(*following) for following in parts[n + ahead : n + ahead + 1]]
        yield *part, begun.pop(0)


def logits(s: Array, scale: float, soft_cap: float) -> Array:
    """Scores as the softmax takes them, in powers of 2, which saves a multiplication each."""
    if not soft_cap:
        return s * (scale * LOG2E)
    return jnp.tanh(s * (scale / soft_cap)) * (soft_cap * LOG2E)
