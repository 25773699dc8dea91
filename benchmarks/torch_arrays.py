"""Arrays of JAX as torch sees them and back, without a copy. Torch need not be there."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def torch_sees(platform: str) -> bool:
    """Whether torch is installed and computes on this kind of device."""
    try:
        import torch
    except ImportError:
        return False
    return platform == "cpu" or (platform == "gpu" and torch.cuda.is_available())


def to_torch(x: Array) -> Any:
    """A tensor of the same memory."""
    import torch

    return torch.from_dlpack(jax.block_until_ready(x))


def from_torch(x: Any) -> Any:
    """An array of the same memory; arrays stay what they are."""
    return x if isinstance(x, jax.Array) else jnp.from_dlpack(x.detach().contiguous())
