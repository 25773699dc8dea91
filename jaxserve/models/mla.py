"""Multi-head latent attention (DeepSeek-V2, 2024), and the decoder that V2 and V3 share around it.

Keys and values of all heads are linear in one latent row per token, which is all that the cache
keeps. Queries are taken to the latent space (q @ W_UK), attention runs there with a single KV head
whose values are the first lanes of its keys, and each head's output is taken back (o @ W_UV).
That absorbed form reads little and computes much, which suits decoding. A step that begins its
sequences has nothing to read, and makes every head's keys and values instead (`Ops.attend_made`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxserve.models import decoder, llama, rope
from jaxserve.models.decoder import logits
from jaxserve.models.layers import Mlp, add_bias, join_heads
from jaxserve.models.ops import Ops
from jaxserve.models.settings import choice
from kernels_pallas.rope import Table
from kernels_pallas.weight import Weight, as_array
from moe.experts import Experts
from moe.router import Router
from sharding.tree import part, pytree, weight

__all__ = ["Config", "config", "declare_params", "forward", "logits"]

LATENT_EPS = 1e-6
"""Of the norms inside attention, whatever `rms_norm_eps` says: no checkpoint can set it."""


@dataclass(frozen=True, kw_only=True)
class Config(decoder.Config):
    """A decoder whose `head_dim` is nope_dim + rope_dim.

    Attributes:
        q_lora: rank of the queries' own latent; 0 projects them in one step.
        kv_lora: rank R of the latent that the cache keeps.
        nope_dim, rope_dim, v_dim: lanes of a head's query without and with rotation, of its value.
        shared_mlp: width of the MLP that every token visits beside its experts.
        interleaved: rotated pairs are neighbours.
        correction: the router has a bias for the choice alone.
    """

    q_lora: int
    kv_lora: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    shared_mlp: int
    interleaved: bool = True
    correction: bool = False

    @property
    def full_q(self) -> bool:
        return not self.q_lora

    @property
    def q_lora_bias(self) -> bool:
        return bool(self.q_lora) and self.qkv_bias

    @property
    def sizes(self) -> Mapping[str, int]:
        return {
            **super().sizes, "q_lora": self.q_lora, "kv_lora": self.kv_lora,
            "kv_row": self.kv_lora + self.rope_dim, "nope_dim": self.nope_dim,
            "v_dim": self.v_dim, "shared_mlp": self.shared_mlp, "two_states": 2 * self.embed,
        }  # fmt: skip

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """One KV head; values are lanes of its keys."""
        return 1, self.kv_lora + self.rope_dim, 0

    @property
    def key_parts(self) -> tuple[int, ...]:
        return self.kv_lora, self.rope_dim


def _keys(get: Callable[[str], np.ndarray], name: str, cfg: Config) -> np.ndarray:
    return _kv_b(get, name, cfg)[:, : cfg.nope_dim].swapaxes(1, 2)


def _values(get: Callable[[str], np.ndarray], name: str, cfg: Config) -> np.ndarray:
    return _kv_b(get, name, cfg)[:, cfg.nope_dim :]


def _put_keys(tensors: dict[str, np.ndarray], name: str, cfg: Config, x: np.ndarray) -> None:
    _begin(tensors, name, cfg, x)[:, : cfg.nope_dim] = x.swapaxes(1, 2)


def _put_values(tensors: dict[str, np.ndarray], name: str, cfg: Config, x: np.ndarray) -> None:
    _begin(tensors, name, cfg, x)[:, cfg.nope_dim :] = x


def _begin(tensors: dict[str, np.ndarray], name: str, cfg: Config, x: np.ndarray) -> np.ndarray:
    lanes = cfg.nope_dim + cfg.v_dim
    flat = tensors.setdefault(name, np.empty((cfg.heads * lanes, cfg.kv_lora), x.dtype))
    return flat.reshape(cfg.heads, lanes, cfg.kv_lora)


def _kv_b(get: Callable[[str], np.ndarray], name: str, cfg: Config) -> np.ndarray:
    lanes, x = cfg.nope_dim + cfg.v_dim, get(name)
    if x.shape != (cfg.heads * lanes, cfg.kv_lora):  # as many values may lie the other way
        raise ValueError(f"{list(x.shape)}, expected {[cfg.heads * lanes, cfg.kv_lora]}")
    return x.reshape(cfg.heads, lanes, cfg.kv_lora)


_KV_B = "kv_b_proj.weight"  # both halves of every head, one after the other


@pytree
class Attention:
    wq: Weight | None = weight("heads head_dim embed", "q_proj.weight", when="full_q")
    wq_a: Weight | None = weight("q_lora embed", "q_a_proj.weight", when="q_lora")
    bq_a: Weight | None = weight("q_lora", "q_a_proj.bias", when="q_lora_bias")
    q_norm: Weight | None = weight("q_lora", "q_a_layernorm.weight", init="ones", when="q_lora")
    wq_b: Weight | None = weight("heads head_dim q_lora", "q_b_proj.weight", when="q_lora")
    wkv_a: Weight = weight("kv_row embed", "kv_a_proj_with_mqa.weight")
    bkv_a: Weight | None = weight("kv_row", "kv_a_proj_with_mqa.bias", when="qkv_bias")
    kv_norm: Weight = weight("kv_lora", "kv_a_layernorm.weight", init="ones")
    # stored with nope_dim first; here what is contracted comes last, which bfloat16 on CPU needs
    w_uk: Weight = weight("heads kv_lora nope_dim", _KV_B, read=_keys, write=_put_keys)
    w_uv: Weight = weight(
        "heads v_dim kv_lora", "kv_b_proj.weight", read=_values, write=_put_values
    )
    wo: Weight = weight("embed heads*v_dim", "o_proj.weight")
    bo: Weight | None = weight("embed", "o_proj.bias", when="o_bias")


@pytree
class SharedMlp(Mlp):
    w_gate: Weight = weight("shared_mlp embed", "gate_proj.weight")
    w_up: Weight = weight("shared_mlp embed", "up_proj.weight")
    w_down: Weight = weight("embed shared_mlp", "down_proj.weight")
    b_gate: Weight | None = weight("shared_mlp", "gate_proj.bias", when="mlp_bias")
    b_up: Weight | None = weight("shared_mlp", "up_proj.bias", when="mlp_bias")


@pytree
class Moe:
    router: Weight = weight("routes embed", "gate.weight")
    correction: Weight | None = weight(
        "routes", "gate.e_score_correction_bias", dtype="float32", init="zeros", when="correction"
    )
    experts: Experts = part(Experts, "experts.")
    shared: SharedMlp | None = part(SharedMlp, "shared_experts.", when="shared_mlp")


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


def config(hf: Mapping[str, Any], router: Router, **more: Any) -> Config:
    """What V2 and V3 spell alike; `moe_layer_freq` is refused where it would mean something."""
    choice(hf, "moe_layer_freq", {1: 1, None: 1}, 1)
    nope, rotated, n = hf["qk_nope_head_dim"], hf["qk_rope_head_dim"], hf["num_hidden_layers"]
    return llama.config(
        {**hf, "head_dim": nope + rotated},
        Config,
        kv_heads=1,
        rope=rope.from_hf(hf, rotated),
        q_lora=hf.get("q_lora_rank") or 0,
        kv_lora=hf["kv_lora_rank"],
        nope_dim=nope,
        rope_dim=rotated,
        v_dim=hf["v_head_dim"],
        router=router,
        expert_mlp=hf["moe_intermediate_size"],
        shared_mlp=hf["moe_intermediate_size"] * (hf.get("n_shared_experts") or 0),
        moe_layers=tuple(i >= hf["first_k_dense_replace"] for i in range(n)),
        **more,
    )


def attention(
    cfg: Config,
    ops: Ops,
    table: Table,
    p: Attention,
    x: Array,
    kv: Any,
    i: Array | int,
    residual: Array,
) -> tuple[Array, Any]:
    """What attention says of x [B, T, D], added to the residual stream.

    Where tokens are spread over devices, latents are gathered on the way to the heads, and what
    heads say is exchanged on the way back: two collectives.
    """
    q, row = _latents(cfg, ops.by_token, p, x)
    if ops.spread is not None:
        both = ops.spread.gather(jnp.concatenate([q, row], -1))
        q, row = jnp.split(both, [q.shape[-1]], -1)
    q = ops.linear(q, p.wq if p.wq is not None else p.wq_b)
    nope, rotated = jnp.split(q, [cfg.nope_dim], -1)
    latent, k_rope = jnp.split(row[:, :, None], [cfg.kv_lora], -1)
    turn = partial(ops.rotate, table=table, interleaved=cfg.interleaved)
    row = jnp.concatenate([latent, turn(k_rope)], -1)
    form = _absorbed if ops.attend_made is None else _expanded
    o, kv = form(cfg, ops, p, nope, turn(rotated), row, kv, i)
    if ops.spread is not None:
        o = ops.spread.to_tokens(o)
    return add_bias(ops.by_token.linear(join_heads(o), p.wo, residual=residual), p.bo), kv


def _latents(cfg: Config, ops: Ops, p: Attention, x: Array) -> tuple[Array, Array]:
    """What heads make queries of [B, T, q_lora], or x itself, and the row to keep [B, T, W], whose
    last lanes are still to be rotated."""
    q = x
    if p.wq_a is not None:
        q = ops.rms_norm(add_bias(ops.linear(x, p.wq_a), p.bq_a), p.q_norm, eps=LATENT_EPS)
    latent, k_rope = jnp.split(add_bias(ops.linear(x, p.wkv_a), p.bkv_a), [cfg.kv_lora], -1)
    latent = ops.rms_norm(latent, p.kv_norm, eps=LATENT_EPS)
    return q, jnp.concatenate([latent, k_rope], -1)


def _absorbed(
    cfg: Config,
    ops: Ops,
    p: Attention,
    q: Array,  # [B, T, N, nope_dim]
    q_rope: Array,  # [B, T, N, rope_dim]
    row: Array,  # [B, T, 1, W]
    kv: Any,
    i: Array | int,
) -> tuple[Array, Any]:
    """What heads say [B, T, N, v_dim], by attention to latents."""
    q = jnp.concatenate([_per_head("btnh,nrh->btnr", q, p.w_uk), q_rope], -1)
    o, kv = ops.attend(q, row, None, kv, i, scale=_scale(cfg), value_dim=cfg.kv_lora)
    return _per_head("btnr,nhr->btnh", o, p.w_uv), kv


def _expanded(
    cfg: Config,
    ops: Ops,
    p: Attention,
    q: Array,
    q_rope: Array,
    row: Array,
    kv: Any,
    i: Array | int,
) -> tuple[Array, Any]:
    """As `_absorbed`, by attention to keys of nope_dim + rope_dim lanes and values of v_dim."""

    def make(rows: Array) -> tuple[Array, Array]:
        latent, rope = jnp.split(rows, [cfg.kv_lora], -1)
        k = _per_head("btr,nrh->btnh", latent, p.w_uk)
        rope = jnp.broadcast_to(rope[:, :, None], (*k.shape[:-1], cfg.rope_dim))
        return jnp.concatenate([k, rope], -1), _per_head("btr,nhr->btnh", latent, p.w_uv)

    assert ops.attend_made is not None
    q = jnp.concatenate([q, q_rope], -1)
    return ops.attend_made(q, row, make, kv, i, scale=_scale(cfg))


def _scale(cfg: Config) -> float:
    return cfg.head_dim**-0.5 * cfg.rope.score_scale


def _per_head(spec: str, x: Array, w: Weight) -> Array:
    w = as_array(w)
    return jnp.einsum(spec, x.astype(w.dtype), w, preferred_element_type=jnp.float32).astype(
        x.dtype
    )


declare_params = partial(decoder.declare_params, dense_layer=Layer, moe_layer=MoeLayer)
forward = partial(decoder.forward, attend=attention)
