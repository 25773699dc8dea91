"""Which rows are multiplied by which expert: rows sorted by expert, cut into blocks of one size.

Rows past those of the last expert are padding. They form a group E of their own, without weights.
Everything here is a few comparisons of small arrays, which compilers fuse into one kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class Blocks(NamedTuple):
    """Blocks that hold consecutive rows of one group.

    Attributes:
        group: of each block; E for padding.
        start: its first row.
        size: how many rows it has; 0 for blocks that are not used.
    """

    group: Array  # [V]
    start: Array  # [V]
    size: Array  # [V]


class Visits(NamedTuple):
    """Pairs of an aligned block of rows and a group that has rows there, in the order of rows.

    Attributes:
        block: of rows.
        group: of rows; E for padding.
        weight: the expert whose weights are loaded: the group, or for padding the last expert that
            has rows, whose weights are loaded already.
        used: how many pairs there are. Entries past them repeat the last pair.
        starts: the first row of each group, then the number of rows.
    """

    block: Array  # [V]
    group: Array  # [V]
    weight: Array  # [V]
    used: Array  # []
    starts: Array  # [E + 2]


def _starts(group_sizes: Array, rows: int) -> Array:
    """The first row of each group and of padding, then the number of rows [E + 2]."""
    ends = jnp.minimum(jnp.cumsum(group_sizes, dtype=jnp.int32), rows)
    zero = jnp.zeros(1, jnp.int32)
    return jnp.concatenate([zero, ends, zero + rows])


def _owner(i: Array, counts: Array) -> tuple[Array, Array]:
    """Which of consecutive runs, of `counts` entries each, holds entry i, and where it begins.

    The last run holds whatever is past the end.
    """
    ends = jnp.cumsum(counts[:-1], dtype=jnp.int32)
    past = i[:, None] >= ends  # a binary search would be a loop of small kernels on a GPU
    return past.sum(1, dtype=jnp.int32), jnp.where(past, counts[:-1], 0).sum(1, dtype=jnp.int32)


def blocks(group_sizes: Array, rows: int, size: int, align: int = 1) -> Blocks:
    """Blocks of up to `size` of the `rows` rows.

    Args:
        align: a divisor of `size`. A block's rows lie within `size` rows of which the first is a
            multiple of `align`.
    """
    starts = _starts(group_sizes, rows)
    first = starts[:-1] // align * align
    counts = jnp.where(jnp.diff(starts) > 0, -(-(starts[1:] - first) // size), 0)  # [E + 1]
    groups = min(counts.shape[0], rows)
    i = jnp.arange((rows + groups * (align - 1)) // size + groups, dtype=jnp.int32)
    group, before = _owner(i, counts)
    begin = first[group] + (i - before) * size
    start = jnp.maximum(begin, starts[group])
    return Blocks(
        group, start, jnp.maximum(jnp.minimum(begin + size, starts[group + 1]) - start, 0)
    )


def visits(group_sizes: Array, rows: int, size: int) -> Visits:
    """The pairs of ceil(rows / size) aligned blocks and the groups that have rows there."""
    starts = _starts(group_sizes, rows)
    first, last = starts[:-1] // size, (starts[1:] - 1) // size
    counts = jnp.where(jnp.diff(starts) > 0, last - first + 1, 0)  # [E + 1]
    count, E = counts.sum(dtype=jnp.int32), group_sizes.shape[0]
    i = jnp.arange(-(-rows // size) + min(E + 1, rows) - 1, dtype=jnp.int32)
    i = jnp.minimum(i, count - 1)
    group, before = _owner(i, counts)
    present = jnp.where(group_sizes > 0, jnp.arange(E, dtype=jnp.int32), 0)
    weight = jnp.where(group < E, group, present.max())
    return Visits(first[group] + i - before, group, weight, count, starts)
