"""Eight-bit weights: which of them, how they are rounded, and checkpoints of them.

Names are loaded on first use: a command line that lists the measures needs no jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxserve.quant.checkpoint import check_paths as check_paths
    from jaxserve.quant.checkpoint import quantize_checkpoint as quantize_checkpoint
    from jaxserve.quant.config import PLAIN as PLAIN
    from jaxserve.quant.config import QuantizeConfig as QuantizeConfig

_HOMES = {
    "PLAIN": "jaxserve.quant.config",
    "QuantizeConfig": "jaxserve.quant.config",
    "check_paths": "jaxserve.quant.checkpoint",
    "quantize_checkpoint": "jaxserve.quant.checkpoint",
}
__all__ = ["PLAIN", "QuantizeConfig", "check_paths", "quantize_checkpoint"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxserve.quant' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
