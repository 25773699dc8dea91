"""Llama 1 to 3.x: the plain decoder, with optional biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models import rope
from jaxserve.models.decoder import Config, declare_params, forward, logits

__all__ = ["config", "declare_params", "forward", "logits"]


def config(hf: Mapping[str, Any], **more: Any) -> Config:
    """Reads `config.json`. Llama's descendants call this too, and say what differs in `more`."""
    heads = hf["num_attention_heads"]
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
    return Config(**{
        "vocab": hf["vocab_size"],
        "embed": hf["hidden_size"],
        "mlp": hf["intermediate_size"],
        "heads": heads,
        "kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "rope": rope.from_hf(hf, head_dim),
        "norm_eps": hf["rms_norm_eps"],
        "windows": (0,) * hf["num_hidden_layers"],
        "max_len": hf["max_position_embeddings"],
        "tied": hf.get("tie_word_embeddings", False),
        "qkv_bias": hf.get("attention_bias", False),
        "o_bias": hf.get("attention_bias", False),
        "mlp_bias": hf.get("mlp_bias", False),
    } | more)  # fmt: skip


def windows(hf: Mapping[str, Any]) -> tuple[int, ...]:
    """How far back each layer sees, by `layer_types` or by the older `max_window_layers`."""
    n, window = hf["num_hidden_layers"], hf.get("sliding_window") or 0
    if kinds := hf.get("layer_types"):
        return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    if not hf.get("use_sliding_window", True):
        return (0,) * n
    return tuple(window if i >= hf.get("max_window_layers", 0) else 0 for i in range(n))
