"""Pages that keep keys and values in eight or four bits, and how their rows are read again.

A row is one head's key (or value) of one token. Its lanes fall into *parts* with a scale each,
since a latent row is a normed latent with a few rotated lanes of quite another size behind it.
Scales lie beside the values, `[L, P, K * parts, Z]`: those of a page come in one copy, keys along
its lanes, as logits lie. More rows than that are padding (`whole_scales`).

Four bits are taken after a fixed rotation: a Hadamard matrix on each block of lanes spreads what a
few large lanes hold over all of them. Queries turn alike, which leaves scores as they are, and what
attention says is turned back, once per row of the output.
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

from kernels_pallas.quantize import quantize_rows

ROTATED = 128
"""Most lanes of a part in four bits: a whole TPU register, a small product for a matrix unit.

With one scale for 128 rotated lanes (4.25 bits a lane) Gaussian rows keep 1.06 % of error in the
mean square; with 32 lanes (5 bits) 0.74 %. Without the range's odd end, -8, it is 1.38 and 0.94 %.
"""


class _Quantized:
    values: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """[L, P, K, Z, W], whatever is packed how."""
        return self.values.shape

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    @property
    def written(self) -> list[Any]:
        """The arrays that writing changes."""
        return [self.values, self.scale]

    def with_written(self, arrays: list[Any]) -> Any:
        pages: Any = self  # a dataclass
        return replace(pages, **dict(zip(("values", "scale"), arrays, strict=False)))


_register = partial(jax.tree_util.register_dataclass, meta_fields=["parts"])


@partial(_register, data_fields=["values", "scale"])
@dataclass(frozen=True)
class Int8Pages(_Quantized):
    """values * scale; a scale for each token, head and part, found as the row is written.

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
    """values * scale with scales from a calibration: writing is one product and needs no maximum.

    A kernel may `fold` those of keys into queries, and those of values into what attention says.

    Attributes:
        values: int8 [L, P, K, Z, W]; what is beyond 127 scales is cut.
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
        """What rows are multiplied with before they are rounded [K, W]; 0 where the scale is."""
        scale = lax.dynamic_index_in_dim(self.scale, layer, keepdims=False)
        return jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1.0), 0.0)

    def fold(self, x: Array, layer: Array | int) -> Array:
        """x [T, N, H] times the scales of its lanes: rows of the cache then count as integers."""
        scale = lax.dynamic_index_in_dim(self.scale, layer, keepdims=False)  # [K, W]
        (T, N, H), (K, W) = x.shape, scale.shape
        scale = jnp.pad(scale, ((0, 0), (0, max(0, H - W))))[:, None, :H]
        return (x.astype(jnp.float32).reshape(T, K, N // K, H) * scale).reshape(T, N, H)


@partial(_register, data_fields=["values", "scale"])
@dataclass(frozen=True)
class Int4Pages(_Quantized):
    """nibble * scale of rotated rows; a scale for each token, head and part.

    Two slots share a byte and lanes stay whole. Nibbles are two's complement; a part's largest
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
        rows = [_quantize_nibbles(part) for part in _split(_turned(x, self.parts), self.parts)]
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


def put(pages: Pages, x: Array, layer: Array | int, page: Array, slot: Array) -> Any:
    """The pages with rows x [T, K, H <= W] in their slots; a page past the last goes nowhere."""
    if isinstance(pages, QuantizedPages):
        x = _widened(x, pages.shape[-1]).astype(jnp.float32)
        return pages.put(x, layer, page, slot)
    return pages.at[layer, page, :, slot].set(to_stored(x, pages), mode="drop")


def take(pages: Pages, layer: Array | int, index: Array) -> Array:
    """Rows [..., K, Z, W] of pages [...], float32, rotated where rows are."""
    if isinstance(pages, QuantizedPages):
        return pages.take(layer, index)
    return _from_stored(pages[layer, index])


def turned(pages: Pages, x: Array) -> Array:
    """x [..., H] as rows are turned: queries [..., W] for their keys. What attention says of
    values comes back by the same turn; what lies in the first parts does without the others."""
    if not isinstance(pages, Int4Pages):
        return x
    ends = zip(pages.parts, accumulate(pages.parts), strict=True)
    parts = tuple(n for n, end in ends if end - n < x.shape[-1])
    return _turned(_widened(x, sum(parts)), parts)


def turned_by_product(pages: Pages, x: Array) -> Array:
    """Queries x [..., H] as `turned` has them, in x's type and each part times the root of its
    `block_of`. XLA makes temporaries of butterflies; signs are exact in bfloat16, a root is not."""
    if not isinstance(pages, Int4Pages):
        return x
    ends = zip(pages.parts, accumulate(pages.parts), strict=True)
    parts = [n for n, end in ends if end - n < x.shape[-1]]
    blocks = [block_of(n) for n in parts for _ in range(n // block_of(n))]
    rows = x.reshape(-1, x.shape[-1])

    def product(part: Array, by: Array) -> Array:
        how = {"precision": lax.Precision.HIGHEST, "preferred_element_type": x.dtype}
        return jnp.dot(part, by[: part.shape[1]], **how)

    # Each writes its lanes of the result. One product of all blocks would make them an axis of
    # their own, which a TPU pads to eights and copies.
    each = [
        product(rows[:, end - n : end], jnp.asarray(signs(n), x.dtype))
        for n, end in zip(blocks, accumulate(blocks), strict=True)
    ]
    return jnp.concatenate(each, -1).reshape(*x.shape[:-1], -1)


def block_of(lanes: int) -> int:
    """The lanes of a part in four bits that turn together."""
    return lanes & -lanes


def signs(block: int) -> np.ndarray:
    """Sylvester's matrix."""
    return reduce(np.kron, [[[1, 1], [1, -1]]] * (block.bit_length() - 1), np.ones((1, 1)))


def whole_parts(pages: Pages, lanes: int) -> int:
    """The fewest lanes, at least so many, that can be turned back."""
    if not isinstance(pages, Int4Pages):
        return lanes
    return next(end for end in accumulate(pages.parts) if end >= lanes)


def as_read(pages: Pages, x: Array, layer: Array | int) -> Array:
    """Rows x [T, K, H] as they would be read again, in x's type: rounded as pages round them."""
    if isinstance(pages, QuantizedPages):
        return round_trip(pages, x.astype(jnp.float32), layer)[..., : x.shape[-1]].astype(x.dtype)
    kept = jnp.bfloat16 if pages.dtype == jnp.uint16 else pages.dtype
    return x.astype(kept).astype(x.dtype)


def round_trip(pages: QuantizedPages, x: Array, layer: Array | int) -> Array:
    """Rows x [T, K, H] as they would be read again [T, K, W], turned back, with x's gradient."""
    K, W = pages.shape[2], pages.shape[-1]
    x = _widened(x, W)
    parts = None if isinstance(pages, StaticInt8Pages) else pages.parts
    blank = empty(jnp.int4 if isinstance(pages, Int4Pages) else jnp.int8, (1, x.shape[0], K, 2, W),
                  parts=parts)  # fmt: skip
    if isinstance(pages, StaticInt8Pages):
        blank = StaticInt8Pages(blank.values, pages.scale[layer][None])
    every = jnp.arange(x.shape[0])
    stored = put(blank, lax.stop_gradient(x), 0, every, jnp.zeros_like(every))
    read = turned(pages, take(stored, 0, every)[:, :, 0])
    return x + lax.stop_gradient(read - x)


def whole_scales(rows: int) -> int:
    """As many rows of scales as a TPU's page wants: 1, 2, 4 or eights. XLA lays arrays with others
    out by another axis, and a kernel would pay a copy of all scales."""
    return rows if rows in (1, 2, 4) else -(-rows // 8) * 8


def empty(
    dtype: Any, shape: tuple[int, ...], *, parts: tuple[int, ...] | None = None,
    whole: bool = False, device: Any = None,
) -> Any:  # fmt: skip
    """Blank pages [L, P, K, Z, W]: int8 and int4 with scales of their own, others as they are.

    Args:
        whole: rows of scales are padded to `whole_scales`.
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
    """Scales [L, K, W] for `StaticInt8Pages` from rows [L, T, K, W] that a model has made.

    Args:
        margin: how much larger than what was seen a lane may become before it is cut.
    """
    return jnp.max(jnp.abs(rows.astype(jnp.float32)), 1) * (margin / 127.0)


def hadamard(x: Array, block: int) -> Array:
    """x with each block of lanes (a power of two) turned by Sylvester's matrix over sqrt(block).

    Its own inverse. Sums are butterflies, so a row's bits do not depend on how many there are.
    """
    shape, step = x.shape, 1
    while step < block:
        a, b = jnp.moveaxis(x.reshape(*shape[:-1], -1, 2, step), -2, 0)
        x = jnp.stack([a + b, a - b], -2).reshape(shape)
        step *= 2
    return x * jnp.float32(block**-0.5)


def _quantize_nibbles(x: Array) -> tuple[Array, Array]:
    """Rows [..., W] as nibbles in uint8 and scales [...]; one that is not finite has no scale."""
    high, low = x.max(-1, keepdims=True), x.min(-1, keepdims=True)
    top = jnp.where(high >= -low, high, low)
    top = jnp.where(jnp.all(jnp.isfinite(x), -1, keepdims=True), top, jnp.nan)
    steps = jnp.where(top != 0, -8.0 / top, 0.0)
    values = jnp.clip(_round(x * steps), -8, 7).astype(jnp.int8)
    return lax.bitcast_convert_type(values, jnp.uint8) & 15, top[..., 0] * (-1 / 8)


def _turned(x: Array, parts: tuple[int, ...]) -> Array:
    return jnp.concatenate([hadamard(part, block_of(part.shape[-1]))
                            for part in _split(x, parts)], -1)  # fmt: skip


def _round(x: Array) -> Array:
    return lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)


def _scaled(values: Array, scale: Array, parts: tuple[int, ...]) -> Array:
    """values [..., K, Z, W] times scale [..., K * parts, Z], or with padding behind."""
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
    """x as floats are kept: uint16 is bfloat16, which jax 0.10 scatters slowly on CPU."""
    x = _widened(x, pages.shape[-1])
    if pages.dtype == jnp.uint16:
        return lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    return x.astype(pages.dtype)


def _from_stored(x: Array) -> Array:
    if x.dtype == jnp.uint16:
        x = lax.bitcast_convert_type(x, jnp.bfloat16)
    return x.astype(jnp.float32)
