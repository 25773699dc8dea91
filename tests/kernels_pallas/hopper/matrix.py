"""wgmma: products of bfloat16 of a warpgroup, 64 rows each, added to float32 (9.7.15)."""

from __future__ import annotations

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tests.kernels_pallas.hopper.arithmetic import LANES, WARP
from tests.kernels_pallas.hopper.memory import Addresses, FaultError, swizzled

ROWS, DEPTH = 64, 16  # of a product: rows of A, and what is summed
_SPANS = {1: 128, 2: 64, 3: 32}  # modes of a descriptor -> bytes of a swizzle


def operand(descriptor: int, rows: int, transposed: bool) -> Addresses:
    """Where the elements of A or B [rows, 16] lie in shared memory (9.7.15.5.1).

    Args:
        descriptor: 64 bits; start, and steps between groups of 8 rows and of columns, in 16 bytes.
        transposed: whether rows are neighbours, and not what is summed.
    """
    begin, leading, step = (((descriptor >> at) & 0x3FFF) << 4 for at in (0, 16, 32))
    span = _SPANS.get(descriptor >> 62 & 3)
    if span is None or descriptor >> 49 & 7:
        raise FaultError(
            f"a matrix of shared memory without swizzle or with a base: {descriptor:#x}"
        )
    row, k = np.arange(rows, dtype=np.int64)[:, None], np.arange(DEPTH, dtype=np.int64)
    if transposed:
        wide = span // 2  # rows of a line
        at = row // wide * leading + row % wide * 2 + k // 8 * step + k % 8 * span
    else:
        at = row // 8 * step + row % 8 * span + k * 2
    return swizzled(begin + at, span)


def floats(raw: NDArray[np.uint8]) -> NDArray[np.float32]:  # [..., 2] -> [...]
    return np.ascontiguousarray(raw).view(ml_dtypes.bfloat16)[..., 0].astype(np.float32)


@cache
def places(columns: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Rows and columns of what registers hold, [columns / 2, 128] (9.7.15.5.1, "matrix D")."""
    register, lane = np.arange(columns // 2)[:, None], np.arange(LANES)
    warp, lane = lane // WARP, lane % WARP
    row = warp * 16 + lane // 4 + register // 2 % 2 * 8
    return row, register // 4 * 8 + lane % 4 * 2 + register % 2


def unpacked(registers: NDArray[np.uint32]) -> NDArray[np.float32]:
    """A [64, 16] from four registers of two values each, [4, 128]; they are as those of D are."""
    pairs = registers[..., None].view(ml_dtypes.bfloat16)  # [4, 128, 2]
    row, column = places(DEPTH)  # [8, 128]: two registers of D are one of A
    found = np.zeros((ROWS, DEPTH), np.float32)
    found[row, column] = pairs.transpose(0, 2, 1).reshape(8, LANES).astype(np.float32)
    return found
