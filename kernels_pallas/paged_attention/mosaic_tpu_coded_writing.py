"""Writing into pages of eight or four bits on a TPU: rows are rounded on their way, in place.

An *item* is a page of one sequence that gets new rows. Its scales come and go whole, since they lie
along lanes; of its values only those groups of slots do that new rows fall into, since memory moves
in tiles of rows. Several items are on their way at once, and no two have a page in common, so that
the two slots of a byte of four bits are always written by one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.op import UnsupportedError
from kernels_pallas.paged_attention.codec import (
    Int4Pages,
    QuantizedPages,
    StaticInt8Pages,
    whole_scales,
)
from kernels_pallas.paged_attention.ragged import Ragged

_LANES = 128
_ROWS = 32  # of a tile of bytes
_VMEM = 32 * 2**20


@dataclass(frozen=True)
class Shape:
    """What the kernel knows while it is traced.

    Attributes:
        page: slots in a page.
        group: slots of a tile, in which pages come and go: of four bits two share a row.
        row: entries in a row of the block table.
        align: tokens that a copy of new rows begins at multiples of.
        depth: items on their way at a time.
        parts: of the rows of each cache; none where its scales are calibrated.
    """

    page: int
    group: int
    row: int
    align: int
    depth: int
    parts: tuple[tuple[int, ...], ...]


def page_write(
    k_pages: QuantizedPages, v_pages: QuantizedPages | None, k: Array, v: Array | None,
    layer: Array | int, batch: Ragged, *, items: int, interpret: Any,
) -> tuple[QuantizedPages, QuantizedPages | None]:  # fmt: skip
    """`reference.page_write` as a TPU kernel."""
    stacks: list[Any] = [k_pages] if v_pages is None else [k_pages, v_pages]
    new = [k] if v is None else [k, v]
    (T, K, _), dtype = k.shape, k.dtype if k.dtype == jnp.bfloat16 else jnp.float32
    shape = _shape(stacks, batch, dtype, items)
    tokens = pl.cdiv(max(T, shape.group + shape.align), shape.align) * shape.align

    def rows(x: Array, pages: QuantizedPages) -> Array:  # [K, T, W]
        padding = (0, tokens - T), (0, 0), (0, pages.shape[-1] - x.shape[-1])
        return jnp.pad(x.astype(dtype), padding).swapaxes(0, 1)

    rows_in = [rows(x, pages) for x, pages in zip(new, stacks, strict=True)]
    steps = [pages.steps(layer) for pages in stacks if isinstance(pages, StaticInt8Pages)]
    leaves = [leaf for pages in stacks for leaf in pages.written]
    scalars = (
        jnp.asarray(layer, jnp.int32).reshape(1), batch.row_starts, batch.kv_lens,
        batch.tables.reshape(-1), *_items(batch, T, shape.page),
    )  # fmt: skip
    hbm, vmem = (pl.BlockSpec(memory_space=m) for m in (pltpu.MemorySpace.HBM, pltpu.VMEM))
    first, groups = len(scalars) + len(rows_in) + len(steps), shape.page // shape.group
    out = pl.pallas_call(
        partial(_kernel, shape=shape),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(1,),
            in_specs=[*[hbm] * len(rows_in), *[vmem] * len(steps), *[hbm] * len(leaves)],
            out_specs=[hbm] * len(leaves),
            scratch_shapes=[
                *(pltpu.VMEM((shape.depth, groups, K, shape.group + shape.align, x.shape[-1]),
                             x.dtype)
                  for x in rows_in),
                *(pltpu.VMEM((shape.depth, *leaf.shape[2:]), leaf.dtype) for leaf in leaves),
                pltpu.SemaphoreType.DMA((2, shape.depth)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves],
        input_output_aliases={first + i: i for i in range(len(leaves))},
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=2 * _VMEM),
        interpret=interpret,
        name="page_write_int4" if isinstance(k_pages, Int4Pages) else "page_write_int8",
    )(*scalars, *rows_in, *steps, *leaves)  # fmt: skip
    done = iter(out)
    results = [pages.with_written([next(done) for _ in pages.written]) for pages in stacks]
    return results[0], None if v_pages is None else results[1]


def _shape(stacks: list[Any], batch: Ragged, dtype: Any, items: int) -> Shape:
    """The kernel's sizes, or what speaks against it."""
    Z, kinds = stacks[0].shape[3], {type(pages) for pages in stacks}
    if len(kinds) > 1:
        raise UnsupportedError(f"keys and values in {kinds}: keep both in one")
    group = 2 * _ROWS if kinds == {Int4Pages} else _ROWS
    lanes = [pages.shape[-1] for pages in stacks]
    if any(n % _LANES for n in lanes):
        raise UnsupportedError(f"pages of {lanes} lanes: pad them to multiples of {_LANES}")
    parts = tuple(() if isinstance(p, StaticInt8Pages) else p.parts for p in stacks)
    if any(n % _LANES for each in parts for n in each):
        raise UnsupportedError(f"{parts=} of rows must be multiples of {_LANES} lanes")
    rows = [p.scale.shape[2] for p in stacks if not isinstance(p, StaticInt8Pages)]
    if any(n != whole_scales(n) for n in rows):  # they would be copied
        raise UnsupportedError(f"{rows} rows of scales: pad them to 1, 2, 4 or eights")
    whole = _LANES if any(parts) else group
    if Z % whole:
        raise UnsupportedError(
            f"{Z=} keys in a page of {stacks[0].dtype} must be a multiple of {whole}"
        )
    K, align = stacks[0].shape[2], 32 // jnp.dtype(dtype).itemsize
    fresh = Z // group * (group + align) * jnp.dtype(dtype).itemsize
    depth = min(items, _VMEM // (sum(lanes) * K * (fresh + Z // group * _ROWS)))
    if depth < 2:
        raise UnsupportedError(f"two pages of {K=} heads, {Z=} slots do not fit into VMEM")
    return Shape(Z, group, batch.tables.shape[1], align, depth, parts)


def _items(batch: Ragged, T: int, Z: int) -> tuple[Array, Array, Array]:
    """The sequence of each item, which of its pages it is, and how many items there are."""
    starts, ends = batch.row_starts[:-1], batch.row_starts[1:]
    R = starts.shape[0]
    real = (jnp.arange(R) < batch.num_seqs) & (ends > starts)
    page = (batch.kv_lens - (ends - starts)) // Z
    count = jnp.where(real, (batch.kv_lens - 1) // Z - page + 1, 0)
    before = jnp.cumsum(count, dtype=jnp.int32)
    i = jnp.arange(pl.cdiv(T, Z) + 2 * R, dtype=jnp.int32)  # a chunk may begin and end anywhere
    seqs = jnp.minimum(jnp.sum(before <= i[:, None], 1), R - 1).astype(jnp.int32)
    return seqs, (page - before + count)[seqs] + i, before[-1:]


class _Place(NamedTuple):
    """Where an item lies: slot s is that of token `token` + s of the step, if first <= s < end."""

    page: Array
    token: Array
    first: Array
    end: Array


def _kernel(*refs: Any, shape: Shape) -> None:
    layer, starts, lens, tables, seqs, pages, count, *rest = refs
    stacks = len(shape.parts)
    leaves = sum(2 if parts else 1 for parts in shape.parts)
    static = 2 * stacks - leaves
    new, steps, rest = rest[:stacks], rest[stacks : stacks + static], rest[stacks + static :]
    caches, rest = rest[leaves : 2 * leaves], rest[2 * leaves :]  # those that come in go out
    fresh, old, arrived = rest[:stacks], rest[stacks:-1], rest[-1]
    owned = _owned(shape.parts)
    tokens, count = new[0].shape[1], count[0]

    def place(i: Array) -> _Place:
        seq, begin = seqs[i], pages[i] * shape.page
        shift = lens[seq] - starts[seq + 1]
        first = jnp.maximum(starts[seq] + shift - begin, 0)
        end = jnp.minimum(lens[seq] - begin, shape.page)
        return _Place(tables[seq * shape.row + pages[i]], begin - shift, first, end)

    def window(at: _Place, g: Array) -> Array:
        """The aligned token from which a group's rows are read; all of them exist."""
        token = jnp.clip(at.token + g * shape.group, 0, tokens - shape.group - shape.align)
        return pl.multiple_of(lax.div(token, jnp.int32(shape.align)) * shape.align, shape.align)

    def groups(at: _Place) -> Any:
        return pl.loop(lax.div(at.first, shape.group), lax.div(at.end - 1, shape.group) + 1)

    def tile(g: Array) -> Any:
        return pl.ds(pl.multiple_of(g * _ROWS, _ROWS), _ROWS)

    def move(i: Array, act: str, out: bool) -> None:
        """Starts or awaits what an item begins with, or what it ends with."""
        at, n = place(i), lax.rem(i, jnp.int32(shape.depth))

        def copy(there: Any, here: Any) -> None:
            ends = (here, there) if out else (there, here)
            getattr(pltpu.make_async_copy(*ends, arrived.at[int(out), n]), act)()

        for c, (values, scale) in enumerate(owned):
            if scale is not None:
                copy(caches[scale].at[layer[0], at.page], old[scale].at[n])

            @groups(at)
            def _(g: Array, c: int = c, values: int = values) -> None:
                copy(caches[values].at[layer[0], at.page, :, tile(g)],
                     old[values].at[n, :, tile(g)])  # fmt: skip
                if not out:
                    copy(new[c].at[:, pl.ds(window(at, g), shape.group + shape.align)],
                         fresh[c].at[n, g])  # fmt: skip

    def merge(i: Array) -> None:
        at, n = place(i), lax.rem(i, jnp.int32(shape.depth))
        calibrated = iter(steps)
        for c, (values, scale) in enumerate(owned):
            kept = old[values]
            take: Any = partial(_calibrated, next(calibrated)) if scale is None else partial(
                _rounded, old[scale].at[n], shape.parts[c], _code(kept.dtype)
            )  # fmt: skip

            @groups(at)
            def _(g: Array, x: Any = fresh[c], kept: Any = kept, take: Any = take) -> None:
                slot = g * shape.group + lax.broadcasted_iota(jnp.int32, (shape.group, 1), 0)
                own = (slot >= at.first) & (slot < at.end)

                @pl.loop(0, kept.shape[1])
                def _(h: Array) -> None:
                    rows = x[n, g, h].astype(jnp.float32)  # a roll of rows wants whole words
                    size = jnp.int32(rows.shape[0])
                    ahead = window(at, g) - at.token - g * shape.group
                    rows = pltpu.roll(rows, lax.rem(ahead + size, size), 0)[: shape.group]
                    rows = take(rows, h, slot, own)
                    rows = lax.round(rows, lax.RoundingMethod.TO_NEAREST_EVEN)
                    kept[n, h, tile(g)] = _merged(kept[n, h, tile(g)], rows, own)

    ahead = shape.depth // 2
    pl.loop(0, jnp.minimum(ahead, count))(partial(move, act="start", out=False))

    @pl.loop(0, count)
    def _(i: Array) -> None:
        @pl.when(i + ahead < count)
        def _() -> None:
            free = i + ahead - shape.depth
            pl.when(free >= 0)(lambda: move(free, "wait", True))
            move(i + ahead, "start", False)

        move(i, "wait", False)
        merge(i)
        move(i, "start", True)

    pl.loop(jnp.maximum(count - shape.depth, 0), count)(partial(move, act="wait", out=True))


def _owned(parts: tuple[tuple[int, ...], ...]) -> list[tuple[int, int | None]]:
    """For each cache, which leaf its values are and which its scales."""
    ends = list(accumulate(2 if each else 1 for each in parts))
    return [(e - 2, e - 1) if each else (e - 1, None) for e, each in zip(ends, parts, strict=True)]


def _calibrated(steps: Any, x: Array, h: Array, slot: Array, own: Array) -> Array:
    """Rows x [slots, W] over steps that are known."""
    del slot, own
    return jnp.clip(x * steps[pl.ds(h, 1)], -127.0, 127.0)


def _merged(tile: Array, rows: Array, own: Array) -> Array:
    """A tile of a page with whole numbers in place of its own rows [slots, W]. Two slots that share
    a byte are consecutive rows of nibbles, as `mosaic_tpu_kernel.Rows` says."""
    if tile.dtype != jnp.uint8:
        return jnp.where(own, rows, tile.astype(jnp.float32)).astype(tile.dtype)
    nibbles = pltpu.bitcast(tile, jnp.int4).astype(jnp.float32)
    nibbles = jnp.where(own, rows, nibbles).astype(jnp.int32).astype(jnp.int4)
    return pltpu.bitcast(nibbles, tile.dtype)


def _rounded(
    scale: Any, parts: tuple[int, ...], code: Any, x: Array, h: Array, slot: Array, own: Array
) -> Array:
    """Rows x [slots, W] over their steps; the scales of own slots are put along `scale`'s lanes."""
    out = list[Array]()
    for b, (n, end) in enumerate(zip(parts, accumulate(parts), strict=True)):
        part, step = code(x[:, end - n : end])
        out.append(part)
        lane = lax.broadcasted_iota(jnp.int32, (x.shape[0], scale.shape[-1]), 1)
        mine = (lane == slot) & own
        found = jnp.sum(jnp.where(mine, step, 0.0), 0, keepdims=True)
        new = jnp.max(jnp.where(mine, 1.0, 0.0), 0, keepdims=True) > 0
        at = pl.ds(h * len(parts) + b, 1)
        scale[at] = jnp.where(new, found, scale[at])
    return jnp.concatenate(out, 1)


def _code(dtype: Any) -> Callable[[Array], tuple[Array, Array]]:
    """What takes a part of rows [slots, n] to itself over its steps, and these [slots, 1]."""
    return _nibbles if dtype == jnp.uint8 else _bytes


def _bytes(x: Array) -> tuple[Array, Array]:
    top = jnp.max(jnp.abs(x), 1, keepdims=True)
    return x * jnp.where(top > 0, 127.0 / top, 0.0), top * (1 / 127.0)


def _nibbles(x: Array) -> tuple[Array, Array]:
    """To the bit as `codec` has it: rows are turned, and what is largest in them becomes -8."""
    x = _turned(x)
    high, low = jnp.max(x, 1, keepdims=True), jnp.min(x, 1, keepdims=True)
    top = jnp.where(high >= -low, high, low)
    top = jnp.where(high != high, high, top)
    return jnp.clip(x * jnp.where(top != 0, -8.0 / top, 0.0), -8.0, 7.0), top * (-1 / 8)


def _turned(x: Array) -> Array:
    """`codec.hadamard`, the same sums in the same order: lanes meet those a power of two away."""
    n, lane, step = x.shape[1], lax.broadcasted_iota(jnp.int32, x.shape, 1), 1
    block = n & -n
    while step < block:
        second = (lane & step) != 0
        other = jnp.where(second, pltpu.roll(x, step, 1), pltpu.roll(x, n - step, 1))
        x = other + jnp.where(second, -x, x)
        step *= 2
    return x * np.float32(block**-0.5)
