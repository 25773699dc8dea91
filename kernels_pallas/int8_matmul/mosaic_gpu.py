"""The W8A8 product on Hopper: int8 wgmma on tiles that TMA brings, scales and gate in registers.

Weights are the side of 64 rows that wgmma fixes, tokens the side that may be as narrow as 8, so one
kernel serves a decoding step and a prompt. Results lie transposed in registers and are turned
while they are stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.int8_matmul.reference import check
from kernels_pallas.linear import GATES
from kernels_pallas.op import UnsupportedError, tried
from kernels_pallas.tiling import ALIGNED_FLOATS, fit

_LINE = 128  # bytes of K that a swizzled row of shared memory holds
_SHARED = 224 * 1024  # bytes of shared memory of a core that default tiles take
_CORES = 132
_STORED = 64  # tokens that are turned and stored at a time


@dataclass(frozen=True)
class Tile:
    """A block's share: tokens, groups of 64 weight rows, and how K is walked.

    Attributes:
        tokens: of x: 8, 16, 32, or a multiple of 64 up to 256.
        warpgroups: that multiply, 64 rows of w each. Where there are several, one more loads.
        depth: of K in a step.
        stages: steps whose operands are in shared memory or on their way.
    """

    tokens: int = tried(256, 8, 64, 128)
    warpgroups: int = tried(2, 1)
    depth: int = tried(128, 256)
    stages: int = tried(4, 3, 6)

    @classmethod
    def default(cls, T: int, N: int, K: int, gated: bool) -> Tile:
        tokens = min(128 if gated else 256, max(8, 1 << (T - 1).bit_length()))
        warpgroups = 2 if tokens > 64 and N % 128 == 0 else 1
        depth = 256 if tokens <= 64 and K % 256 == 0 else 128
        crowded = warpgroups == 1 and N // 64 * -(-T // tokens) > _CORES  # then two share a core
        stage = depth * (64 * warpgroups * (1 + gated) + tokens)
        kept = warpgroups * 64 * (4 * min(tokens, _STORED) + 16) + 4 * tokens
        stages = (_SHARED // (1 + crowded) - kept) // stage
        return cls(tokens, warpgroups, depth, max(2, min(8, stages)))

    def shared(self, K: int, out_bytes: int, gated: bool, per_row: int) -> tuple[int, ...]:
        """Bytes of arrays in shared memory, with so many numbers for each row of w."""
        stage = self.depth * (64 * self.warpgroups * (1 + gated) + self.tokens)
        turned, scales = min(self.tokens, _STORED) * out_bytes, 4 * max(self.tokens, ALIGNED_FLOATS)
        of_each = 64 * turned, scales, 4 * 64 * per_row
        return stage * min(self.stages, K // self.depth), *(self.warpgroups * n for n in of_each)


def _kernel(
    layer_ref, x_ref, x_scale_ref, *refs, tile: Tile, gated: bool, biased: bool, activation
):
    count = 1 + gated
    weights, scales, rest = refs[:count], refs[count : 2 * count], refs[2 * count :]
    bias_ref, out_ref, out_smem, x_scale_smem, row_smem, arrived = rest if biased else (None, *rest)
    per_row = [*scales, *([bias_ref] if biased else [])]
    layer = layer_ref[0]
    wg = lax.axis_index("wg") if tile.warpgroups > 1 else 0
    tokens = pl.ds(lax.axis_index("t") * tile.tokens, tile.tokens)
    x_scale_mine = x_scale_smem.at[wg, pl.ds(0, tile.tokens)]
    first = lax.axis_index("n") * (64 * tile.warpgroups)
    rows, chunk = pl.ds(first + wg * 64, 64), out_smem.shape[1]

    def step(_, x_smem, *w_smems, sums):
        for w_smem, total in zip(w_smems, sums, strict=True):
            plgpu.wgmma(total, w_smem.at[pl.ds(wg * 64, 64)], x_smem.T)
        plgpu.wgmma_wait(len(sums))  # of this step: the tiles of the last one may be overwritten
        return sums

    def compute(pipeline):
        plgpu.copy_gmem_to_smem(x_scale_ref.at[tokens], x_scale_mine, arrived.at[wg])
        for i, ref in enumerate(per_row):
            plgpu.copy_gmem_to_smem(ref.at[layer, rows], row_smem.at[wg, i], arrived.at[wg])

        def scope(*sums):
            pipeline(sums)
            plgpu.barrier_wait(arrived.at[wg])
            shape = (64, tile.tokens)
            x_scale = lax.broadcast_in_dim(x_scale_mine[...], shape, (1,))
            y = [
                total[...].astype(jnp.float32)
                * x_scale
                * lax.broadcast_in_dim(row_smem[wg, i], shape, (0,))
                for i, total in enumerate(sums)
            ]
            out = GATES[activation](*y) if activation else y[0]
            if biased:
                out += lax.broadcast_in_dim(row_smem[wg, count], shape, (0,))
            out = out.astype(out_ref.dtype)
            for begin in range(0, tile.tokens, chunk):
                part = out[:, begin : begin + chunk]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_smem.at[wg].T[...] = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED)
                plgpu.commit_smem()
                at = pl.ds(tokens.start + begin, chunk)
                plgpu.copy_smem_to_gmem(out_smem.at[wg], out_ref.at[at, rows])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        pl.run_scoped(
            scope, *[plgpu.WGMMAAccumulatorRef((64, tile.tokens), jnp.int32) for _ in weights]
        )

    height = 64 * tile.warpgroups
    weight = plgpu.BlockSpec((height, tile.depth), lambda k: (0, k), delay_release=1)
    x_spec = plgpu.BlockSpec((tile.tokens, tile.depth), lambda k: (0, k), delay_release=1)
    pipeline = {
        "grid": (x_ref.shape[1] // tile.depth,),
        "in_specs": [x_spec, *[weight for _ in weights]],
        "max_concurrent_steps": tile.stages,
    }
    operands = (
        x_ref.at[tokens],
        *[w.at[layer].at[pl.ds(first, height)] for w in weights],
    )
    if tile.warpgroups == 1:  # several such blocks share a core, and hide each other's waiting
        compute(lambda sums: plgpu.emit_pipeline(partial(step, sums=sums), **pipeline)(*operands))
    else:
        plgpu.emit_pipeline_warp_specialized(
            lambda i, *args: step(i, *args[:-1], sums=args[-1]),
            wg_axis="wg", num_compute_wgs=tile.warpgroups, memory_registers=40,
            compute_context=compute, **pipeline,
        )(*operands)  # fmt: skip


def gpu(
    x: Array, x_scale: Array, w: Array, w_scale: Array, *,
    layer: Array | int | None = None, bias: Array | None = None,
    up: Array | None = None, up_scale: Array | None = None, activation: str | None = None,
    out_dtype: Any = jnp.bfloat16, tile: Tile | None = None, interpret: Any = False,
) -> Array:  # fmt: skip
    """`reference.int8_matmul` as a Hopper kernel."""
    gated = check(x, x_scale, w, w_scale, layer, bias, up, up_scale, activation)
    (T, K), N = x.shape, w.shape[-2]
    if K % _LINE or N % 64:
        raise UnsupportedError(f"{K=} must be a multiple of {_LINE}, and {N=} of 64")
    tile = tile or Tile.default(T, N, K, gated)
    rows = 64 * tile.warpgroups
    if K % tile.depth or N % rows:
        raise UnsupportedError(f"{tile}: {K=} is no multiple of {tile.depth}, or {N=} of {rows}")
    padding = -T % tile.tokens
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
        grid=(N // rows, (T + padding) // tile.tokens),
        grid_names=("n", "t"),
        **(threads if tile.warpgroups > 1 else {}),
        scratch_types=[
            plgpu.SMEM((tile.warpgroups, min(tile.tokens, _STORED), 64), out_dtype),
            plgpu.SMEM((tile.warpgroups, max(tile.tokens, ALIGNED_FLOATS)), jnp.float32),
            plgpu.SMEM((tile.warpgroups, len(per_row), 64), jnp.float32),
            plgpu.Barrier(num_arrivals=1 + len(per_row), num_barriers=tile.warpgroups),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
        kernel_name="int8_matmul",
    )(jnp.asarray(layer, jnp.int32).reshape(1), x, x_scale, *weights, *per_row)
    return y[:T]
