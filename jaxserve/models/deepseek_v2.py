"""DeepSeek-V2: latent attention, softmax routing over groups of experts, shared experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models import mla
from jaxserve.models.mla import Config, declare_params, forward, logits
from jaxserve.models.settings import check, choice
from moe.router import Router

__all__ = ["config", "declare_params", "forward", "logits"]


def config(hf: Mapping[str, Any]) -> Config:
    """Reads `config.json`; `norm_topk_prob` has no effect, as in transformers."""
    check(hf)
    choice(hf, "scoring_func", {"softmax": "softmax"}, "softmax")
    methods = {"greedy": False, "group_limited_greedy": True}
    grouped = choice(hf, "topk_method", methods, "greedy")
    router = Router(
        hf["n_routed_experts"],
        hf["num_experts_per_tok"],
        normalise=False,
        scale=hf.get("routed_scaling_factor", 1.0),
        num_groups=hf["n_group"] if grouped else 1,
        top_groups=hf["topk_group"] if grouped else 1,
    )
    return mla.config(hf, router)
