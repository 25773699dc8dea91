"""Rows of int8 or int4 pages as bfloat16, on Hopper, on their way to the tensor cores.

A byte b zero-extended to 16 bits is, read as bfloat16, b * 2**-133: subnormals and the first binade
are equally spaced. One fma.rn.bf16x2 (times 2**127, minus the sign's offset) converts two lanes.
2**127 is the largest power there is, so results are `UNIT` = 2**-6 times the integers, exactly;
callers divide queries and outputs by `UNIT`. The high half of a byte need not be shifted, only
multiplied by a smaller power.

The simulator has no inline PTX, so there the same is computed in jnp.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector
from jaxlib.mlir.dialects import llvm

UNIT = 2.0**-6
"""What an integer 1 in a page becomes in bfloat16."""

_EIGHTS = plgpu.Layout.TILED(
    plgpu.Tiling(((16, 64), (4, 64), (8,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
_NIBBLES = plgpu.Layout.TILED(
    plgpu.Tiling(((16, 64), (16, 16), (8, 16), (8,), (4,))),
    warp_dims=(-7,), lane_dims=(-4, -2, -3), vector_dim=-1,
)  # fmt: skip
"""16 rows of 64 bytes, four bytes in a thread: `WGMMA_UPCAST_2X`, which has 64 rows of 16 bytes, in
another shape."""


class _Integer(NamedTuple):
    """An integer within a byte, in two's complement.

    Attributes:
        bits: the mask of its bits.
        unit: the value of the lowest of them in the byte.
    """

    bits: int
    unit: int

    @property
    def sign(self) -> int:
        """Its highest bit. With it flipped, the integer is unsigned and too large by as much."""
        return self.bits & ~(self.bits >> 1)


_PAIRS = "prmt.b32 $0, $1, 0, 0x4140;", "prmt.b32 $0, $1, 0, 0x4342;"
"""The first two of four bytes, and the other two, each zero-extended to 16 bits."""

_WHOLE, _LOW, _HIGH = _Integer(0xFF, 1), _Integer(0x0F, 1), _Integer(0xF0, 16)


def widen(raw: Any, block: Any, most: int, *, simulated: bool) -> None:
    """Converts int8 rows to `UNIT` times their integers.

    Args:
        raw: int8 [rows, lanes] in shared memory.
        block: bfloat16 [rows, lanes] in shared memory.
        most: lanes at a time, at most; a thread has eight neighbouring ones.
        simulated: whether the simulator runs the kernel.
    """
    lanes = math.gcd(raw.shape[1], most)

    @pl.loop(0, raw.shape[1] // lanes)  # unrolled it takes too many registers
    def _(i: Array) -> None:
        at = pl.ds(i * lanes, lanes)
        x = plgpu.layout_cast(raw[:, at], _EIGHTS)
        [block[:, at]] = _integers(x, _EIGHTS, _WHOLE, simulated=simulated)

    plgpu.commit_smem()


def unpack(raw: Any, block: Any, classes: int, *, simulated: bool) -> None:
    """Converts int4 rows, two of which share bytes, to `UNIT` times their integers.

    Args:
        raw: uint8 [rows / 2, lanes] in shared memory.
        block: bfloat16 [rows, lanes] in shared memory: `classes` equal stretches of rows. The first
            stretch comes from low halves of the first bytes, the second from their high halves, and
            so on.
        simulated: whether the simulator runs the kernel.
    """
    rows, lanes = block.shape[0] // classes, math.gcd(raw.shape[1], 128)
    n = math.gcd(rows, 16)  # rows at a time; 32 take too many registers with jax 0.12

    @pl.loop(0, raw.shape[1] // lanes)
    def _(i: Array) -> None:
        at = pl.ds(i * lanes, lanes)
        for stretch in range(classes // 2):
            for some in range(0, rows, n):
                x = plgpu.layout_cast(raw[pl.ds(stretch * rows + some, n), at], _NIBBLES)
                halves = _integers(x, _NIBBLES, _LOW, _HIGH, simulated=simulated)
                for half, y in enumerate(halves):
                    block[pl.ds((2 * stretch + half) * rows + some, n), at] = y

    plgpu.commit_smem()


def _integers(x: Array, layout: Any, *fields: _Integer, simulated: bool) -> tuple[Array, ...]:
    """`UNIT` times the integers in each field of bytes x, bfloat16 in the shape of x."""
    if simulated:
        return tuple(_simulated(x, field) for field in fields)
    out = plgpu.ShapeDtypeStruct(x.shape, jnp.bfloat16, layout=layout)
    inline = plgpu.inline_mgpu(arg_types=(layout,), return_type=(out,) * len(fields))
    return inline(lambda _, x: _converted(x, fields))(x)


def _simulated(x: Array, field: _Integer) -> Array:
    """`UNIT` times the integers in a field of bytes, in jnp."""
    unsigned = (lax.bitcast_convert_type(x, jnp.uint8) ^ field.sign) & field.bits
    return (unsigned.astype(jnp.float32) - field.sign).astype(jnp.bfloat16) * (UNIT / field.unit)


def _converted(x: Any, fields: tuple[_Integer, ...]) -> tuple[Any, ...]:
    """For each field, what the bytes in a thread's registers, four or more in each, become."""
    outs, signs = [np.empty_like(x.registers) for _ in fields], sum(field.sign for field in fields)
    for index, register in np.ndenumerate(x.registers):
        [size] = ir.VectorType(register.type).shape
        words = vector.bitcast(ir.VectorType.get((size // 4,), _i32()), register)
        words = [vector.extract(words, [], [i]) for i in range(size // 4)]
        words = [arith.xori(word, _constant(signs * 0x01010101)) for word in words]
        pairs = [_assembled(code, word) for word in words for code in _PAIRS]
        for out, field in zip(outs, fields, strict=True):
            found = vector.from_elements(
                ir.VectorType.get((size // 2,), _i32()), [_scaled(pair, field) for pair in pairs]
            )
            out[index] = vector.bitcast(ir.VectorType.get((size,), ir.BF16Type.get()), found)
    return tuple(
        mgpu.FragmentedArray(_registers=out, _layout=x.layout, _is_signed=None) for out in outs
    )


def _scaled(pair: Any, field: _Integer) -> Any:
    """`UNIT` times the integers in a field of two bytes, whose signs are flipped."""
    pair = pair if field.bits == 0xFF else arith.andi(pair, _constant(field.bits * 0x00010001))
    factor, offset = 2.0**127 / field.unit, -field.sign * UNIT / field.unit
    numbers = [int(np.asarray(x, jnp.bfloat16).view(np.uint16)) for x in (factor, offset)]
    numbers = [_constant(x * 0x00010001) for x in numbers]  # of both lanes
    return _assembled("fma.rn.bf16x2 $0, $1, $2, $3;", pair, *numbers)


def _assembled(code: str, *operands: Any) -> Any:
    """The 32 bits that one PTX instruction makes of operands of 32 bits."""
    return llvm.inline_asm(_i32(), list(operands), code, ",".join(["=r"] + ["r"] * len(operands)))


def _constant(bits: int) -> Any:
    return arith.constant(_i32(), ir.IntegerAttr.get(_i32(), bits - (bits >> 31 << 32)))


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)
