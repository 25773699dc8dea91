"""The ops that tests, benchmarks and tuning go through."""

from __future__ import annotations

from kernels_pallas.cpu.ops import CPU_OPS
from kernels_pallas.flash_attention import flash_attention, flash_attention_gradient
from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.int8_matmul import int8_matmul
from kernels_pallas.op import Op
from kernels_pallas.paged_attention.ops import page_attention, page_write
from kernels_pallas.rms_norm_quantize import rms_norm_quantize
from kernels_pallas.sample import sample

OPS: tuple[Op, ...] = (
    rms_norm_quantize,
    int8_matmul,
    grouped_matmul,
    page_write,
    page_attention,
    flash_attention,
    flash_attention_gradient,
    sample,
    *CPU_OPS,
)
"""All ops that have cases."""
