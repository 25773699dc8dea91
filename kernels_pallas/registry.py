"""Every op that has cases: what tests, benchmarks and tuning go through."""

from __future__ import annotations

from kernels_pallas.op import Op
from kernels_pallas.paged_attention.ops import page_attention, page_write
from kernels_pallas.rms_norm_quantize import rms_norm_quantize

OPS: tuple[Op, ...] = (rms_norm_quantize, page_write, page_attention)
