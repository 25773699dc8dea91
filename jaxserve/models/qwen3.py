"""Qwen3: Llama whose queries and keys are normed per head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models import llama
from jaxserve.models.decoder import Config, declare_params, forward, logits

__all__ = ["config", "declare_params", "forward", "logits"]


def config(hf: Mapping[str, Any], **more: Any) -> Config:
    sliding = hf if hf.get("use_sliding_window") else {**hf, "sliding_window": 0}
    head_dim = hf.get("head_dim") or 128
    settings = {"windows": llama.windows(sliding), "mlp_bias": False, "qk_norm": True, **more}
    return llama.config({**hf, "head_dim": head_dim}, **settings)
