"""Mixtral: Mistral with eight experts a layer, stored under names of its own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from jaxserve.models import decoder, llama
from jaxserve.models.decoder import Config, forward, logits
from jaxserve.models.layers import Attention
from jaxserve.models.settings import check
from kernels_pallas.weight import Weight
from moe.experts import Experts
from moe.router import Router
from sharding.tree import part, pytree, weight

__all__ = ["config", "declare_params", "forward", "logits"]


@pytree
class MixtralExperts(Experts):
    w_gate: Weight = weight("experts expert_mlp embed", "{expert}.w1.weight")
    w_up: Weight = weight("experts expert_mlp embed", "{expert}.w3.weight")
    w_down: Weight = weight("experts embed expert_mlp", "{expert}.w2.weight")


@pytree
class MixtralMoe:
    router: Weight = weight("routes embed", "gate.weight")
    experts: MixtralExperts = part(MixtralExperts, "experts.")


@pytree
class Layer:
    attn_norm: Weight = weight("embed", "input_layernorm.weight", init="ones")
    attn: Attention = part(Attention, "self_attn.")
    mlp_norm: Weight = weight("embed", "post_attention_layernorm.weight", init="ones")
    mlp: MixtralMoe = part(MixtralMoe, "block_sparse_moe.")


declare_params = partial(decoder.declare_params, moe_layer=Layer)


def config(hf: Mapping[str, Any]) -> Config:
    check(hf)
    return llama.config(
        {"rope_theta": 1_000_000.0, **hf},
        windows=llama.windows(hf),
        qkv_bias=False,
        o_bias=False,
        moe_layers=(True,) * hf["num_hidden_layers"],
        router=Router(hf["num_local_experts"], hf["num_experts_per_tok"]),
        expert_mlp=hf["intermediate_size"],
    )
