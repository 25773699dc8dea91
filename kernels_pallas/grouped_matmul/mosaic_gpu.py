"""The grouped product on Hopper: a block of the grid takes up to `tokens` rows of one expert.

Weights are the side of 64 rows that wgmma fixes, tokens the side that may be as narrow as 8, since
an expert has few rows when decoding. A tile is read from a multiple of 8 rows on, as its layout in
shared memory demands, and may hold neighbours' rows. It is turned, laid out plainly, and stored in
pieces of powers of two, since a TMA store has a fixed shape.
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

from kernels_pallas.grouped_matmul.reference import check
from kernels_pallas.grouped_matmul.visits import blocks
from kernels_pallas.op import UnsupportedError, tried
from kernels_pallas.tiling import ALIGNED_FLOATS, fit

_LINE = 128  # bytes of K that a swizzled row of shared memory holds
_TURNED = 64  # tokens that are turned and stored at a time
_SHARED = 224 * 1024  # bytes of shared memory of a core that default tiles take


@dataclass(frozen=True)
class Tile:
    """A block's share: tokens of one expert, groups of weight rows, and how K is walked.

    Attributes:
        tokens: of x: a power of two, 8 to 256.
        warpgroups: that multiply. Where there are several, one more loads.
        rows: of w for each of them: 64 or 128.
        bytes: of a row of w in a step.
        stages: steps whose operands are in shared memory or on their way.
    """

    tokens: int = tried(128, 16, 32, 64)
    warpgroups: int = tried(2, 1)
    rows: int = tried(128, 64)
    bytes: int = tried(128, 256)
    stages: int = tried(4, 3)

    @classmethod
    def default(cls, M: int, E: int, N: int, row_bytes: int, out_bytes: int) -> Tile:
        tokens = min(128, max(16, 1 << (2 * M // E - 1).bit_length() if 2 * M > E else 16))
        many = tokens > 64 and N % 256 == 0
        warpgroups, rows = (2, 128 // (out_bytes // 2)) if many else (1, 64)
        depth = 256 if not many and row_bytes % 256 == 0 else 128
        kept = warpgroups * (rows * (2 * _TURNED * out_bytes + 8) + 4 * tokens)
        stages = (_SHARED // (1 if many else 2) - kept) // (depth * (warpgroups * rows + tokens))
        return cls(tokens, warpgroups, rows, depth, max(2, min(8, stages)))

    def shared(self, out_bytes: int) -> tuple[int, ...]:
        """Bytes of arrays in shared memory."""
        stage = self.bytes * (self.rows * self.warpgroups + self.tokens)
        turned, scales = _TURNED * self.rows * out_bytes, 4 * max(self.tokens, ALIGNED_FLOATS)
        of_each = turned, turned, scales, 4 * self.rows
        return stage * self.stages, *(self.warpgroups * n for n in of_each)


def _kernel(group_ref, start_ref, size_ref, layer_ref, x_ref, w_ref, *refs, tile: Tile, E: int):
    """refs: scales of rows and of weights if they are int8; the output; shared memory."""
    *scale_refs, out_ref, turned, out_smem, x_scale_smem, w_scale_smem, arrived = refs
    v, shape = lax.axis_index("v"), (tile.rows, tile.tokens)
    group, start, size = group_ref[v], start_ref[v], size_ref[v]
    expert = layer_ref[0] * E + jnp.minimum(group, E - 1)
    # A multiple of 8 that the compiler can see; and no tile leaves the array.
    begin = jnp.minimum(lax.div(start, 8), (x_ref.shape[0] - tile.tokens) // 8) * 8
    tokens = pl.ds(begin, tile.tokens)
    wg = lax.axis_index("wg") if tile.warpgroups > 1 else 0
    first = lax.axis_index("n") * (tile.rows * tile.warpgroups)
    rows = pl.ds(first + wg * tile.rows, tile.rows)
    x_scale_mine = x_scale_smem.at[wg, pl.ds(0, tile.tokens)]

    def step(_, x_smem, w_smem, total):
        plgpu.wgmma(total, w_smem.at[pl.ds(wg * tile.rows, tile.rows)], x_smem.T)
        plgpu.wgmma_wait(1)  # this one: the tiles of the last may be overwritten
        return total

    def compute(pipeline):
        if scale_refs:
            plgpu.copy_gmem_to_smem(scale_refs[0].at[tokens], x_scale_mine, arrived.at[wg])
            w_scale = scale_refs[1].at[expert, rows]
            plgpu.copy_gmem_to_smem(w_scale, w_scale_smem.at[wg], arrived.at[wg])

        def scope(total):
            pipeline(total)
            y = total[...]
            if scale_refs:
                plgpu.barrier_wait(arrived.at[wg])
                y = y.astype(jnp.float32)
                for smem, axis in ((x_scale_mine, 1), (w_scale_smem.at[wg], 0)):
                    # of padding either may be NaN: nobody's row, and an expert that may be absent
                    real = lax.broadcast(group < E, (shape[axis],))
                    scale = jnp.where(real, smem[...], 0.0)
                    y *= lax.broadcast_in_dim(scale, shape, (axis,))
            y = y.astype(out_ref.dtype)
            for done in range(0, tile.tokens, _TURNED):
                part = y[:, done : done + _TURNED]
                part = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED)
                turned.at[wg].at[pl.ds(0, part.shape[1])].T[...] = part
                out_smem[wg] = plgpu.layout_cast(turned[wg], plgpu.Layout.WGMMA)
                plgpu.commit_smem()
                _store(out_smem.at[wg], out_ref.at[:, rows], start, size, start - begin, done)

        pl.run_scoped(
            scope, plgpu.WGMMAAccumulatorRef(shape, jnp.int32 if scale_refs else jnp.float32)
        )

    depth = tile.bytes // x_ref.dtype.itemsize
    steps = jnp.where(group < E, x_ref.shape[1] // depth, 0)  # nothing is added up for padding
    pipeline = {
        "grid": (steps,),
        "in_specs": [
            plgpu.BlockSpec((height, depth), lambda k: (0, k), delay_release=1)
            for height in (tile.tokens, tile.rows * tile.warpgroups)
        ],
        "max_concurrent_steps": tile.stages,
    }
    operands = x_ref.at[tokens], w_ref.at[expert].at[pl.ds(first, tile.rows * tile.warpgroups)]

    @pl.when(size > 0)
    def _():
        if tile.warpgroups == 1:  # several such blocks share a core, and hide each other's waiting
            compute(
                lambda total: plgpu.emit_pipeline(partial(step, total=total), **pipeline)(*operands)
            )
        else:
            plgpu.emit_pipeline_warp_specialized(
                step, wg_axis="wg", num_compute_wgs=tile.warpgroups, memory_registers=40,
                compute_context=compute, **pipeline,
            )(*operands)  # fmt: skip


def _store(smem, out_ref, start, size, offset, done):
    """Stores those of the tile's rows [done, done + 64), which smem holds, that are asked for.

    Args:
        start, size: rows of out_ref that the tile is to fill, beginning with its row `offset`.
    """
    first = jnp.clip(offset - done, 0, _TURNED)
    to = start + done + first - offset
    left = jnp.clip(offset + size - done - first, 0, _TURNED - first)
    part = _TURNED
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
    """`reference.grouped_matmul` as a Hopper kernel. Weights of absent experts are not read."""
    check(x, w, group_sizes, layer, x_scale, w_scale)
    (M, K), (E, N) = x.shape, w.shape[-3:-1]
    if x.dtype not in (jnp.bfloat16, jnp.int8):
        raise UnsupportedError(f"rows are {x.dtype}: expected bfloat16 or int8")
    row_bytes, out_bytes = K * x.dtype.itemsize, jnp.dtype(out_dtype).itemsize
    tile = tile or Tile.default(M, E, N, row_bytes, out_bytes)
    cols = tile.rows * tile.warpgroups
    if row_bytes % tile.bytes or N % cols:
        depth = tile.bytes // x.dtype.itemsize
        raise UnsupportedError(f"{K=} must be a multiple of {depth}, and {N=} of {cols}")
    fit(tile.shared(out_bytes), f"{tile}")
    padding = max(-M % 8, tile.tokens - M)
    scales, total = [], M + padding
    if x_scale is not None and w_scale is not None:
        scales = [jnp.pad(x_scale, (0, padding)), w_scale.reshape(-1, N)]
    threads = {"num_threads": tile.warpgroups + 1, "thread_name": "wg"}
    plan = blocks(group_sizes, total, tile.tokens, align=8)
    y = plgpu.kernel(
        partial(_kernel, tile=tile, E=E),
        out_type=jax.ShapeDtypeStruct((total, N), out_dtype),
        grid=(plan.group.shape[0], N // cols),
        grid_names=("v", "n"),
        **(threads if tile.warpgroups > 1 else {}),
        scratch_types=[
            *[plgpu.SMEM((tile.warpgroups, _TURNED, tile.rows), out_dtype) for _ in range(2)],
            plgpu.SMEM((tile.warpgroups, max(tile.tokens, ALIGNED_FLOATS)), jnp.float32),
            plgpu.SMEM((tile.warpgroups, tile.rows), jnp.float32),
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
