"""Attention over pages on Hopper: TMA brings pages to shared memory, wgmma attends 64 rows of them.

A block of threads is given an *item*: some consecutive tokens of one sequence, for some query heads
of one KV head and, where there would be too few blocks of threads to fill the cores, a split of the
keys. The rows of a warpgroup's tile are tokens times query heads that share the keys. A prompt has
two tiles; the few rows of a decode step have two warpgroups that take turns at blocks of keys.
Further warpgroups are producers, which only bring pages. Pages that a group of sequences begins
with are items of their own, whose rows are tokens of all these sequences.

Splits of the keys merge by (o, lse), and sinks join there, as one more split without a value.
Queries for int4 pages are rotated by a Hadamard matrix before the kernel, and the kernel rotates
outputs back but for the last factor, within each eight lanes.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.hopper import ROWS
from kernels_pallas.paged_attention import mosaic_gpu_latent as latent
from kernels_pallas.paged_attention.codec import (
    Int4Pages,
    Int8Pages,
    QuantizedPages,
    StaticInt8Pages,
    rotated_by_product,
    signs,
    whole_parts,
)
from kernels_pallas.paged_attention.mosaic_gpu_items import Plan, plan, rows_of_queries
from kernels_pallas.paged_attention.mosaic_gpu_kernel import Scratch, kernel
from kernels_pallas.paged_attention.mosaic_gpu_shape import Shape
from kernels_pallas.paged_attention.mosaic_gpu_tiling import GpuTile, shape_of
from kernels_pallas.paged_attention.mosaic_gpu_widening import UNIT
from kernels_pallas.paged_attention.ragged import Ragged, owners
from kernels_pallas.softmax import LOG2E, MASK_VALUE
from kernels_pallas.weight import Weight, as_array


def page_attention(
    q: Array, k_pages: Any, v_pages: Any, layer: Array | int, batch: Ragged, *,
    scale: float, window: Array | int = 0, sinks: Weight | None = None, soft_cap: float = 0.0,
    value_dim: int | None = None, mass: bool = False, tile: GpuTile | None = None,
    interpret: Any = False,
) -> tuple[Array, ...]:  # fmt: skip
    """`reference.page_attention` as one Hopper kernel.

    Groups are ignored where their tokens would share no tile of rows, or little of one: with
    prompts, whose tiles are full of one sequence, and with query heads of a KV head that fill a
    tile. They are also ignored where masses of pages are asked for.

    Raises:
        UnsupportedError: see `mosaic_gpu_tiling.shape_of`.
    """
    (T, N, H), K = q.shape, k_pages.shape[2]
    stacks: list[Any] = [k_pages] if v_pages is None else [k_pages, v_pages]
    value_dim = value_dim or int(H if v_pages is None else v_pages.shape[-1])
    shape = shape_of(
        tile or GpuTile(), q, k_pages, v_pages, batch, value_dim=value_dim, mass=mass,
        scale=scale, soft_cap=soft_cap,
    )  # fmt: skip
    q = _prepared(q, k_pages, layer, shape)
    window = jnp.asarray(window, jnp.int32)
    seq, position = owners(batch, T)
    planned = plan(batch, T, seq, window, shape)
    token, row = rows_of_queries(planned.items, T, shape)
    head = jnp.arange(K * shape.tiles_per_kv_head)[:, None]  # a tile of heads, as the grid has it
    G = shape.heads_per_tile
    queries = q.astype(jnp.bfloat16)[token, head * G + row % G]  # [heads, rows, lanes]
    scalars = jnp.asarray(layer, jnp.int32).reshape(1), window.reshape(1), batch.tables.reshape(-1)
    o, lse, *masses = _launch((*scalars, planned.items, queries), _leaves(stacks), shape, interpret)
    rows = _ResultRows.of(planned, T, head, shape)
    o, lse = _by_token(o, lse, rows, planned.valid, (T, N))
    o = o[..., : whole_parts(stacks[-1], value_dim)]
    o, lse = _merge(o, lse, None if sinks is None else as_array(sinks), shape.int4)
    o = o / UNIT if shape.quantized else o
    o = stacks[-1].fold(o, layer) if isinstance(stacks[-1], StaticInt8Pages) else o
    o = o[..., :value_dim]
    if not mass:
        return o, lse
    logs = masses[0][rows.item[0], head, :, rows.in_item[0]].reshape(T, N, -1)
    return o, lse, _page_mass(logs, lse, position, window, batch.tables.shape[1], shape)


def _prepared(q: Array, k_pages: Any, layer: Array | int, shape: Shape) -> Array:
    """Queries [T, N, key_lanes] as blocks of keys are multiplied: with scales that are calibrated,
    rotated for int4 pages, and over `UNIT`, a power of two, which integers in pages become
    multiples of."""
    q = k_pages.fold(q, layer) if isinstance(k_pages, StaticInt8Pages) else q
    q = rotated_by_product(k_pages, q)
    q = q / UNIT if shape.quantized else q
    return jnp.pad(q, ((0, 0), (0, 0), (0, shape.key_lanes - q.shape[-1])))


def _leaves(stacks: list[Any]) -> list[Array]:
    """What blocks are copied from: values of each cache, then scales. Pairs of int4 keys, and four
    scales of such keys, get an axis of their own, by which copies sort them."""
    caches = [x.values if isinstance(x, QuantizedPages) else x for x in stacks]
    scales = [x.scale for x in stacks if isinstance(x, Int8Pages | Int4Pages)]
    if isinstance(stacks[0], Int4Pages):
        caches = [x.reshape(*x.shape[:3], -1, 2, x.shape[-1]) for x in caches]
        scales = [x.reshape(*x.shape[:3], -1, 4) for x in scales]
    return caches + scales


class _ResultRows(NamedTuple):
    """Where the results of each token are, once in each of its n items.

    Attributes:
        item: [n, T, 1, 1].
        head: tiles of heads [heads, 1].
        in_item: the row in its item [n, T, 1, heads_per_tile].
        in_output: the row of outputs [n, T, 1, heads_per_tile].
    """

    item: Array
    head: Array
    in_item: Array
    in_output: Array

    @classmethod
    def of(cls, planned: Plan, T: int, head: Array, shape: Shape) -> _ResultRows:
        items, of_token = planned.items, planned.of_token
        token = jnp.arange(T) - items.token_begins[of_token]  # its number in each of its items
        row = token // shape.tokens_per_tile * ROWS
        row = row + token % shape.tokens_per_tile * shape.heads_per_tile
        in_output = (items.row_begins[of_token] * shape.row_align + row)[..., None, None]
        in_output = in_output + jnp.arange(shape.heads_per_tile)
        in_item = row[..., None, None] + jnp.arange(shape.heads_per_tile)
        return cls(of_token[..., None, None], head, in_item, in_output)


def _by_token(
    o: Array, lse: Array, rows: _ResultRows, valid: Array | None, sizes: tuple[int, int]
) -> tuple[Array, Array]:
    """o [splits * n, T, N, lanes] and lse [splits * n, T, N] from those of rows.

    lse is `MASK_VALUE` where a token has no such item.
    """
    T, N = sizes
    o = o[:, rows.head, rows.in_output].reshape(-1, T, N, o.shape[-1])
    lse = lse[:, rows.item, rows.head, rows.in_item]
    lse = lse if valid is None else jnp.where(valid[..., None, None], lse, MASK_VALUE)
    return o, lse.reshape(-1, T, N)


def _merge(o: Array, lse: Array, sinks: Array | None, rotated: bool) -> tuple[Array, Array]:
    """Splits of the keys as one: o [T, N, lanes] and lse [T, N].

    Args:
        o: [splits, T, N, lanes]; lse: [splits, T, N].
        sinks: [N], logits that weigh in the softmax and have no value.
        rotated: whether the last factor of a Hadamard rotation, within each eight lanes, is still
            to be undone. As sums and not as a product it is part of the fusion that gathers and
            merges.
    """
    if len(o) == 1 and sinks is None:
        weights, lse = None, lse[0]
    else:
        top = lse.max(0) if sinks is None else jnp.maximum(lse.max(0), sinks.astype(jnp.float32))
        weights = jnp.exp(lse - top)
        of_sinks = 0.0 if sinks is None else jnp.exp(sinks.astype(jnp.float32) - top)
        total = weights.sum(0) + of_sinks
        weights, lse = (weights / total)[..., None], top + jnp.log(total)
    o = o.astype(jnp.float32)
    if rotated:
        eights = (o if weights is None else o * weights).reshape(*o.shape[:-1], -1, 8)
        matrix = jnp.asarray(signs(8), jnp.float32)
        return jnp.sum(eights[..., None] * matrix, (0, -2)).reshape(o.shape[1:]), lse
    return o[0] if weights is None else jnp.sum(o * weights, 0), lse


def _page_mass(
    logs: Array, lse: Array, position: Array, window: Array, M: int, shape: Shape
) -> Array:
    """Masses of pages [T, N, M].

    Args:
        logs: logarithms to base 2 of sums over each copy's keys [T, N, copies]. Those of copies
            that a token sees no key of were never written.
        lse: [T, N]; position: [T].
        M: pages that a sequence may have.
    """
    first = jnp.arange(M * shape.copies_per_page) * shape.keys_per_copy  # the first key of a copy
    position = position[:, None]
    seen = first <= position
    seen &= (window == 0) | (position - first - shape.keys_per_copy < window - 1)
    share = jnp.exp2(logs[..., : M * shape.copies_per_page] - lse[..., None] * LOG2E)
    share = jnp.where(seen[:, None], share, 0.0)
    return share.reshape(*lse.shape, M, shape.copies_per_page).sum(-1)


def _launch(operands: tuple[Any, ...], caches: list[Array], shape: Shape, interpret: Any) -> Any:
    """o [splits, heads, rows, value_lanes], in the rows of queries; lse [splits, items, heads, rows
    of an item]; and, if they are asked for, masses [items, heads, copies, rows of an item].

    Args:
        operands: layer [1], window [1], tables [R * M], items, queries [heads, rows, key_lanes].
        caches: see `_leaves`.
    """
    *scalars, items, queries = operands
    number, heads, rows = len(items.seqs), len(queries), shape.tiles * ROWS
    out = [
        jax.ShapeDtypeStruct(
            (shape.splits, *queries.shape[:2], shape.value_lanes), shape.out_dtype
        ),
        jax.ShapeDtypeStruct((shape.splits, number, heads, rows), jnp.float32),
    ]
    if shape.mass:
        copies = shape.table_width * shape.copies_per_page + shape.copies_per_block
        out.append(jax.ShapeDtypeStruct((number, heads, copies, rows), jnp.float32))
    body = latent.kernel if shape.split_values else kernel
    return plgpu.kernel(
        partial(body, shape=shape, simulated=bool(interpret)),
        out_type=out,
        grid=(heads, shape.splits, number),
        grid_names=("head", "split", "item"),
        num_threads=3 if shape.split_values else shape.consumers + shape.producers,
        thread_name="wg",
        scratch_types=[latent.Scratch.of(shape) if shape.split_values else Scratch.of(shape)],
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            reduction_scratch_bytes=1024,  # sums of rows stay in four threads and take none
        ),
        interpret=interpret,
        kernel_name="page_attention",
    )(*scalars, items.table(), queries, *caches)
