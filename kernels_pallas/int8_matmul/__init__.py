"""W8A8 product: eight-bit rows times eight-bit weights, exact sums, scales and gate in one pass."""

from __future__ import annotations

from kernels_pallas.int8_matmul import mosaic_gpu, mosaic_tpu
from kernels_pallas.int8_matmul.cases import CASES
from kernels_pallas.int8_matmul.reference import check
from kernels_pallas.int8_matmul.reference import int8_matmul as reference
from kernels_pallas.op import Body, Op
from kernels_pallas.target import not_hopper

__all__ = ["int8_matmul"]

int8_matmul = Op(
    "int8_matmul",
    reference,
    {
        "mosaic_tpu": Body("tpu", mosaic_tpu.tpu, mosaic_tpu.Tile, mosaic_tpu.Tile.wanted),
        "mosaic_gpu": Body("gpu", mosaic_gpu.gpu, mosaic_gpu.Tile, declines=not_hopper),
    },
    CASES,
    check=check,
)
