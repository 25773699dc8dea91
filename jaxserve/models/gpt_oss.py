"""gpt-oss: attention sinks, windows in every other layer, and experts stored in four bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from jaxserve.checkpoint import mxfp4
from jaxserve.models import decoder, llama
from jaxserve.models.decoder import forward, logits
from jaxserve.models.layers import Attention
from jaxserve.models.settings import check, choice, refuse_quantized
from kernels_pallas.weight import Weight
from moe.experts import Experts
from moe.router import Router
from sharding.tree import part, pytree, weight

__all__ = ["config", "declare_params", "forward", "logits"]

_YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config(decoder.Config):
    """`mxfp4`: experts are stored as four-bit blocks and scales."""

    mxfp4: bool


def _matrix(get: Callable[[str], np.ndarray], name: str, cfg: Config, *, rows: slice) -> np.ndarray:
    """[E, rows, in]; stored as [E, in, out], or quantised as [E, out, in]."""
    if cfg.mxfp4:
        return mxfp4.read(get, name, rows)
    return get(name).swapaxes(1, 2)[:, rows]


def _bias(get: Callable[[str], np.ndarray], name: str, cfg: Config, *, rows: slice) -> np.ndarray:
    return get(name)[:, rows]


_GATE, _UP, _ALL = slice(0, None, 2), slice(1, None, 2), slice(None)
_FIRST, _SECOND = "gate_up_proj", "down_proj"  # of a joint tensor, rows of gate and up alternate


@pytree
class GptOssExperts(Experts):
    w_gate: Weight = weight("experts expert_mlp embed", _FIRST, read=partial(_matrix, rows=_GATE))
    w_up: Weight = weight("experts expert_mlp embed", _FIRST, read=partial(_matrix, rows=_UP))
    w_down: Weight = weight("experts embed expert_mlp", _SECOND, read=partial(_matrix, rows=_ALL))
    b_gate: Weight | None = weight(
        "experts expert_mlp", f"{_FIRST}_bias", read=partial(_bias, rows=_GATE)
    )
    b_up: Weight | None = weight(
        "experts expert_mlp", f"{_FIRST}_bias", read=partial(_bias, rows=_UP)
    )
    b_down: Weight | None = weight("experts embed", f"{_SECOND}_bias")


@pytree
class Moe:
    router: Weight = weight("routes embed", "router.weight")
    router_bias: Weight = weight("routes", "router.bias")
    experts: GptOssExperts = part(GptOssExperts, "experts.")


@pytree
class Layer:
    attn_norm: Weight = weight("embed", "input_layernorm.weight", init="ones")
    attn: Attention = part(Attention, "self_attn.")
    mlp_norm: Weight = weight("embed", "post_attention_layernorm.weight", init="ones")
    mlp: Moe = part(Moe, "mlp.")


declare_params = partial(decoder.declare_params, moe_layer=Layer)


def config(hf: Mapping[str, Any]) -> Config:
    """Reads `config.json`; defaults are the published models'."""
    check(hf)
    quantized = refuse_quantized(hf, supported=("mxfp4",))
    choice(hf, "hidden_act", {"silu": "silu"}, "silu")
    choice(hf, "swiglu_limit", {7.0: 7.0}, 7.0)
    choice(hf, "swiglu_alpha", {1.702: 1.702}, 1.702)
    scaling = hf.get("rope_scaling") or (None if hf.get("rope_parameters") else _YARN)
    theta, biases = hf.get("rope_theta") or 150_000.0, hf.get("attention_bias", True)
    return llama.config(
        {**hf, "rope_theta": theta, "rope_scaling": scaling, "quantization_config": None},
        Config,
        windows=llama.windows(hf, full_every=2),
        qkv_bias=biases,
        o_bias=biases,
        mlp_bias=False,
        sinks=True,
        activation="swiglu_oai",
        moe_layers=(True,) * hf["num_hidden_layers"],
        router=Router(hf["num_local_experts"], hf["num_experts_per_tok"]),
        expert_mlp=hf["intermediate_size"],
        mxfp4=quantized is not None,
    )
