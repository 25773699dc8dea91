"""DeepSeek-V3 with its layer for multi-token prediction (technical report, 2024, section 2.2).

The layer sees a token's hidden state beside the embedding of the token that follows, and predicts
the one after that. Embedding and head are the model's own. Trained along, it makes the model look
further; served, it drafts. A checkpoint keeps it as layer `num_hidden_layers`, with copies of
embedding and head. `deepseek_v3` leaves it there.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxserve.models import decoder, mla
from jaxserve.models.deepseek_v3 import config
from jaxserve.models.layers import run_layers
from jaxserve.models.ops import Ops
from kernels_pallas.rope import Table
from kernels_pallas.weight import Weight
from sharding.tree import declare, part, pytree, weight

__all__ = ["Params", "config", "declare_params", "forward", "logits", "predict"]


@pytree
class Ahead:
    """The layer, as a stack of one."""

    token_norm: Weight = weight("embed", "enorm.weight", init="ones")
    hidden_norm: Weight = weight("embed", "hnorm.weight", init="ones")
    join: Weight = weight("embed two_states", "eh_proj.weight")
    block: mla.MoeLayer = part(mla.MoeLayer)
    final_norm: Weight = weight("embed", "shared_head.norm.weight", init="ones")


@pytree
class Params:
    main: decoder.Params  # what `deepseek_v3` serves
    ahead: Ahead


def declare_params(cfg: mla.Config) -> Params:
    """The tree of `Weight`, in which embedding and head have a second name."""
    main: Any = mla.declare_params(cfg)  # whose leaves are still `Weight`
    n = cfg.num_layers
    copies = (f"model.layers.{n}.embed_tokens.weight", f"model.layers.{n}.shared_head.head.weight")
    if main.lm_head is None:
        main = replace(main, embed=replace(main.embed, also=copies))
    else:
        embed, head = replace(main.embed, also=copies[:1]), replace(main.lm_head, also=copies[1:])
        main = replace(main, embed=embed, lm_head=head)
    return Params(main, declare(Ahead, cfg, "model.layers.{layer}.", layers=range(n, n + 1)))


def forward(
    cfg: mla.Config, params: Params, tokens: Array, positions: Array, ops: Ops, kv: Any = None
) -> tuple[Array, Any]:
    """As in `deepseek_v3`."""
    return mla.forward(cfg, params.main, tokens, positions, ops, kv)


def logits(cfg: mla.Config, params: Params, x: Array, ops: Ops) -> Array:
    """Of hidden states from either `forward` or `predict`."""
    return mla.logits(cfg, params.main, x, ops)


def predict(
    cfg: mla.Config,
    params: Params,
    hidden: Array,  # [B, T, D], from `forward`
    following: Array,  # [B, T], the token after each
    positions: Array,  # [B, T], of `hidden`
    ops: Ops,
    kv: Any = None,
) -> tuple[Array, Any]:
    """Hidden states [B, T, D] whose logits predict the token after `following`, and the cache."""
    table = cfg.rope.tables(positions)
    run = partial(_layer, cfg, ops, table, ops.embed(params.main.embed, following))
    return run_layers(ops, run, (params.ahead,), hidden, kv, first=cfg.num_layers)


def _layer(
    cfg: mla.Config,
    ops: Ops,
    table: Table,
    embedded: Array,
    p: Ahead,
    x: Array,
    kv: Any,
    i: Array | int,
) -> tuple[Array, Any]:
    both = (
        ops.rms_norm(embedded, p.token_norm, eps=cfg.norm_eps),
        ops.rms_norm(x, p.hidden_norm, eps=cfg.norm_eps),
    )
    x = ops.linear(jnp.concatenate(both, -1), p.join)
    x, kv = decoder.attend_half(cfg, mla.attention, ops, table, p.block, x, kv, i)
    x, kv = decoder.mlp_half(cfg, ops, p.block, x, kv, i)
    return ops.rms_norm(x, p.final_norm, eps=cfg.norm_eps), kv
