"""Arithmetic of tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

_FAR = 2**20  # steps: more than there are


def divisor(size: int, limit: int, unit: int) -> int:
    """The largest multiple of `unit` up to `limit` that divides `size`, itself such a multiple."""
    return unit * max(d for d in range(1, max(1, limit // unit) + 1) if size // unit % d == 0)


def in_parts(size: tuple[int, int], part: tuple[int, int], act: Callable[[Any, Any], None]) -> None:
    """Has a kernel act on ranges of rows and of columns, in loops, until a block is covered.

    Blocks are large, so that little is read twice; a part is what registers hold. Columns are
    lanes, so that parts of them are divisors; a last part of the rows may be shorter.
    """
    columns = divisor(size[1], part[1], 128) if size[1] % 128 == 0 else size[1]
    rows = min(part[0], size[0])

    @pl.loop(0, size[1] // columns)
    def _(j: Array) -> None:
        across = pl.ds(pl.multiple_of(j * columns, columns), columns)

        @pl.loop(0, size[0] // rows)
        def _(i: Array) -> None:
            act(pl.ds(pl.multiple_of(i * rows, rows), rows), across)

        if size[0] % rows:
            act(pl.ds(size[0] // rows * rows, size[0] % rows), across)


def late(index: Array | int, step: Array) -> Array:
    """An index that a GPU's compilers do not know before the step: they would work addresses out in
    front of the loop, and keep them until registers spill."""
    return index + lax.div(step, jnp.int32(_FAR))


def product(a: Array, b: Array, over: tuple[int, int]) -> Array:
    """Sums of products over one axis of each, in float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None  # else it is rounded
    axes = (((over[0],), (over[1],)), ((), ()))
    return lax.dot_general(a, b, axes, precision, preferred_element_type=jnp.float32)
