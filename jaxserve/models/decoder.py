"""The pre-norm decoder that Llama, Mistral, Qwen and Mixtral share; families only configure it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from jax import Array

from jaxserve.models.layers import Attention, Mlp, Moe, attention, mlp, moe, per_layer, run_layers, runs
from jaxserve.models.ops import Ops
from jaxserve.models.rope import Rope
from kernels_pallas.op import Weight
from moe.router import Router
from sharding.tree import declare, part, pytree, weight


@dataclass(frozen=True)
class Config:
    """Sizes and switches; every field is what the checkpoint says.

    Attributes:
        windows: per layer, how far back attention sees; 0 is everything.
        moe_layers: per layer, whether its MLP is a mixture of experts.
        router, expert_mlp: of those mixtures.
    """

    vocab: int
    embed: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope
    norm_eps: float
    windows: tuple[int, ...]
    max_len: int
    tied: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sinks: bool = False
    norm_offset: float = 0.0
    activation: str = "silu"
    moe_layers: tuple[bool, ...] = ()
    router: Router | None = None
    expert_mlp: int = 0

    @property
    def num_layers(self) -> int:
        return len(self.windows)

    @property
    def untied(self) -> bool:
        return not self.tied

    @property
    def sizes(self) -> Mapping[str, int]:
        experts = self.router.num_experts if self.router else 0
        return {
            "vocab": self.vocab, "embed": self.embed, "mlp": self.mlp, "heads": self.heads,
            "kv_heads": self.kv_heads, "head_dim": self.head_dim,
            "experts": experts, "expert_mlp": self.expert_mlp,
        }  # fmt: skip

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """KV heads, and lanes of a key and of a value."""
        return self.kv_heads, self.head_dim, self.head_dim


@pytree
class Layer:
    attn_norm: Weight = weight("embed", "input_layernorm.weight", init="ones")
    attn: Attention = part(Attention, "self_attn.")
    mlp_norm: Weight = weight("embed", "post_attention_layernorm.weight", init="ones")
    mlp: Mlp = part(Mlp, "mlp.")


@pytree
class MoeLayer:
    attn_norm: Weight = weight("embed", "input_layernorm.weight", init="ones")
    attn: Attention = part(Attention, "self_attn.")
    mlp_norm: Weight = weight("embed", "post_attention_layernorm.weight", init="ones")
    mlp: Moe = part(Moe, "mlp.")


@pytree
class Params:
    embed: Array = weight("vocab embed", "model.embed_tokens.weight")
    stacks: tuple[Layer | MoeLayer, ...]
    final_norm: Array = weight("embed", "model.norm.weight", init="ones")
    lm_head: Array | None = weight("vocab embed", "lm_head.weight", when="untied")  # None: tied


def declare_params(cfg: Config, moe_layer: type = MoeLayer) -> Params:
    """The tree of `Weight` that a checkpoint of this config fills."""
    kinds = [moe_layer if i < len(cfg.moe_layers) and cfg.moe_layers[i] else Layer for i in range(cfg.num_layers)]
    stacks = tuple(declare(cls, cfg, "model.layers.{layer}.", layers=layers) for cls, layers in runs(kinds))
    return replace(declare(Params, cfg), stacks=stacks)


def layer(cfg: Config, ops: Ops, rope: tuple[Array, Array], p: Any, x: Array, kv: Any, i: Array | int):
    h = ops.rms_norm(x, p.attn_norm, eps=cfg.norm_eps)
    scale = cfg.head_dim**-0.5
    o, kv = attention(cfg, ops, rope, p.attn, h, kv, i, scale=scale, window=per_layer(cfg.windows, i))
    x = x + o
    h = ops.rms_norm(x, p.mlp_norm, eps=cfg.norm_eps)
    if isinstance(p.mlp, Mlp):
        return x + mlp(ops, p.mlp, h, cfg.activation), kv
    return x + moe(ops, cfg.router, p.mlp, h, cfg.activation), kv


def forward(cfg: Config, params: Params, tokens: Array, positions: Array, ops: Ops, kv: Any = None):
    """Hidden states [B, T, D] for tokens [B, T] at positions [B, T], and the cache with their keys."""
    rope = cfg.rope.tables(positions)
    x = ops.embed(params.embed, tokens)
    x, kv = run_layers(partial(layer, cfg, ops, rope), params.stacks, x, kv)
    return ops.rms_norm(x, params.final_norm, eps=cfg.norm_eps), kv


def logits(cfg: Config, params: Params, x: Array, ops: Ops) -> Array:  # [..., D] -> [..., V]
    return ops.linear(x, params.embed if params.lm_head is None else params.lm_head)
