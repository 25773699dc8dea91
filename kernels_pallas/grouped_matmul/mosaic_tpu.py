"""The grouped product on TPU: a grid over pairs of a block of rows and an expert (`Visits`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.grouped_matmul.reference import check
from kernels_pallas.grouped_matmul.visits import visits
from kernels_pallas.op import UnsupportedError, refuse_no_rows, tried
from kernels_pallas.target import matrix_unit
from kernels_pallas.tpu import LANES, SUBLANES, VMEM_BYTES, divisor, in_parts

_SCALE_ROWS = SUBLANES  # experts whose scales are read together
_ROW_BYTES = 4096  # of a row of w per step, where nothing else is asked for
_STRETCH = 512  # columns of a stretch of `in_parts`, which ends with some 200 idle cycles
_FINISHED = (64, 256)  # rows and columns that are scaled at a time: registers hold their floats


@dataclass(frozen=True)
class Tile:
    """What one step of the grid multiplies. A size of 0 is chosen by `for_shape`.

    Attributes:
        block_m: rows of x.
        block_n: rows of w.
        block_k: elements of K.
        unit: `matrix_unit` of the device: columns that are multiplied at a time.
        int8_part: rows of x that are multiplied at a time if they are int8; 256 if they are not.
    """

    block_m: int = tried(0, 32, 64, 128, 256)
    block_n: int = tried(512, 256, 1024)
    block_k: int = tried(0, 1024, 2048)
    unit: int = 256
    int8_part: int = tried(256, 128)

    @classmethod
    def wanted(cls, device: str) -> Tile:
        """The tile for a device where none was tuned.

        Parts of 256 int8 rows spill three times as much on a v6e, in 38 % fewer cycles.
        """
        return cls(unit=matrix_unit(device), int8_part=128 if device == "v6e" else 256)

    def for_shape(self, M: int, E: int, itemsize: int) -> Tile:
        """The tile for M rows of x in E groups, without zeros.

        A step multiplies whole blocks, so a block has about as many rows as a group on average.

        Args:
            itemsize: bytes of an element of x and w.
        """
        mean = min(256, max(32, 1 << (M // E - 1).bit_length() if M > E else 32))
        block_m, block_k = min(M, self.block_m or mean), self.block_k or _ROW_BYTES // itemsize
        return replace(self, block_m=block_m, block_k=block_k)


def _kernel(block_ref, group_ref, row_ref, starts_ref, x_ref, w_ref, *refs, part: tuple[int, int]):
    """One step of the grid (n, v, k).

    Args:
        refs: scales of x and of w if they are int8, the output and the sums.
        part: rows and columns that are multiplied at a time.
    """
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
            x_scale = jnp.where(real, x_scale_ref[rows], 0.0)  # those of padding may be NaN, and
            w_scale = jnp.where(real, w_scale, 0.0)  # so may those of an expert that it did not ask
            y = y.astype(jnp.float32) * x_scale * w_scale
        at = block_ref[v] * out_ref.shape[0] + rows.start
        at += lax.broadcasted_iota(jnp.int32, y.shape, 0)
        mine = (at >= starts_ref[group]) & (at < starts_ref[group + 1])
        # Other rows keep what another step wrote, or get it later: every row is in some group.
        y = jnp.where(mine, y, out_ref[rows, columns].astype(jnp.float32))
        out_ref[rows, columns] = y.astype(out_ref.dtype)

    stretch = part[0], _STRETCH
    pl.when(real)(lambda: in_parts(out_ref.shape, part, multiply, stretch))
    pl.when(k == pl.num_programs(2) - 1)(lambda: in_parts(out_ref.shape, _FINISHED, finish))


def tpu(
    x: Array, w: Array, group_sizes: Array, *,
    layer: Array | int | None = None, x_scale: Array | None = None, w_scale: Array | None = None,
    out_dtype: Any = jnp.bfloat16, tile: Tile | None = None, interpret: Any = False,
) -> Array:  # fmt: skip
    """`reference.grouped_matmul` as a TPU kernel. Weights of experts without rows are not read.

    Raises:
        UnsupportedError: x has no rows or is neither bfloat16 nor int8, or K or N is no multiple
            of 128.
    """
    check(x, w, group_sizes, layer, x_scale, w_scale)
    (M, K), (E, N) = x.shape, w.shape[-3:-1]
    refuse_no_rows(M)
    if K % LANES or N % LANES:
        raise UnsupportedError(f"{K=} and {N=} must be whole lanes of {LANES}")
    if x.dtype not in (jnp.bfloat16, jnp.int8):
        raise UnsupportedError(f"rows are {x.dtype}: expected bfloat16 or int8")
    tile = (tile or Tile()).for_shape(M, E, x.dtype.itemsize)
    block_m, block_n = tile.block_m, min(tile.block_n, N)
    block_k = divisor(K, tile.block_k, LANES)
    plan = visits(group_sizes, M, block_m)
    row = plan.weight + (0 if layer is None else layer * E)  # among the experts of all layers

    last = K // block_k - 1

    def weight_index(n, v, k, block, group, row, starts):
        return row[v], n, jnp.where(group[v] < E, k, last)  # nothing new is read for padding

    in_specs = [
        pl.BlockSpec((block_m, block_k), lambda n, v, k, block, *_: (block[v], k)),
        pl.BlockSpec((None, block_n, block_k), weight_index),
    ]
    operands = [x, w.reshape(-1, N, K)]
    if x_scale is not None and w_scale is not None:
        in_specs += [
            pl.BlockSpec((block_m, 1), lambda n, v, k, block, *_: (block[v], 0)),
            pl.BlockSpec(
                (min(_SCALE_ROWS, w.size // (N * K)), block_n),
                lambda n, v, k, block, group, row, starts: (lax.div(row[v], _SCALE_ROWS), n),
            ),
        ]
        operands += [x_scale[:, None], w_scale.reshape(-1, N)]
    return pl.pallas_call(
        partial(_kernel, part=(tile.int8_part if x.dtype == jnp.int8 else 256, tile.unit)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(N, block_n), plan.used, K // block_k),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((block_m, block_n), lambda n, v, k, block, *_: (block[v], n)),
            scratch_shapes=[
                pltpu.VMEM((block_m, block_n), jnp.int32 if x.dtype == jnp.int8 else jnp.float32)
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((M, N), out_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name="grouped_matmul",
    )(plan.block, plan.group, row, plan.starts, *operands)
