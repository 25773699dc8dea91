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
"""Of shared memory on Hopper: a copy of a tensor begins at a multiple of 128 bytes."""

SHARED_BYTES = 227 * 1024 - 512
"""Of shared memory that arrays of a block of threads may take on Hopper; barriers take the rest."""

_FAR = 2**20  # steps: more than there are


def fit(arrays: Iterable[int], what: str) -> None:
    """Sees to it that arrays, of so many bytes each, fit into shared memory.

    Raises:
        UnsupportedError: they need more than `SHARED_BYTES`.
    """
    needed = sum(-(-size // 1024) * 1024 for size in arrays)  # where Mosaic has the next one begin
    if needed > SHARED_BYTES:
        raise UnsupportedError(
            f"{what} need {needed} bytes of shared memory, and {SHARED_BYTES} are there"
        )


def divisor(size: int, limit: int, unit: int) -> int:
    """The largest multiple of `unit` up to `limit` that divides `size`, itself such a multiple."""
    return unit * max(d for d in range(1, max(1, limit // unit) + 1) if size // unit % d == 0)


def in_parts(
    size: tuple[int, int], part: tuple[int, int], act: Callable[[Any, Any], None],
    stretch: tuple[int, int] | None = None,
) -> None:  # fmt: skip
    """Has a kernel act on ranges of rows and of columns until a block is covered.

    Blocks are large, so that little is read twice; a part is what registers hold. Columns are
    lanes, so that parts of them are divisors; a last part of the rows may be shorter.

    Args:
        stretch: rows and columns whose parts are written out one behind another, which the compiler
            has overlap; one part if it is None. Over the stretches of a block there are loops, and
            whatever waits in one is waited for at its end.
    """
    tall, wide = stretch or part
    tall, across = min(tall, size[0]), _lanes(size[1], wide)
    rows, columns = min(part[0], tall), _lanes(across, part[1])

    def write_out(count: int, row: Any, column: Any) -> None:
        for i, j in itertools.product(range(0, count, rows), range(0, across, columns)):
            here = pl.ds(row + i, min(rows, count - i))
            act(here, pl.ds(pl.multiple_of(column + j, columns), columns))

    @pl.loop(0, size[1] // across)
    def _(j: Array) -> None:
        @pl.loop(0, size[0] // tall)
        def _(i: Array) -> None:
            write_out(tall, pl.multiple_of(i * tall, rows), j * across)

        if size[0] % tall:
            write_out(size[0] % tall, size[0] // tall * tall, j * across)


def _lanes(size: int, limit: int) -> int:
    return divisor(size, limit, 128) if size % 128 == 0 else size


def late(index: Array | int, step: Array) -> Array:
    """An index that a GPU's compilers do not know before the step: they would work addresses out in
    front of the loop, and keep them until registers spill."""
    return index + lax.div(step, jnp.int32(_FAR))


def product(a: Array, b: Array, over: tuple[int, int]) -> Array:
    """Sums of products over one axis of each, in float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None  # else it is rounded
    axes = (((over[0],), (over[1],)), ((), ()))
    return lax.dot_general(a, b, axes, precision, preferred_element_type=jnp.float32)
