"""Every op that has cases: what tests, benchmarks and tuning go through."""

from __future__ import annotations

from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.int8_matmul import int8_matmul
from kernels_pallas.op import Op
from kernels_pallas.rms_norm_quantize import rms_norm_quantize

OPS: tuple[Op, ...] = (grouped_matmul, int8_matmul, rms_norm_quantize)
