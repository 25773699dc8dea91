"""Causal attention over packed rows whose scores never leave the chip, with a backward pass."""

from kernels_pallas.flash_attention import (
    mosaic_gpu,
    mosaic_gpu_backward,
    mosaic_tpu,
    mosaic_tpu_backward,
    reference,
)
from kernels_pallas.flash_attention.cases import cases
from kernels_pallas.flash_attention.gpu_blocks import GpuTile
from kernels_pallas.flash_attention.tpu_blocks import TpuTile
from kernels_pallas.op import Body, Op

flash_attention = Op(
    "flash_attention",
    reference.attend,
    {
        "mosaic_tpu": Body("tpu", mosaic_tpu.tpu, TpuTile),
        "mosaic_gpu": Body("gpu", mosaic_gpu.gpu, GpuTile),
    },
    cases(backward=False),
)

flash_attention_gradient = Op(
    "flash_attention_gradient",
    reference.gradient,
    {
        "mosaic_tpu": Body("tpu", mosaic_tpu_backward.backward, TpuTile),
        "mosaic_gpu": Body("gpu", mosaic_gpu_backward.backward, GpuTile),
    },
    cases(backward=True),
)
"""What the bodies of `flash_attention` run backwards, as an op, to be tested and timed."""

__all__ = ["flash_attention", "flash_attention_gradient"]
