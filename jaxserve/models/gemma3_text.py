"""Gemma 3, text only: four norms a layer, and local layers with a RoPE of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxserve.models import decoder, llama, rope
from jaxserve.models.decoder import Params
from jaxserve.models.layers import Attention, Mlp, attention, mlp, per_layer, run_layers
from jaxserve.models.ops import Ops
from jaxserve.models.rope import Rope
from jaxserve.models.settings import ACTIVATIONS, check, choice
from kernels_pallas.rope import Table
from kernels_pallas.weight import Weight
from sharding.tree import part, pytree, weight

__all__ = ["config", "declare_params", "forward", "logits"]


@dataclass(frozen=True, kw_only=True)
class Config(decoder.Config):
    """A decoder whose `rope` turns global layers.

    Attributes:
        local_rope: turns layers with a window.
        query_dim: attention scores are divided by its root (`query_pre_attn_scalar`).
        final_soft_cap: logits become cap * tanh(logits / cap); 0 leaves them.
    """

    local_rope: Rope
    query_dim: float
    final_soft_cap: float


@pytree
class Layer:
    attn_norm: Weight = weight("embed", "input_layernorm.weight", init="zeros")
    attn: Attention = part(Attention, "self_attn.")
    attn_out_norm: Weight = weight("embed", "post_attention_layernorm.weight", init="zeros")
    mlp_norm: Weight = weight("embed", "pre_feedforward_layernorm.weight", init="zeros")
    mlp: Mlp = part(Mlp, "mlp.")
    mlp_out_norm: Weight = weight("embed", "post_feedforward_layernorm.weight", init="zeros")


declare_params = partial(decoder.declare_params, dense_layer=Layer)


def config(hf: Mapping[str, Any]) -> Config:
    check(hf)
    choice(hf, "use_bidirectional_attention", {None: False, False: False}, False)
    # Gemma 2 capped attention's scores; here the key is left over, and transformers ignores it.
    choice(hf, "attn_logit_softcapping", {None: 0.0}, None)
    head_dim = hf.get("head_dim") or 256
    local = {**hf, "rope_theta": hf.get("rope_local_base_freq", 10_000.0), "rope_scaling": None}
    return llama.config(
        {**hf, "head_dim": head_dim},
        Config,
        windows=llama.windows(hf, full_every=hf.get("sliding_window_pattern", 6)),
        rope=rope.from_hf({"rope_theta": 1_000_000.0, **hf}, head_dim, "full_attention"),
        local_rope=rope.from_hf(local, head_dim, "sliding_attention"),
        tied=hf.get("tie_word_embeddings", True),
        mlp_bias=False,
        qk_norm=True,
        norm_offset=1.0,
        activation=choice(hf, "hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
        query_dim=hf.get("query_pre_attn_scalar", 256),
        final_soft_cap=hf.get("final_logit_softcapping") or 0.0,
    )


def layer(
    cfg: Config,
    ops: Ops,
    tables: tuple[Table, Table],
    p: Layer,
    x: Array,
    kv: Any,
    i: Array | int,
) -> tuple[Array, Any]:
    norm = partial(ops.rms_norm, eps=cfg.norm_eps, offset=cfg.norm_offset)
    window = per_layer(cfg.windows, i)
    table = jax.tree.map(partial(jnp.where, window > 0), *tables)
    scale = cfg.query_dim**-0.5
    h = norm(x, p.attn_norm)
    o, kv = attention(cfg, ops, table, p.attn, h, kv, i, scale=scale, window=window)
    x = x + norm(o, p.attn_out_norm)
    h = norm(x, p.mlp_norm)
    return x + norm(mlp(ops, p.mlp, h, cfg.activation), p.mlp_out_norm), kv


def forward(
    cfg: Config, params: Params, tokens: Array, positions: Array, ops: Ops, kv: Any = None
) -> tuple[Array, Any]:
    """Hidden states [B, T, D] for tokens [B, T], and the cache with their keys."""
    tables = cfg.local_rope.tables(positions), cfg.rope.tables(positions)
    scale = jnp.asarray(cfg.embed**0.5, params.embed.dtype)  # rounded, as it was in training
    x = ops.embed(params.embed, tokens) * scale.astype(ops.dtype)
    x, kv = run_layers(ops, partial(layer, cfg, ops, tables), params.stacks, x, kv)
    return ops.rms_norm(x, params.final_norm, eps=cfg.norm_eps, offset=cfg.norm_offset), kv


def logits(cfg: Config, params: Params, x: Array, ops: Ops) -> Array:  # [..., D] -> [..., V]
    y = decoder.logits(cfg, params, x, ops)
    return cfg.final_soft_cap * jnp.tanh(y / cfg.final_soft_cap) if cfg.final_soft_cap else y
