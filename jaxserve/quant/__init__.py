"""Eight-bit weights: which of them, how they are rounded, and checkpoints of them."""

from jaxserve.quant.checkpoint import quantize_checkpoint
from jaxserve.quant.config import PLAIN, QuantizeConfig

__all__ = ["PLAIN", "QuantizeConfig", "quantize_checkpoint"]
