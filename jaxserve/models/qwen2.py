"""Qwen2 and 2.5: Llama with biases on queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models import llama
from jaxserve.models.decoder import Config, declare_params, forward, logits

__all__ = ["config", "declare_params", "forward", "logits"]


def config(hf: Mapping[str, Any]) -> Config:
    sliding = hf if hf.get("use_sliding_window") else {**hf, "sliding_window": 0}
    return llama.config(
        hf, windows=llama.windows(sliding), qkv_bias=True, o_bias=False, mlp_bias=False
    )
