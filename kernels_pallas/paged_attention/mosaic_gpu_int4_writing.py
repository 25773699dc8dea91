"""Writing keys and values into pages of four bits on Hopper: turned and rounded on their way, in
place.

Two slots share a byte, and whoever writes one writes both. So a byte belongs to the token of its
even slot, or to that of the odd one where the other slot is none of this step, and then its half of
an earlier step is read first. A block of threads is given 64 consecutive tokens and a head; all but
the last are its own, and the last one may share a byte with the one before. The step's last block
begins sooner where it would be short.

Turning begins before the kernel, in one pass of XLA's over the rows: eight lanes would be those of
several threads. What is left of it is sums of registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial, reduce
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import versions
from kernels_pallas.hopper import fit
from kernels_pallas.op import UnsupportedError
from kernels_pallas.paged_attention.codec import Int4Pages, block_of
from kernels_pallas.paged_attention.ragged import Ragged, owners

_ROWS = 64  # tokens: rows of a tile of registers
_OWN = _ROWS - 1  # of a block of threads
_SPARE = 8  # rows behind those of tokens, since each looks at the one behind it
_LINE = 128  # bytes: where in shared memory a copy may begin, and lanes that one takes
_SOME = 16  # rows whose bytes are put together at a time
_BYTES = plgpu.Layout.TILED(
    plgpu.Tiling(((4, 128), (4, 4))), warp_dims=(-2,), lane_dims=(-3,), vector_dim=-1
)
"""A row of 128 bytes in each warp, four of them in a thread: others collide in shared memory."""
_NONE, _BOTH, _EVEN, _ODD = range(4)  # which slots of its byte a token writes


@dataclass(frozen=True)
class Shape:
    """What the kernel knows while it is traced.

    Attributes:
        page: slots in a page.
        lanes: of the rows of each cache.
        parts: of these rows.
    """

    page: int
    lanes: tuple[int, ...]
    parts: tuple[tuple[int, ...], ...]

    @property
    def copies(self) -> list[tuple[int, Any]]:
        """In which a token's bytes come and go: the cache, and lanes."""
        return [
            (cache, pl.ds(begin, min(_LINE, n - begin)))
            for cache, n in enumerate(self.lanes)
            for begin in range(0, n, _LINE)
        ]


def page_write(
    k_pages: Int4Pages, v_pages: Int4Pages | None, k: Array, v: Array | None,
    layer: Array | int, batch: Ragged, *, interpret: Any,
) -> tuple[Int4Pages, Int4Pages | None]:  # fmt: skip
    """`reference.page_write` as a Hopper kernel."""
    stacks: list[Any] = [k_pages] if v_pages is None else [k_pages, v_pages]
    T, shape = k.shape[0], _shape(stacks)
    padding = max(0, _ROWS - T)

    def rows(x: Array, lanes: int) -> Array:  # [T, K, W], each eight lanes turned
        x = jnp.pad(x.astype(jnp.float32), ((0, padding), (0, 0), (0, lanes - x.shape[-1])))
        eights = x.reshape(*x.shape[:2], -1, 8)
        return jnp.stack(_butterflies([eights[..., i] for i in range(8)], 8), -1).reshape(x.shape)

    new = [rows(x, n) for x, n in zip([k] if v is None else [k, v], shape.lanes, strict=True)]
    row, position = owners(batch, T)
    page = batch.tables[row, jnp.maximum(position, 0) // shape.page]
    slots = jnp.where(position >= 0, page * shape.page + position % shape.page, -1)
    first = jnp.arange(max(1, -(-(T - 1) // _OWN)), dtype=jnp.int32)[:, None] * _OWN
    token = jnp.minimum(first, T + padding - _ROWS) + jnp.arange(_ROWS, dtype=jnp.int32)
    own = (token >= first) & (token < T) & ((token < first + _OWN) | (token == T - 1))

    def of_blocks(x: Array, none: int) -> Array:  # [blocks, 64]
        return jnp.where(own, x[jnp.minimum(token, T - 1)], none)

    slots, written = of_blocks(slots, -1), of_blocks(_written(slots), _NONE)
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    moved = [pages.written for pages in stacks]
    numbers = layer, token[:, 0], slots, written
    out = _launch(numbers, new, moved, shape=shape, interpret=interpret)
    results = [pages.with_written(x) for pages, x in zip(stacks, out, strict=True)]
    return results[0], None if v_pages is None else results[1]


def _written(slots: Array) -> Array:
    """Which slots of a byte each token writes, from the slots of all [T]. Neighbours in a byte are
    neighbours in the step, since only its owner writes a page."""
    none = jnp.full(1, -1, jnp.int32)
    before, behind = jnp.concatenate([none, slots[:-1]]), jnp.concatenate([slots[1:], none])
    even = jnp.where(behind == slots + 1, _BOTH, _EVEN)
    odd = jnp.where(before == slots - 1, _NONE, _ODD)
    return jnp.where(slots < 0, _NONE, jnp.where(slots % 2 == 0, even, odd)).astype(jnp.int32)


def _shape(stacks: list[Any]) -> Shape:
    """The kernel's sizes, or what speaks against it."""
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
    return -(-lanes // _LINE) * _LINE


@partial(jax.jit, static_argnames=("shape", "interpret"))
def _launch(
    numbers: tuple[Array, ...], new: list[Array], moved: list[list[Array]], *, shape: Shape,
    interpret: Any,
) -> list[list[Array]]:  # fmt: skip
    """The leaves with their new rows and scales. Refs of a memory space want a jit around them."""
    caches = jax.tree.map(lambda x: jax.new_ref(x, memory_space=plgpu.GMEM), moved)
    scratch = [
        [plgpu.SMEM((_ROWS + _SPARE, _stride(n)), jnp.uint8) for n in shape.lanes],
        [plgpu.SMEM((-(-n // _LINE), _ROWS, _LINE), jnp.uint8) for n in shape.lanes],
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


def _kernel(layer, first_token, slots, written, *refs: Any, shape: Shape, simulated: bool) -> None:
    *inputs, rows, old, scales, kind, arrived, kept = refs
    new, values, owned = inputs[: len(rows)], inputs[len(rows) :: 2], inputs[len(rows) + 1 :: 2]
    head, block = lax.axis_index("head"), lax.axis_index("block")
    plgpu.copy_gmem_to_smem(written.at[block], kind, arrived)

    def bytes_of(slot: Array) -> list[tuple[Any, Any, Any]]:
        """A token's bytes in the cache, which cache it is, and lanes."""
        number, z = lax.div(slot, jnp.int32(shape.page)), lax.rem(slot, jnp.int32(shape.page))
        pair = lax.div(z, jnp.int32(2))
        return [
            (values[cache].at[layer[0], number, head, pl.ds(pair, 1), lanes], cache, lanes)
            for cache, lanes in shape.copies
        ]

    @pl.loop(0, _ROWS)
    def _keep(t: Array) -> None:
        alone = written[block, t] >= _EVEN

        @pl.when(alone)
        def _() -> None:
            for there, cache, lanes in bytes_of(slots[block, t]):
                here = old[cache].at[lanes.start // _LINE, pl.ds(t, 1), pl.ds(0, lanes.size)]
                plgpu.copy_gmem_to_smem(there, here, kept)

        @pl.when(jnp.logical_not(alone))
        def _() -> None:
            for _ in shape.copies:  # barriers count
                plgpu.barrier_arrive(kept)

    for x, row, scale, parts in zip(new, rows, scales, shape.parts, strict=True):
        x, first, part = x.at[pl.ds(first_token[block], _ROWS), head], 0, 0
        for n, alike in groupby(parts):
            count = len(list(alike))
            at = {"lanes": n, "first": first, "part": part}
            take = partial(_take, x, row, scale, **at, simulated=simulated)
            pl.loop(0, count)(take) if count > 1 else take(0)  # unrolled it compiles for minutes
            first, part = first + count * n, part + count
    plgpu.barrier_wait(arrived)
    plgpu.barrier_wait(kept)
    for row, before in zip(rows, old, strict=True):
        pl.loop(0, _ROWS // _SOME)(partial(_pack, row, before, kind))
    plgpu.commit_smem()

    @pl.loop(0, _ROWS)
    def _leave(t: Array) -> None:
        slot = slots[block, t]

        @pl.when(slot >= 0)
        def _() -> None:
            number, z = lax.div(slot, jnp.int32(shape.page)), lax.rem(slot, jnp.int32(shape.page))
            for stack, scale in zip(owned, scales, strict=True):
                parts = scale.shape[0]
                for b in range(parts):
                    stack[layer[0], number, head * parts + b, z] = scale[b, t]

        @pl.when(written[block, t] > _NONE)
        def _() -> None:
            for there, cache, lanes in bytes_of(slot):
                plgpu.copy_smem_to_gmem(rows[cache].at[pl.ds(t, 1), lanes], there)

    plgpu.wait_smem_to_gmem(0)


def _take(
    x: Any, row: Any, scale: Any, i: Any, *, lanes: int, first: int, part: int, simulated: bool
) -> None:
    """The i-th of some parts alike, which begin at a lane, from rows x [tokens, W]."""
    at = first + i * lanes
    some = versions.load_narrow(x.at[:, pl.ds(at, lanes)], plgpu.Layout.WGMMA, simulated)
    _rounded(_turned(some), at, row, scale.at[part + i])


def _turned(x: Array) -> list[Array]:
    """A part of rows as `codec.hadamard` turns it, to the bit, eight lanes at a time, from what has
    been turned within these."""
    block = block_of(x.shape[1])
    columns = [x[:, at : at + 8] for at in range(0, x.shape[1], 8)]
    return [column * np.float32(block**-0.5) for column in _butterflies(columns, block // 8)]


def _butterflies(x: list[Array], block: int) -> list[Array]:
    step = 1
    while step < block:
        pairs = [(x[i & ~step], x[i | step]) for i in range(len(x))]
        x = [a - b if i & step else a + b for i, (a, b) in enumerate(pairs)]
        step *= 2
    return x


def _rounded(columns: list[Array], first: Any, row: Any, scale: Any) -> None:
    """Rows of a part, eight lanes at a time, over steps of their own: as `codec` has them."""
    high = jnp.max(reduce(jnp.maximum, columns), 1)
    low = jnp.min(reduce(jnp.minimum, columns), 1)
    top = jnp.where(high >= -low, high, low)
    top = jnp.where(high != high, high, top)
    steps = jnp.where(top != 0, -8.0 / top, 0.0)
    for i, x in enumerate(columns):
        x = x * lax.broadcast_in_dim(steps, x.shape, (0,))
        x = jnp.clip(lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN), -8.0, 7.0)
        nibbles = lax.bitcast_convert_type(x.astype(jnp.int8), jnp.uint8)
        versions.store_narrow(row.at[pl.ds(0, _ROWS), pl.ds(first + 8 * i, 8)], nibbles)
    scale[...] = top * (-1 / 8)


def _pack(row: Any, old: Any, kind: Any, i: Array) -> None:
    """Nibbles of some tokens with those of the tokens behind them, or with what was there. Rows
    that come later still are what they were.

    Args:
        old: [lines, tokens, lanes of one]. Copies mix up the words of a line by its place in shared
            memory, which registers are loaded by only if it is a line of a tile.
    """
    first = i * _SOME

    def ints(x: Array) -> Array:
        return plgpu.layout_cast(x, _BYTES).astype(jnp.int32)

    for line in range(old.shape[0]):
        at = pl.ds(line * _LINE, _LINE)
        own, behind = (ints(row[pl.ds(first + n, _SOME), at]) for n in (0, 1))
        before = ints(old[line, pl.ds(first, _SOME)])
        is_ = lax.broadcast_in_dim(kind[pl.ds(first, _SOME)], own.shape, (0,))
        low = jnp.where(is_ == _ODD, before, own) & 15
        high = jnp.where(is_ == _ODD, own << 4, jnp.where(is_ == _BOTH, behind << 4, before)) & 240
        row[pl.ds(first, _SOME), at] = (low | high).astype(jnp.uint8)
