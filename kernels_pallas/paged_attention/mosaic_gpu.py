"""Attention over pages on Hopper: TMA brings pages to shared memory, wgmma attends 64 rows of them.

A block of threads is given an *item*: some consecutive tokens of one sequence, a head of keys and,
where there would be too few blocks to fill the cores, a share of the keys. Rows of a warpgroup are
the tokens and those heads of queries that share the keys: a prompt has two such tiles, and the few
rows of a decode step have two warpgroups that take blocks of keys in turn. Others only bring pages.
Pages that a group of sequences begins with are items of their own, whose rows are tokens of all.
Shares of keys merge by (o, lse), and sinks join there, as one more share without a value. Queries
for pages of four bits are turned before, and outputs by the kernel, but for the last eight lanes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.hopper import ROWS
from kernels_pallas.op import UnsupportedError, tried
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
from kernels_pallas.paged_attention.mosaic_gpu_blocks import Shape
from kernels_pallas.paged_attention.mosaic_gpu_items import held, most_items, plan
from kernels_pallas.paged_attention.mosaic_gpu_kernel import HIDDEN, LOG2E, Scratch, kernel
from kernels_pallas.paged_attention.mosaic_gpu_widening import UNIT
from kernels_pallas.paged_attention.ragged import Ragged, owners
from kernels_pallas.weight import Weight, as_array

_SHARED = 227 * 1024  # bytes of shared memory that a block may take
_VALUES = 256  # lanes of values that a warpgroup's registers hold
_CORES = 132
_LONG = 2048  # keys that a sequence may have: of fewer, too many share a block with the last
_LINE = 32  # scales: 128 bytes, at whose multiples a copy to shared memory may begin


@dataclass(frozen=True)
class GpuTile:
    """keys: attended at a time; stages: blocks of keys that are in shared memory or on their way;
    groups: of 64 rows that share them; turns: warpgroups that take blocks in turn, for the same
    rows; splits: of a sequence's keys. 0 leaves a choice. apart: whether two groups of rows take
    turns at the matrix unit, 1 or 0."""

    keys: int = tried(0, 64, 128)
    stages: int = tried(0, 2, 4)
    groups: int = 0
    turns: int = tried(0, 1)
    apart: int = 1
    splits: int = tried(0, 4, 8, 16)


def page_attention(
    q: Array, k_pages: Any, v_pages: Any, layer: Array | int, batch: Ragged, *,
    scale: float, window: Array | int = 0, sinks: Weight | None = None, soft_cap: float = 0.0,
    value_dim: int | None = None, mass: bool = False, tile: GpuTile | None = None,
    interpret: Any = False,
) -> tuple[Array, ...]:  # fmt: skip
    """`reference.page_attention` as one Hopper kernel.

    Groups are passed over where their tokens would share no tile of rows, or little of one: with
    prompts, whose tiles are full of one sequence, and with as many heads to a key as fill a tile.
    So they are where masses of pages are asked for.
    """
    (T, N, H), K = q.shape, k_pages.shape[2]
    stacks: list[Any] = [k_pages] if v_pages is None else [k_pages, v_pages]
    value_dim = value_dim or int(H if v_pages is None else v_pages.shape[-1])
    shape = _shape(tile or GpuTile(), q, k_pages, v_pages, batch, value_dim, mass, scale, soft_cap)
    G, heads = shape.group, K * shape.heads
    q = k_pages.fold(q, layer) if isinstance(k_pages, StaticInt8Pages) else q
    q = rotated_by_product(k_pages, q)
    q = q / UNIT if shape.ahead else q  # a power of two, as are integers in pages
    q = jnp.pad(q, ((0, 0), (0, 0), (0, shape.lanes - q.shape[-1])))
    window = jnp.asarray(window, jnp.int32)
    seq, position = owners(batch, T)
    items, mine, there = plan(batch, T, seq, window, shape)
    token, row = held(items, T, shape)
    head = jnp.arange(heads)[:, None]
    queries = q.astype(jnp.bfloat16)[token, head * G + row % G]  # [heads, rows, lanes]
    scalars = jnp.asarray(layer, jnp.int32).reshape(1), window.reshape(1), batch.tables.reshape(-1)
    o, lse, *masses = _launch((*scalars, items, queries), _leaves(stacks), shape, interpret)
    at = jnp.arange(T) - items.firsts[mine]  # of each token, in its items
    row = at // shape.tokens * ROWS + at % shape.tokens * G
    kept = (items.places[mine] * shape.piece + row)[..., None, None] + jnp.arange(G)
    row = row[..., None, None] + jnp.arange(G)  # [items of a token, T, 1, G]
    item = mine[..., None, None]
    o = o[:, head, kept].reshape(-1, T, N, o.shape[-1])
    lse = lse[:, item, head, row]
    lse = lse if there is None else jnp.where(there[..., None, None], lse, HIDDEN)
    lse = lse.reshape(-1, T, N)
    o = o[..., : whole_parts(stacks[-1], value_dim)]
    o, lse = _merge(o, lse, None if sinks is None else as_array(sinks), shape.nibbles)
    o = o / UNIT if shape.ahead else o
    o = stacks[-1].fold(o, layer) if isinstance(stacks[-1], StaticInt8Pages) else o
    o = o[..., :value_dim]
    if not mass:
        return o, lse
    logs = masses[0][item[0], head, :, row[0]].reshape(T, N, -1)
    return o, lse, _page_mass(logs, lse, position, window, batch.tables.shape[1], shape)


def _leaves(stacks: list[Any]) -> list[Array]:
    """What blocks are copied from. Pairs of keys in four bits, and four scales of keys, get an axis
    of their own, by which copies sort them."""
    caches = [x.values if isinstance(x, QuantizedPages) else x for x in stacks]
    scales = [x.scale for x in stacks if isinstance(x, Int8Pages | Int4Pages)]
    if isinstance(stacks[0], Int4Pages):
        caches = [x.reshape(*x.shape[:3], -1, 2, x.shape[-1]) for x in caches]
        scales = [x.reshape(*x.shape[:3], -1, 4) for x in scales]
    return caches + scales


def _page_mass(
    logs: Array, lse: Array, position: Array, window: Array, M: int, shape: Shape
) -> Array:
    """[T, N, M] from logarithms of sums over parts of pages, where a token sees any of a part."""
    first = jnp.arange(M * shape.parts) * shape.part  # keys
    position = position[:, None]
    seen = (first <= position) & ((window == 0) | (position - first - shape.part < window - 1))
    share = jnp.exp2(logs[..., : M * shape.parts] - lse[..., None] * LOG2E)
    share = jnp.where(seen[:, None], share, 0.0)  # nobody has written elsewhere
    return share.reshape(*lse.shape, M, shape.parts).sum(-1)


def _merge(o: Array, lse: Array, sinks: Array | None, turned: bool) -> tuple[Array, Array]:
    """Of shares of keys [splits, T, N, ...], and of sinks [N], which weigh and say nothing.

    Args:
        turned: whether each eight lanes are still to be turned back, which the kernel leaves. As
            sums and not as a product it is part of the fusion that gathers and merges.
    """
    if len(o) == 1 and sinks is None:
        weights, lse = None, lse[0]
    else:
        top = lse.max(0) if sinks is None else jnp.maximum(lse.max(0), sinks.astype(jnp.float32))
        weights = jnp.exp(lse - top)
        own = 0.0 if sinks is None else jnp.exp(sinks.astype(jnp.float32) - top)
        total = weights.sum(0) + own
        weights, lse = (weights / total)[..., None], top + jnp.log(total)
    o = o.astype(jnp.float32)
    if turned:
        each = (o if weights is None else o * weights).reshape(*o.shape[:-1], -1, 8)
        by = jnp.asarray(signs(8), jnp.float32)
        return jnp.sum(each[..., None] * by, (0, -2)).reshape(o.shape[1:]), lse
    return o[0] if weights is None else jnp.sum(o * weights, 0), lse


def _shape(
    tile: GpuTile, q: Array, k_pages: Any, v_pages: Any, batch: Ragged, value_dim: int,
    mass: bool, scale: float, soft_cap: float,
) -> Shape:  # fmt: skip
    """The kernel's sizes, or what speaks against it."""
    (T, N, H), K, Z = q.shape, k_pages.shape[2], k_pages.shape[3]
    if scale <= 0:
        raise UnsupportedError(f"{scale=}: above 0, or the largest product is not what counts")
    lanes, values, wide = _lanes(H, value_dim, k_pages, v_pages)
    in_keys, parts = v_pages is None, _parts(lanes, values, k_pages, v_pages)
    heads = next(n for n in range(1, N // K + 1) if N // K % n == 0 and N // K // n <= ROWS)
    G, R, M = N // K // heads, *batch.tables.shape
    tokens, many = ROWS // G, T > 4 * R and not in_keys  # prompts: two groups of rows share keys
    rounded = isinstance(k_pages, QuantizedPages)
    some = M * Z >= _LONG and not many if rounded else many
    roomy = lanes + values <= 256 and not (in_keys or mass)  # in registers and memory
    keys = tile.keys or (128 if roomy and some else 64)
    if Z % 8 or max(Z, keys) % min(Z, keys) or keys % 64 or keys > 256:
        raise UnsupportedError(f"{Z=} keys in a page: a power of two, from 8; and {keys=}: 64s")
    groups = tile.groups or (2 if many and lanes + values <= 256 else 1)
    full = wide or groups > 1 or (rounded and values > 128)  # registers are
    turns = tile.turns or (1 if full or 4 * keys > M * Z else 2)
    if groups * turns > (1 if wide else 2):
        most = "one, whose values two warpgroups share" if wide else "two warpgroups in all"
        raise UnsupportedError(f"{groups=} of rows, {turns=} in which they take keys: {most}")
    apart = bool(tile.apart) and groups > 1 and not rounded
    blocks = most_items(T, R, groups * tokens) * K * heads
    splits = tile.splits or _splits(blocks, M * Z // keys, prompts=T > 4 * R)
    sharing = batch.groups is not None and T <= 4 * R and groups * tokens > 1 and not mass
    shared = _shared(-(-T // (groups * tokens)) * K * heads * splits) if sharing else 0
    factor, cap = (scale / soft_cap, soft_cap * LOG2E) if soft_cap else (scale * LOG2E, 0.0)
    part = min(Z, keys)
    stacks, nibbles = (k_pages, v_pages), isinstance(k_pages, Int4Pages)
    owned = tuple(len(x.parts) for x in stacks if isinstance(x, Int8Pages | Int4Pages))
    shape = Shape(
        G, heads, tokens, groups, turns, apart, 0, splits, shared, part, Z // part, keys // part, M,
        lanes, values, in_keys, wide, 0, nibbles, *parts, owned, mass, factor, cap,
    )  # fmt: skip
    try:
        return _with_depths(shape, tile.stages, rounded)
    except UnsupportedError:
        if tile.turns or turns == 1:
            raise
        return _with_depths(replace(shape, turns=1), tile.stages, rounded)


def _lanes(H: int, value_dim: int, k_pages: Any, v_pages: Any) -> tuple[int, int, bool]:
    """Of keys and of values that are brought, and whether two warpgroups share the values."""
    W, in_keys = k_pages.shape[-1], v_pages is None
    lanes, values = whole_parts(k_pages, H), whole_parts(k_pages if in_keys else v_pages, value_dim)
    lanes, values = -(-lanes // 64) * 64, -(-values // 64) * 64
    wide = in_keys and values > _VALUES
    if wide:
        values = -(-values // 128) * 128  # two halves
        lanes = max(lanes, values)
    stored = W if in_keys else min(W, v_pages.shape[-1])
    most = 2 * _VALUES if in_keys else _VALUES
    if lanes > W or values > stored or values > most:
        raise UnsupportedError(
            f"keys of {H} and values of {value_dim} lanes in pages of {W}: "
            f"whole 64s, and values up to {most}"
        )
    return lanes, values, wide


def _parts(
    lanes: int, values: int, k_pages: Any, v_pages: Any
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Parts of keys and of values with scales of their own, as far as they are brought; none in
    other pages."""
    stacks = (k_pages, k_pages if v_pages is None else v_pages)
    if not isinstance(k_pages, QuantizedPages) and k_pages.dtype != jnp.bfloat16:
        raise UnsupportedError(f"pages of {k_pages.dtype}: keep them in bfloat16, int8 or int4")
    if not isinstance(k_pages, Int8Pages | Int4Pages):
        return (), ()

    def brought(pages: Any, lanes: int) -> tuple[int, ...]:
        begins = [0, *accumulate(pages.parts)]
        pairs = zip(pages.parts, begins, strict=False)
        return tuple(min(n, lanes - begin) for n, begin in pairs if begin < lanes)

    keys, of_values = brought(stacks[0], lanes), brought(stacks[1], values)
    if any(n % 64 for n in (*keys, *of_values)):
        raise UnsupportedError(
            f"{stacks[0].parts=} of keys, {stacks[1].parts=} of values: whole 64s, as tiles are"
        )
    Z = k_pages.shape[3]
    if Z % _LINE:
        kind = "int4" if isinstance(k_pages, Int4Pages) else "int8"
        raise UnsupportedError(
            f"{Z=} scales of a page of {kind}: whole {_LINE}s, which a copy fills"
        )
    return keys, of_values


def _with_depths(shape: Shape, wanted: int, rounded: bool) -> Shape:
    """With blocks that are multiplied or wait for it, and blocks of eight or four bits on their
    way. A slot is of one turn: a barrier that one warpgroup waits for, and then another, tells
    the second of blocks that are long gone."""
    # of a row: weights, or outputs on their way and `Scratch.told`; and lse, or what it shrinks by
    each = 2 * shape.weights * shape.keys + 4 if shape.wide else 128 + 4 + 8 * shape.turns
    barriers = 2048 if shape.wide else 3072  # and room between arrays
    fixed = shape.groups * ROWS * (2 * shape.lanes + each) + barriers
    width = sum(shape.widths)
    scales = 4 * (shape.rows_of_scales if shape.nibbles else sum(shape.scales))
    block = shape.keys * (2 * width + scales)
    room = _SHARED - fixed
    if rounded:
        raw = shape.keys * (width + scales)
        if shape.nibbles:
            raw = shape.keys * width // 2 + 4 * math.prod(shape.unsorted)
        stages = 2 if shape.turns > 1 or room >= 2 * (block + raw) else 1
        ahead = wanted or max(1, min(6, (room - stages * block) // raw))
        ahead = max(2, ahead // 2 * 2) if shape.turns > 1 else ahead
        bits = "four" if shape.nibbles else "eight"
        used, said = stages * block + ahead * raw, f"{stages} + {ahead} in {bits} bits of"
    else:
        stages, ahead = wanted or max(2, min(6, room // block)), 0
        stages = max(1, stages // shape.turns) * shape.turns
        used, said = stages * block, f"{stages}"
    if used > room:
        raise UnsupportedError(
            f"{said} blocks of {shape.keys} keys of {shape.lanes} and values of {shape.values} "
            f"lanes need {fixed + used} bytes of shared memory, and {_SHARED} are there"
        )
    return replace(shape, stages=stages, ahead=ahead)


def _splits(blocks: int, steps: int, prompts: bool) -> int:
    """Shares of a sequence's keys: the fewest with which cores are about as busy as they can be.

    Args:
        blocks: of threads, without shares; one fills a core.
        steps: of the longest sequence. A share is of four at least, or merging takes longer.
        prompts: whether rows are many, whose sums would all be written once for each share.
    """
    most = max(1, min(16, steps // 4, _CORES // blocks if prompts else steps))
    times = [-(-blocks * n // _CORES) / n for n in range(1, most + 1)]
    return next(n for n, time in enumerate(times, 1) if time <= 1.1 * min(times))


def _shared(blocks: int) -> int:
    """Shares of the keys of a group, if one of all tokens were so many blocks of threads."""
    return max(1, min(8, _CORES // blocks))  # merging reads all of them, in any step


def _launch(operands: tuple[Any, ...], caches: list[Array], shape: Shape, interpret: Any) -> Any:
    """o [splits, heads, rows, values], where queries are; lse [splits, items, heads, rows of an
    item] and sums by part."""
    *scalars, given, queries = operands
    items, heads, rows = len(given.seqs), len(queries), shape.groups * ROWS
    out = [
        jax.ShapeDtypeStruct((shape.splits, *queries.shape[:2], shape.values), shape.said),
        jax.ShapeDtypeStruct((shape.splits, items, heads, rows), jnp.float32),
    ]
    if shape.mass:
        sums = items, heads, shape.row * shape.parts + shape.count, rows
        out.append(jax.ShapeDtypeStruct(sums, jnp.float32))
    body = latent.kernel if shape.wide else kernel
    return plgpu.kernel(
        partial(body, shape=shape, simulated=bool(interpret)),
        out_type=out,
        grid=(heads, shape.splits, items),
        grid_names=("head", "split", "item"),
        num_threads=3 if shape.wide else shape.readers + shape.bringers,
        thread_name="wg",
        scratch_types=latent.scratch(shape) if shape.wide else [Scratch.of(shape)],
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            reduction_scratch_bytes=1024,  # sums of rows stay in four threads and take none
        ),
        interpret=interpret,
        kernel_name="page_attention",
    )(*scalars, given.table(), queries, *caches)
