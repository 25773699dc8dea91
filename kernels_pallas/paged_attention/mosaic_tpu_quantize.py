"""Quantizes rows on a TPU, to the same bits as `codec`, and puts them into tiles of pages."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.paged_attention.codec import block_of
from kernels_pallas.tpu import SUBLANES


def with_rows(tile: Array, rows: Array, first: Array, own: Array) -> Array:
    """A tile of a page with rows [block, W] in its slots from `first` on, where `own` [block, 1].

    Rows for eight or four bits are rounded to whole numbers here. Slots that share a word, four of
    bytes or eight of nibbles, are consecutive, as `mosaic_tpu_blocks.Rows` says.
    """
    if tile.dtype in (jnp.bfloat16, jnp.float32):
        return jnp.where(own, rows, tile.astype(jnp.float32)).astype(tile.dtype)
    bits = 4 if tile.dtype == jnp.uint8 else 8
    slots, words = jnp.int32(32 // bits), pltpu.bitcast(tile, jnp.int32)
    rows = lax.round(rows, lax.RoundingMethod.TO_NEAREST_EVEN).astype(jnp.int32)
    row = lax.broadcasted_iota(jnp.int32, words.shape, 0)
    shift, mask = lax.rem(row, slots) * bits, jnp.int32(2**bits - 1)
    new, gone = (jnp.where(own, x << shift, 0) for x in (rows & mask, mask))
    for i in range(SUBLANES * bits // 32):
        mine = lax.div(row, slots) == i
        bits_in, bits_out = (_or_of_rows(jnp.where(mine, x, 0)) for x in (new, gone))
        here = row == lax.div(first, slots) + i
        words = jnp.where(here, (words & ~bits_out) | bits_in, words)
    return pltpu.bitcast(words, tile.dtype)


def _or_of_rows(x: Array) -> Array:
    """The bitwise or of all eight rows, in each of them."""
    for step in (4, 2, 1):
        x = x | pltpu.roll(x, step, 0)
    return x


def with_steps(scales: Array, step: Array, slots: Array, own: Array) -> Array:
    """Scales [1, Z] of a page, with the steps of rows in the lanes of their slots, where `own`; the
    last three are [block, 1]."""
    lane = lax.broadcasted_iota(jnp.int32, (step.shape[0], scales.shape[1]), 1)
    mine = (lane == slots) & own
    found = jnp.sum(jnp.where(mine, step, 0.0), 0, keepdims=True)
    new = jnp.max(jnp.where(mine, 1.0, 0.0), 0, keepdims=True) > 0
    return jnp.where(new, found, scales)


def over_steps(rows: Array, parts: Sequence[int], dtype: Any) -> tuple[Array, list[Array]]:
    """Rows [block, W] divided by the quantization steps of their parts, not rounded yet, and these
    steps, each [block, 1]. Rows for four bits must be rotated already.

    Args:
        parts: lanes of each part.
        dtype: of the pages: int8, or uint8 for four bits.
    """
    divided = _nibbles if dtype == jnp.uint8 else _bytes
    each = [divided(x) for x in _split(rows, parts)]
    return jnp.concatenate([x for x, _ in each], 1), [step for _, step in each]


def _bytes(x: Array) -> tuple[Array, Array]:
    """The largest magnitude of a row becomes 127."""
    top = jnp.max(jnp.abs(x), 1, keepdims=True)
    return x * jnp.where(top > 0, 127.0 / top, 0.0), top * (1 / 127.0)


def _nibbles(x: Array) -> tuple[Array, Array]:
    """The largest magnitude of a row becomes -8."""
    high, low = jnp.max(x, 1, keepdims=True), jnp.min(x, 1, keepdims=True)
    top = jnp.where(high >= -low, high, low)
    top = jnp.where(high != high, high, top)
    return jnp.clip(x * jnp.where(top != 0, -8.0 / top, 0.0), -8.0, 7.0), top * (-1 / 8)


def _split(x: Array, parts: Sequence[int]) -> list[Array]:
    return [x[:, end - n : end] for n, end in zip(parts, accumulate(parts), strict=True)]


def rotated(rows: list[Array], parts: list[tuple[int, ...]]) -> list[Array]:
    """Rows [block, W] of several heads, rotated: all blocks of lanes of one width at once.

    Args:
        parts: of each head's rows, lanes of each part.
    """
    widths = [[block_of(n) for n in each for _ in range(n // block_of(n))] for each in parts]
    blocks = [_split(x, each) for x, each in zip(rows, widths, strict=True)]
    for width in sorted(set(chain(*widths))):
        alike = [(i, j) for i, each in enumerate(widths) for j, n in enumerate(each) if n == width]
        found = _hadamard(jnp.concatenate([blocks[i][j] for i, j in alike], 0))
        for k, (i, j) in enumerate(alike):
            blocks[i][j] = found[k * SUBLANES : (k + 1) * SUBLANES]
    return [jnp.concatenate(each, 1) for each in blocks]


def _hadamard(x: Array) -> Array:
    """`codec.hadamard` of rows [R, n], with the same sums in the same order.

    It works on the transpose, whose lanes are rows: two transpositions and sums of rows take a
    third of the time of seven sums across lanes.
    """
    x, step = jnp.transpose(x), 1
    n, R = x.shape
    while step < SUBLANES:  # sums of rows of a register
        tiles = x.reshape(n // SUBLANES, SUBLANES, R)
        second = (lax.broadcasted_iota(jnp.int32, tiles.shape, 1) & step) != 0
        back, ahead = (pltpu.roll(tiles, by, 1) for by in (step, SUBLANES - step))
        x = jnp.where(second, back, ahead) + jnp.where(second, -tiles, tiles)
        x, step = x.reshape(n, R), 2 * step
    while step < n:  # sums of registers
        pairs = x.reshape(n // step // 2, 2, step, R)
        sums, differences = pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]
        x, step = jnp.stack([sums, differences], 1).reshape(n, R), 2 * step
    return jnp.transpose(x) * np.float32(n**-0.5)
