"""Writing a step's keys and values into their pages on a TPU, in place.

Memory moves in tiles of rows, and a new key is one row. So an *item* is an aligned group of slots
of one sequence that gets new rows: it is read, filled and written back. Where rows have scales, an
item is a page: of its rows only the groups that get new ones are copied, but all of its scales,
which lie along lanes, slot by slot. No two items share a slot: only a page's owner writes to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.op import UnsupportedError, tried
from kernels_pallas.paged_attention.codec import Int4Pages, QuantizedPages, StaticInt8Pages
from kernels_pallas.paged_attention.mosaic_tpu_pages import check, parts_of
from kernels_pallas.paged_attention.mosaic_tpu_writing_kernel import Shape, kernel
from kernels_pallas.paged_attention.ragged import Ragged
from kernels_pallas.tpu import LANES, SUBLANES, divisor

_VMEM, _SPARE = 32 * 2**20, 4 * 2**20  # bytes for items, and for the compiler besides
_SUFFIXES = {jnp.dtype(jnp.int8): "_int8", jnp.dtype(jnp.uint8): "_int4"}  # of kernels' names
_MOST_HEADS = 8  # KV heads that are filled in side by side, at most
_MOST_REGISTERS = 32  # of their rows, at most


@dataclass(frozen=True)
class TpuTile:
    """How the kernel cuts its work.

    Attributes:
        slots: that are copied at a time; 0 for few in a decode step and many in a long prompt.
            Quantized pages are always copied by tiles.
        items: in flight at a time, at most.
    """

    slots: int = tried(0, 16, 32, 64)
    items: int = tried(8, 4, 16)


def page_write(
    k_pages: Any, v_pages: Any, k: Array, v: Array | None, layer: Array | int, batch: Ragged, *,
    tile: TpuTile | None = None, interpret: Any = False,
) -> tuple[Any, Any]:  # fmt: skip
    """`reference.page_write` as a TPU kernel.

    Raises:
        UnsupportedError: `mosaic_tpu_pages.check` refuses the pages; the slots of a copy do not
            divide a page, or are not whole tiles; two items do not fit into VMEM.
    """
    stacks = [k_pages] if v_pages is None else [k_pages, v_pages]
    new = [k] if v is None else [k, v]
    check(stacks, batch.tables.shape)
    T, dtype = k.shape[0], _dtype(k, stacks)
    shape = _shape(stacks, batch, T, dtype, tile or TpuTile())
    tokens = pl.cdiv(T, shape.align) * shape.align

    def rows(x: Array, pages: Any) -> Array:  # [K, T, W]
        padding = (0, tokens - T), (0, 0), (0, pages.shape[-1] - x.shape[-1])
        return jnp.pad(x.astype(dtype), padding).swapaxes(0, 1)

    rows_in = [rows(x, pages) for x, pages in zip(new, stacks, strict=True)]
    steps = [pages.steps(layer) for pages in stacks if isinstance(pages, StaticInt8Pages)]
    leaves = [leaf for pages in stacks for leaf in _written(pages)]
    scalars = (
        jnp.asarray(layer, jnp.int32).reshape(1), batch.row_starts, batch.kv_lens,
        batch.tables.reshape(-1), *_items(batch, T, shape.item_slots),
    )  # fmt: skip
    name = "page_write" + _SUFFIXES.get(stacks[0].dtype, "")
    out = iter(_launch(scalars, rows_in, steps, leaves, shape, name, interpret))
    results = [
        pages.with_written([next(out) for _ in pages.written])
        if isinstance(pages, QuantizedPages)
        else next(out)
        for pages in stacks
    ]
    return results[0], None if v_pages is None else results[1]


def _launch(
    scalars: Sequence[Array], new: list[Array], steps: list[Array], leaves: list[Array],
    shape: Shape, name: str, interpret: Any,
) -> list[Array]:  # fmt: skip
    """The caches' arrays, with new rows [K, T, W] in their slots."""
    hbm, vmem = (pl.BlockSpec(memory_space=m) for m in (pltpu.MemorySpace.HBM, pltpu.VMEM))
    first = len(scalars) + len(new) + len(steps)

    def copies(x: Array) -> tuple[int, ...]:
        count = shape.item_slots // shape.align + 1
        return shape.depth, count, x.shape[0], shape.align, x.shape[2]

    return pl.pallas_call(
        partial(kernel, shape=shape),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(1,),
            in_specs=[*[hbm] * len(new), *[vmem] * len(steps), *[hbm] * len(leaves)],
            out_specs=[hbm] * len(leaves),
            scratch_shapes=[
                *(pltpu.VMEM(copies(x), x.dtype) for x in new),
                *(pltpu.VMEM((shape.depth, *shape.item_shape(x)), x.dtype) for x in leaves),
                pltpu.SemaphoreType.DMA((2, shape.depth)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves],
        input_output_aliases={first + i: i for i in range(len(leaves))},
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=shape.vmem_bytes,  # no more: XLA keeps new rows in the rest
            disable_bounds_checks=True,  # they take half of the time to start a copy
        ),
        interpret=interpret,
        name=name,
    )(*scalars, *new, *steps, *leaves)


def _dtype(new: Array, stacks: list[Any]) -> Any:
    """The type in which new rows reach the kernel. Quantized pages round them once, so they are not
    rounded before."""
    if not isinstance(stacks[0], QuantizedPages):
        return stacks[0].dtype
    return new.dtype if new.dtype == jnp.bfloat16 else jnp.dtype(jnp.float32)


def _written(pages: Any) -> list[Any]:
    """The arrays of a cache that are written."""
    return pages.written if isinstance(pages, QuantizedPages) else [pages]


def _shape(stacks: list[Any], batch: Ragged, T: int, dtype: Any, tile: TpuTile) -> Shape:
    """The kernel's sizes.

    Raises:
        UnsupportedError: as `page_write` says.
    """
    (_, _, K, Z, _), (R, M) = stacks[0].shape, batch.tables.shape
    itemsize, lanes = jnp.dtype(dtype).itemsize, [pages.shape[-1] for pages in stacks]
    align, parts = 32 // itemsize, tuple(parts_of(stacks))
    if isinstance(stacks[0], QuantizedPages):
        tile_slots = copy = 64 if isinstance(stacks[0], Int4Pages) else 32
        block = SUBLANES
    else:
        block = tile_slots = align
        copy = min(tile.slots or max(16, 1 << max(0, (T // R).bit_length() - 1)), Z)
        if Z % copy or copy % align:
            raise UnsupportedError(
                f"groups of {copy} slots: take a divisor of {Z=}, whole {align}s"
            )
    item = Z if any(parts) else copy
    item_bytes = (item + align) * itemsize + item * stacks[0].dtype.itemsize
    item_bytes *= sum(lanes) * K
    depth = min(tile.items, _VMEM // item_bytes)
    if depth < 2:
        raise UnsupportedError(f"two times {item} slots of {K=} heads do not fit into VMEM")
    heads = _MOST_REGISTERS // (2 * align // SUBLANES * max(lanes) // LANES)
    heads, vmem_bytes = divisor(K, min(heads, _MOST_HEADS), 1), depth * item_bytes + _SPARE
    return Shape(
        page_size=Z, item_slots=item, copy_slots=copy, tile_slots=tile_slots, block_slots=block,
        table_width=M, align=align, heads_at_once=heads, depth=depth, vmem_bytes=vmem_bytes,
        parts=parts,
    )  # fmt: skip


def _items(batch: Ragged, T: int, slots: int) -> tuple[Array, Array, Array]:
    """The sequence of each item, which of its items it is, and how many there are [1].

    Args:
        slots: of an item.
    """
    starts, ends = batch.row_starts[:-1], batch.row_starts[1:]
    R = starts.shape[0]
    real = (jnp.arange(R) < batch.num_seqs) & (ends > starts)
    item = (batch.kv_lens - (ends - starts)) // slots
    count = jnp.where(real, (batch.kv_lens - 1) // slots - item + 1, 0)
    before = jnp.cumsum(count, dtype=jnp.int32)
    i = jnp.arange(pl.cdiv(T, slots) + 2 * R, dtype=jnp.int32)  # a chunk may begin and end anywhere
    seqs = jnp.minimum(jnp.sum(before <= i[:, None], 1), R - 1).astype(jnp.int32)
    return seqs, (item - before + count)[seqs] + i, before[-1:]
