"""The grouped product on TPU: a grid over visits of a block of rows by an expert."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.grouped_matmul.reference import check
from kernels_pallas.grouped_matmul.visits import visits
from kernels_pallas.op import UnsupportedError, tried
from kernels_pallas.target import matrix_unit
from kernels_pallas.tiling import divisor, in_parts

_SCALE_ROWS = 8  # experts whose scales are read together: rows of a tile in VMEM
_VMEM = 40 * 2**20  # of 64 MiB on the smallest part
_ACROSS = 512  # columns that are written out: each such stretch ends with some 200 idle cycles
_FINISHED = (64, 256)  # of it, which registers hold as floats


@dataclass(frozen=True)
class Tile:
    """rows of x (0 for about as many as a group has, since a visit multiplies whole blocks), cols
    (rows of w) and bytes (of a row of w) in a step of the grid; unit: `matrix_unit` of the device,
    the columns that are multiplied at a time; tall: the rows, where they have eight bits.
    """

    rows: int = tried(0, 32, 64, 128, 256)
    cols: int = tried(512, 256, 1024)
    bytes: int = tried(4096, 2048)
    unit: int = 256
    tall: int = tried(256, 128)

    @classmethod
    def wanted(cls, device: str) -> Tile:
        """256 rows of eight bits spill three times as much on a v6e, in 38 % fewer cycles."""
        return cls(unit=matrix_unit(device), tall=128 if device == "v6e" else 256)

    def rows_of(self, M: int, E: int) -> int:
        """In a block, of M rows in E groups."""
        mean = min(256, max(32, 1 << (M // E - 1).bit_length() if M > E else 32))
        return min(M, self.rows or mean)


def _kernel(block_ref, group_ref, row_ref, starts_ref, x_ref, w_ref, *refs, part: tuple[int, int]):
    *scale_refs, out_ref, sum_ref = refs
    v, k = pl.program_id(1), pl.program_id(2)
    group = group_ref[v]

    @pl.when(k == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    real = group < starts_ref.shape[0] - 2  # padding has no weights

    def multiply(rows: Any, columns: Any) -> None:
        sum_ref[rows, columns] += lax.dot_general(
            x_ref[rows], w_ref[columns], (((1,), (1,)), ((), ())),
            preferred_element_type=sum_ref.dtype,
        )  # fmt: skip

    def finish(rows: Any, columns: Any) -> None:
        y = sum_ref[rows, columns]
        if scale_refs:
            x_scale_ref, w_scale_ref = scale_refs
            w_scale = w_scale_ref[pl.ds(lax.rem(row_ref[v], _SCALE_ROWS), 1), columns]
            x_scale = jnp.where(real, x_scale_ref[rows], 0.0)  # of padding it may be NaN
            y = y.astype(jnp.float32) * x_scale * w_scale
        at = block_ref[v] * out_ref.shape[0] + rows.start
        at += lax.broadcasted_iota(jnp.int32, y.shape, 0)
        mine = (at >= starts_ref[group]) & (at < starts_ref[group + 1])
        # What is kept is another visit's, or nothing yet: every row is some group's.
        y = jnp.where(mine, y, out_ref[rows, columns].astype(jnp.float32))
        out_ref[rows, columns] = y.astype(out_ref.dtype)

    stretch = part[0], _ACROSS
    pl.when(real)(lambda: in_parts(out_ref.shape, part, multiply, stretch))
    pl.when(k == pl.num_programs(2) - 1)(lambda: in_parts(out_ref.shape, _FINISHED, finish))


def tpu(
    x: Array, w: Array, group_sizes: Array, *,
    layer: Array | int | None = None, x_scale: Array | None = None, w_scale: Array | None = None,
    out_dtype: Any = jnp.bfloat16, tile: Tile | None = None, interpret: Any = False,
) -> Array:  # fmt: skip
    """`reference.grouped_matmul` as a TPU kernel. Weights of experts without rows are not read."""
    check(x, w, group_sizes, layer, x_scale, w_scale)
    (M, K), (E, N) = x.shape, w.shape[-3:-1]
    if K % 128 or N % 128:
        raise UnsupportedError(f"{K=} and {N=} must be whole lanes of 128")
    if x.dtype not in (jnp.bfloat16, jnp.int8):
        raise UnsupportedError(f"rows are {x.dtype}: expected bfloat16 or int8")
    tile = tile or Tile()
    rows, cols = tile.rows_of(M, E), min(tile.cols, N)
    depth = divisor(K, tile.bytes // x.dtype.itemsize, 128)
    plan = visits(group_sizes, M, rows)
    row = plan.weight + (0 if layer is None else layer * E)  # of all layers' experts

    last = K // depth - 1

    def weight_index(n, v, k, block, group, row, starts):
        return row[v], n, jnp.where(group[v] < E, k, last)  # padding reads nothing new

    in_specs = [
        pl.BlockSpec((rows, depth), lambda n, v, k, block, *_: (block[v], k)),
        pl.BlockSpec((None, cols, depth), weight_index),
    ]
    operands = [x, w.reshape(-1, N, K)]
    if x_scale is not None and w_scale is not None:
        in_specs += [
            pl.BlockSpec((rows, 1), lambda n, v, k, block, *_: (block[v], 0)),
            pl.BlockSpec(
                (min(_SCALE_ROWS, w.size // (N * K)), cols),
                lambda n, v, k, block, group, row, starts: (lax.div(row[v], _SCALE_ROWS), n),
            ),
        ]
        operands += [x_scale[:, None], w_scale.reshape(-1, N)]
    return pl.pallas_call(
        partial(_kernel, part=(tile.tall if x.dtype == jnp.int8 else 256, tile.unit)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(N, cols), plan.used, K // depth),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((rows, cols), lambda n, v, k, block, *_: (block[v], n)),
            scratch_shapes=[
                pltpu.VMEM((rows, cols), jnp.int32 if x.dtype == jnp.int8 else jnp.float32)
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((M, N), out_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        interpret=interpret,
        name="grouped_matmul",
    )(plan.block, plan.group, row, plan.starts, *operands)
