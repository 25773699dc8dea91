"""Arithmetic of tiles."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from kernels_pallas.op import UnsupportedError

ALIGNED_FLOATS = 32
"""Floats in 128 bytes: copies into Hopper's shared memory begin at multiples of that."""

SHARED_BYTES = 227 * 1024 - 512
"""Shared memory that arrays of a block of threads may take on Hopper; barriers take the rest."""

_FAR = 2**20  # more steps than any loop has


def fit(arrays: Iterable[int], what: str) -> None:
    """Checks that arrays, of so many bytes each, fit into shared memory.

    Args:
        what: names them in the error.

    Raises:
        UnsupportedError: they need more than `SHARED_BYTES`.
    """
    needed = sum(-(-size // 1024) * 1024 for size in arrays)  # Mosaic aligns each to 1024 bytes
    if needed > SHARED_BYTES:
        raise UnsupportedError(
            f"{what} need {needed} bytes of shared memory, and {SHARED_BYTES} are there"
        )


def divisor(size: int, limit: int, unit: int) -> int:
    """The largest multiple of `unit` up to `limit` that divides `size`, a multiple of `unit`."""
    return unit * max(d for d in range(1, max(1, limit // unit) + 1) if size // unit % d == 0)


def in_parts(
    size: tuple[int, int], part: tuple[int, int], act: Callable[[Any, Any], None],
    stretch: tuple[int, int] | None = None,
) -> None:  # fmt: skip
    """Calls act(rows, columns) on the parts of a block in a TPU's VMEM.

    Blocks are large, so that little is read twice; a part is what registers hold. Columns are
    lanes, so the columns of a part divide the block's; the last part of its rows may be shorter.

    Args:
        size: rows and columns of the block.
        part: rows and columns of a part, at most.
        act: takes ranges (`pl.ds`) of rows and of columns.
        stretch: region whose parts are unrolled, so that the compiler overlaps them (default: one
            part). Stretches are looped over, and the matrix unit drains after each.
    """
    tall, wide = stretch or part
    tall, across = min(tall, size[0]), _lanes(size[1], wide)
    rows, columns = min(part[0], tall), _lanes(across, part[1])

    def unroll(count: int, row: Any, column: Any) -> None:
        for i, j in itertools.product(range(0, count, rows), range(0, across, columns)):
            here = pl.ds(row + i, min(rows, count - i))
            act(here, pl.ds(pl.multiple_of(column + j, columns), columns))

    @pl.loop(0, size[1] // across)
    def _(j: Array) -> None:
        @pl.loop(0, size[0] // tall)
        def _(i: Array) -> None:
            unroll(tall, pl.multiple_of(i * tall, rows), j * across)

        if size[0] % tall:
            unroll(size[0] % tall, size[0] // tall * tall, j * across)


def _lanes(size: int, limit: int) -> int:
    """Columns of a part: whole registers if the size has them, else all at once."""
    return divisor(size, limit, 128) if size % 128 == 0 else size


def late(index: Array | int, step: Array) -> Array:
    """`index`, but unknown to a GPU's compiler before `step` is.

    Otherwise the compiler computes addresses before the loop, and keeps them in registers until
    these spill.
    """
    return index + lax.div(step, jnp.int32(_FAR))


def product(a: Array, b: Array, over: tuple[int, int]) -> Array:
    """a times b, summed over one axis of each, in float32.

    Args:
        over: the axis of a and that of b.
    """
    # otherwise a TPU would round float32 factors to bfloat16
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    axes = (((over[0],), (over[1],)), ((), ()))
    return lax.dot_general(a, b, axes, precision, preferred_element_type=jnp.float32)
