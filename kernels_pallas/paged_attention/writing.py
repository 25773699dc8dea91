"""Writing a step's keys and values into their pages, in place.

On a TPU memory moves in tiles of rows and a key is one row. So an *item* is an aligned group of
slots of one sequence: it is read, the rows of new tokens are replaced, and it is written back.
Several items are on their way at once. No two share a slot, since only its owner writes a page.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.op import Body, Case, Cost, Op, UnsupportedError, tried
from kernels_pallas.paged_attention import mosaic_gpu_writing, mosaic_tpu_coded_writing
from kernels_pallas.paged_attention.cases import batch as step_of
from kernels_pallas.paged_attention.codec import QuantizedPages
from kernels_pallas.paged_attention.coded_cases import WRITING
from kernels_pallas.paged_attention.ragged import Ragged
from kernels_pallas.paged_attention.reference import page_write as reference

_LANES = 128
_TABLE = 2**17  # entries: half of a v5e's SMEM


@dataclass(frozen=True)
class TpuTile:
    """slots: of an item, 0 for few where rows decode and many where prompts are long; items: on
    their way at a time."""

    slots: int = tried(0, 16, 32, 64)
    items: int = tried(8, 4, 16)


def tpu(
    k_pages: Any, v_pages: Any, k: Array, v: Array | None, layer: Array | int,
    batch: Ragged, *, tile: TpuTile | None = None, interpret: Any = False,
) -> tuple[Any, Any]:  # fmt: skip
    """`reference.page_write` as a TPU kernel."""
    tile = tile or TpuTile()
    if isinstance(k_pages, QuantizedPages):
        options: dict[str, Any] = {"items": tile.items, "interpret": interpret}
        return mosaic_tpu_coded_writing.page_write(k_pages, v_pages, k, v, layer, batch, **options)
    stacks = [k_pages] if v_pages is None else [k_pages, v_pages]
    (T, K, _), (R, M) = k.shape, batch.tables.shape
    Z, align = k_pages.shape[3], _check(stacks, batch)
    slots = tile.slots or max(16, 1 << (T // R).bit_length() - 1)
    slots = min(slots, Z)
    if Z % slots or slots % align:
        raise UnsupportedError(f"groups of {slots} slots: take a divisor of {Z=}, whole {align}s")

    tokens = pl.cdiv(max(T, slots + align), align) * align  # so that a group fits in

    def rows(x: Any, pages: Array) -> Array:  # [K, T, W]
        padding = (0, tokens - T), (0, 0), (0, pages.shape[-1] - x.shape[-1])
        return jnp.pad(x.astype(pages.dtype), padding).swapaxes(0, 1)

    new = [rows(x, pages) for x, pages in zip((k, v), stacks, strict=False)]
    scalars = (
        jnp.asarray(layer, jnp.int32).reshape(1), batch.row_starts, batch.kv_lens,
        batch.tables.reshape(-1), *_items(batch, T, slots),
    )  # fmt: skip
    hbm = pl.BlockSpec(memory_space=pltpu.MemorySpace.HBM)
    n = len(stacks)
    out = pl.pallas_call(
        partial(_kernel, slots=slots, page=Z, row=M, align=align, stacks=n, depth=tile.items),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(1,),
            in_specs=[hbm] * 2 * n,
            out_specs=[hbm] * n,
            scratch_shapes=[
                *(pltpu.VMEM((tile.items, K, slots + align, x.shape[-1]), x.dtype) for x in new),
                *(pltpu.VMEM((tile.items, K, slots, x.shape[-1]), x.dtype) for x in stacks),
                pltpu.SemaphoreType.DMA((2, tile.items)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in stacks],
        input_output_aliases={len(scalars) + n + i: i for i in range(n)},
        interpret=interpret,
        name="page_write",
    )(*scalars, *new, *stacks)  # fmt: skip
    return out[0], None if v_pages is None else out[1]


def _check(stacks: list[Array], batch: Ragged) -> int:
    """Rows of a tile, which slices in memory are multiples of."""
    dtype, lanes = stacks[0].dtype, [x.shape[-1] for x in stacks]
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise UnsupportedError(f"pages of {dtype}: keep them in bfloat16 or float32")
    if any(n % _LANES for n in lanes):
        raise UnsupportedError(f"pages of {lanes} lanes: pad them to multiples of {_LANES}")
    if batch.tables.size > _TABLE:
        raise UnsupportedError(
            f"a block table {batch.tables.shape} has more than {_TABLE} entries: take larger pages"
        )
    return 32 // dtype.itemsize


def _items(batch: Ragged, T: int, slots: int) -> tuple[Array, Array, Array]:
    """The sequence of each item, which group of its slots it is, and how many items there are."""
    starts, ends = batch.row_starts[:-1], batch.row_starts[1:]
    R = starts.shape[0]
    real = (jnp.arange(R) < batch.num_seqs) & (ends > starts)
    group = (batch.kv_lens - (ends - starts)) // slots
    count = jnp.where(real, (batch.kv_lens - 1) // slots - group + 1, 0)
    before = jnp.cumsum(count, dtype=jnp.int32)
    i = jnp.arange(pl.cdiv(T, slots) + 2 * R, dtype=jnp.int32)  # a chunk may begin and end anywhere
    seqs = jnp.minimum(jnp.sum(before <= i[:, None], 1), R - 1).astype(jnp.int32)
    return seqs, (group - before + count)[seqs] + i, before[-1:]


class _Place(NamedTuple):
    """Where an item lies: its first slot is that of token `token` of the step."""

    seq: Array
    token: Array
    page: Array
    slot: Array


def _kernel(
    *refs: Any, slots: int, page: int, row: int, align: int, stacks: int, depth: int
) -> None:
    layer, starts, lens, tables, seqs, groups, count, *rest = refs
    new, rest = rest[:stacks], rest[2 * stacks :]  # the caches that come in are those that go out
    caches, fresh, old = (rest[i * stacks : (i + 1) * stacks] for i in range(3))
    arrived, count = rest[-1], count[0]
    tokens = new[0].shape[1]

    def place(i: Array) -> _Place:
        seq, first = seqs[i], groups[i] * slots
        token = first - (lens[seq] - starts[seq + 1])
        entry = tables[seq * row + lax.div(first, jnp.int32(page))]
        return _Place(seq, token, entry, lax.rem(first, jnp.int32(page)))

    def window(at: _Place) -> Array:
        """The aligned token from which an item's tokens are read; all of them exist."""
        token = jnp.clip(at.token, 0, tokens - slots - align)
        return pl.multiple_of(lax.div(token, jnp.int32(align)) * align, align)

    def slots_of(i: Array, c: int) -> tuple[Any, Any]:
        """An item in the cache, and its place here."""
        at = place(i)
        slot = pl.ds(pl.multiple_of(at.slot, slots), slots)
        there = caches[c].at[layer[0], at.page, :, slot]
        return there, old[c].at[lax.rem(i, jnp.int32(depth))]

    def read(i: Array, act: str) -> None:
        n = lax.rem(i, jnp.int32(depth))
        for c in range(stacks):
            tokens = new[c].at[:, pl.ds(window(place(i)), slots + align)]
            for pair in ((tokens, fresh[c].at[n]), slots_of(i, c)):
                getattr(pltpu.make_async_copy(*pair, arrived.at[0, n]), act)()

    def written(i: Array, act: str) -> None:
        n = lax.rem(i, jnp.int32(depth))
        for c in range(stacks):
            there, here = slots_of(i, c)
            getattr(pltpu.make_async_copy(here, there, arrived.at[1, n]), act)()

    def merge(i: Array) -> None:
        at, n = place(i), lax.rem(i, jnp.int32(depth))
        for x, kept in zip(fresh, old, strict=True):

            @pl.loop(0, kept.shape[1])
            def _(h: Array, x: Any = x, kept: Any = kept) -> None:
                rows = x[n, h].astype(jnp.float32)  # a roll of rows wants whole words
                back = lax.rem(window(at) - at.token + rows.shape[0], jnp.int32(rows.shape[0]))
                rows = pltpu.roll(rows, back, 0)[:slots]
                token = at.token + lax.broadcasted_iota(jnp.int32, rows.shape, 0)
                own = (token >= starts[at.seq]) & (token < starts[at.seq + 1])
                kept[n, h] = jnp.where(own, rows, kept[n, h].astype(jnp.float32)).astype(kept.dtype)

    ahead = depth // 2
    pl.loop(0, jnp.minimum(ahead, count))(partial(read, act="start"))

    @pl.loop(0, count)
    def _(i: Array) -> None:
        @pl.when(i + ahead < count)
        def _() -> None:
            pl.when(i + ahead >= depth)(lambda: written(i + ahead - depth, "wait"))
            read(i + ahead, "start")

        read(i, "wait")
        merge(i)
        written(i, "start")

    pl.loop(jnp.maximum(count - depth, 0), count)(partial(written, act="wait"))


def _case(
    name: str, new: tuple[int, ...], lens: tuple[int, ...], *, K: int, H: int = 128, Z: int = 64,
    W: int = 128, dtype: Any = jnp.bfloat16, idle: int = 0, latent: bool = False,
    shipped: bool = False,
) -> Case:  # fmt: skip
    L, T = 2, sum(new)
    step, P = step_of(new, lens, Z, idle)

    def make(key: Array) -> tuple[tuple[Any, ...], dict[str, Any]]:
        keys = jax.random.split(key, 4)
        k_pages, v_pages = (jax.random.normal(x, (L, P, K, Z, W), dtype) for x in keys[:2])
        k, v = (jax.random.normal(x, (T, K, H)) for x in keys[2:])
        k_pages, v_pages, k, v = (k_pages, None, k, None) if latent else (k_pages, v_pages, k, v)
        return (k_pages, v_pages, k, v, jnp.int32(1), jax.tree.map(jnp.asarray, step)), {}

    cost = Cost((1 if latent else 2) * T * K * (4 * H + W * jnp.dtype(dtype).itemsize))
    return Case(name, make, {}, shipped, cost, tolerance=0)


CASES = (
    _case("mixed", (1, 37, 1, 9), (70, 40, 9, 64), K=2, Z=32, idle=2),
    _case("f32", (1, 1, 20), (33, 1, 17 + 20), K=4, Z=8, H=64, dtype=jnp.float32),
    _case("latent", (1, 5, 1), (40, 37, 16), K=1, Z=16, H=192, W=256, latent=True),
    _case("decode-256", (1,) * 256, (2048,) * 256, K=8, shipped=True),
    _case("latent-decode-128", (1,) * 128, (2048,) * 128, K=1, H=576, W=640, latent=True,
          shipped=True),
    *WRITING,
)  # fmt: skip

page_write = Op(
    "page_write",
    reference,
    {
        "mosaic_tpu": Body("tpu", tpu, TpuTile),
        "mosaic_gpu": Body("gpu", mosaic_gpu_writing.page_write, mosaic_gpu_writing.GpuTile),
    },
    CASES,
    in_place=((0, 0), (1, 1)),
)
