"""The W8A8 product on TPU: products of blocks of K are summed in VMEM, then scaled."""

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
from kernels_pallas.op import UnsupportedError, refuse_no_rows, tried
from kernels_pallas.target import matrix_unit
from kernels_pallas.tpu import LANES, SUBLANES, VMEM_BYTES, divisor, in_parts

_SCALE_ROWS = SUBLANES  # layers whose scales are read together
_FEW = 128  # rows of x, up to which one block holds them all
_FINISHED = (64, 256)  # rows and columns that are scaled at a time: registers hold their floats


@dataclass(frozen=True)
class Tile:
    """What one step of the grid multiplies. A size of 0 is chosen by `for_shape`.

    Attributes:
        block_m: rows of x.
        block_n: rows of w.
        block_k: elements of K.
        unit: `matrix_unit` of the device, which decides what is multiplied at a time.
    """

    block_m: int = tried(0, 128, 512, 1024)
    block_n: int = tried(0, 256, 512, 1024)
    block_k: int = tried(0, 1024, 2048, 4096)
    unit: int = 256

    @classmethod
    def wanted(cls, device: str) -> Tile:
        """The tile for a device where none was tuned."""
        return cls(unit=matrix_unit(device))

    def for_shape(self, T: int, gated: bool) -> Tile:
        """The tile for T rows of x, without zeros."""
        if T <= _FEW:  # reading the weights takes most of the time: few, long reads
            block_m, block_n, block_k = _FEW, 256 if gated else 512, 2048
        else:  # sums stay in the matrix unit over all of a large block_k
            block_m, block_n, block_k = 1024, 512, 4096
        return Tile(
            self.block_m or block_m, self.block_n or block_n, self.block_k or block_k, self.unit
        )  # fmt: skip

    def parts(self, block_m: int, gated: bool) -> tuple[tuple[int, int], tuple[int, int]]:
        """`part` and `stretch` of `in_parts` for a block of `block_m` rows.

        The matrix unit is idle for some 200 cycles after each stretch, in which it would compute
        the products of four parts, or of two where a part takes twice as long. A part leaves
        registers for what is read ahead of it, except on a v6e, whose unit it has to fill.
        """
        narrow = self.unit == 128
        if block_m <= _FEW:
            return (32, 512) if narrow else (128, 128), (_FEW, 512)
        limit = 512 if narrow or gated else 1024  # rows of a stretch with 256 columns
        rows = min(block_m, limit)
        return (256, 256), (rows, 256 * limit // rows)


def _kernel(
    layer_ref, x_ref, x_scale_ref, *refs, gated: bool, biased: bool, activation: str | None,
    parts: tuple[tuple[int, int], tuple[int, int]],
):  # fmt: skip
    """One step of the grid (t, n, k).

    Args:
        refs: weights, their scales, the bias if there is one, the output, and the sums. There are
            two weights, scales and sums if there is a gate.
        parts: of `Tile.parts`.
    """
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
    """`reference.int8_matmul` as a TPU kernel: weights are read once for each block of rows.

    Raises:
        UnsupportedError: x has no rows, or K or N is no multiple of 128.
    """
    gated = check(x, x_scale, w, w_scale, layer, bias, up, up_scale, activation)
    (T, K), N = x.shape, w.shape[-2]
    refuse_no_rows(T)
    if K % LANES or N % LANES:
        raise UnsupportedError(f"{K=} and {N=} must be whole lanes of {LANES}")
    tile = (tile or Tile()).for_shape(T, gated)
    block_m = T if tile.block_m >= T else tile.block_m // 32 * 32
    block_n, block_k = min(tile.block_n, N), divisor(K, tile.block_k, LANES)

    weights: list[Any] = [w, up][: 1 + gated]
    scales: list[Any] = [w_scale, up_scale][: 1 + gated]
    per_row = [*scales, *([] if bias is None else [bias.astype(jnp.float32)])]  # of w
    if layer is None:
        layer, weights, per_row = 0, [w[None] for w in weights], [s[None] for s in per_row]
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    scale_rows = min(_SCALE_ROWS, w_scale.shape[0] if w_scale.ndim > 1 else 1)
    w_spec = pl.BlockSpec((None, block_n, block_k), lambda t, n, k, i: (i[0], n, k))
    row_spec = pl.BlockSpec(
        (scale_rows, block_n), lambda t, n, k, i: (lax.div(i[0], _SCALE_ROWS), n)
    )
    kernel = partial(_kernel, gated=gated, biased=bias is not None, activation=activation)
    return pl.pallas_call(
        partial(kernel, parts=tile.parts(block_m, gated)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(T, block_m), pl.cdiv(N, block_n), K // block_k),
            in_specs=[
                pl.BlockSpec((block_m, block_k), lambda t, n, k, i: (t, k)),
                pl.BlockSpec((block_m, 1), lambda t, n, k, i: (t, 0)),
                *[w_spec for _ in weights],
                *[row_spec for _ in per_row],
            ],
            out_specs=pl.BlockSpec((block_m, block_n), lambda t, n, k, i: (t, n)),
            scratch_shapes=[pltpu.VMEM((block_m, block_n), jnp.int32) for _ in weights],
        ),
        out_shape=jax.ShapeDtypeStruct((T, N), out_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * T * N * K * (1 + gated),
            transcendentals=T * N * gated,
            bytes_accessed=math.prod((N, K)) * (1 + gated) + T * K + T * N * 2,
        ),
        interpret=interpret,
        name="int8_matmul",
    )(layer, x, x_scale[:, None], *weights, *per_row)
