"""Quantized pages, which keep keys and values in eight or four bits, and how they are read.

A row is one head's key (or value) of one token. Its lanes fall into *parts* with a scale each: a
latent row, say, is a normalized latent followed by a few lanes with position (RoPE), whose
magnitude is quite different. Scales are an array beside the values, `[L, P, K * parts, Z]`: those
of a page come in one copy, with keys along the lanes, as in logits. Further rows of it are padding
(`whole_scales`).

Rows are rotated before they are rounded to four bits: a Hadamard matrix on each block of lanes
spreads what a few large lanes hold over all of them. Queries are rotated alike, which leaves scores
as they are, and outputs are rotated back, once per row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from kernels_pallas.op import UnsupportedError
from kernels_pallas.quantize import quantize_rows

ROTATED = 128
"""The most lanes of a part in four bits: a whole TPU register, and a small product for a matrix
unit.

With one scale for 128 rotated lanes (4.25 bits a lane) Gaussian rows have a mean square error of
1.06 %; with one for 32 lanes (5 bits), 0.74 %. Without -8, the end of the range that has no
positive counterpart, these are 1.38 and 0.94 %.
"""


class _Quantized:
    """What all quantized pages share. Each kind also has methods `put` and `take`, which do what
    the functions below say."""

    values: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """[L, P, K, Z, W], however values are packed."""
        return self.values.shape

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    @property
    def written(self) -> list[Any]:
        """The arrays that writing changes."""
        return [self.values, self.scale]

    def with_written(self, arrays: list[Any]) -> Any:
        """The same pages with `arrays` in place of `written`."""
        pages: Any = self  # a dataclass
        return replace(pages, **dict(zip(("values", "scale"), arrays, strict=False)))


_register = partial(jax.tree_util.register_dataclass, meta_fields=["parts"])


@partial(_register, data_fields=["values", "scale"])
@dataclass(frozen=True)
class Int8Pages(_Quantized):
    """values * scale, with a scale for each token, head and part, computed when a row is written.

    Attributes:
        values: int8 [L, P, K, Z, W].
        scale: float32 [L, P, K * parts, Z].
        parts: lanes of each part; their sum is W.
    """

    values: Any
    scale: Any
    parts: tuple[int, ...]

    def put(self, x: Array, layer: Array | int, page: Array, slot: Array) -> Int8Pages:
        rows = [quantize_rows(part) for part in _split(x, self.parts)]
        values = jnp.concatenate([v for v, _ in rows], -1)
        values = self.values.at[layer, page, :, slot].set(values, mode="drop")
        scale = _put_scales(self.scale, [s for _, s in rows], layer, page, slot)
        return Int8Pages(values, scale, self.parts)

    def take(self, layer: Array | int, index: Array) -> Array:
        return _scaled(self.values[layer, index], self.scale[layer, index], self.parts)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StaticInt8Pages(_Quantized):
    """values * scale, with scales from a calibration: writing is one product and needs no maximum.

    A kernel may `fold` the scales of keys into queries, and those of values into outputs.

    Attributes:
        values: int8 [L, P, K, Z, W]; magnitudes above 127 scales are clipped.
        scale: float32 [L, K, W]. See `calibrate`.
    """

    values: Any
    scale: Any

    @property
    def written(self) -> list[Any]:
        return [self.values]

    def put(self, x: Array, layer: Array | int, page: Array, slot: Array) -> StaticInt8Pages:
        values = jnp.clip(_round(x * self.steps(layer)), -127, 127).astype(jnp.int8)
        values = self.values.at[layer, page, :, slot].set(values, mode="drop")
        return StaticInt8Pages(values, self.scale)

    def take(self, layer: Array | int, index: Array) -> Array:
        return self.values[layer, index].astype(jnp.float32) * self.scale[layer][:, None]

    def steps(self, layer: Array | int) -> Array:
        """What rows are multiplied by before they are rounded [K, W]; 0 where the scale is 0."""
        scale = lax.dynamic_index_in_dim(self.scale, layer, keepdims=False)
        return jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1.0), 0.0)

    def fold(self, x: Array, layer: Array | int) -> Array:
        """x [T, N, H] times the scales of its lanes, with which int8 rows need no scale."""
        scale = lax.dynamic_index_in_dim(self.scale, layer, keepdims=False)  # [K, W]
        (T, N, H), (K, W) = x.shape, scale.shape
        scale = jnp.pad(scale, ((0, 0), (0, max(0, H - W))))[:, None, :H]
        return (x.astype(jnp.float32).reshape(T, K, N // K, H) * scale).reshape(T, N, H)


@partial(_register, data_fields=["values", "scale"])
@dataclass(frozen=True)
class Int4Pages(_Quantized):
    """nibble * scale of rotated rows, with a scale for each token, head and part.

    A byte holds the same lane of two slots. Nibbles are two's complement; a part's largest
    magnitude becomes -8, so its scale may be negative.

    Attributes:
        values: uint8 [L, P, K, Z / 2, W]; byte i holds slot 2i in its low half, 2i + 1 in its high.
        scale: float32 [L, P, K * parts, Z].
        parts: lanes of each part; their sum is W. A part is rotated in blocks of the largest power
            of two that divides it.
    """

    values: Any
    scale: Any
    parts: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, pairs, lanes = self.values.shape
        return (*lead, 2 * pairs, lanes)

    def put(self, x: Array, layer: Array | int, page: Array, slot: Array) -> Int4Pages:
        rows = [_quantize_nibbles(part) for part in _split(_rotated(x, self.parts), self.parts)]
        nibbles, values = jnp.concatenate([v for v, _ in rows], -1), self.values
        for half in (0, 1):  # one after the other: neighbours share a byte
            target = jnp.where(slot % 2 == half, page, values.shape[1])
            old = values.at[layer, target, :, slot // 2].get(mode="clip")
            new = (old & (0xF0 >> 4 * half)) | (nibbles << 4 * half)
            values = values.at[layer, target, :, slot // 2].set(new, mode="drop")
        scale = _put_scales(self.scale, [s for _, s in rows], layer, page, slot)
        return Int4Pages(values, scale, self.parts)

    def take(self, layer: Array | int, index: Array) -> Array:
        packed = self.values[layer, index]
        pairs = jnp.stack([packed << 4, packed], -2)  # [..., Z / 2, 2, W]
        nibbles = lax.bitcast_convert_type(pairs, jnp.int8) >> 4
        nibbles = nibbles.reshape(*packed.shape[:-2], -1, packed.shape[-1])
        return _scaled(nibbles, self.scale[layer, index], self.parts)


QuantizedPages = Int8Pages | StaticInt8Pages | Int4Pages
Pages = Array | QuantizedPages


def check_alike(*stacks: Pages) -> None:
    """Refuses keys and values whose pages are of different kinds: kernels take one kind.

    Raises:
        UnsupportedError: they are.
    """
    kinds = [
        type(x).__name__ if isinstance(x, QuantizedPages) else f"pages of {x.dtype}" for x in stacks
    ]
    if len({*kinds}) > 1:
        raise UnsupportedError(f"keys and values in {' and '.join(kinds)}: keep both in one kind")


def put(pages: Pages, x: Array, layer: Array | int, page: Array, slot: Array) -> Any:
    """The pages with rows x [T, K, H <= W] in slots [T] of pages [T]. Rows for a page past the last
    are dropped; lanes that x lacks become 0."""
    if isinstance(pages, QuantizedPages):
        x = _widened(x, pages.shape[-1]).astype(jnp.float32)
        return pages.put(x, layer, page, slot)
    return pages.at[layer, page, :, slot].set(to_stored(x, pages), mode="drop")


def take(pages: Pages, layer: Array | int, index: Array) -> Array:
    """Rows [..., K, Z, W] of the pages numbered `index` [...], float32; those of four bits are
    rotated."""
    if isinstance(pages, QuantizedPages):
        return pages.take(layer, index)
    return _from_stored(pages[layer, index])


def rotated(pages: Pages, x: Array) -> Array:
    """Applies the pages' rotation, which is its own inverse, to x [..., H]: to queries before
    attention, to outputs after.

    Returns:
        [..., W], or x itself if the pages do not rotate. If x covers only the first parts, only
        those are rotated and returned.
    """
    if not isinstance(pages, Int4Pages):
        return x
    ends = zip(pages.parts, accumulate(pages.parts), strict=True)
    parts = tuple(n for n, end in ends if end - n < x.shape[-1])
    return _rotated(_widened(x, sum(parts)), parts)


def rotated_by_product(pages: Pages, x: Array) -> Array:
    """Queries x [..., H], `rotated` by products with matrices, in x's type.

    Each part is larger by the square root of its `block_of`: the signs of a Hadamard matrix are
    exact in bfloat16, and the root is not. XLA would make temporaries of butterflies.
    """
    if not isinstance(pages, Int4Pages):
        return x
    ends = zip(pages.parts, accumulate(pages.parts), strict=True)
    parts = [n for n, end in ends if end - n < x.shape[-1]]
    blocks = [block_of(n) for n in parts for _ in range(n // block_of(n))]
    rows = x.reshape(-1, x.shape[-1])

    def product(part: Array, by: Array) -> Array:
        how = {"precision": lax.Precision.HIGHEST, "preferred_element_type": x.dtype}
        return jnp.dot(part, by[: part.shape[1]], **how)

    # Each product writes its lanes of the result. One product of all blocks would make an axis of
    # them, which a TPU pads to a multiple of eight and copies.
    each = [
        product(rows[:, end - n : end], jnp.asarray(signs(n), x.dtype))
        for n, end in zip(blocks, accumulate(blocks), strict=True)
    ]
    return jnp.concatenate(each, -1).reshape(*x.shape[:-1], -1)


def block_of(lanes: int) -> int:
    """Lanes of a part in four bits that are rotated together: the largest power of two that divides
    the part's."""
    return lanes & -lanes


def signs(block: int) -> np.ndarray:
    """Sylvester's Hadamard matrix [block, block], whose entries are 1 and -1.

    Args:
        block: a power of two.
    """
    return reduce(np.kron, [[[1, 1], [1, -1]]] * (block.bit_length() - 1), np.ones((1, 1)))


def whole_parts(pages: Pages, lanes: int) -> int:
    """The fewest lanes, at least `lanes`, that are whole parts: only those can be rotated back."""
    if not isinstance(pages, Int4Pages):
        return lanes
    return next(end for end in accumulate(pages.parts) if end >= lanes)


def as_read(pages: Pages, x: Array, layer: Array | int) -> Array:
    """Rows x [T, K, H] as the pages would return them, rounded, in x's type."""
    if isinstance(pages, QuantizedPages):
        return round_trip(pages, x.astype(jnp.float32), layer)[..., : x.shape[-1]].astype(x.dtype)
    kept = jnp.bfloat16 if pages.dtype == jnp.uint16 else pages.dtype
    return x.astype(kept).astype(x.dtype)


def round_trip(pages: QuantizedPages, x: Array, layer: Array | int) -> Array:
    """Rows x [T, K, H] as pages would return them [T, K, W], rotated back, with x's gradient."""
    K, W = pages.shape[2], pages.shape[-1]
    x = _widened(x, W)
    parts = None if isinstance(pages, StaticInt8Pages) else pages.parts
    blank = empty(jnp.int4 if isinstance(pages, Int4Pages) else jnp.int8, (1, x.shape[0], K, 2, W),
                  parts=parts)  # fmt: skip
    if isinstance(pages, StaticInt8Pages):
        blank = StaticInt8Pages(blank.values, pages.scale[layer][None])
    every = jnp.arange(x.shape[0])
    stored = put(blank, lax.stop_gradient(x), 0, every, jnp.zeros_like(every))
    read = rotated(pages, take(stored, 0, every)[:, :, 0])
    return x + lax.stop_gradient(read - x)


def whole_scales(rows: int) -> int:
    """Rows of scales of a page, padded for a TPU to 1, 2, 4 or a multiple of 8. XLA lays arrays
    with other numbers out by another axis, and a kernel would first copy all scales."""
    return rows if rows in (1, 2, 4) else -(-rows // 8) * 8


def empty(
    dtype: Any, shape: tuple[int, ...], *, parts: tuple[int, ...] | None = None,
    whole: bool = False, device: Any = None,
) -> Any:  # fmt: skip
    """Blank pages: `Int8Pages` for int8, `Int4Pages` for int4, and arrays for other types.

    Args:
        shape: [L, P, K, Z, W].
        parts: lanes of each part of quantized rows; by default a row is one part. Those of four
            bits are cut into parts of at most `ROTATED` lanes.
        whole: rows of scales are padded to `whole_scales`.

    Raises:
        ValueError: Z is odd for int4, where two slots share a byte.
    """
    zeros = partial(jnp.zeros, device=device)
    L, P, K, Z, W = shape
    parts = parts or (W,)

    def scales(parts: tuple[int, ...]) -> Array:
        rows = K * len(parts)
        return zeros((L, P, whole_scales(rows) if whole else rows, Z))

    if dtype == jnp.int8:
        return Int8Pages(zeros(shape, jnp.int8), scales(parts), parts)
    if dtype == jnp.int4:
        if Z % 2:
            raise ValueError(f"pages of {Z} slots: two share a byte, take an even number")
        parts = tuple(min(ROTATED, n - i) for n in parts for i in range(0, n, ROTATED))
        return Int4Pages(zeros((L, P, K, Z // 2, W), jnp.uint8), scales(parts), parts)
    return zeros(shape, dtype)


def calibrate(rows: Array, margin: float = 1.0) -> Array:
    """Scales [L, K, W] for `StaticInt8Pages` from rows [L, T, K, W] that a model computed.

    Args:
        margin: of the largest magnitude that a lane may reach before it is clipped, to the largest
            one in `rows`.
    """
    return jnp.max(jnp.abs(rows.astype(jnp.float32)), 1) * (margin / 127.0)


def hadamard(x: Array, block: int) -> Array:
    """x [..., H] with each block of lanes (a power of two) multiplied by the normalized Hadamard
    matrix, `signs(block)` over sqrt(block), which is its own inverse.

    Sums are butterflies, so the bits of a row do not depend on the number of rows.
    """
    shape, step = x.shape, 1
    while step < block:
        a, b = jnp.moveaxis(x.reshape(*shape[:-1], -1, 2, step), -2, 0)
        x = jnp.stack([a + b, a - b], -2).reshape(shape)
        step *= 2
    return x * jnp.float32(block**-0.5)


def _quantize_nibbles(x: Array) -> tuple[Array, Array]:
    """Rows [..., W] as nibbles in uint8 and scales [...]. The scale of a row that is not finite is
    not finite either."""
    high, low = x.max(-1, keepdims=True), x.min(-1, keepdims=True)
    top = jnp.where(high >= -low, high, low)
    top = jnp.where(jnp.all(jnp.isfinite(x), -1, keepdims=True), top, jnp.nan)
    steps = jnp.where(top != 0, -8.0 / top, 0.0)
    values = jnp.clip(_round(x * steps), -8, 7).astype(jnp.int8)
    return lax.bitcast_convert_type(values, jnp.uint8) & 15, top[..., 0] * (-1 / 8)


def _rotated(x: Array, parts: tuple[int, ...]) -> Array:
    return jnp.concatenate([hadamard(part, block_of(part.shape[-1]))
                            for part in _split(x, parts)], -1)  # fmt: skip


def _round(x: Array) -> Array:
    return lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)


def _scaled(values: Array, scale: Array, parts: tuple[int, ...]) -> Array:
    """values [..., K, Z, W] times scale [..., K * parts, Z], which may have rows of padding."""
    *lead, K, Z, _ = values.shape
    scale = scale[..., : K * len(parts), :]
    each = jnp.split(scale.reshape(*lead, K, len(parts), Z), len(parts), -2)
    rows = [
        part.astype(jnp.float32) * jnp.swapaxes(by, -1, -2)
        for part, by in zip(_split(values, parts), each, strict=True)
    ]
    return jnp.concatenate(rows, -1)


def _put_scales(
    stored: Array, each: list[Array], layer: Array | int, page: Array, slot: Array
) -> Array:
    scales = jnp.stack(each, -1).reshape(each[0].shape[0], -1)  # [T, K * parts]
    return stored.at[layer, page, : scales.shape[1], slot].set(scales, mode="drop")


def _split(x: Array, parts: tuple[int, ...]) -> list[Array]:
    return jnp.split(x, list(accumulate(parts))[:-1], -1)


def _widened(x: Array, lanes: int) -> Array:
    short = lanes - x.shape[-1]
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, short),)) if short > 0 else x


def to_stored(x: Array, pages: Array) -> Array:
    """x [..., H] as pages [..., W] of floats store it. Pages of uint16 hold the bits of bfloat16,
    which jax 0.10 scatters slowly on CPU."""
    x = _widened(x, pages.shape[-1])
    if pages.dtype == jnp.uint16:
        return lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    return x.astype(pages.dtype)


def _from_stored(x: Array) -> Array:
    if x.dtype == jnp.uint16:
        x = lax.bitcast_convert_type(x, jnp.bfloat16)
    return x.astype(jnp.float32)
