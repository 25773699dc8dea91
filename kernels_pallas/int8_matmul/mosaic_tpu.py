"""The W8A8 product on TPU: blocks of K are summed up in VMEM, the scales are applied at the end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.int8_matmul.reference import check
from kernels_pallas.linear import GATES
from kernels_pallas.op import UnsupportedError, tried
from kernels_pallas.target import matrix_unit
from kernels_pallas.tiling import divisor, in_parts

_SCALE_ROWS = 8  # layers whose scales are read together: rows of a tile in VMEM
_FEW = 128  # rows, which one step takes
_VMEM = 40 * 2**20  # of 64 MiB on the smallest part
_FINISHED = (64, 256)  # of it, which registers hold as floats


@dataclass(frozen=True)
class Tile:
    """rows of x, cols (rows of w) and depth (of K) in a step of the grid, 0 for as many as suit the
    rows there are; unit: `matrix_unit` of the device, which decides what is multiplied at a time.
    """

    rows: int = tried(0, 128, 512, 1024)
    cols: int = tried(0, 256, 512, 1024)
    depth: int = tried(0, 1024, 2048, 4096)
    unit: int = 256

    @classmethod
    def wanted(cls, device: str) -> Tile:
        return cls(unit=matrix_unit(device))

    def suited(self, T: int, gated: bool) -> Tile:
        """With sizes for T rows instead of 0."""
        if T <= _FEW:  # weights are read once and decide the time: few, long reads
            rows, cols, depth = _FEW, 256 if gated else 512, 2048
        else:  # sums stay in the unit over all of a deep block
            rows, cols, depth = 1024, 512, 4096
        return Tile(self.rows or rows, self.cols or cols, self.depth or depth, self.unit)

    def parts(self, rows: int, gated: bool) -> tuple[tuple[int, int], tuple[int, int]]:
        """`part` and `stretch` of `in_parts`, for a block of so many rows. The unit says nothing
        for some 200 cycles after each stretch, which is four products, or two of those that take
        twice as long. A part leaves registers for what is read ahead of it, but for a v6e, whose
        unit it has to fill.
        """
        narrow = self.unit == 128
        if rows <= _FEW:
            return (32, 512) if narrow else (128, 128), (_FEW, 512)
        most = 512 if narrow or gated else 1024  # rows of 256 columns
        tall = min(rows, most)
        return (256, 256), (tall, 256 * most // tall)


def _kernel(
    layer_ref, x_ref, x_scale_ref, *refs, gated: bool, biased: bool, activation: str | None,
    parts: tuple[tuple[int, int], tuple[int, int]],
):  # fmt: skip
    """refs: weights, their scales, bias, output, sums; two of weights, scales and sums if gated."""
    count = 1 + gated
    weights, scales, rest = refs[:count], refs[count : 2 * count], refs[2 * count :]
    bias_ref, out_ref, *sums = rest if biased else (None, *rest)
    k = pl.program_id(2)

    @pl.when(k == 0)
    def _():
        for sum_ref in sums:
            sum_ref[...] = jnp.zeros_like(sum_ref)

    def multiply(rows: Any, columns: Any) -> None:
        for w_ref, sum_ref in zip(weights, sums, strict=True):
            sum_ref[rows, columns] += lax.dot_general(
                x_ref[rows], w_ref[columns], (((1,), (1,)), ((), ())),
                preferred_element_type=jnp.int32,
            )  # fmt: skip

    def finish(rows: Any, columns: Any) -> None:
        row = lax.rem(layer_ref[0], _SCALE_ROWS)
        y = [
            sum_ref[rows, columns].astype(jnp.float32)
            * x_scale_ref[rows]
            * scale_ref[pl.ds(row, 1), columns]
            for sum_ref, scale_ref in zip(sums, scales, strict=True)
        ]
        out = GATES[activation](*y) if activation else y[0]
        if bias_ref is not None:
            out += bias_ref[pl.ds(row, 1), columns]
        out_ref[rows, columns] = out.astype(out_ref.dtype)

    part, stretch = parts
    in_parts(out_ref.shape, part, multiply, stretch)
    pl.when(k == pl.num_programs(2) - 1)(lambda: in_parts(out_ref.shape, _FINISHED, finish))


def tpu(
    x: Array, x_scale: Array, w: Array, w_scale: Array, *,
    layer: Array | int | None = None, bias: Array | None = None,
    up: Array | None = None, up_scale: Array | None = None, activation: str | None = None,
    out_dtype: Any = jnp.bfloat16, tile: Tile | None = None, interpret: Any = False,
) -> Array:  # fmt: skip
    """`reference.int8_matmul` as a TPU kernel: each weight is read once for each block of rows."""
    gated = check(x, x_scale, w, w_scale, layer, bias, up, up_scale, activation)
    (T, K), N = x.shape, w.shape[-2]
    if K % 128 or N % 128:
        raise UnsupportedError(f"{K=} and {N=} must be whole lanes of 128")
    tile = (tile or Tile()).suited(T, gated)
    rows = T if tile.rows >= T else tile.rows // 32 * 32
    cols, depth = min(tile.cols, N), divisor(K, tile.depth, 128)

    weights: list[Any] = [w, up][: 1 + gated]
    scales: list[Any] = [w_scale, up_scale][: 1 + gated]
    per_column = [*scales, *([] if bias is None else [bias.astype(jnp.float32)])]
    if layer is None:
        layer, weights = 0, [w[None] for w in weights]
        per_column = [s[None] for s in per_column]
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    scale_rows = min(_SCALE_ROWS, w_scale.shape[0] if w_scale.ndim > 1 else 1)
    weight = pl.BlockSpec((None, cols, depth), lambda t, n, k, i: (i[0], n, k))
    column = pl.BlockSpec((scale_rows, cols), lambda t, n, k, i: (lax.div(i[0], _SCALE_ROWS), n))
    return pl.pallas_call(
        partial(
            _kernel,
            gated=gated,
            biased=bias is not None,
            activation=activation,
            parts=tile.parts(rows, gated),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(T, rows), pl.cdiv(N, cols), K // depth),
            in_specs=[
                pl.BlockSpec((rows, depth), lambda t, n, k, i: (t, k)),
                pl.BlockSpec((rows, 1), lambda t, n, k, i: (t, 0)),
                *[weight for _ in weights],
                *[column for _ in per_column],
            ],
            out_specs=pl.BlockSpec((rows, cols), lambda t, n, k, i: (t, n)),
            scratch_shapes=[pltpu.VMEM((rows, cols), jnp.int32) for _ in weights],
        ),
        out_shape=jax.ShapeDtypeStruct((T, N), out_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * T * N * K * (1 + gated),
            transcendentals=T * N * gated,
            bytes_accessed=math.prod((N, K)) * (1 + gated) + T * K + T * N * 2,
        ),
        interpret=interpret,
        name="int8_matmul",
    )(layer, x, x_scale[:, None], *weights, *per_column)
