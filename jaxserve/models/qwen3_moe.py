"""Qwen3-MoE: Qwen3 with routed experts in all layers but those listed or stepped over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models import qwen3
from jaxserve.models.decoder import Config, declare_params, forward, logits
from moe.router import Router

__all__ = ["config", "declare_params", "forward", "logits"]


def config(hf: Mapping[str, Any]) -> Config:
    dense, step = hf.get("mlp_only_layers") or (), hf.get("decoder_sparse_step", 1)
    num_experts = hf.get("num_experts") or hf["num_local_experts"]
    return qwen3.config(
        hf,
        moe_layers=tuple(i not in dense and (i + 1) % step == 0 for i in range(hf["num_hidden_layers"])),
        router=Router(num_experts, hf["num_experts_per_tok"], normalise=hf.get("norm_topk_prob", False)),
        expert_mlp=hf["moe_intermediate_size"],
    )
