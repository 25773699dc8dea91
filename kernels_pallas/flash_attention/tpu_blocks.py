"""What the three TPU kernels share: sizes, blocks of arrays, and a grid of the blocks with work.

A step of the grid is a pair of blocks, of queries and of keys, in which any query sees any key.
Which pairs those are depends on the documents, so the length of the grid is dynamic and a list of
the pairs lies in scalar memory. No time is spent on pairs that are masked as a whole.
"""

from __future__ import annotations

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
from kernels_pallas.softmax import LOG2E
from kernels_pallas.tpu import LANES, divisor

_PART = 256  # queries of a part: see `parts_ahead`
_MAX_STEPS = 64 * 1024  # of three words each, in a scalar memory of 1 MiB


@dataclass(frozen=True)
class TpuTile:
    """q, k: tokens in a block of queries and of keys, at most: a block's size divides T."""

    q: int = tried(512, 256, 1024)
    k: int = tried(512, 256, 1024)


@dataclass(frozen=True)
class Shape:
    """Sizes of one call: q is [B, N, T, H], k [B, K, T, H], v [B, K, T, Hv].

    Attributes:
        bq, bk: tokens in a block of queries and of keys.
    """

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
        """The sizes of these arrays, in blocks that divide T.

        Raises:
            UnsupportedError: arrays are not all bfloat16 or all float32, N is no multiple of K or
                T of 128.
        """
        (B, N, T, H), K, Hv = q.shape, k.shape[1], v.shape[3]
        if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
            types = f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}"
            raise UnsupportedError(f"{types}: all must be bfloat16, or all float32")
        if N % K:
            raise UnsupportedError(f"{N=} heads cannot share {K=} KV heads evenly")
        if T % LANES:
            raise UnsupportedError(f"{T=} must be a multiple of {LANES}: pad with segment 0")
        bq = min(tile.q, max(LANES, 4 * tile.q * K // N))  # many heads fill VMEM sooner
        return cls(B, N, K, T, H, Hv, divisor(T, bq, LANES), divisor(T, tile.k, LANES))


@dataclass(frozen=True)
class Blocks:
    """Which blocks of the arrays each step is given.

    Scores have keys in rows and queries in lanes: the softmax then adds whole registers rather than
    lanes of one, and a number per query is a row of a block, as it is in memory.

    Attributes:
        keys_inside: the outer axis of the steps is that of queries, the inner one that of keys.
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
            operands: the kind of each array (see `_spec`), and the array.
            out: the kind of each result, and its shape and type.

        Raises:
            UnsupportedError: there are more steps than scalar memory holds.
        """
        if steps.outer.size > _MAX_STEPS:
            raise UnsupportedError(
                f"T={self.shape.T} has {steps.outer.size} pairs of blocks, of which scalar memory "
                f"holds {_MAX_STEPS}: use larger tiles"
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

        Args:
            kind: "queries" [B, N, T, H or Hv], "keys" [B, K, T, H or Hv], "rows" [B, K, G, T] of a
                number per query, "first" [B, 1, T] of `first_seen`, or "scalars" of any shape.
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
        transposed = kind in ("queries", "keys") and is_transposed(width)

        def at(h: Array, step: Array, outer: Any, inner: Any, flags: Any) -> tuple[Any, ...]:
            where = index(*self._place(outer[step], h, inner[step]))
            return _swapped(where) if transposed else where

        return pl.BlockSpec(_swapped(block) if transposed else block, at)

    def _place(self, outer: Array, h: Array | int, inner: Array) -> tuple[Any, ...]:
        """(row of the batch, KV head, block of queries, block of keys)."""
        size = self.shape.T // (self.shape.bq if self.keys_inside else self.shape.bk)
        row, mine = lax.div(outer, size), lax.rem(outer, size)
        return (row, h, mine, inner) if self.keys_inside else (row, h, inner, mine)

    def seen(self, outer: Array, inner: Array, first: Array) -> Array:
        """Which keys of a step its queries see: bool [bk, bq].

        Args:
            first: `first_seen` of the queries [1, bq].
        """
        _, _, i, j = self._place(outer, 0, inner)
        at = (self.shape.bk, self.shape.bq)
        key = j * self.shape.bk + lax.broadcasted_iota(jnp.int32, at, 0)
        query = i * self.shape.bq + lax.broadcasted_iota(jnp.int32, at, 1)
        return (first <= key) & (key <= query)


def is_transposed(width: int) -> bool:
    """Whether heads of this width are stored transposed, with tokens in lanes.

    There are 128 lanes, of which narrower heads would leave a part of every row in memory unused.
    """
    return width % LANES != 0


def width_axis(width: int) -> int:
    """The axis of a head's width in a block of one head; the other one is that of tokens."""
    return 0 if is_transposed(width) else 1


def _swapped(x: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*x[:-2], x[-1], x[-2])


def _laid(kind: str, width: int, x: Array) -> Array:
    """An operand as the kernel takes it, or a result of the kernel as the op returns it."""
    return jnp.swapaxes(x, -1, -2) if kind in ("queries", "keys") and is_transposed(width) else x


def rows(block: Array, width: int) -> Array:
    """A block of one head as [tokens, width]."""
    return block.T if is_transposed(width) else block


def columns(block: Array, width: int) -> Array:
    """A block of one head as [width, tokens]."""
    return block if is_transposed(width) else block.T


def part_of(ref: Any, width: int, g: int, at: slice) -> Array:
    """Some queries of head g, as they lie in a block of "queries"."""
    return ref[0, g, :, at] if is_transposed(width) else ref[0, g, at]


def parts_ahead(
    shape: Shape, begin: Callable[[int, slice], Any], ahead: int
) -> Iterator[tuple[int, slice, Any]]:
    """Heads of a block and parts of their queries, each with what `begin` returned for it.

    A part is some 256 queries: its scores are twice what registers hold, and a matrix unit is as
    wide. When a part is returned, `begin` was already called for so many parts `ahead`, so that the
    matrix unit computes their scores during the softmax of this one. More parts ahead hide more
    time, and spill more registers.
    """
    size = divisor(shape.bq, _PART, LANES)
    parts = [(g, slice(i, i + size)) for g in range(shape.G) for i in range(0, shape.bq, size)]
    begun = [begin(*part) for part in parts[:ahead]]
    for n, part in enumerate(parts):
        begun += [begin(*following) for following in parts[n + ahead : n + ahead + 1]]
        yield *part, begun.pop(0)


def logits(s: Array, scale: float, soft_cap: float) -> Array:
    """Logits in base 2 of products of q and k: exp2 then needs no multiplication."""
    if not soft_cap:
        return s * (scale * LOG2E)
    return jnp.tanh(s * (scale / soft_cap)) * (soft_cap * LOG2E)
