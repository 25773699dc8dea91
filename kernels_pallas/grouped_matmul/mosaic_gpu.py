"""The grouped product on Hopper: a block of the grid takes up to `block_m` rows of one expert.

wgmma fixes one side of a product at 64 rows, and takes from 8 to 256 on the other. Rows of w are
the fixed side and rows of x the other, since an expert has few rows when decoding. A tile of x is
read from a multiple of 8 rows on, as its layout in shared memory demands, so it may hold rows of
neighbours. The result is transposed in registers. It is transposed back, laid out without swizzle,
and stored in pieces of powers of two, since a TMA store has a fixed shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.grouped_matmul.reference import check
from kernels_pallas.grouped_matmul.visits import blocks
from kernels_pallas.hopper import LINE_BYTES, PLANNED_BYTES, fit, pipelined
from kernels_pallas.op import UnsupportedError, refuse_no_rows, tried

_STORE_M = 64  # rows of the result that are transposed and stored at a time


@dataclass(frozen=True)
class Tile:
    """What one block of the grid computes, and how it walks K.

    Attributes:
        block_m: rows of x, of one expert: a power of two, 8 to 256.
        warpgroups: that multiply. If there are several, one more loads.
        warpgroup_n: rows of w for each of them: 64 or 128.
        block_k: elements of K per step.
        stages: steps whose operands are in shared memory or being loaded.
    """

    block_m: int = tried(128, 16, 32, 64)
    warpgroups: int = tried(2, 1)
    warpgroup_n: int = tried(128, 64)
    block_k: int = tried(128, 64, 256)
    stages: int = tried(4, 3)

    @property
    def block_n(self) -> int:
        """Rows of w."""
        return self.warpgroup_n * self.warpgroups

    @classmethod
    def for_shape(cls, M: int, E: int, N: int, K: int, itemsize: int, out_bytes: int) -> Tile:
        """The tile for x [M, K] and w [E, N, K] where none was tuned.

        Args:
            itemsize: bytes of an element of x and w.
            out_bytes: bytes of an element of the result.
        """
        block_m = min(128, max(16, 1 << (2 * M // E - 1).bit_length() if 2 * M > E else 16))
        many = block_m > 64 and N % 256 == 0
        warpgroups, warpgroup_n = (2, 128 // (out_bytes // 2)) if many else (1, 64)
        row_bytes = 256 if not many and K * itemsize % 256 == 0 else 128
        kept = warpgroups * (warpgroup_n * (2 * _STORE_M * out_bytes + 8) + 4 * block_m)
        stage = row_bytes * (warpgroups * warpgroup_n + block_m)
        stages = (PLANNED_BYTES // (1 if many else 2) - kept) // stage
        return cls(
            block_m, warpgroups, warpgroup_n, row_bytes // itemsize, max(2, min(8, stages))
        )  # fmt: skip

    def shared(self, itemsize: int, out_bytes: int) -> tuple[int, ...]:
        """Bytes of the arrays in shared memory."""
        stage = self.block_k * itemsize * (self.block_n + self.block_m)
        out = _STORE_M * self.warpgroup_n * out_bytes
        scales = max(4 * self.block_m, LINE_BYTES)
        per_warpgroup = out, out, scales, 4 * self.warpgroup_n
        return stage * self.stages, *(self.warpgroups * size for size in per_warpgroup)


class _Refs(NamedTuple):
    """What the kernel is given: arrays in global memory, then those in shared memory."""

    group: Any  # [V]
    start: Any  # [V]
    size: Any  # [V]
    layer: Any  # [1]
    x: Any  # [M, K]
    w: Any  # [L * E, N, K]
    scales: Sequence[Any]  # of x [M] and of w [L * E, N], or none
    out: Any  # [M, N]
    transposed_smem: Any  # [warpgroups, 64, warpgroup_n]
    out_smem: Any  # likewise
    x_scale_smem: Any  # [warpgroups, block_m, or more for alignment]
    w_scale_smem: Any  # [warpgroups, warpgroup_n]
    arrived: Any  # a barrier per warpgroup, for its scales

    @classmethod
    def of(cls, refs: Sequence[Any]) -> _Refs:
        group, start, size, layer, x, w, *scales = refs[:-6]
        return cls(group, start, size, layer, x, w, scales, *refs[-6:])


class _Share(NamedTuple):
    """What one warpgroup computes: products of rows of x and of an expert's rows of w.

    Attributes:
        group: whose rows are computed; E for padding, whose result is 0.
        expert: of all layers' experts, the one whose weights are read.
        start, size: the rows of x that belong to the group.
        x_rows: those that are read: from a multiple of 8 on, and no fewer than a tile.
    """

    wg: Any
    group: Array
    expert: Array
    start: Array
    size: Array
    x_rows: Any
    w_rows: Any

    @property
    def shape(self) -> tuple[int, int]:
        """Of the result, transposed: (warpgroup_n, block_m)."""
        return self.w_rows.size, self.x_rows.size


def _kernel(*args, tile: Tile, E: int):
    refs = _Refs.of(args)
    v = lax.axis_index("v")
    group, start, size = refs.group[v], refs.start[v], refs.size[v]
    expert = refs.layer[0] * E + jnp.minimum(group, E - 1)
    # A multiple of 8 that the compiler can see; and no tile leaves the array.
    begin = jnp.minimum(lax.div(start, 8), (refs.x.shape[0] - tile.block_m) // 8) * 8
    x_rows = pl.ds(begin, tile.block_m)
    wg = lax.axis_index("wg") if tile.warpgroups > 1 else 0
    first = lax.axis_index("n") * tile.block_n
    w_rows = pl.ds(first + wg * tile.warpgroup_n, tile.warpgroup_n)
    share = _Share(wg, group, expert, start, size, x_rows, w_rows)

    def compute(multiply_all):
        if refs.scales:
            _load_scales(refs, share)

        def scope(total):
            multiply_all(total)
            y = total[...]
            if refs.scales:
                y = _scaled(refs, share, y, E)
            _store(refs, share, y.astype(refs.out.dtype))

        dtype = jnp.int32 if refs.scales else jnp.float32
        pl.run_scoped(scope, plgpu.WGMMAAccumulatorRef(share.shape, dtype))

    steps = jnp.where(group < E, refs.x.shape[1] // tile.block_k, 0)  # padding has no products

    @pl.when(size > 0)
    def _():
        pipelined(
            partial(_multiply, share),
            compute,
            [refs.x.at[x_rows], refs.w.at[expert].at[pl.ds(first, tile.block_n)]],
            warpgroups=tile.warpgroups,
            grid=(steps,),
            in_specs=[
                plgpu.BlockSpec((rows, tile.block_k), lambda k: (0, k), delay_release=1)
                for rows in (tile.block_m, tile.block_n)
            ],
            max_concurrent_steps=tile.stages,
        )


def _load_scales(refs: _Refs, share: _Share) -> None:
    """Starts to load the scales of both sides into a warpgroup's own memory."""
    wg, (x_scale, w_scale) = share.wg, refs.scales
    x_scale_smem = refs.x_scale_smem.at[wg, pl.ds(0, share.x_rows.size)]
    plgpu.copy_gmem_to_smem(x_scale.at[share.x_rows], x_scale_smem, refs.arrived.at[wg])
    w_scale = w_scale.at[share.expert, share.w_rows]
    plgpu.copy_gmem_to_smem(w_scale, refs.w_scale_smem.at[wg], refs.arrived.at[wg])


def _multiply(share: _Share, _: Any, x_smem: Any, w_smem: Any, total: Any) -> Any:
    """Adds one step's products of a warpgroup's rows of w to the total [warpgroup_n, block_m]."""
    rows = pl.ds(share.wg * share.w_rows.size, share.w_rows.size)
    plgpu.wgmma(total, w_smem.at[rows], x_smem.T)
    plgpu.wgmma_wait(1)  # all but this one: the tiles of the step before are free
    return total


def _scaled(refs: _Refs, share: _Share, y: Array, E: int) -> Array:
    """Sums [warpgroup_n, block_m] times the scales of both sides; 0 for padding, which is group
    E."""
    wg = share.wg
    plgpu.barrier_wait(refs.arrived.at[wg])
    y = y.astype(jnp.float32)
    x_scale_smem = refs.x_scale_smem.at[wg, pl.ds(0, share.x_rows.size)]
    for smem, axis in ((x_scale_smem, 1), (refs.w_scale_smem.at[wg], 0)):
        # Scales of padding may be NaN: its rows are nobody's, and its expert may have no rows.
        real = lax.broadcast(share.group < E, (share.shape[axis],))
        scale = jnp.where(real, smem[...], 0.0)
        y *= lax.broadcast_in_dim(scale, share.shape, (axis,))
    return y


def _store(refs: _Refs, share: _Share, y: Array) -> None:
    """Transposes the result [warpgroup_n, block_m], 64 rows of x at a time, and stores it."""
    transposed_smem, out_smem = refs.transposed_smem.at[share.wg], refs.out_smem
    for done in range(0, y.shape[1], _STORE_M):
        part = y[:, done : done + _STORE_M]
        part = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED)
        transposed_smem.at[pl.ds(0, part.shape[1])].T[...] = part
        out_smem[share.wg] = plgpu.layout_cast(transposed_smem[...], plgpu.Layout.WGMMA)
        plgpu.commit_smem()
        out_ref = refs.out.at[:, share.w_rows]
        offset = share.start - share.x_rows.start
        _store_rows(out_smem.at[share.wg], out_ref, share.start, share.size, offset, done)


def _store_rows(smem: Any, out_ref: Any, start: Array, size: Array, offset: Array, done: int):
    """Stores those rows of a tile that belong to its group, of the 64 that shared memory holds.

    Args:
        smem: rows [done, done + 64) of the tile.
        out_ref: [M, warpgroup_n].
        start, size: rows of out_ref that the tile is to fill, beginning with its row `offset`.
    """
    first = jnp.clip(offset - done, 0, _STORE_M)
    to = start + done + first - offset
    left = jnp.clip(offset + size - done - first, 0, _STORE_M - first)
    part = _STORE_M
    while part:

        @pl.when(left & part > 0)
        def _(part=part, first=first, to=to):
            plgpu.copy_smem_to_gmem(smem.at[pl.ds(first, part)], out_ref.at[pl.ds(to, part)])

        stored = left & part
        first, to, part = first + stored, to + stored, part // 2
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def gpu(
    x: Array, w: Array, group_sizes: Array, *,
    layer: Array | int | None = None, x_scale: Array | None = None, w_scale: Array | None = None,
    out_dtype: Any = jnp.bfloat16, tile: Tile | None = None, interpret: Any = False,
) -> Array:  # fmt: skip
    """`reference.grouped_matmul` as a Hopper kernel. Weights of absent experts are not read.

    Raises:
        UnsupportedError: x has no rows or is neither bfloat16 nor int8, the tile does not divide K
            and N or reads rows of w that are no multiple of 128 bytes, or needs more shared memory
            than there is.
    """
    check(x, w, group_sizes, layer, x_scale, w_scale)
    (M, K), (E, N), itemsize = x.shape, w.shape[-3:-1], x.dtype.itemsize
    refuse_no_rows(M)
    if x.dtype not in (jnp.bfloat16, jnp.int8):
        raise UnsupportedError(f"rows are {x.dtype}: expected bfloat16 or int8")
    out_bytes = jnp.dtype(out_dtype).itemsize
    tile = tile or Tile.for_shape(M, E, N, K, itemsize, out_bytes)
    if tile.block_k * itemsize % LINE_BYTES:
        raise UnsupportedError(f"{tile}: a step must be a multiple of {LINE_BYTES} bytes")
    if K % tile.block_k or N % tile.block_n:
        raise UnsupportedError(
            f"{K=} must be a multiple of {tile.block_k}, and {N=} of {tile.block_n}"
        )
    fit(tile.shared(itemsize, out_bytes), f"{tile}")
    padding = max(-M % 8, tile.block_m - M)
    scales, total = [], M + padding
    if x_scale is not None and w_scale is not None:
        scales = [jnp.pad(x_scale, (0, padding)), w_scale.reshape(-1, N)]
    threads = {"num_threads": tile.warpgroups + 1, "thread_name": "wg"}
    plan = blocks(group_sizes, total, tile.block_m, align=8)
    out_smem = plgpu.SMEM((tile.warpgroups, _STORE_M, tile.warpgroup_n), out_dtype)
    y = plgpu.kernel(
        partial(_kernel, tile=tile, E=E),
        out_type=jax.ShapeDtypeStruct((total, N), out_dtype),
        grid=(plan.group.shape[0], N // tile.block_n),
        grid_names=("v", "n"),
        **(threads if tile.warpgroups > 1 else {}),
        scratch_types=[
            out_smem,
            out_smem,
            plgpu.SMEM((tile.warpgroups, max(tile.block_m, LINE_BYTES // 4)), jnp.float32),
            plgpu.SMEM((tile.warpgroups, tile.warpgroup_n), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=tile.warpgroups),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
        kernel_name="grouped_matmul",
    )(
        *plan,
        jnp.asarray(0 if layer is None else layer, jnp.int32).reshape(1),
        jnp.pad(x, ((0, padding), (0, 0))),
        w.reshape(-1, N, K),
        *scales,
    )  # fmt: skip
    return y[:M]
