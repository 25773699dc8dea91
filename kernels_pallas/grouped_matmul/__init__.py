"""Grouped product: rows sorted by expert, each times its own expert's weight."""

from __future__ import annotations

from kernels_pallas.grouped_matmul import mosaic_gpu, mosaic_tpu
from kernels_pallas.grouped_matmul.cases import CASES
from kernels_pallas.grouped_matmul.reference import check
from kernels_pallas.grouped_matmul.reference import grouped_matmul as reference
from kernels_pallas.op import Body, Op
from kernels_pallas.target import not_hopper

__all__ = ["grouped_matmul"]

grouped_matmul = Op(
    "grouped_matmul",
    reference,
    {
        "mosaic_tpu": Body("tpu", mosaic_tpu.tpu, mosaic_tpu.Tile, mosaic_tpu.Tile.wanted),
        "mosaic_gpu": Body("gpu", mosaic_gpu.gpu, mosaic_gpu.Tile, declines=not_hopper),
    },
    CASES,
    check=check,
)
