"""Qwen3-MoE: Qwen3 with routed experts in all layers but those listed or stepped over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models import qwen3
from jaxserve.models.decoder import Config, declare_params, forward, logits
from jaxserve.models.settings import check
from moe.router import Router

__all__ = ["config", "declare_params", "forward", "logits"]


def config(hf: Mapping[str, Any]) -> Config:
    check(hf)
    dense, step = hf.get("mlp_only_layers") or (), hf.get("decoder_sparse_step", 1)
    num_experts, n = hf.get("num_experts") or hf["num_local_experts"], hf["num_hidden_layers"]
    normalise = hf.get("norm_topk_prob", False)
    window = (hf.get("sliding_window") or 0) if hf.get("use_sliding_window") else 0
    return qwen3.config(
        {"head_dim": hf["hidden_size"] // hf["num_attention_heads"], **hf},
        windows=(window,) * n,  # max_window_layers has no effect here, unlike in dense Qwen3
        moe_layers=tuple(i not in dense and (i + 1) % step == 0 for i in range(n)),
        router=Router(num_experts, hf["num_experts_per_tok"], normalise=normalise),
        expert_mlp=hf["moe_intermediate_size"],
    )
