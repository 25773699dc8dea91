"""Causal attention over packed rows whose scores never leave the chip, with a backward pass."""

from __future__ import annotations

from collections.abc import Callable
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
"""The backward pass of `flash_attention`: an op, since its tiles are tuned by themselves."""


def _differentiate(forward: Callable[..., Any], target: Target) -> Callable[..., Any]:
    """A forward kernel whose gradient is `flash_attention_gradient` on the same target."""
    return with_gradient(forward, partial(flash_attention_gradient, target=target))


flash_attention = Op(
    "flash_attention",
    reference.attend,
    {
        "mosaic_tpu": Body("tpu", mosaic_tpu.forward, TpuTile),
        "mosaic_gpu": Body("gpu", mosaic_gpu.forward, mosaic_gpu.ForwardTile, declines=not_hopper),
    },
    cases(backward=False),
    differentiate=_differentiate,
    check=reference.check,
)

__all__ = ["flash_attention", "flash_attention_gradient"]
