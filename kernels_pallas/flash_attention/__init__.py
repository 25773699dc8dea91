"""Causal attention over packed rows whose scores never leave the chip, with a backward pass."""

from __future__ import annotations

from functools import partial
from typing import Any

from kernels_pallas.flash_attention import (
    mosaic_gpu,
    mosaic_gpu_backward,
    mosaic_tpu,
    mosaic_tpu_backward,
    reference,
)
from kernels_pallas.flash_attention.cases import cases
from kernels_pallas.flash_attention.gpu_blocks import GpuTile
from kernels_pallas.flash_attention.gradient import with_gradient
from kernels_pallas.flash_attention.tpu_blocks import TpuTile
from kernels_pallas.op import Body, Op
from kernels_pallas.target import Target, not_hopper

flash_attention_gradient = Op(
    "flash_attention_gradient",
    reference.gradient,
    {
        "mosaic_tpu": Body("tpu", mosaic_tpu_backward.backward, TpuTile),
        "mosaic_gpu": Body("gpu", mosaic_gpu_backward.backward, GpuTile, declines=not_hopper),
    },
    cases(backward=True),
)
"""What `flash_attention` runs backwards, whose tiles are not those of the forward pass."""


class FlashAttention(Op):
    """Attention whose slopes another op computes. The reference is differentiated by JAX."""

    def chosen(self, target: Target, name: str, *args: Any, tile: Any, **options: Any) -> Any:
        forward = partial(super().chosen, target, name, tile=tile)
        if name == "reference":
            return forward(*args, **options)
        backward = partial(flash_attention_gradient, target=target)
        return with_gradient(forward, backward)(*args, **options)


flash_attention = FlashAttention(
    "flash_attention",
    reference.attend,
    {
        "mosaic_tpu": Body("tpu", mosaic_tpu.forward, TpuTile),
        "mosaic_gpu": Body("gpu", mosaic_gpu.forward, mosaic_gpu.ForwardTile, declines=not_hopper),
    },
    cases(backward=False),
)

__all__ = ["flash_attention", "flash_attention_gradient"]
