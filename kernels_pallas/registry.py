"""Every op that has cases: what tests, benchmarks and tuning go through."""

from __future__ import annotations

from kernels_pallas.flash_attention import flash_attention, flash_attention_gradient
from kernels_pallas.op import Op
from kernels_pallas.rms_norm_quantize import rms_norm_quantize
from kernels_pallas.sample import sample

OPS: tuple[Op, ...] = (rms_norm_quantize, flash_attention, flash_attention_gradient, sample)
