"""Writing keys and values into pages of eight bits on Hopper: rounded on their way, in place.

A block of threads is given 64 consecutive tokens of the step and a head. One copy brings their rows
to shared memory, they are rounded in registers and put down again, and each leaves on its own for
its slot, its scales beside it. So nothing else of a page is read or written, wherever a chunk
begins or ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.hopper import fit
from kernels_pallas.op import UnsupportedError
from kernels_pallas.paged_attention.codec import QuantizedPages, StaticInt8Pages
from kernels_pallas.paged_attention.ragged import Ragged, owners

_ROWS = 64  # tokens: rows of a tile of registers
_LINE = 128  # bytes: where in shared memory a copy may begin
_WIDE = _LINE  # lanes of a row that registers hold at a time, and that one copy takes


@dataclass(frozen=True)
class Shape:
    """What the kernel knows while it is traced.

    Attributes:
        page: slots in a page.
        lanes: of the rows of each cache.
        parts: of these rows; none where scales are calibrated.
        dtype: of the rows that come.
    """

    page: int
    lanes: tuple[int, ...]
    parts: tuple[tuple[int, ...], ...]
    dtype: Any


def page_write(
    k_pages: QuantizedPages, v_pages: QuantizedPages | None, k: Array, v: Array | None,
    layer: Array | int, batch: Ragged, *, interpret: Any,
) -> tuple[QuantizedPages, QuantizedPages | None]:  # fmt: skip
    """`reference.page_write` as a Hopper kernel."""
    stacks: list[Any] = [k_pages] if v_pages is None else [k_pages, v_pages]
    T, shape = k.shape[0], _shape(stacks, k.dtype)
    padding = -T % _ROWS

    def rows(x: Array, lanes: int) -> Array:  # [T, K, W]
        padded = (0, padding), (0, 0), (0, lanes - x.shape[-1])
        return jnp.pad(x.astype(shape.dtype), padded)

    new = [rows(x, n) for x, n in zip([k] if v is None else [k, v], shape.lanes, strict=True)]
    steps = [pages.steps(layer) for pages in stacks if isinstance(pages, StaticInt8Pages)]
    row, position = owners(batch, T)
    page = batch.tables[row, jnp.maximum(position, 0) // shape.page]
    slots = jnp.where(position >= 0, page * shape.page + position % shape.page, -1)
    slots = jnp.pad(slots, (0, padding), constant_values=-1)
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    moved = [pages.written for pages in stacks]
    out = _launch(layer, slots, new, steps, moved, shape=shape, interpret=interpret)
    results = [pages.with_written(x) for pages, x in zip(stacks, out, strict=True)]
    return results[0], None if v_pages is None else results[1]


def _shape(stacks: list[Any], dtype: Any) -> Shape:
    """The kernel's sizes, or what speaks against it."""
    dtype = jnp.dtype(dtype if dtype == jnp.bfloat16 else jnp.float32)
    lanes = tuple(pages.shape[-1] for pages in stacks)
    parts = tuple(() if isinstance(x, StaticInt8Pages) else x.parts for x in stacks)
    if any(n % 64 for each in (lanes, *parts) for n in each):
        raise UnsupportedError(f"{lanes=} of pages and {parts=} of rows: whole 64s, as tiles are")
    fit((_ROWS * (_stride(n) + n * dtype.itemsize) for n in lanes), f"{_ROWS} rows of {lanes=}")
    return Shape(stacks[0].shape[3], lanes, parts, dtype)


def _stride(lanes: int) -> int:
    """Bytes from a row in shared memory to the next one."""
    return -(-lanes // _LINE) * _LINE


@partial(jax.jit, static_argnames=("shape", "interpret"))
def _launch(
    layer: Array, slots: Array, new: list[Array], steps: list[Array], moved: list[list[Array]], *,
    shape: Shape, interpret: Any,
) -> list[list[Array]]:  # fmt: skip
    """The leaves with their new rows and scales. Refs of a memory space want a jit around them."""
    caches = jax.tree.map(lambda x: jax.new_ref(x, memory_space=plgpu.GMEM), moved)
    known = [n for n, parts in zip(shape.lanes, shape.parts, strict=True) if not parts]
    copies = len(new) + sum(len(_pieces(0, n)) for n in known)
    scratch = [
        [plgpu.SMEM((_ROWS, n), shape.dtype) for n in shape.lanes],
        [plgpu.SMEM((n,), jnp.float32) for n in known],
        [plgpu.SMEM((-(-n // _WIDE), _ROWS, _WIDE), jnp.int8) for n in shape.lanes],
        [plgpu.SMEM((_ROWS,), jnp.float32) for each in shape.parts for _ in each],
        plgpu.Barrier(num_arrivals=copies),
    ]
    body = partial(_kernel, shape=shape)
    write: Any = pl.kernel(
        lambda *refs: pl.run_scoped(partial(body, *refs), *scratch),
        out_type=(),
        mesh=plgpu.Mesh(
            grid=(new[0].shape[1], slots.shape[0] // _ROWS), grid_names=("head", "block")
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
        name="page_write_int8",
    )
    write(layer, slots, *new, *steps, *jax.tree.leaves(caches))
    return jax.tree.map(jax.freeze, caches)


def _kernel(layer, slots, *refs: Any, shape: Shape) -> None:
    *inputs, fresh, known, rows, scales, arrived = refs
    new, inputs = inputs[: len(rows)], inputs[len(rows) :]
    given, caches = inputs[: len(known)], inputs[len(known) :]
    head, first = lax.axis_index("head"), lax.axis_index("block") * _ROWS
    for x, here in zip(new, fresh, strict=True):
        plgpu.copy_gmem_to_smem(x.at[pl.ds(first, _ROWS), head], here, arrived)
    for steps, here in zip(given, known, strict=True):
        for at in _pieces(0, here.shape[0]):
            plgpu.copy_gmem_to_smem(steps.at[head, at], here.at[at], arrived)
    plgpu.barrier_wait(arrived)

    caches, known, scales = iter(caches), iter(known), iter(scales)
    leaving = list[Any]()  # what a token has: where it is, in which array, row and lanes it belongs
    for x, row, n, parts in zip(fresh, rows, shape.lanes, shape.parts, strict=True):
        values = next(caches)
        for i, begin in enumerate(range(0, n, _WIDE)):
            size = min(_WIDE, n - begin)
            leaving.append((row.at[i, :, pl.ds(0, size)], values, head, pl.ds(begin, size)))
        if not parts:
            _calibrated(x, next(known), row)
            continue
        owned = next(caches)
        for b, (size, end) in enumerate(zip(parts, accumulate(parts), strict=True)):
            scale = next(scales)
            _rounded(x, end - size, size, row, scale)
            leaving.append((scale, owned, head * len(parts) + b, None))
    plgpu.commit_smem()

    @pl.loop(0, _ROWS)
    def _(t: Array) -> None:
        slot = slots[first + t]

        @pl.when(slot >= 0)
        def _() -> None:
            number, z = lax.div(slot, jnp.int32(shape.page)), lax.rem(slot, jnp.int32(shape.page))
            for here, there, at, lanes in leaving:
                if lanes is None:
                    there[layer[0], number, at, z] = here[t]
                else:
                    there = there.at[layer[0], number, at, pl.ds(z, 1), lanes]
                    plgpu.copy_smem_to_gmem(here.at[pl.ds(t, 1)], there)

    plgpu.wait_smem_to_gmem(0)


def _rounded(x: Any, first: int, lanes: int, row: Any, scale: Any) -> None:
    """A part of rows [tokens, lanes], each over a step of its own: `quantize_rows` on the way.

    Args:
        row: [lines, tokens, lanes of one].
    """
    pieces = _pieces(first, lanes)
    top = jnp.zeros((_ROWS,), jnp.float32)
    for at in pieces:
        top = jnp.maximum(top, jnp.max(jnp.abs(_floats(x, at)), 1))
    steps = jnp.where(top > 0, 127.0 / top, 0.0)
    for at in pieces:
        y = _floats(x, at)
        y = _nearest(y * lax.broadcast_in_dim(steps, y.shape, (0,)))
        row[_line(at)] = y.astype(jnp.int8)
    scale[...] = top * (1 / 127.0)


def _calibrated(x: Any, steps: Any, row: Any) -> None:
    """Rows [tokens, lanes] over steps that are known."""
    for at in _pieces(0, x.shape[1]):
        y = _floats(x, at)
        y = _nearest(y * lax.broadcast_in_dim(steps[at], y.shape, (1,)))
        row[_line(at)] = jnp.clip(y, -127.0, 127.0).astype(jnp.int8)


def _pieces(first: int, lanes: int) -> list[Any]:
    """Lanes that registers hold at a time, of one line each."""
    end, begins = first + lanes, range(first // _WIDE * _WIDE, first + lanes, _WIDE)
    ranges = [(max(first, begin), min(end, begin + _WIDE)) for begin in begins]
    return [pl.ds(begin, behind - begin) for begin, behind in ranges]


def _line(lanes: Any) -> tuple[Any, ...]:
    """Where some lanes of one line are. Copies mix up the words of a line by its place in shared
    memory, and registers are stored as if what they are stored to began where that begins anew:
    lines of a tile do, and a line of a wider row does not."""
    return lanes.start // _WIDE, slice(None), pl.ds(lanes.start % _WIDE, lanes.size)


def _floats(x: Any, lanes: Any) -> Array:
    rows = plgpu.layout_cast(x[:, lanes], plgpu.Layout.WGMMA)  # nobody would find out by himself
    return rows.astype(jnp.float32)


def _nearest(x: Array) -> Array:
    return lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
