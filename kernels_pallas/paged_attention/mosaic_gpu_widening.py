"""Rows of eight or four bits as bfloat16, on Hopper, on their way to where they are multiplied.

A byte alone in 16 bits is, read as bfloat16, so many times the smallest number there is, whatever
the byte: numbers without an exponent, and those with the first one, lie equally far apart. So one
instruction, a product with a power of two and a difference, makes two lanes of integers. No power
is large enough, so that integers become multiples of `UNIT`, exactly, and whoever calls multiplies
queries and outputs by as much. Halves of a byte need not be shifted, only multiplied by less.

The simulator knows no instructions, and reckons.
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
"""What an integer 1 in a page is where it is multiplied."""

_EIGHTS = plgpu.Layout.TILED(
    plgpu.Tiling(((16, 64), (4, 64), (8,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
_NIBBLES = plgpu.Layout.TILED(
    plgpu.Tiling(((16, 64), (16, 16), (8, 16), (8,), (4,))),
    warp_dims=(-7,), lane_dims=(-4, -2, -3), vector_dim=-1,
)  # fmt: skip
"""16 rows of 64 bytes, as `WGMMA_UPCAST_2X` has 64 of 16: four bytes in a thread."""


class _Integer(NamedTuple):
    """An integer in a byte, in two's complement: its bits, and what the lowest of them counts."""

    bits: int
    unit: int

    @property
    def sign(self) -> int:
        """Its highest bit. Flipped, it has the lowest integer there is become 0."""
        return self.bits & ~(self.bits >> 1)


_PAIRS = "prmt.b32 $0, $1, 0, 0x4140;", "prmt.b32 $0, $1, 0, 0x4342;"
"""The first two of four bytes, and the others, each in 16 bits of its own."""

_WHOLE, _LOW, _HIGH = _Integer(0xFF, 1), _Integer(0x0F, 1), _Integer(0xF0, 16)


def widen(raw: Any, block: Any, most: int, *, simulated: bool) -> None:
    """Rows of eight bits as bfloat16, eight lanes in a thread and at most so many at a time."""
    lanes = math.gcd(raw.shape[1], most)

    @pl.loop(0, raw.shape[1] // lanes)  # unrolled it takes too many registers
    def _(i: Array) -> None:
        at = pl.ds(i * lanes, lanes)
        x = plgpu.layout_cast(raw[:, at], _EIGHTS)
        [block[:, at]] = _integers(x, _EIGHTS, _WHOLE, simulated=simulated)

    plgpu.commit_smem()


def unpack(raw: Any, block: Any, kinds: int, *, simulated: bool) -> None:
    """Rows of four bits as bfloat16, two in a byte: `kinds` stretches of them, of which the first
    lie in low halves of the first bytes."""
    rows, lanes = block.shape[0] // kinds, math.gcd(raw.shape[1], 128)
    n = math.gcd(rows, 16)  # of 32, registers do not suffice with jax 0.12

    @pl.loop(0, raw.shape[1] // lanes)
    def _(i: Array) -> None:
        at = pl.ds(i * lanes, lanes)
        for odd in range(kinds // 2):
            for some in range(0, rows, n):
                x = plgpu.layout_cast(raw[pl.ds(odd * rows + some, n), at], _NIBBLES)
                halves = _integers(x, _NIBBLES, _LOW, _HIGH, simulated=simulated)
                for half, y in enumerate(halves):
                    block[pl.ds((2 * odd + half) * rows + some, n), at] = y

    plgpu.commit_smem()


def _integers(x: Array, layout: Any, *kinds: _Integer, simulated: bool) -> tuple[Array, ...]:
    """`UNIT` times the integers of each kind that bytes hold, in two's complement."""
    if simulated:
        return tuple(_reckoned(x, kind) for kind in kinds)
    out = plgpu.ShapeDtypeStruct(x.shape, jnp.bfloat16, layout=layout)
    inline = plgpu.inline_mgpu(arg_types=(layout,), return_type=(out,) * len(kinds))
    return inline(lambda _, x: _instructions(x, kinds))(x)


def _reckoned(x: Array, kind: _Integer) -> Array:
    above = (lax.bitcast_convert_type(x, jnp.uint8) ^ kind.sign) & kind.bits
    return (above.astype(jnp.float32) - kind.sign).astype(jnp.bfloat16) * (UNIT / kind.unit)


def _instructions(x: Any, kinds: tuple[_Integer, ...]) -> tuple[Any, ...]:
    """For each kind what a thread's registers of four or more bytes become."""
    outs, signs = [np.empty_like(x.registers) for _ in kinds], sum(kind.sign for kind in kinds)
    for index, register in np.ndenumerate(x.registers):
        [size] = ir.VectorType(register.type).shape
        words = vector.bitcast(ir.VectorType.get((size // 4,), _i32()), register)
        words = [vector.extract(words, [], [i]) for i in range(size // 4)]
        words = [arith.xori(word, _constant(signs * 0x01010101)) for word in words]
        pairs = [_assembled(code, word) for word in words for code in _PAIRS]
        for out, kind in zip(outs, kinds, strict=True):
            found = vector.from_elements(
                ir.VectorType.get((size // 2,), _i32()), [_scaled(pair, kind) for pair in pairs]
            )
            out[index] = vector.bitcast(ir.VectorType.get((size,), ir.BF16Type.get()), found)
    return tuple(
        mgpu.FragmentedArray(_registers=out, _layout=x.layout, _is_signed=None) for out in outs
    )


def _scaled(pair: Any, kind: _Integer) -> Any:
    """Two bytes, whose signs are flipped, as `UNIT` times the integers in them."""
    pair = pair if kind.bits == 0xFF else arith.andi(pair, _constant(kind.bits * 0x00010001))
    numbers = 2.0**127 / kind.unit, -kind.sign * UNIT / kind.unit
    numbers = [int(np.asarray(x, jnp.bfloat16).view(np.uint16)) for x in numbers]
    numbers = [_constant(x * 0x00010001) for x in numbers]
    return _assembled("fma.rn.bf16x2 $0, $1, $2, $3;", pair, *numbers)


def _assembled(code: str, *operands: Any) -> Any:
    return llvm.inline_asm(_i32(), list(operands), code, ",".join(["=r"] + ["r"] * len(operands)))


def _constant(bits: int) -> Any:
    return arith.constant(_i32(), ir.IntegerAttr.get(_i32(), bits - (bits >> 31 << 32)))


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)
