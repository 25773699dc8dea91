"""TPUs: registers, and blocks in VMEM that are computed in parts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

LANES = 128
"""Columns of a register, and of a tile in VMEM."""

SUBLANES = 8
"""Rows of a register, and of a float32 tile in VMEM."""

INT8_ROWS = 32
"""Rows of an int8 tile in VMEM."""

VMEM_BYTES = 40 * 2**20
"""VMEM that a kernel may ask for: the smallest device has 64 MiB."""


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
    return divisor(size, limit, LANES) if size % LANES == 0 else size


def dot(a: Array, b: Array, over: tuple[int, int]) -> Array:
    """a times b, summed over one axis of each, in float32.

    Args:
        over: the axis of a and that of b.
    """
    # otherwise a TPU would round float32 factors to bfloat16
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    axes = (((over[0],), (over[1],)), ((), ()))
    return lax.dot_general(a, b, axes, precision, preferred_element_type=jnp.float32)
