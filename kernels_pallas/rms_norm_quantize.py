"""RMSNorm whose result is quantized to int8 rows with a scale each: the input of a W8A8 product."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import shapes
from kernels_pallas.op import Body, Case, Cost, Op, UnsupportedError, refuse_no_rows, tried
from kernels_pallas.quantize import largest, quantize_rows
from kernels_pallas.target import not_hopper
from kernels_pallas.tpu import INT8_ROWS, LANES, divisor


def reference(x: Array, scale: Array, *, eps: float, offset: float = 0.0) -> tuple[Array, Array]:
    """`quantize_rows` of x / rms(x) * (offset + scale), computed in float32.

    Args:
        x: [T, D].
        scale: [D].

    Returns:
        int8 [T, D] and float32 [T].

    Raises:
        ValueError: shapes and types do not go together.
    """
    check(x, scale)
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return quantize_rows(y * (offset + scale.astype(jnp.float32)))


def check(x: Array, scale: Array, **options: Any) -> None:
    """Raises ValueError where the arguments of `reference` do not go together."""
    shapes.check("rms_norm_quantize", x=(x, "float T D"), scale=(scale, "float D"))


_COLUMNS = 512  # at most, per step: registers hold so many of 32 rows


@dataclass(frozen=True)
class TpuTile:
    """rows: tokens in a block of the grid."""

    rows: int = tried(256, 64, 128, 512)


def _tpu_kernel(x_ref, scale_ref, values_ref, scales_ref, *, eps: float, offset: float):
    """Quantizes 32 rows at a time, in parts of columns that registers hold.

    A first pass finds the sum of squares and the largest magnitude before it is divided by the rms;
    a second one rounds.
    """
    D = x_ref.shape[1]
    width = divisor(D, _COLUMNS, LANES)

    def scaled(rows: Any, i: Array) -> tuple[Array, Array, Any]:
        columns = pl.ds(pl.multiple_of(i * width, width), width)
        x = x_ref[rows, columns].astype(jnp.float32)
        return x, x * (offset + scale_ref[:, columns].astype(jnp.float32)), columns

    @pl.loop(0, x_ref.shape[0] // INT8_ROWS)
    def _(i: Array) -> None:
        rows = pl.ds(pl.multiple_of(i * INT8_ROWS, INT8_ROWS), INT8_ROWS)

        def measure(i: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
            x, y, _ = scaled(rows, i)
            squares, absmax = found
            for at in range(0, width, LANES):  # lanes are reduced at the end
                part = slice(at, at + LANES)
                squares += x[:, part] * x[:, part]
                absmax = jnp.maximum(absmax, jnp.abs(y[:, part]))
            return squares, absmax

        zeros = jnp.zeros((INT8_ROWS, LANES), jnp.float32)
        squares, absmax = lax.fori_loop(0, D // width, measure, (zeros, zeros))
        absmax = largest(absmax)  # an infinity times a scale of 0 is NaN, and a maximum may drop it
        steps = jnp.where(absmax > 0, 127.0 / absmax, 0.0)
        squares = jnp.sum(squares, 1, keepdims=True)
        scales_ref[rows] = absmax * lax.rsqrt(squares * (1 / D) + eps) * (1 / 127)

        @pl.loop(0, D // width)
        def _(i: Array) -> None:
            _, y, columns = scaled(rows, i)
            values_ref[rows, columns] = jnp.round(y * steps).astype(jnp.int8)


def tpu(
    x: Array, scale: Array, *, eps: float, offset: float = 0.0,
    tile: TpuTile | None = None, interpret: Any = False,
) -> tuple[Array, Array]:  # fmt: skip
    """`reference` as a TPU kernel: one pass over HBM.

    Raises:
        UnsupportedError: x has no rows, or D is no multiple of 128.
    """
    T, D = x.shape
    refuse_no_rows(T)
    if D % LANES:
        raise UnsupportedError(f"rows of {D=} must be whole lanes of {LANES}")
    wanted = (tile or TpuTile(rows=min(256, 2**20 // D))).rows  # wide rows fill VMEM sooner
    rows = max(INT8_ROWS, min(wanted, T + INT8_ROWS - 1) // INT8_ROWS * INT8_ROWS)
    block = pl.BlockSpec((rows, D), lambda t: (t, 0))
    values, scales = pl.pallas_call(
        partial(_tpu_kernel, eps=eps, offset=offset),
        grid=(pl.cdiv(T, rows),),
        in_specs=[block, pl.BlockSpec((1, D), lambda t: (0, 0))],
        out_specs=[block, pl.BlockSpec((rows, 1), lambda t: (t, 0))],
        out_shape=[
            jax.ShapeDtypeStruct((T, D), jnp.int8),
            jax.ShapeDtypeStruct((T, 1), jnp.float32),
        ],
        interpret=interpret,
        name="rms_norm_quantize",
    )(x, scale[None])
    return values, scales[:, 0]


@dataclass(frozen=True)
class GpuTile:
    """Nothing to choose: a block of the grid is a row, which one warpgroup keeps in registers."""


def _gpu_kernel(x_ref, scale_ref, values_ref, scales_ref, *, eps: float, offset: float):
    row = lax.axis_index("t")
    y = x_ref[row].astype(jnp.float32)
    y = y * lax.rsqrt(jnp.sum(y * y) * (1 / y.size) + eps)
    y = y * (offset + scale_ref[...].astype(jnp.float32))
    absmax = jnp.max(jnp.abs(y))
    steps = jnp.where(absmax > 0, 127.0 / absmax, 0.0)
    rounded = lax.round(y * steps, lax.RoundingMethod.TO_NEAREST_EVEN)
    values_ref[row] = rounded.astype(jnp.int8)
    scales_ref[row] = absmax * (1 / 127.0)


def gpu(
    x: Array, scale: Array, *, eps: float, offset: float = 0.0,
    tile: GpuTile | None = None, interpret: Any = False,
) -> tuple[Array, Array]:  # fmt: skip
    """`reference` as a Hopper kernel: one pass over memory.

    Raises:
        UnsupportedError: x has no rows, or D is no multiple of 128, or above 16384.
    """
    T, D = x.shape
    refuse_no_rows(T)
    if D % 128 or D > 16384:
        raise UnsupportedError(f"rows of {D=} must be multiples of 128 up to 16384")
    return plgpu.kernel(
        partial(_gpu_kernel, eps=eps, offset=offset),
        out_type=[
            jax.ShapeDtypeStruct((T, D), jnp.int8),
            jax.ShapeDtypeStruct((T,), jnp.float32),
        ],
        grid=(T,),
        grid_names=("t",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
        kernel_name="rms_norm_quantize",
    )(x, scale)


def _case(T: int, D: int, dtype: Any = jnp.bfloat16, *, shipped: bool = False, **options) -> Case:
    def make(key: Array) -> tuple[tuple[Array, Array], dict[str, Array]]:
        a, b = jax.random.split(key)
        x, scale = jax.random.normal(a, (T, D), dtype), jax.random.normal(b, (D,), dtype)
        return (x, scale), {}

    cost = Cost(T * D * (jnp.dtype(dtype).itemsize + 1) + 4 * T)
    name = f"{T}x{D}-{jnp.dtype(dtype).name}"
    return Case(name, make, {"eps": 1e-6, **options}, shipped, cost, tolerance=0.008)


CASES = (
    _case(40, 128),
    _case(3, 256, jnp.float32),
    _case(64, 384, offset=1.0),
    _case(64, 4096, shipped=True),
    _case(8192, 7168, shipped=True),
)

rms_norm_quantize = Op(
    "rms_norm_quantize",
    reference,
    {
        "mosaic_tpu": Body("tpu", tpu, TpuTile),
        "mosaic_gpu": Body("gpu", gpu, GpuTile, declines=not_hopper),
    },
    CASES,
    check=check,
)
