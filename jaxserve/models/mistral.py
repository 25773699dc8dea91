"""Mistral: Llama whose every layer may see only a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models import llama
from jaxserve.models.decoder import Config, declare_params, forward, logits

__all__ = ["config", "declare_params", "forward", "logits"]


def config(hf: Mapping[str, Any]) -> Config:
    return llama.config(hf, windows=llama.windows(hf), qkv_bias=False, o_bias=False, mlp_bias=False)
