"""The W8A8 product on Hopper: int8 wgmma on tiles that TMA loads, scales and gate in registers.

wgmma fixes one side of a product at 64 rows, and takes from 8 to 256 on the other. Rows of w are
the fixed side and rows of x (tokens) the other, so one kernel serves a decoding step and a prompt.
The result is therefore transposed in registers, and is transposed back while it is stored.
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

from kernels_pallas.hopper import CORES, LINE_BYTES, PLANNED_BYTES, ROWS, fit, pipelined
from kernels_pallas.int8_matmul.reference import check
from kernels_pallas.linear import GATES
from kernels_pallas.op import UnsupportedError, refuse_no_rows, tried

_STORE_M = 64  # rows of the result that are transposed and stored at a time


@dataclass(frozen=True)
class Tile:
    """What one block of the grid computes, and how it walks K.

    Attributes:
        block_m: rows of x: 8, 16, 32, or a multiple of 64 up to 256.
        warpgroups: that multiply, 64 rows of w each. If there are several, one more loads.
        block_k: elements of K per step.
        stages: steps whose operands are in shared memory or being loaded.
    """

    block_m: int = tried(256, 8, 64, 128)
    warpgroups: int = tried(2, 1)
    block_k: int = tried(128, 256)
    stages: int = tried(4, 3, 6)

    @property
    def block_n(self) -> int:
        """Rows of w."""
        return ROWS * self.warpgroups

    @classmethod
    def for_shape(cls, T: int, N: int, K: int, gated: bool) -> Tile:
        """The tile for x [T, K] and w [N, K] where none was tuned."""
        block_m = min(128 if gated else 256, max(8, 1 << (T - 1).bit_length()))
        warpgroups = 2 if block_m > 64 and N % 128 == 0 else 1
        block_k = 256 if block_m <= 64 and K % 256 == 0 else 128
        two_per_sm = warpgroups == 1 and N // 64 * -(-T // block_m) > CORES
        stage = block_k * (64 * warpgroups * (1 + gated) + block_m)
        kept = warpgroups * 64 * (4 * min(block_m, _STORE_M) + 16) + 4 * block_m
        stages = (PLANNED_BYTES // (1 + two_per_sm) - kept) // stage
        return cls(block_m, warpgroups, block_k, max(2, min(8, stages)))

    def shared(self, K: int, out_bytes: int, gated: bool, per_row: int) -> tuple[int, ...]:
        """Bytes of the arrays in shared memory; `per_row` floats are kept for each row of w."""
        stage = self.block_k * (self.block_n * (1 + gated) + self.block_m)
        out = ROWS * min(self.block_m, _STORE_M) * out_bytes
        scales = max(4 * self.block_m, LINE_BYTES)
        per_warpgroup = out, scales, 4 * ROWS * per_row
        stages = min(self.stages, K // self.block_k)
        return stage * stages, *(self.warpgroups * size for size in per_warpgroup)


class _Refs(NamedTuple):
    """What the kernel is given: arrays in global memory, then those in shared memory."""

    layer: Any  # [1]
    x: Any  # [T, K]
    x_scale: Any  # [T]
    weights: Sequence[Any]  # [L, N, K]: w, and `up` if there is a gate
    per_row: Sequence[Any]  # [L, N]: a scale for each weight, and the bias if there is one
    out: Any  # [T, N]
    out_smem: Any  # [warpgroups, rows stored at a time, 64]
    x_scale_smem: Any  # [warpgroups, block_m, or more for alignment]
    per_row_smem: Any  # [warpgroups, len(per_row), 64]
    arrived: Any  # a barrier per warpgroup, for its scales and bias

    @classmethod
    def of(cls, refs: Sequence[Any], gated: bool, biased: bool) -> _Refs:
        (layer, x, x_scale), refs = refs[:3], refs[3:]
        count = 1 + gated
        weights, per_row = refs[:count], refs[count : 2 * count + biased]
        return cls(layer, x, x_scale, weights, per_row, *refs[2 * count + biased :])


class _Share(NamedTuple):
    """What one warpgroup computes: products of these rows of x and of a layer's w."""

    wg: Any
    layer: Array
    x_rows: Any
    w_rows: Any


def _kernel(*args, tile: Tile, gated: bool, biased: bool, activation: str | None):
    refs = _Refs.of(args, gated, biased)
    layer = refs.layer[0]
    wg = lax.axis_index("wg") if tile.warpgroups > 1 else 0
    x_rows = pl.ds(lax.axis_index("t") * tile.block_m, tile.block_m)
    first = lax.axis_index("n") * tile.block_n
    share = _Share(wg, layer, x_rows, pl.ds(first + wg * ROWS, ROWS))

    def compute(multiply_all):
        _load_scales(refs, share)

        def scope(*sums):
            multiply_all(sums)
            _store(refs, share, _scaled(refs, share, sums, activation))

        sums = [plgpu.WGMMAAccumulatorRef((ROWS, tile.block_m), jnp.int32) for _ in refs.weights]
        pl.run_scoped(scope, *sums)

    x_spec = plgpu.BlockSpec((tile.block_m, tile.block_k), lambda k: (0, k), delay_release=1)
    w_spec = plgpu.BlockSpec((tile.block_n, tile.block_k), lambda k: (0, k), delay_release=1)
    pipelined(
        partial(_multiply, wg),
        compute,
        [refs.x.at[x_rows], *[w.at[layer].at[pl.ds(first, tile.block_n)] for w in refs.weights]],
        warpgroups=tile.warpgroups,
        grid=(refs.x.shape[1] // tile.block_k,),
        in_specs=[x_spec, *[w_spec for _ in refs.weights]],
        max_concurrent_steps=tile.stages,
    )


def _load_scales(refs: _Refs, share: _Share) -> None:
    """Starts to load the scales of both sides, and the bias, into a warpgroup's own memory."""
    wg, arrived = share.wg, refs.arrived.at[share.wg]
    x_scale_smem = refs.x_scale_smem.at[wg, pl.ds(0, share.x_rows.size)]
    plgpu.copy_gmem_to_smem(refs.x_scale.at[share.x_rows], x_scale_smem, arrived)
    for i, ref in enumerate(refs.per_row):
        source = ref.at[share.layer, share.w_rows]
        plgpu.copy_gmem_to_smem(source, refs.per_row_smem.at[wg, i], arrived)


def _multiply(wg: Any, _: Any, x_smem: Any, *weights_and_sums: Any) -> Any:
    """Adds one step's products of a warpgroup's rows of w to the sums [64, block_m]."""
    *weights, sums = weights_and_sums
    for w_smem, total in zip(weights, sums, strict=True):
        plgpu.wgmma(total, w_smem.at[pl.ds(wg * ROWS, ROWS)], x_smem.T)
    plgpu.wgmma_wait(len(sums))  # all but this step's: the tiles of the step before are free
    return sums


def _scaled(refs: _Refs, share: _Share, sums: Sequence[Any], activation: str | None) -> Array:
    """The result [64, block_m] of the sums: scaled, gated, the bias added."""
    wg, shape = share.wg, (ROWS, share.x_rows.size)
    plgpu.barrier_wait(refs.arrived.at[wg])
    x_scale_smem = refs.x_scale_smem.at[wg, pl.ds(0, share.x_rows.size)]
    x_scale = lax.broadcast_in_dim(x_scale_smem[...], shape, (1,))
    y = [
        total[...].astype(jnp.float32)
        * x_scale
        * lax.broadcast_in_dim(refs.per_row_smem[wg, i], shape, (0,))
        for i, total in enumerate(sums)
    ]
    out = GATES[activation](*y) if activation else y[0]
    if len(refs.per_row) > len(sums):
        out += lax.broadcast_in_dim(refs.per_row_smem[wg, len(sums)], shape, (0,))
    return out.astype(refs.out.dtype)


def _store(refs: _Refs, share: _Share, y: Array) -> None:
    """Transposes the result [64, block_m], as much at a time as there is memory for, and stores
    it."""
    out_smem = refs.out_smem.at[share.wg]
    size = refs.out_smem.shape[1]
    for begin in range(0, y.shape[1], size):
        part = y[:, begin : begin + size]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_smem.T[...] = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        x_rows = pl.ds(share.x_rows.start + begin, size)
        plgpu.copy_smem_to_gmem(out_smem, refs.out.at[x_rows, share.w_rows])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def gpu(
    x: Array, x_scale: Array, w: Array, w_scale: Array, *,
    layer: Array | int | None = None, bias: Array | None = None,
    up: Array | None = None, up_scale: Array | None = None, activation: str | None = None,
    out_dtype: Any = jnp.bfloat16, tile: Tile | None = None, interpret: Any = False,
) -> Array:  # fmt: skip
    """`reference.int8_matmul` as a Hopper kernel.

    Raises:
        UnsupportedError: x has no rows, K is no multiple of 128 or N of 64, the tile does not
            divide them, or it needs more shared memory than there is.
    """
    gated = check(x, x_scale, w, w_scale, layer, bias, up, up_scale, activation)
    (T, K), N = x.shape, w.shape[-2]
    refuse_no_rows(T)
    if K % LINE_BYTES or N % ROWS:
        raise UnsupportedError(f"{K=} must be a multiple of {LINE_BYTES}, and {N=} of {ROWS}")
    tile = tile or Tile.for_shape(T, N, K, gated)
    if K % tile.block_k or N % tile.block_n:
        raise UnsupportedError(
            f"{tile}: {K=} is no multiple of {tile.block_k}, or {N=} of {tile.block_n}"
        )
    padding = -T % tile.block_m
    x, x_scale = jnp.pad(x, ((0, padding), (0, 0))), jnp.pad(x_scale, (0, padding))
    weights: list[Any] = [w, up][: 1 + gated]
    scales: list[Any] = [w_scale, up_scale][: 1 + gated]
    per_row = [*scales, *([] if bias is None else [bias.astype(jnp.float32)])]
    fit(tile.shared(K, jnp.dtype(out_dtype).itemsize, gated, len(per_row)), f"{tile}")
    if layer is None:
        layer, weights, per_row = 0, [w[None] for w in weights], [s[None] for s in per_row]
    threads = {"num_threads": tile.warpgroups + 1, "thread_name": "wg"}
    y = plgpu.kernel(
        partial(_kernel, tile=tile, gated=gated, biased=bias is not None, activation=activation),
        out_type=jax.ShapeDtypeStruct((T + padding, N), out_dtype),
        grid=(N // tile.block_n, (T + padding) // tile.block_m),
        grid_names=("n", "t"),
        **(threads if tile.warpgroups > 1 else {}),
        scratch_types=[
            plgpu.SMEM((tile.warpgroups, min(tile.block_m, _STORE_M), ROWS), out_dtype),
            plgpu.SMEM((tile.warpgroups, max(tile.block_m, LINE_BYTES // 4)), jnp.float32),
            plgpu.SMEM((tile.warpgroups, len(per_row), ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=1 + len(per_row), num_barriers=tile.warpgroups),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
        kernel_name="int8_matmul",
    )(jnp.asarray(layer, jnp.int32).reshape(1), x, x_scale, *weights, *per_row)
    return y[:T]
