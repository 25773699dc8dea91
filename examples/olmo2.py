"""OLMo 2: it norms what a block adds rather than what it reads, and queries across all heads.

The worked example of CONTRIBUTING.md: a dense family that is more than a configuration of the
shared decoder. As `jaxserve/models/olmo2.py`, and named in `FAMILIES`, it would be served.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from jax import Array

from jaxserve.models import decoder, llama
from jaxserve.models.decoder import Config, Params, logits
from jaxserve.models.layers import Mlp, join_heads, mlp, run_layers
from jaxserve.models.ops import Ops
from kernels_pallas.rope import Table
from kernels_pallas.weight import Weight, as_array
from sharding.tree import part, pytree, weight

__all__ = ["config", "declare_params", "forward", "logits"]


@pytree
class Attention:
    wq: Weight = weight("heads head_dim embed", "q_proj.weight")
    wk: Weight = weight("kv_heads head_dim embed", "k_proj.weight")
    wv: Weight = weight("kv_heads head_dim embed", "v_proj.weight")
    wo: Weight = weight("embed heads*head_dim", "o_proj.weight")
    q_norm: Weight = weight("heads head_dim", "q_norm.weight", init="ones")
    k_norm: Weight = weight("kv_heads head_dim", "k_norm.weight", init="ones")


@pytree
class Layer:
    attn: Attention = part(Attention, "self_attn.")
    attn_out_norm: Weight = weight("embed", "post_attention_layernorm.weight", init="ones")
    mlp: Mlp = part(Mlp, "mlp.")
    mlp_out_norm: Weight = weight("embed", "post_feedforward_layernorm.weight", init="ones")


declare_params = partial(decoder.declare_params, dense_layer=Layer)


def config(hf: Mapping[str, Any]) -> Config:
    if hf.get("attention_bias"):
        raise ValueError("attention_bias is set, and no OLMo 2 that we know has biases")
    return llama.config(hf, mlp_bias=False)


def norm_heads(cfg: Config, ops: Ops, x: Array, scale: Weight) -> Array:  # [B, T, N, H]
    flat = x.reshape(*x.shape[:2], -1)
    return ops.rms_norm(flat, as_array(scale).reshape(-1), eps=cfg.norm_eps).reshape(x.shape)


def attention(
    cfg: Config, ops: Ops, rope: Table, p: Attention, x: Array, kv: Any, i: Array | int
) -> tuple[Array, Any]:
    q, k, v = ops.linear(x, p.wq, p.wk, p.wv)
    q = ops.rotate(norm_heads(cfg, ops, q, p.q_norm), rope)
    k = ops.rotate(norm_heads(cfg, ops, k, p.k_norm), rope)
    o, kv = ops.attend(q, k, v, kv, i, scale=cfg.head_dim**-0.5)
    return ops.linear(join_heads(o), p.wo), kv


def layer(
    cfg: Config, ops: Ops, rope: Table, p: Layer, x: Array, kv: Any, i: Array | int
) -> tuple[Array, Any]:
    norm = partial(ops.rms_norm, eps=cfg.norm_eps)
    o, kv = attention(cfg, ops, rope, p.attn, x, kv, i)
    x = x + norm(o, p.attn_out_norm)
    return x + norm(mlp(ops, p.mlp, x, cfg.activation), p.mlp_out_norm), kv


def forward(
    cfg: Config, params: Params, tokens: Array, positions: Array, ops: Ops, kv: Any = None
) -> tuple[Array, Any]:
    """Hidden states [B, T, D] for tokens [B, T], and the cache with their keys."""
    x = ops.embed(params.embed, tokens)
    step = partial(layer, cfg, ops, cfg.rope.tables(positions))
    x, kv = run_layers(ops, step, params.stacks, x, kv)
    return ops.rms_norm(x, params.final_norm, eps=cfg.norm_eps), kv
