"""Llama 1 to 3.x: the plain decoder, with optional biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.errors import CheckpointError
from jaxserve.models import rope
from jaxserve.models.decoder import Config, declare_params, forward, logits
from jaxserve.models.settings import ACTIVATIONS, check, choice, refuse_quantized

__all__ = ["config", "declare_params", "forward", "logits"]


def config(hf: Mapping[str, Any], kind: type[Config] = Config, **more: Any) -> Any:
    """Reads `config.json`. Other families call this too, and say in `more` where they differ."""
    check(hf)
    refuse_quantized(hf)
    heads = hf["num_attention_heads"]
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
    return kind(**{
        "vocab": hf["vocab_size"],
        "embed": hf["hidden_size"],
        "mlp": hf["intermediate_size"],
        "heads": heads,
        "kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "rope": more.get("rope") or rope.from_hf(hf, head_dim),
        "norm_eps": hf["rms_norm_eps"],
        "windows": (0,) * hf["num_hidden_layers"],
        "max_len": hf["max_position_embeddings"],
        "tied": hf.get("tie_word_embeddings", False),
        "qkv_bias": hf.get("attention_bias", False),
        "o_bias": hf.get("attention_bias", False),
        "mlp_bias": hf.get("mlp_bias", False),
        "activation": more.get("activation") or choice(hf, "hidden_act", ACTIVATIONS, "silu"),
    } | more)  # fmt: skip


def windows(hf: Mapping[str, Any], full_every: int | None = None) -> tuple[int, ...]:
    """How far back each layer sees, by `layer_types` or by the older spellings.

    Args:
        full_every: without `layer_types`, every so many layers one sees everything.
    """
    check(hf)
    n, window = hf["num_hidden_layers"], hf.get("sliding_window") or 0
    if kinds := hf.get("layer_types"):
        slides = {"sliding_attention": True, "full_attention": False}
        local = [choice({"layer_types": kind}, "layer_types", slides, None) for kind in kinds]
    elif full_every:
        local = [(i + 1) % full_every != 0 for i in range(n)]
    else:
        first = hf.get("max_window_layers", 0) if hf.get("use_sliding_window", True) else n
        return tuple(window if i >= first else 0 for i in range(n))
    if any(local) and not window:
        raise CheckpointError("sliding_window must be positive where layers slide; it is not set")
    return tuple(window if is_local else 0 for is_local in local)
