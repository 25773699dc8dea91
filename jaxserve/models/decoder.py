"""The pre-norm decoder that Llama, Mistral, Qwen and Mixtral share; families only configure it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from jax import Array

from jaxserve.models.interleaved import Parts, run_parts
from jaxserve.models.layers import (
    Attention,
    Mlp,
    Moe,
    Underway,
    attention,
    mlp,
    moe_answer,
    moe_receive,
    moe_reply,
    moe_send,
    per_layer,
    runs,
)
from jaxserve.models.ops import Ops
from jaxserve.models.rope import Rope
from kernels_pallas.rope import Table
from kernels_pallas.weight import Weight
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
    activation: str = "silu"  # a key of kernels_pallas.linear.GATES
    moe_layers: tuple[bool, ...] = ()
    router: Router | None = None
    expert_mlp: int = 0

    def __post_init__(self):
        if bad := {k: n for k, n in self.sizes.items() if not isinstance(n, int) or n < 0}:
            raise ValueError(f"sizes must be whole numbers, not {bad}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads {self.heads} is no multiple of "
                f"num_key_value_heads {self.kv_heads}"
            )

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
            "routes": experts, "experts": experts, "expert_mlp": self.expert_mlp,
        }  # fmt: skip

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """KV heads, and lanes of a key and of a value."""
        return self.kv_heads, self.head_dim, self.head_dim

    @property
    def key_parts(self) -> tuple[int, ...]:
        """Lanes of a key that differ in kind, and so in size: a rounded cache scales them apart."""
        return (self.head_dim,)


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


def declare_params(cfg: Config, dense_layer: type = Layer, moe_layer: type = MoeLayer) -> Params:
    """The tree of `Weight` that a checkpoint of this config fills."""
    sparse = cfg.moe_layers or (False,) * cfg.num_layers
    kinds = [moe_layer if is_moe else dense_layer for is_moe in sparse]
    stacks = tuple(
        declare(cls, cfg, "model.layers.{layer}.", layers=layers) for cls, layers in runs(kinds)
    )
    return replace(declare(Params, cfg), stacks=stacks)


def grouped(
    cfg: Config,
    ops: Ops,
    rope: Table,
    p: Attention,
    x: Array,
    kv: Any,
    i: Array | int,
    residual: Array,
) -> tuple[Array, Any]:
    """Grouped-query attention with the usual scale and the layer's window."""
    how = {"scale": cfg.head_dim**-0.5, "window": per_layer(cfg.windows, i)}
    return attention(cfg, ops, rope, p, x, kv, i, residual=residual, **how)


def attend_half(
    cfg: Config,
    attend: Callable[..., tuple[Array, Any]],
    ops: Ops,
    rope: Table,
    p: Any,
    x: Array,
    kv: Any,
    i: Array | int,
) -> tuple[Array, Any]:
    h = ops.by_token.rms_norm(x, p.attn_norm, eps=cfg.norm_eps)
    return attend(cfg, ops, rope, p.attn, h, kv, i, x)


def mlp_send(
    cfg: Config, ops: Ops, p: Any, x: Array, kv: Any, i: Array | int
) -> tuple[Underway, Any]:
    """The MLP, or the way to the experts; the rest of a layer is the three below."""
    ops = ops.by_token
    h = ops.rms_norm(x, p.mlp_norm, eps=cfg.norm_eps)
    if isinstance(p.mlp, Mlp):
        return Underway(mlp(ops, p.mlp, h, cfg.activation, residual=x)), kv
    assert cfg.router is not None
    shared, visit, kv = moe_send(ops, cfg.router, p.mlp, h, kv, i, activation=cfg.activation)
    return Underway(x, shared, visit), kv


def mlp_answer(cfg: Config, ops: Ops, p: Any, sent: Underway) -> Underway:
    if sent.visit is None:
        return sent
    return moe_answer(ops.by_token, p.mlp, sent, activation=cfg.activation)


def mlp_reply(ops: Ops, answered: Underway) -> Underway:
    return answered if answered.visit is None else moe_reply(ops.by_token, answered)


def mlp_receive(ops: Ops, replied: Underway) -> Array:
    return replied.x if replied.visit is None else replied.x + moe_receive(ops.by_token, replied)


def mlp_half(cfg: Config, ops: Ops, p: Any, x: Array, kv: Any, i: Array | int) -> tuple[Array, Any]:
    """All of those, one after the other."""
    sent, kv = mlp_send(cfg, ops, p, x, kv, i)
    return mlp_receive(ops, mlp_reply(ops, mlp_answer(cfg, ops, p, sent))), kv


def forward(
    cfg: Config,
    params: Params,
    tokens: Array,  # [B, T]
    positions: Array,  # [B, T]
    ops: Ops,
    kv: Any = None,
    *,
    attend: Callable[..., tuple[Array, Any]] = grouped,
) -> tuple[Array, Any]:
    """Hidden states [B, T, D], and the cache with the keys of these tokens.

    Args:
        attend: the family's attention, called with config, ops, RoPE, weights, x, cache, layer and
            the residual stream that it adds to.
    """
    rope = cfg.rope.tables(positions)
    x = ops.embed(params.embed, tokens)
    parts = Parts(
        partial(attend_half, cfg, attend), partial(mlp_send, cfg), partial(mlp_answer, cfg),
        mlp_reply, mlp_receive,
    )  # fmt: skip
    x, kv = run_parts(ops, parts, rope, params.stacks, x, kv)
    return ops.rms_norm(x, params.final_norm, eps=cfg.norm_eps), kv


def logits(cfg: Config, params: Params, x: Array, ops: Ops) -> Array:  # [..., D] -> [..., V]
    return ops.linear(x, params.embed if params.lm_head is None else params.lm_head)
