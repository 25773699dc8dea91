"""Attention over pages on Hopper: TMA brings pages to shared memory, wgmma attends 64 rows of them.

A block of threads is given an *item*: some consecutive tokens of one sequence, a head of keys and,
where there would be too few blocks to fill the cores, a share of the keys. Rows of a warpgroup are
the tokens and those heads of queries that share the keys; values of more than 256 lanes are spread
over two warpgroups, which both compute the weights. One more warpgroup only brings pages.
Shares of keys merge by (o, lse), and sinks join there, as one more share without a value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.op import UnsupportedError
from kernels_pallas.paged_attention.ragged import Ragged, locate
from kernels_pallas.weight import Weight, as_array

_HIDDEN = -1e30  # finite: a row that has seen nothing yet must not become NaN
_LOG2E = math.log2(math.e)
_ROWS = 64  # of a warpgroup: what wgmma fixes
_SHARED = 224 * 1024  # bytes of shared memory that a block may take
_CORES = 132


@dataclass(frozen=True)
class GpuTile:
    """keys: attended at a time; stages: blocks of keys that are in shared memory or on their way;
    groups: of 64 rows that share them; splits: of a sequence's keys. 0 leaves a choice."""

    keys: int = 0
    stages: int = 0
    groups: int = 0
    splits: int = 0


@dataclass(frozen=True)
class Shape:
    """What the kernel knows while it is traced.

    Attributes:
        group: heads of queries in a tile of rows.
        heads: such groups for each head of keys.
        tokens: in a tile of rows.
        groups: tiles of rows in a block of threads.
        wide: warpgroups for each of them, which have the lanes of its values between them.
        part: keys that are brought by one copy: those of a page, or fewer.
        parts: of a page.
        count: parts in a block of keys.
        row: entries in a row of the block table.
        values: lanes of the outputs.
        stored: lanes of them that are stored at a time.
        in_keys: whether values are lanes of keys.
        factor: of logits, inside tanh where there is a `cap`.
    """

    group: int
    heads: int
    tokens: int
    groups: int
    wide: int
    stages: int
    splits: int
    part: int
    parts: int
    count: int
    row: int
    lanes: int
    values: int
    stored: int
    in_keys: bool
    factor: float
    cap: float

    @property
    def keys(self) -> int:
        return self.count * self.part

    @property
    def warpgroups(self) -> int:
        return self.groups * self.wide


def page_attention(
    q: Array, k_pages: Array, v_pages: Array | None, layer: Array | int, batch: Ragged, *,
    scale: float, window: Array | int = 0, sinks: Weight | None = None, soft_cap: float = 0.0,
    value_dim: int | None = None, mass: bool = False, tile: GpuTile | None = None,
    interpret: Any = False,
) -> tuple[Array, ...]:  # fmt: skip
    """`reference.page_attention` as one Hopper kernel."""
    if mass:
        raise UnsupportedError("mass=True: no sums of pages are kept here")
    (T, N, H), K, W = q.shape, k_pages.shape[2], k_pages.shape[-1]
    value_dim = value_dim or (H if v_pages is None else v_pages.shape[-1])
    shape = _shape(tile or GpuTile(), q, k_pages, v_pages, batch, value_dim, scale, soft_cap)
    G, heads = shape.group, K * shape.heads
    seqs, firsts, first_item = _items(batch, T, shape)
    queries = jnp.pad(q.astype(k_pages.dtype), ((0, 0), (0, 0), (0, W - H)))
    row = jnp.arange(_ROWS)
    token = jnp.arange(shape.groups)[:, None] * shape.tokens + row // G
    token = jnp.minimum(firsts[:, None] + token.reshape(-1), T - 1)  # [items, rows]; some idle
    head = jnp.arange(heads)[:, None] * G + jnp.tile(row % G, shape.groups)  # [heads, rows]
    queries = queries[token[:, None], head]  # [items, heads, rows, W]
    caches = [k_pages] if v_pages is None else [k_pages, v_pages]
    o, lse = _launch(
        (
            jnp.asarray(layer, jnp.int32).reshape(1), jnp.asarray(window, jnp.int32).reshape(1),
            batch.row_starts, batch.kv_lens, batch.tables.reshape(-1), seqs, firsts,
        ),
        queries, caches, shape, interpret,
    )  # fmt: skip
    seq, _ = locate(batch, T)
    size = shape.groups * shape.tokens
    at = jnp.arange(T) - batch.row_starts[seq]  # of each token, in its sequence's share of the step
    item, at = first_item[seq] + at // size, at % size
    row = at // shape.tokens * _ROWS + at % shape.tokens * G
    row = row[:, None, None] + jnp.arange(G)  # [T, 1, G]
    where = slice(None), item[:, None, None], jnp.arange(heads)[:, None], row
    o, lse = (x[where].reshape(shape.splits, T, N, *x.shape[4:]) for x in (o, lse))
    return _merge(o[..., :value_dim], lse, None if sinks is None else as_array(sinks))


def _merge(o: Array, lse: Array, sinks: Array | None) -> tuple[Array, Array]:
    """Of shares of keys [splits, T, N, ...], and of sinks [N], which weigh and say nothing."""
    if len(o) == 1 and sinks is None:
        return o[0], lse[0]
    top = lse.max(0) if sinks is None else jnp.maximum(lse.max(0), sinks.astype(jnp.float32))
    weights = jnp.exp(lse - top)
    total = weights.sum(0) + (0.0 if sinks is None else jnp.exp(sinks.astype(jnp.float32) - top))
    return jnp.sum(o * (weights / total)[..., None], 0), top + jnp.log(total)


def _shape(
    tile: GpuTile, q: Array, k_pages: Array, v_pages: Array | None, batch: Ragged, value_dim: int,
    scale: float, soft_cap: float,
) -> Shape:  # fmt: skip
    """The kernel's sizes, or what speaks against it."""
    T, N, _ = q.shape
    _, _, K, Z, W = k_pages.shape
    values = -(-value_dim // 64) * 64 if v_pages is None else v_pages.shape[-1]
    if k_pages.dtype != jnp.bfloat16:
        raise UnsupportedError(f"pages of {k_pages.dtype}: keep them in bfloat16")
    if W % 64 or values % 64 or values > 512:
        raise UnsupportedError(f"keys of {W}, values of {values} lanes: 64s, and values up to 512")
    keys = tile.keys or (64 if values <= 256 else 32)
    if Z % 8 or max(Z, keys) % min(Z, keys) or keys % 16 or keys > 256:
        raise UnsupportedError(f"{Z=} keys in a page: a power of two, where {keys} are attended")
    R, M = batch.tables.shape
    heads = next(n for n in range(1, N // K + 1) if N // K % n == 0 and N // K // n <= _ROWS)
    G = N // K // heads
    tokens, wide = _ROWS // G, -(-values // 256)
    many = T > 4 * R and v_pages is not None  # prompts: two groups of rows share what TMA brings
    groups = tile.groups or (2 if many and wide == 1 else 1)
    items = T // (groups * tokens) + R
    wanted = 1 if many else min(16, -(-2 * _CORES // (items * K * heads)), M * Z // (4 * keys))
    splits = tile.splits or max(1, wanted)
    block = keys * 2 * (W + (0 if v_pages is None else values))
    fixed = groups * _ROWS * (2 * W + 4 + wide * 2 * keys) + 1024  # and barriers
    stored = 64 if fixed + groups * wide * _ROWS * 4 * 64 + 3 * block < _SHARED else 16
    fixed += groups * wide * _ROWS * 4 * stored
    stages = tile.stages or max(2, min(6, (_SHARED - fixed) // block))
    if fixed + stages * block > _SHARED:
        raise UnsupportedError(
            f"{stages} blocks of {keys} keys of {W} and values of {values} lanes need "
            f"{fixed + stages * block} bytes of shared memory, and {_SHARED} are there"
        )
    factor, cap = (scale / soft_cap, soft_cap * _LOG2E) if soft_cap else (scale * _LOG2E, 0.0)
    part = min(Z, keys)
    return Shape(
        G, heads, tokens, groups, wide, stages, splits, part, Z // part, keys // part, M, W,
        values, stored, v_pages is None, factor, cap,
    )  # fmt: skip


def _items(batch: Ragged, T: int, shape: Shape) -> tuple[Array, Array, Array]:
    """The sequence of each item (-1: none) and its first token; the first item of each sequence."""
    starts, ends = batch.row_starts[:-1], batch.row_starts[1:]
    R, size = starts.shape[0], shape.groups * shape.tokens
    count = jnp.where(jnp.arange(R) < batch.num_seqs, -(-(ends - starts) // size), 0)
    before = jnp.cumsum(count, dtype=jnp.int32)
    i = jnp.arange(T // size + R, dtype=jnp.int32)
    seqs = jnp.minimum(jnp.sum(before <= i[:, None], 1), R - 1).astype(jnp.int32)
    firsts = starts[seqs] + (i - (before - count)[seqs]) * size
    return jnp.where(i < before[-1], seqs, -1), firsts, before - count


def _launch(
    scalars: tuple[Array, ...], queries: Array, caches: list[Array], shape: Shape, interpret: Any
) -> tuple[Array, Array]:
    """o [splits, items, heads, rows, values] and lse, without lanes."""
    (items, heads, rows, _), dtype = queries.shape, queries.dtype
    ready = plgpu.Barrier(num_arrivals=shape.count, num_barriers=shape.stages)
    return plgpu.kernel(
        partial(_kernel, shape=shape),
        out_type=[
            jax.ShapeDtypeStruct((shape.splits, items, heads, rows, shape.values), jnp.float32),
            jax.ShapeDtypeStruct((shape.splits, items, heads, rows), jnp.float32),
        ],
        grid=(heads, shape.splits, items),
        grid_names=("head", "split", "item"),
        num_threads=shape.warpgroups + 1,
        thread_name="wg",
        scratch_types=[
            plgpu.SMEM((shape.groups, _ROWS, shape.lanes), dtype),
            plgpu.SMEM((shape.warpgroups, _ROWS, shape.keys), dtype),
            plgpu.SMEM((shape.warpgroups, _ROWS, shape.stored), jnp.float32),
            plgpu.SMEM((shape.groups, _ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=shape.groups),
            plgpu.Barrier(num_arrivals=shape.warpgroups),
            plgpu.Barrier(num_arrivals=shape.warpgroups, num_barriers=shape.stages),
            *(plgpu.SMEM((shape.stages, shape.keys, x.shape[-1]), dtype) for x in caches),
            *(ready for _ in caches),
        ],
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        interpret=interpret,
        kernel_name="page_attention",
    )(*scalars, queries, *caches)


def _kernel(
    layer, window, starts, lens, tables, seqs, firsts, q_ref, *refs, shape: Shape
) -> None:  # fmt: skip
    n = 1 if shape.in_keys else 2
    stacks, (o_ref, lse_ref), refs = refs[:n], refs[n : n + 2], refs[n + 2 :]
    q_smem, p_smem, o_smem, lse_smem, arrived, silenced, free, *rest = refs
    blocks, ready = rest[:n], rest[n:]
    head, split, item = (lax.axis_index(name) for name in ("head", "split", "item"))
    wg, seq = lax.axis_index("wg"), seqs[item]

    @pl.when(seq >= 0)
    def _() -> None:
        first, shift = firsts[item], lens[seq] - starts[seq + 1]
        end = jnp.minimum(first + shape.groups * shape.tokens, starts[seq + 1])
        reach = jnp.where(window[0] > 0, window[0], 2**30)
        part = lax.div(jnp.maximum(first + shift - reach + 1, 0), jnp.int32(shape.part))
        end_part = lax.div(end - 1 + shift, jnp.int32(shape.part)) + 1
        share = lax.div(end_part - part + shape.count - 1, jnp.int32(shape.count))  # in blocks
        share = lax.div(share + shape.splits - 1, jnp.int32(shape.splits)) * shape.count
        part = part + split * share
        share = jnp.maximum(jnp.minimum(share, end_part - part), 0)
        count = lax.div(share + shape.count - 1, jnp.int32(shape.count))

        @pl.when(wg == shape.warpgroups)
        def _bring() -> None:
            if shape.warpgroups > 1:
                plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, count)
            def _step(step: Array) -> None:
                slot = lax.rem(step, jnp.int32(shape.stages))
                pl.when(step >= shape.stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                for p in range(shape.count):  # none is left out, since barriers count
                    at = jnp.minimum(part + step * shape.count + p, end_part - 1)
                    page = tables[seq * shape.row + lax.div(at, jnp.int32(shape.parts))]
                    z = pl.ds(lax.rem(at, jnp.int32(shape.parts)) * shape.part, shape.part)
                    where = layer[0], page, lax.div(head, jnp.int32(shape.heads)), z
                    to = slot, pl.ds(p * shape.part, shape.part)
                    for stack, block, there in zip(stacks, blocks, ready, strict=True):
                        plgpu.copy_gmem_to_smem(stack.at[where], block.at[to], there.at[slot])

        @pl.when(wg < shape.warpgroups)
        def _compute() -> None:
            if shape.warpgroups > 1:
                plgpu.set_max_registers(232, action="increase")
            tile, side = (wg, 0) if shape.wide == 1 else (0, wg)
            base, width = first + tile * shape.tokens, shape.values // shape.wide

            @pl.when(side == 0)
            def _() -> None:
                rows = q_ref.at[item, head, pl.ds(tile * _ROWS, _ROWS)]
                plgpu.copy_gmem_to_smem(rows, q_smem.at[tile], arrived.at[tile])

            plgpu.barrier_wait(arrived.at[tile])

            def together() -> None:
                plgpu.barrier_arrive(silenced)
                plgpu.barrier_wait(silenced)

            def attend(step: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
                value, top, total = state
                slot = lax.rem(step, jnp.int32(shape.stages))
                key = (part + step * shape.count) * shape.part
                plgpu.barrier_wait(ready[0].at[slot])
                s = _product(q_smem.at[tile], blocks[0].at[slot].T, (_ROWS, shape.keys))
                s = s * shape.factor
                s = jnp.tanh(s) * shape.cap if shape.cap else s
                row = lax.broadcasted_iota(jnp.int32, s.shape, 0)
                position = base + shift + lax.div(row, jnp.full_like(row, shape.group))
                back = position - key - lax.broadcasted_iota(jnp.int32, s.shape, 1)
                s = jnp.where((back >= 0) & (back < reach), s, _HIDDEN)
                now = jnp.maximum(top, jnp.max(s, 1))
                p, shrink = jnp.exp2(s - _down(now, s.shape)), jnp.exp2(top - now)
                total = total * shrink + jnp.sum(p, 1)
                plgpu.barrier_wait(ready[-1].at[slot]) if n == 2 else None
                values = blocks[-1].at[slot, :, pl.ds(side * width, width)]
                past = end + shift - key  # the first of the block's keys that nobody sees

                @pl.when(past < shape.keys)
                def _() -> None:
                    together()  # where values are keys, others may still read them
                    pl.when(tile == 0)(lambda: _silence(values, past))
                    together()

                p_smem[wg] = p.astype(values.dtype)
                plgpu.commit_smem()
                added = _product(p_smem.at[wg], values, value.shape)
                plgpu.barrier_arrive(free.at[slot])
                return value * _down(shrink, value.shape) + added, now, total

            state = (
                jnp.zeros((_ROWS, width), jnp.float32),
                *(jnp.full((_ROWS,), x, jnp.float32) for x in (_HIDDEN, 0.0)),
            )
            value, top, total = lax.fori_loop(0, count, attend, state)
            total = jnp.maximum(total, 1e-30)
            value = value / _down(total, value.shape)
            lse = (top + jnp.log2(total)) * (1 / _LOG2E)

            @pl.when(side == 0)
            def _() -> None:
                lse_smem[tile] = lse
                plgpu.commit_smem()
                out = lse_ref.at[split, item, head, pl.ds(tile * _ROWS, _ROWS)]
                plgpu.copy_smem_to_gmem(lse_smem.at[tile], out)

            for begin in range(0, width, shape.stored):
                o_smem[wg] = value[:, begin : begin + shape.stored]
                plgpu.commit_smem()
                lanes = pl.ds(side * width + begin, shape.stored)
                for row in range(0, _ROWS, 8):  # none without a token

                    @pl.when(base + row // shape.group < end)
                    def _(row: int = row, lanes: Any = lanes) -> None:
                        out = o_ref.at[split, item, head, pl.ds(tile * _ROWS + row, 8), lanes]
                        plgpu.copy_smem_to_gmem(o_smem.at[wg, pl.ds(row, 8)], out)

                plgpu.wait_smem_to_gmem(0, wait_read_only=begin + shape.stored < width)


def _silence(values: Any, past: Array) -> None:
    """Zeros behind the last value that is seen: a weight of 0 would not silence a NaN there, in a
    slot that nobody has written since its page changed hands."""
    x = values[...]
    row = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    values[...] = jnp.where(row < past, x, jnp.zeros_like(x))
    plgpu.commit_smem()


def _product(a: Any, b: Any, shape: tuple[int, int]) -> Array:
    """a @ b [64, n] in float32; b is a tile in shared memory."""

    def scope(total: Any) -> Array:
        plgpu.wgmma(total, a, b)
        return total[...]

    return pl.run_scoped(scope, plgpu.ACC(shape, jnp.float32))


def _down(column: Array, shape: tuple[int, int]) -> Array:
    """A number per row."""
    return lax.broadcast_in_dim(column, shape, (0,))
