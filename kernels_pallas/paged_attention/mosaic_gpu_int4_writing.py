"""Writing keys and values into int4 pages on Hopper: rotated and quantized on their way, in place.

Two slots share a byte, and whoever writes one of them writes both. So a byte belongs to the token
of its even slot, or to that of its odd slot if the even one belongs to no token of this step. Where
one slot of a byte belongs to an earlier step, the byte is read first, and its other half is kept.

A block of threads is given 64 consecutive tokens and a head. All but the last token are its own;
the last one is there because it may share a byte with the one before. The step's last block begins
sooner where it would be short.

The Hadamard rotation begins before the kernel, in one pass of XLA's over the rows: each eight
neighbouring lanes would be in registers of several threads. The rest of it adds whole registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import versions
from kernels_pallas.hopper import LINE_BYTES, fit
from kernels_pallas.op import UnsupportedError
from kernels_pallas.paged_attention.codec import Int4Pages, block_of
from kernels_pallas.paged_attention.ragged import Ragged, slots

_ROWS = 64  # tokens: rows of a tile of registers
_OWN = _ROWS - 1  # tokens whose bytes a block of threads writes
_SPARE = 8  # rows behind those of tokens, since each byte looks at the row behind its own
_PACKED = 16  # rows whose bytes are put together at a time
_BYTES = plgpu.Layout.TILED(
    plgpu.Tiling(((4, 128), (4, 4))), warp_dims=(-2,), lane_dims=(-3,), vector_dim=-1
)
"""A warp has a row of 128 bytes, a thread four of them: other layouts have bank conflicts."""
_NONE, _BOTH, _EVEN, _ODD = range(4)  # which slots of its byte a token writes


@dataclass(frozen=True)
class Shape:
    """What the kernel knows while it is traced.

    Attributes:
        page_size: slots in a page.
        lanes: of the rows of each cache.
        parts: lanes of the parts of these rows, each with a scale of its own.
    """

    page_size: int
    lanes: tuple[int, ...]
    parts: tuple[tuple[int, ...], ...]

    @property
    def copies(self) -> list[tuple[int, Any]]:
        """The copies that a token's bytes take: the cache, and lanes."""
        return [
            (cache, pl.ds(begin, min(LINE_BYTES, n - begin)))
            for cache, n in enumerate(self.lanes)
            for begin in range(0, n, LINE_BYTES)
        ]


def page_write(
    k_pages: Int4Pages, v_pages: Int4Pages | None, k: Array, v: Array | None,
    layer: Array | int, batch: Ragged, *, interpret: Any,
) -> tuple[Int4Pages, Int4Pages | None]:  # fmt: skip
    """`reference.page_write` as a Hopper kernel.

    Raises:
        UnsupportedError: keys and values in pages of different kinds; lanes of pages, or of parts
            of rows, that are no multiples of 64; rows of 64 tokens that do not fit into shared
            memory.
    """
    stacks: list[Any] = [k_pages] if v_pages is None else [k_pages, v_pages]
    T, shape = k.shape[0], _shape(stacks)
    padding = max(0, _ROWS - T)

    def rows(x: Array, lanes: int) -> Array:  # [T, K, W], rotated within each eight lanes
        x = jnp.pad(x.astype(jnp.float32), ((0, padding), (0, 0), (0, lanes - x.shape[-1])))
        eights = x.reshape(*x.shape[:2], -1, 8)
        return jnp.stack(_butterflies([eights[..., i] for i in range(8)], 8), -1).reshape(x.shape)

    new = [rows(x, n) for x, n in zip([k] if v is None else [k, v], shape.lanes, strict=True)]
    slot = slots(batch, T, shape.page_size)
    first = jnp.arange(max(1, -(-(T - 1) // _OWN)), dtype=jnp.int32)[:, None] * _OWN
    token = jnp.minimum(first, T + padding - _ROWS) + jnp.arange(_ROWS, dtype=jnp.int32)
    own = (token >= first) & (token < T) & ((token < first + _OWN) | (token == T - 1))

    def by_block(x: Array, none: int) -> Array:  # [blocks, 64]
        return jnp.where(own, x[jnp.minimum(token, T - 1)], none)

    slot, written = by_block(slot, -1), by_block(_written(slot), _NONE)
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    moved = [pages.written for pages in stacks]
    numbers = layer, token[:, 0], slot, written
    out = _launch(numbers, new, moved, shape=shape, interpret=interpret)
    results = [pages.with_written(x) for pages, x in zip(stacks, out, strict=True)]
    return results[0], None if v_pages is None else results[1]


def _written(slot: Array) -> Array:
    """Which slots of a byte each token writes, from the slots of all tokens [T]. Neighbours in a
    byte are neighbours in the step, since a page is written by its owner alone."""
    none = jnp.full(1, -1, jnp.int32)
    before, behind = jnp.concatenate([none, slot[:-1]]), jnp.concatenate([slot[1:], none])
    even = jnp.where(behind == slot + 1, _BOTH, _EVEN)
    odd = jnp.where(before == slot - 1, _NONE, _ODD)
    return jnp.where(slot < 0, _NONE, jnp.where(slot % 2 == 0, even, odd)).astype(jnp.int32)


def _shape(stacks: list[Any]) -> Shape:
    """The kernel's sizes.

    Raises:
        UnsupportedError: see `page_write`.
    """
    if not all(isinstance(pages, Int4Pages) for pages in stacks):
        kinds = {type(pages).__name__ for pages in stacks}
        raise UnsupportedError(f"keys and values in {kinds}: keep both in one")
    lanes, parts = tuple(x.shape[-1] for x in stacks), tuple(x.parts for x in stacks)
    if any(n % 64 for each in (lanes, *parts) for n in each):
        raise UnsupportedError(f"{lanes=} of pages and {parts=} of rows: whole 64s, as tiles are")
    fit(((2 * _ROWS + _SPARE) * _stride(n) for n in lanes), f"{_ROWS} rows of {lanes=}")
    return Shape(stacks[0].shape[3], lanes, parts)


def _stride(lanes: int) -> int:
    """Bytes from a row in shared memory to the next one."""
    return -(-lanes // LINE_BYTES) * LINE_BYTES


@partial(jax.jit, static_argnames=("shape", "interpret"))
def _launch(
    numbers: tuple[Array, ...], new: list[Array], moved: list[list[Array]], *, shape: Shape,
    interpret: Any,
) -> list[list[Array]]:  # fmt: skip
    """The leaves with their new rows and scales. Refs of a memory space want a jit around them.

    Args:
        numbers: layer [1], the first token of each block of threads [blocks], and of its tokens
            slots and which slots of their bytes they write [blocks, 64].
        new: rows [T, K, W] of each cache, rotated within each eight lanes.
        moved: the arrays of each cache that are written.
    """
    caches = jax.tree.map(lambda x: jax.new_ref(x, memory_space=plgpu.GMEM), moved)
    scratch = [
        [plgpu.SMEM((_ROWS + _SPARE, _stride(n)), jnp.uint8) for n in shape.lanes],
        [plgpu.SMEM((-(-n // LINE_BYTES), _ROWS, LINE_BYTES), jnp.uint8) for n in shape.lanes],
        [plgpu.SMEM((len(each), _ROWS), jnp.float32) for each in shape.parts],
        plgpu.SMEM((_ROWS,), jnp.int32),
        plgpu.Barrier(),
        plgpu.Barrier(num_arrivals=_ROWS * len(shape.copies)),
    ]
    body = partial(_kernel, shape=shape, simulated=bool(interpret))
    write: Any = pl.kernel(
        lambda *refs: pl.run_scoped(partial(body, *refs), *scratch),
        out_type=(),
        mesh=plgpu.Mesh(grid=(new[0].shape[1], len(numbers[-1])), grid_names=("head", "block")),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
        name="page_write_int4",
    )
    write(*numbers, *new, *jax.tree.leaves(caches))
    return jax.tree.map(jax.freeze, caches)


class _Refs(NamedTuple):
    """What a block of threads reads and writes. Lists have an entry for each cache.

    Attributes:
        layer: int32 [1]; first_token: int32 [blocks]; slots, written: int32 [blocks, 64]; new:
            float32 [T, K, W]; pages: uint8 [L, P, K, Z / 2, W]; stored_scales: float32
            [L, P, K * parts, Z]. All these in global memory.
        rows: uint8 [64 and some more, W], nibbles and then bytes; old: uint8 [lines, 64, lanes of a
            line], bytes as they were; scales: float32 [parts, 64]; written_smem: int32 [64].
        written_ready, old_ready: `written_smem` and `old` are filled.
    """

    layer: Any
    first_token: Any
    slots: Any
    written: Any
    new: Sequence[Any]
    pages: Sequence[Any]
    stored_scales: Sequence[Any]
    rows: Sequence[Any]
    old: Sequence[Any]
    scales: Sequence[Any]
    written_smem: Any
    written_ready: Any
    old_ready: Any

    @classmethod
    def of(cls, layer: Any, first_token: Any, slots: Any, written: Any, *refs: Any) -> _Refs:
        *inputs, rows, old, scales, written_smem, written_ready, old_ready = refs
        new, pages_and_scales = inputs[: len(rows)], inputs[len(rows) :]
        return cls(
            layer, first_token, slots, written, new, pages_and_scales[::2], pages_and_scales[1::2],
            rows, old, scales, written_smem, written_ready, old_ready,
        )  # fmt: skip

    def bytes_of(self, slot: Array, head: Array, shape: Shape) -> list[tuple[Any, int, Any]]:
        """A slot's bytes in pages, which cache they are of, and lanes."""
        page_size = jnp.int32(shape.page_size)
        page, z = lax.div(slot, page_size), lax.rem(slot, page_size)
        pair = lax.div(z, jnp.int32(2))
        return [
            (self.pages[cache].at[self.layer[0], page, head, pl.ds(pair, 1), lanes], cache, lanes)
            for cache, lanes in shape.copies
        ]


def _kernel(*refs: Any, shape: Shape, simulated: bool) -> None:
    """Writes the rows of 64 consecutive tokens and a head. `refs` are those of `_Refs.of`."""
    of = _Refs.of(*refs)
    head, block = lax.axis_index("head"), lax.axis_index("block")
    plgpu.copy_gmem_to_smem(of.written.at[block], of.written_smem, of.written_ready)
    _load_old(of, head, block, shape)
    _quantize_rows(of, head, block, shape, simulated)
    plgpu.barrier_wait(of.written_ready)
    plgpu.barrier_wait(of.old_ready)
    for row, old in zip(of.rows, of.old, strict=True):
        pl.loop(0, _ROWS // _PACKED)(partial(_pack, row, old, of.written_smem))
    plgpu.commit_smem()
    _store(of, head, block, shape)


def _load_old(of: _Refs, head: Array, block: Array, shape: Shape) -> None:
    """Begins to copy the bytes of which half is kept."""

    @pl.loop(0, _ROWS)
    def _(t: Array) -> None:
        keeps_half = of.written[block, t] >= _EVEN

        @pl.when(keeps_half)
        def _() -> None:
            for source, cache, lanes in of.bytes_of(of.slots[block, t], head, shape):
                line = of.old[cache].at[
                    lanes.start // LINE_BYTES, pl.ds(t, 1), pl.ds(0, lanes.size)
                ]
                plgpu.copy_gmem_to_smem(source, line, of.old_ready)

        @pl.when(jnp.logical_not(keeps_half))
        def _() -> None:
            for _ in shape.copies:  # the barrier counts on as many of each token
                plgpu.barrier_arrive(of.old_ready)


def _quantize_rows(of: _Refs, head: Array, block: Array, shape: Shape, simulated: bool) -> None:
    """Rotates and quantizes all rows: nibbles and scales in shared memory."""
    for x, row, scale, parts in zip(of.new, of.rows, of.scales, shape.parts, strict=True):
        x, first, part = x.at[pl.ds(of.first_token[block], _ROWS), head], 0, 0
        for n, alike in groupby(parts):
            count = len(list(alike))
            place = {"lanes": n, "first": first, "part": part}
            quantize = partial(_quantize_part, x, row, scale, **place, simulated=simulated)
            if count > 1:  # unrolled it compiles for minutes
                pl.loop(0, count)(quantize)
            else:
                quantize(0)
            first, part = first + count * n, part + count


def _store(of: _Refs, head: Array, block: Array, shape: Shape) -> None:
    """Copies the scales of each token to its slot, and its bytes if they are its own."""

    @pl.loop(0, _ROWS)
    def _(t: Array) -> None:
        slot = of.slots[block, t]

        @pl.when(slot >= 0)
        def _() -> None:
            page_size = jnp.int32(shape.page_size)
            page, z = lax.div(slot, page_size), lax.rem(slot, page_size)
            for stored, scale in zip(of.stored_scales, of.scales, strict=True):
                parts = scale.shape[0]
                for part in range(parts):
                    stored[of.layer[0], page, head * parts + part, z] = scale[part, t]

        @pl.when(of.written[block, t] > _NONE)
        def _() -> None:
            for target, cache, lanes in of.bytes_of(slot, head, shape):
                plgpu.copy_smem_to_gmem(of.rows[cache].at[pl.ds(t, 1), lanes], target)

    plgpu.wait_smem_to_gmem(0)


def _quantize_part(
    x: Any, row: Any, scale: Any, i: Any, *, lanes: int, first: int, part: int, simulated: bool
) -> None:
    """Rotates and quantizes a part of rows x [64, W]: the i-th of some parts with as many lanes.

    Args:
        row: where nibbles go; scale: where scales go, [parts, 64].
        lanes: of a part.
        first, part: the first lane and the number of the first of these parts.
    """
    lane = first + i * lanes
    some = versions.load_narrow(x.at[:, pl.ds(lane, lanes)], plgpu.Layout.WGMMA, simulated)
    _quantize(_rotated(some), lane, row, scale.at[part + i])


def _rotated(x: Array) -> list[Array]:
    """A part of rows as `codec.hadamard` rotates it, to the bit, eight lanes at a time. Each eight
    lanes have been rotated already."""
    block = block_of(x.shape[1])
    columns = [x[:, lane : lane + 8] for lane in range(0, x.shape[1], 8)]
    return [column * np.float32(block**-0.5) for column in _butterflies(columns, block // 8)]


def _butterflies(x: list[Array], block: int) -> list[Array]:
    """Each `block` neighbouring arrays times Sylvester's matrix."""
    step = 1
    while step < block:
        pairs = [(x[i & ~step], x[i | step]) for i in range(len(x))]
        x = [a - b if i & step else a + b for i, (a, b) in enumerate(pairs)]
        step *= 2
    return x


def _quantize(columns: list[Array], first: Any, row: Any, scale: Any) -> None:
    """Quantizes rows of a part as `codec` does, each with a scale of its own.

    Args:
        columns: eight lanes of all rows each [64, 8].
        first: the part's first lane in `row`.
        scale: where scales go, [64].
    """
    high = jnp.max(reduce(jnp.maximum, columns), 1)
    low = jnp.min(reduce(jnp.minimum, columns), 1)
    top = jnp.where(high >= -low, high, low)
    top = jnp.where(high != high, high, top)  # NaN
    steps = jnp.where(top != 0, -8.0 / top, 0.0)
    for i, x in enumerate(columns):
        x = x * lax.broadcast_in_dim(steps, x.shape, (0,))
        x = jnp.clip(lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN), -8.0, 7.0)
        nibbles = lax.bitcast_convert_type(x.astype(jnp.int8), jnp.uint8)
        versions.store_narrow(row.at[pl.ds(0, _ROWS), pl.ds(first + 8 * i, 8)], nibbles)
    scale[...] = top * (-1 / 8)


def _pack(rows: Any, old: Any, written: Any, i: Array) -> None:
    """Makes bytes of the nibbles of the i-th 16 tokens: with those of the token behind each, or
    with the half that is kept. Bytes take the place of their low nibbles, which no later token
    reads.

    Args:
        rows: [64 and some more, W], nibbles in bytes of their own.
        old: [lines, 64, lanes of a line], a shape of which each line is a tile: TMA swizzles the
            words of a line by the line's address, and registers are loaded accordingly only from
            tiles.
        written: [64], which slots of its byte a token writes.
    """
    first = i * _PACKED

    def ints(x: Array) -> Array:
        return plgpu.layout_cast(x, _BYTES).astype(jnp.int32)

    for line in range(old.shape[0]):
        lanes = pl.ds(line * LINE_BYTES, LINE_BYTES)
        own, behind = (ints(rows[pl.ds(first + n, _PACKED), lanes]) for n in (0, 1))
        before = ints(old[line, pl.ds(first, _PACKED)])
        kind = lax.broadcast_in_dim(written[pl.ds(first, _PACKED)], own.shape, (0,))
        low = jnp.where(kind == _ODD, before, own) & 15
        high = jnp.where(kind == _ODD, own << 4, jnp.where(kind == _BOTH, behind << 4, before))
        high = high & 240
        rows[pl.ds(first, _PACKED), lanes] = (low | high).astype(jnp.uint8)
