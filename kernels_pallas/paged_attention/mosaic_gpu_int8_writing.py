"""Writing keys and values into int8 pages on Hopper: quantized on their way, in place.

A block of threads is given 64 consecutive tokens of the step and a head. One copy for each cache
brings their rows to shared memory; they are quantized in registers and stored to shared memory
again; and each row is copied to its slot on its own, as are its scales. So nothing else of a page
is read or written, wherever a chunk begins or ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.hopper import LINE_BYTES, fit
from kernels_pallas.op import UnsupportedError
from kernels_pallas.paged_attention.codec import QuantizedPages, StaticInt8Pages
from kernels_pallas.paged_attention.ragged import Ragged, slots

_ROWS = 64  # tokens: rows of a tile of registers
_LANES = LINE_BYTES  # of a row that registers hold at a time, and that one copy takes


@dataclass(frozen=True)
class Shape:
    """What the kernel knows while it is traced.

    Attributes:
        page_size: slots in a page.
        lanes: of the rows of each cache.
        parts: lanes of the parts of these rows that have scales of their own; none where scales are
            calibrated.
        dtype: of the rows before they are quantized.
    """

    page_size: int
    lanes: tuple[int, ...]
    parts: tuple[tuple[int, ...], ...]
    dtype: Any


def page_write(
    k_pages: QuantizedPages, v_pages: QuantizedPages | None, k: Array, v: Array | None,
    layer: Array | int, batch: Ragged, *, interpret: Any,
) -> tuple[QuantizedPages, QuantizedPages | None]:  # fmt: skip
    """`reference.page_write` as a Hopper kernel.

    Raises:
        UnsupportedError: lanes of pages, or of parts of rows, that are no multiples of 64; rows of
            64 tokens that do not fit into shared memory.
    """
    stacks: list[Any] = [k_pages] if v_pages is None else [k_pages, v_pages]
    T, shape = k.shape[0], _shape(stacks, k.dtype)
    padding = -T % _ROWS

    def rows(x: Array, lanes: int) -> Array:  # [T, K, W]
        padded = (0, padding), (0, 0), (0, lanes - x.shape[-1])
        return jnp.pad(x.astype(shape.dtype), padded)

    new = [rows(x, n) for x, n in zip([k] if v is None else [k, v], shape.lanes, strict=True)]
    steps = [pages.steps(layer) for pages in stacks if isinstance(pages, StaticInt8Pages)]
    slot = slots(batch, T, shape.page_size)
    slot = jnp.pad(slot, (0, padding), constant_values=-1)
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    moved = [pages.written for pages in stacks]
    out = _launch(layer, slot, new, steps, moved, shape=shape, interpret=interpret)
    results = [pages.with_written(x) for pages, x in zip(stacks, out, strict=True)]
    return results[0], None if v_pages is None else results[1]


def _shape(stacks: list[Any], dtype: Any) -> Shape:
    """The kernel's sizes.

    Raises:
        UnsupportedError: see `page_write`.
    """
    dtype = jnp.dtype(dtype if dtype == jnp.bfloat16 else jnp.float32)
    lanes = tuple(pages.shape[-1] for pages in stacks)
    parts = tuple(() if isinstance(x, StaticInt8Pages) else x.parts for x in stacks)
    if any(n % 64 for each in (lanes, *parts) for n in each):
        raise UnsupportedError(f"{lanes=} of pages and {parts=} of rows: whole 64s, as tiles are")
    fit((_ROWS * (_stride(n) + n * dtype.itemsize) for n in lanes), f"{_ROWS} rows of {lanes=}")
    return Shape(stacks[0].shape[3], lanes, parts, dtype)


def _stride(lanes: int) -> int:
    """Bytes from a row in shared memory to the next one."""
    return -(-lanes // LINE_BYTES) * LINE_BYTES


@partial(jax.jit, static_argnames=("shape", "interpret"))
def _launch(
    layer: Array, slot: Array, new: list[Array], steps: list[Array], moved: list[list[Array]], *,
    shape: Shape, interpret: Any,
) -> list[list[Array]]:  # fmt: skip
    """The leaves with their new rows and scales. Refs of a memory space want a jit around them.

    Args:
        slot: `ragged.slots` of whole tiles of tokens [blocks * 64].
        new: rows [blocks * 64, K, W] of each cache.
        steps: what rows are multiplied by [K, W], of caches whose scales are calibrated.
        moved: the arrays of each cache that are written.
    """
    caches = jax.tree.map(lambda x: jax.new_ref(x, memory_space=plgpu.GMEM), moved)
    known = [n for n, parts in zip(shape.lanes, shape.parts, strict=True) if not parts]
    copies = len(new) + sum(len(_slices(0, n)) for n in known)
    scratch = [
        [plgpu.SMEM((_ROWS, n), shape.dtype) for n in shape.lanes],
        [plgpu.SMEM((n,), jnp.float32) for n in known],
        [plgpu.SMEM((-(-n // _LANES), _ROWS, _LANES), jnp.int8) for n in shape.lanes],
        [plgpu.SMEM((_ROWS,), jnp.float32) for each in shape.parts for _ in each],
        plgpu.Barrier(num_arrivals=copies),
    ]
    body = partial(_kernel, shape=shape)
    write: Any = pl.kernel(
        lambda *refs: pl.run_scoped(partial(body, *refs), *scratch),
        out_type=(),
        mesh=plgpu.Mesh(
            grid=(new[0].shape[1], slot.shape[0] // _ROWS), grid_names=("head", "block")
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
        name="page_write_int8",
    )
    write(layer, slot, *new, *steps, *jax.tree.leaves(caches))
    return jax.tree.map(jax.freeze, caches)


class _Refs(NamedTuple):
    """What a block of threads reads and writes. Lists have an entry for each cache, `steps` and
    `steps_smem` for each one whose scales are calibrated, `scales` for each part of the others.

    Attributes:
        layer: int32 [1]; slots: int32 [blocks * 64]; new: [blocks * 64, K, W]; steps: float32
            [K, W]; pages: int8 [L, P, K, Z, W] and, behind those of a cache that has some, its
            scales float32 [L, P, K * parts, Z]. All these in global memory.
        new_smem: [64, W]; steps_smem: [W]; rows: int8 [lines, 64, lanes of a line]; scales: [64].
        ready: `new_smem` and `steps_smem` are filled.
    """

    layer: Any
    slots: Any
    new: Sequence[Any]
    steps: Sequence[Any]
    pages: Sequence[Any]
    new_smem: Sequence[Any]
    steps_smem: Sequence[Any]
    rows: Sequence[Any]
    scales: Sequence[Any]
    ready: Any

    @classmethod
    def of(cls, layer: Any, slots: Any, *refs: Any) -> _Refs:
        *inputs, new_smem, steps_smem, rows, scales, ready = refs
        new, inputs = inputs[: len(rows)], inputs[len(rows) :]
        steps, pages = inputs[: len(steps_smem)], inputs[len(steps_smem) :]
        return cls(layer, slots, new, steps, pages, new_smem, steps_smem, rows, scales, ready)


class _Leaving(NamedTuple):
    """Something of each token that is copied to its page.

    Attributes:
        source: in shared memory, [64, lanes], or scales [64].
        target: the array in global memory.
        row: the head or, among scales, the head's part.
        lanes: in the target; None of a scale.
    """

    source: Any
    target: Any
    row: Any
    lanes: Any


def _kernel(*refs: Any, shape: Shape) -> None:
    """Writes the rows of 64 consecutive tokens and a head. `refs` are those of `_Refs.of`."""
    of = _Refs.of(*refs)
    head, first = lax.axis_index("head"), lax.axis_index("block") * _ROWS
    _load(of, head, first)
    leaving = _quantized(of, head, shape)
    plgpu.commit_smem()
    _store(of, leaving, first, shape)


def _load(of: _Refs, head: Array, first: Array) -> None:
    """Copies rows, and steps where they are calibrated, to shared memory, and waits for them."""
    for x, here in zip(of.new, of.new_smem, strict=True):
        plgpu.copy_gmem_to_smem(x.at[pl.ds(first, _ROWS), head], here, of.ready)
    for steps, here in zip(of.steps, of.steps_smem, strict=True):
        for lanes in _slices(0, here.shape[0]):
            plgpu.copy_gmem_to_smem(steps.at[head, lanes], here.at[lanes], of.ready)
    plgpu.barrier_wait(of.ready)


def _quantized(of: _Refs, head: Array, shape: Shape) -> list[_Leaving]:
    """Quantizes all rows in shared memory, and tells what of them goes where."""
    pages, steps, scales = iter(of.pages), iter(of.steps_smem), iter(of.scales)
    leaving = list[_Leaving]()
    for x, row, n, parts in zip(of.new_smem, of.rows, shape.lanes, shape.parts, strict=True):
        values = next(pages)
        for line, begin in enumerate(range(0, n, _LANES)):
            size = min(_LANES, n - begin)
            source = row.at[line, :, pl.ds(0, size)]
            leaving.append(_Leaving(source, values, head, pl.ds(begin, size)))
        if not parts:
            _quantize_calibrated(x, next(steps), row)
            continue
        stored_scales = next(pages)
        for part, (size, end) in enumerate(zip(parts, accumulate(parts), strict=True)):
            scale = next(scales)
            _quantize(x, end - size, size, row, scale)
            leaving.append(_Leaving(scale, stored_scales, head * len(parts) + part, None))
    return leaving


def _store(of: _Refs, leaving: list[_Leaving], first: Array, shape: Shape) -> None:
    """Copies what belongs to each token to its slot, if it has one."""

    @pl.loop(0, _ROWS)
    def _(t: Array) -> None:
        slot = of.slots[first + t]

        @pl.when(slot >= 0)
        def _() -> None:
            page_size = jnp.int32(shape.page_size)
            page, z = lax.div(slot, page_size), lax.rem(slot, page_size)
            for source, target, row, lanes in leaving:
                if lanes is None:
                    target[of.layer[0], page, row, z] = source[t]
                else:
                    target = target.at[of.layer[0], page, row, pl.ds(z, 1), lanes]
                    plgpu.copy_smem_to_gmem(source.at[pl.ds(t, 1)], target)

    plgpu.wait_smem_to_gmem(0)


def _quantize(x: Any, first: int, lanes: int, row: Any, scale: Any) -> None:
    """Quantizes a part of rows [64, W] as `quantize_rows` does, each with a scale of its own.

    Args:
        first, lanes: where the part begins, and its lanes.
        row: where values go, [lines, 64, lanes of a line].
        scale: where scales go, [64].
    """
    slices = _slices(first, lanes)
    top = jnp.zeros((_ROWS,), jnp.float32)
    for some in slices:
        top = jnp.maximum(top, jnp.max(jnp.abs(_floats(x, some)), 1))
    steps = jnp.where(top > 0, 127.0 / top, 0.0)
    for some in slices:
        y = _floats(x, some)
        y = _nearest(y * lax.broadcast_in_dim(steps, y.shape, (0,)))
        row[_line(some)] = y.astype(jnp.int8)
    scale[...] = top * (1 / 127.0)


def _quantize_calibrated(x: Any, steps: Any, row: Any) -> None:
    """Quantizes rows [64, W] with calibrated steps [W]."""
    for some in _slices(0, x.shape[1]):
        y = _floats(x, some)
        y = _nearest(y * lax.broadcast_in_dim(steps[some], y.shape, (1,)))
        row[_line(some)] = jnp.clip(y, -127.0, 127.0).astype(jnp.int8)


def _slices(first: int, lanes: int) -> list[Any]:
    """Lanes that registers hold at a time, of one line each."""
    end, begins = first + lanes, range(first // _LANES * _LANES, first + lanes, _LANES)
    ranges = [(max(first, begin), min(end, begin + _LANES)) for begin in begins]
    return [pl.ds(begin, behind - begin) for begin, behind in ranges]


def _line(lanes: Any) -> tuple[Any, ...]:
    """Where some lanes of one line are in rows [lines, 64, lanes of a line].

    TMA swizzles the words of a line by the line's address. Registers are stored as if the swizzle
    started at the beginning of what they are stored to, which is true of a tile of lines and not of
    a line within a wider row.
    """
    return lanes.start // _LANES, slice(None), pl.ds(lanes.start % _LANES, lanes.size)


def _floats(x: Any, lanes: Any) -> Array:
    rows = plgpu.layout_cast(x[:, lanes], plgpu.Layout.WGMMA)  # layout inference cannot derive this
    return rows.astype(jnp.float32)


def _nearest(x: Array) -> Array:
    return lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
