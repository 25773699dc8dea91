"""wgmma: products of a warpgroup, 64 rows each, of bfloat16 or of eight-bit integers (9.7.15)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tests.kernels_pallas.hopper.arithmetic import LANES, WARP
from tests.kernels_pallas.hopper.memory import Addresses, FaultError, swizzled

ROWS = 64  # of a product: those of A
_STEP = 32  # bytes of a row of A or B: what is summed
_SPANS = {1: 128, 2: 64, 3: 32}  # modes of a descriptor -> bytes of a swizzle


@dataclass(frozen=True)
class Kind:
    """Types of a product.

    Attributes:
        item: of A and B.
        sums: what products are added up in; sums of integers wrap around.
    """

    item: np.dtype[Any]
    sums: np.dtype[Any]

    @property
    def depth(self) -> int:
        """Products of a sum."""
        return _STEP // self.item.itemsize

    def matrix(self, raw: NDArray[np.uint8]) -> NDArray[np.float32]:  # [rows, depth, bytes]
        """Sums of so few products of integers are exact in float32 too."""
        return np.ascontiguousarray(raw).view(self.item)[..., 0].astype(np.float32)


KINDS: dict[tuple[str, ...], Kind] = {
    ("f32", "bf16", "bf16"): Kind(np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)),
    ("s32", "s8", "s8"): Kind(np.dtype(np.int8), np.dtype(np.int32)),
}


def operand(descriptor: int, rows: int, kind: Kind, *, transposed: bool) -> Addresses:
    """Where the elements of A or B [rows, depth] lie in shared memory (9.7.15.5.1).

    Args:
        descriptor: 64 bits; start, and steps between groups of 8 rows and of columns, in 16 bytes.
        transposed: whether rows are neighbours, and not what is summed; of bfloat16.
    """
    begin, leading, step = (((descriptor >> at) & 0x3FFF) << 4 for at in (0, 16, 32))
    span = _SPANS.get(descriptor >> 62 & 3)
    if span is None or descriptor >> 49 & 7:
        raise FaultError(
            f"a matrix of shared memory without swizzle or with a base: {descriptor:#x}"
        )
    item = kind.item.itemsize
    row, k = np.arange(rows, dtype=np.int64)[:, None], np.arange(kind.depth, dtype=np.int64)
    if transposed:
        wide = span // item  # rows of a line
        at = row // wide * leading + row % wide * item + k // 8 * step + k % 8 * span
    else:
        at = row // 8 * step + row % 8 * span + k * item
    return swizzled(begin + at, span)


@cache
def places(columns: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Rows and columns of what registers hold, [columns / 2, 128] (9.7.15.5.1, "matrix D")."""
    register, lane = np.arange(columns // 2)[:, None], np.arange(LANES)
    warp, lane = lane // WARP, lane % WARP
    row = warp * 16 + lane // 4 + register // 2 % 2 * 8
    return row, register // 4 * 8 + lane % 4 * 2 + register % 2


def unpacked(registers: NDArray[np.uint32]) -> NDArray[np.float32]:
    """A [64, 16] of bfloat16 from four registers of two each, [4, 128], which are as those of D."""
    pairs = registers[..., None].view(ml_dtypes.bfloat16)  # [4, 128, 2]
    row, column = places(16)  # [8, 128]: two registers of D are one of A
    found = np.zeros((ROWS, 16), np.float32)
    found[row, column] = pairs.transpose(0, 2, 1).reshape(8, LANES).astype(np.float32)
    return found
