"""Scores, softmax and weights of a tile of rows and a block of keys, in a warpgroup's registers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.hopper import ROWS, across, down, product, within
from kernels_pallas.paged_attention.codec import block_of
from kernels_pallas.paged_attention.mosaic_gpu_shape import Shape
from kernels_pallas.softmax import MASK_VALUE

TINY = 1e-37


def scores(
    q: Any, keys: Any, scales: Any, shape: Shape, meanwhile: Callable[[], None] | None = None
) -> Array:
    """Products of queries with a block of keys [ROWS, keys], times scales where keys have some.

    Args:
        q: [ROWS, lanes] in shared memory.
        keys: [keys, lanes] in shared memory.
        scales: [parts, keys] in shared memory, or None.
        meanwhile: is called while the products are under way, where there are no scales.
    """
    if scales is None:
        return product(q, keys.T, meanwhile)

    def add(part: Any, s: Array, first: Any, n: int) -> Array:
        lanes = pl.ds(first, n)
        of_part = product(q.at[:, lanes], keys.at[:, lanes].T)
        scale = scales[part]
        scale = scale * block_of(n) ** -0.5 if shape.int4 else scale
        return s + of_part * lax.broadcast_in_dim(scale, of_part.shape, (1,))

    s, part, lane = jnp.zeros((ROWS, shape.keys_per_block), jnp.float32), 0, 0
    for n, alike in groupby(shape.key_parts):
        count = len(list(alike))
        if count > 1:  # unrolled, addresses of all operands would be kept in registers

            def body(i: Any, s: Array, part: int = part, lane: int = lane, n: int = n) -> Array:
                return add(part + i, s, lane + i * n, n)

            s = lax.fori_loop(0, count, body, s)
        else:
            s = add(part, s, lane, n)
        part, lane = part + count, lane + count * n
    return s


def mask(
    position: Array, first_key: Array, visible: Array, shape: Shape
) -> Callable[[Array], Array]:
    """A function that hides scores [ROWS, keys] of the keys that a row does not see.

    Args:
        position: of the first row.
        first_key: the position of the block's first key.
        visible: keys that a row sees, back from its own.
    """

    def hide(s: Array) -> Array:
        row = lax.broadcasted_iota(jnp.int32, s.shape, 0)
        back = position + lax.div(row, jnp.full_like(row, shape.heads_per_tile))
        back = back - first_key - shape.key_of_column(lax.broadcasted_iota(jnp.int32, s.shape, 1))
        return jnp.where(within(back, visible), s, MASK_VALUE)

    return hide


def softmax(
    s: Array, row_max: Array, hide: Callable[[Array], Array] | None, shape: Shape
) -> tuple[Array, Array, Array]:
    """A step of the online softmax over a block's scores [ROWS, keys].

    Args:
        row_max: the maximum of each row so far [ROWS], in units of scores (or of their tanh).
        hide: hides what rows do not see; None where they see all.

    Returns:
        Exponentials [ROWS, keys] relative to the new maximum; that maximum [ROWS]; what sums so far
        are to be rescaled by [ROWS].
    """
    s = jnp.tanh(s * shape.logit_scale) if shape.soft_cap else s
    s = s if hide is None else hide(s)
    new_max = jnp.maximum(row_max, jnp.max(s, 1))
    if hide is None:  # one fma each; only for rows that have seen a key
        p = jnp.exp2(s * shape.exp2_scale - down(new_max * shape.exp2_scale, s.shape))
    else:
        p = jnp.exp2((s - down(new_max, s.shape)) * shape.exp2_scale)
    return p, new_max, jnp.exp2((row_max - new_max) * shape.exp2_scale)


def weights(p: Array, scales: Any, end: Array | None, shape: Shape) -> list[Array]:
    """Exponentials p [ROWS, keys] in bfloat16, times the scales of values where these have some:
    one array for each part of a value with a scale of its own.

    Args:
        scales: [parts, keys] in shared memory, or None.
        end: the first key of the block that no row sees: scales from there on might be NaN. None
            where all keys are seen.
    """
    if scales is None:
        return [p.astype(jnp.bfloat16)]

    def scales_of(part: int) -> Array:
        scale = scales[part]
        if end is not None:
            key = shape.key_of_column(lax.broadcasted_iota(jnp.int32, scale.shape, 0))
            scale = jnp.where(key < end, scale, 0.0)
        return across(scale, p.shape)

    return [(p * scales_of(part)).astype(jnp.bfloat16) for part in range(shape.weights_per_key)]


def row_sums(p: Array, shape: Shape) -> list[Array]:
    """Sums of exponentials p [ROWS, keys]: [ROWS] of the block, or of each of its copies where
    masses of pages are asked for."""
    if not shape.mass:
        return [jnp.sum(p, 1)]
    columns = (shape.columns_of_copy(copy) for copy in range(shape.copies_per_block))
    return [sum((jnp.sum(p[:, a:b], 1) for a, b in each[1:]), jnp.sum(p[:, slice(*each[0])], 1))
            for each in columns]  # fmt: skip


def store_masses(masses: Any, sums: list[Array], row_max: Array, first: Array) -> None:
    """Writes logarithms to base 2 of a block's sums. They include the maximum that sums are
    relative to, since what all of them add up to is known only at the end.

    Args:
        masses: [copies, rows] in global memory. Behind a sequence's last copy there is room.
        sums: [rows] of each copy.
        row_max: [rows], in logits of base 2.
        first: the block's first copy.
    """
    for i, total in enumerate(sums):
        masses[first + i] = row_max + jnp.log2(jnp.maximum(total, TINY))


def zero_unseen(values: Any, end: Array) -> None:
    """Zeros the values [keys, lanes] in shared memory from the key `end` on, which no row sees.

    A weight of 0 would not silence a NaN there, in a slot that nobody has written since its page
    changed hands.
    """

    @pl.loop(0, values.shape[1] // 64)  # more lanes at a time would take too many registers
    def _(i: Array) -> None:
        some = values.at[:, pl.ds(i * 64, 64)]
        x = some[...]
        key = lax.broadcasted_iota(jnp.int32, x.shape, 0)
        some[...] = jnp.where(key < end, x, jnp.zeros_like(x))

    plgpu.commit_smem()


def output_columns(x: Array, part: int, width: int, shape: Shape) -> list[Array]:
    """Columns of outputs x [ROWS, n], which are of that part of values, as they are stored.

    They are `width` wide, or 8 of int4 values, whose Hadamard rotation is undone here but for its
    last factor: columns of one eight are held by several threads (`mosaic_gpu.page_attention` does
    the rest).
    """
    if not shape.int4:
        return [x[:, i : i + width] for i in range(0, x.shape[1], width)]
    columns = [x[:, i : i + 8] for i in range(0, x.shape[1], 8)]
    block, step = shape.hadamard_block(part), 1
    while step < min(block // 8, len(columns)):
        for i in (i for i in range(len(columns)) if not i & step):
            a, b = columns[i], columns[i + step]
            columns[i], columns[i + step] = a + b, a - b
        step *= 2
    return [column * block**-0.5 for column in columns]
