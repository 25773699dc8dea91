"""DeepSeek-V3 and R1: V2 with sigmoid routing, balanced by a bias instead of a loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models import mla
from jaxserve.models.mla import Config, declare_params, forward, logits
from jaxserve.models.settings import check, choice
from moe.router import Router

__all__ = ["config", "declare_params", "forward", "logits"]


def config(hf: Mapping[str, Any]) -> Config:
    """Reads `config.json`; layers for multi-token prediction are left in the checkpoint."""
    check(hf)
    choice(hf, "scoring_func", {"sigmoid": "sigmoid"}, "sigmoid")
    choice(hf, "topk_method", {"noaux_tc": "noaux_tc"}, "noaux_tc")
    router = Router(
        hf["n_routed_experts"],
        hf["num_experts_per_tok"],
        scoring="sigmoid",
        normalise=hf.get("norm_topk_prob", True),
        scale=hf.get("routed_scaling_factor", 2.5),
        num_groups=hf.get("n_group") or 1,
        top_groups=hf.get("topk_group") or 1,
        group_score="top2",
    )
    interleaved = hf.get("rope_interleave", True)
    return mla.config(hf, router, mlp_bias=False, interleaved=interleaved, correction=True)
