"""The parts that decoders share: attention, gated MLP, mixture of experts, a run over layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxserve.models.ops import Ops
from kernels_pallas.linear import GATES
from kernels_pallas.rope import Table
from kernels_pallas.weight import Int8Weight, StackedWeight, Weight, as_array
from moe.experts import Experts
from moe.parallel import FarExperts
from moe.router import Router, route
from sharding.tree import part, pytree, weight


@pytree
class Attention:
    """Grouped-query attention, in the names that Llama's descendants store."""

    wq: Weight = weight("heads head_dim embed", "q_proj.weight")
    wk: Weight = weight("kv_heads head_dim embed", "k_proj.weight")
    wv: Weight = weight("kv_heads head_dim embed", "v_proj.weight")
    wo: Weight = weight("embed heads*head_dim", "o_proj.weight")
    bq: Weight | None = weight("heads head_dim", "q_proj.bias", when="qkv_bias")
    bk: Weight | None = weight("kv_heads head_dim", "k_proj.bias", when="qkv_bias")
    bv: Weight | None = weight("kv_heads head_dim", "v_proj.bias", when="qkv_bias")
    bo: Weight | None = weight("embed", "o_proj.bias", when="o_bias")
    q_norm: Weight | None = weight("head_dim", "q_norm.weight", init="ones", when="qk_norm")
    k_norm: Weight | None = weight("head_dim", "k_norm.weight", init="ones", when="qk_norm")
    sinks: Weight | None = weight("heads", "sinks", when="sinks")


def attention(
    cfg: Any,
    ops: Ops,
    rope: Table,
    p: Attention,
    x: Array,  # [B, T, D], normed
    kv: Any,
    i: Array | int,
    *,
    scale: float,
    window: Array | int = 0,
    residual: Array | None = None,  # [B, T, D]
) -> tuple[Array, Any]:
    """What attention says, added to a residual if there is one; the cache with this step's keys."""
    q, k, v = ops.linear(x, p.wq, p.wk, p.wv)
    q, k, v = add_bias(q, p.bq), add_bias(k, p.bk), add_bias(v, p.bv)
    turn = partial(ops.rotate, table=rope, eps=cfg.norm_eps, offset=cfg.norm_offset)
    q, k = turn(q, norm=p.q_norm), turn(k, norm=p.k_norm)
    o, kv = ops.attend(q, k, v, kv, i, scale=scale, window=window, sinks=p.sinks)
    return add_bias(ops.linear(join_heads(o), p.wo, residual=residual), p.bo), kv


def join_heads(x: Array) -> Array:  # [..., N, H] -> [..., N * H]
    return x.reshape(*x.shape[:-2], -1)


def add_bias(x: Array, b: Weight | None) -> Array:
    return x if b is None else x + as_array(b).astype(x.dtype)


@pytree
class Mlp:
    w_gate: Weight = weight("mlp embed", "gate_proj.weight")
    w_up: Weight = weight("mlp embed", "up_proj.weight")
    w_down: Weight = weight("embed mlp", "down_proj.weight")
    b_gate: Weight | None = weight("mlp", "gate_proj.bias", when="mlp_bias")
    b_up: Weight | None = weight("mlp", "up_proj.bias", when="mlp_bias")
    b_down: Weight | None = weight("embed", "down_proj.bias", when="mlp_bias")


def mlp(
    ops: Ops, p: Mlp, x: Array, activation: str, residual: Array | None = None
) -> Array:  # [B, T, D] -> [B, T, D]
    """The gated MLP of x, added to a residual if there is one."""
    if p.b_gate is None:
        hidden = ops.gated_linear(x, p.w_gate, p.w_up, activation=activation)
        return ops.linear(hidden, p.w_down, residual=residual)
    gate, up = ops.linear(x.astype(jnp.float32), p.w_gate, p.w_up)
    hidden = GATES[activation](add_bias(gate, p.b_gate), add_bias(up, p.b_up)).astype(x.dtype)
    return add_bias(ops.linear(hidden, p.w_down, residual=residual), p.b_down)


@pytree
class Moe:
    """Routed experts: the names of Qwen and DeepSeek."""

    router: Weight = weight("routes embed", "gate.weight")
    experts: Experts = part(Experts, "experts.")


class Underway(NamedTuple):
    """A layer's tokens on their way to experts and back; another half computes meanwhile.

    Attributes:
        x: the residual stream [B, T, D] that answers will be added to.
        shared: what an MLP that every token visits says [B, T, D].
        visit: as `moe.parallel.FarExperts` makes it. Where experts are near, their answers [T, D];
            where there are none, None, and x is complete.
    """

    x: Array
    shared: Array | None = None
    visit: Any = None


def moe_send(
    ops: Ops, router: Router, p: Any, x: Array, kv: Any, i: Array | int, *, activation: str
) -> tuple[Array | None, Any, Any]:
    """Sends normed x [B, T, D] to its experts: `Underway.shared` and `visit`, and the cache.

    `p` may carry `router_bias`, `correction` and `shared`.
    """
    flat = x.reshape(-1, x.shape[-1])
    scores = ops.linear(flat.astype(jnp.float32), p.router)
    scores = add_bias(scores, getattr(p, "router_bias", None))
    noise = ops.disturb(kv, i, scores)
    ids, weights = route(router, scores, getattr(p, "correction", None), noise)
    kv = ops.record(kv, i, router, scores, ids)
    if isinstance(ops.experts, FarExperts):
        visit = ops.experts.send(flat, ids, weights, p.experts)
    else:
        visit = ops.experts(flat, ids, weights, p.experts, activation=activation)
    shared = getattr(p, "shared", None)
    return None if shared is None else mlp(ops, shared, x, activation), visit, kv


def moe_answer(ops: Ops, p: Any, sent: Underway, *, activation: str) -> Underway:
    """What this device's experts say to the rows that have come, whoever sent them."""
    if not isinstance(ops.experts, FarExperts):
        return sent
    visit = ops.experts.answer(sent.visit, p.experts, activation=activation)
    return sent._replace(visit=visit)


def moe_reply(ops: Ops, answered: Underway) -> Underway:
    """Answers on their way back."""
    if not isinstance(ops.experts, FarExperts):
        return answered
    return answered._replace(visit=ops.experts.reply(answered.visit))


def moe_receive(ops: Ops, replied: Underway) -> Array:
    """What all experts say [B, T, D]."""
    x, shared, y = replied
    if isinstance(ops.experts, FarExperts):
        y = ops.experts.receive(y, x.shape[0] * x.shape[1], x.dtype)
    y = y.reshape(x.shape)
    return y if shared is None else y + shared


Layer = Callable[[Any, Array, Any, Array | int], tuple[Array, Any]]


def run_layers(
    ops: Ops, layer: Layer, stacks: Sequence[Any], x: Array, kv: Any, *, first: int = 0
) -> tuple[Array, Any]:
    """Runs `layer(p, x, kv, i)` over every layer of every stack; i counts on from `first`.

    A stack of many is a scan, stacks of one are unrolled; `ops.layers` says how weights are taken.
    Whatever `kv` is, it is carried from layer to layer.
    """
    if ops.layers == "recomputed":
        layer = jax.checkpoint(layer)
    for stack in stacks:
        n = jax.tree.leaves(stack)[0].shape[0]
        if n == 1:
            x, kv = layer(layer_of(stack, 0), x, kv, first)
        elif ops.layers == "indexed":
            x, kv = _scan_indices(layer, stack, x, kv, first, n)
        else:
            x, kv = _scan_slices(layer, stack, x, kv, first)
        first += n
    return x, kv


def _scan_slices(layer: Layer, stack: Any, x: Array, kv: Any, first: int) -> tuple[Array, Any]:
    def body(carry, p):
        x, kv, i = carry
        return (*layer(p, x, kv, i), i + 1), None

    return lax.scan(body, (x, kv, jnp.int32(first)), stack)[0][:2]


def _scan_indices(
    layer: Layer, stack: Any, x: Array, kv: Any, first: int, n: int
) -> tuple[Array, Any]:
    def body(carry, i):
        x, kv = carry
        return layer(layer_of(stack, i), x, kv, first + i), None

    return lax.scan(body, (x, kv), jnp.arange(n, dtype=jnp.int32))[0]


def layer_of(stack: Any, i: Array | int) -> Any:
    """Layer i of a stack: vectors are sliced out, which is cheap; the rest stays where it is."""

    def take(w: Array | Int8Weight) -> Weight:
        return StackedWeight(w, i) if w.ndim > 2 else StackedWeight(w, i).take()

    return jax.tree.map(take, stack, is_leaf=lambda w: isinstance(w, Int8Weight))


def restack(params: Any, sizes: Sequence[int]) -> Any:
    """The same weights with their layers in stacks of these sizes; copies every layer.

    Stacks of many are scanned and compile once; stacks of one are unrolled. Arrays of the host stay
    there.

    Raises:
        ValueError: the sizes do not add up, or a stack would join layers of different kinds.
    """
    layers = [layer for stack in params.stacks for layer in _split(stack)]
    if sum(sizes) != len(layers) or min(sizes) < 1:
        raise ValueError(
            f"sizes {tuple(sizes)} must be positive and add up to {len(layers)} layers"
        )
    stacks, first = [], 0
    for size in sizes:
        group = layers[first : first + size]
        if len({jax.tree.structure(layer) for layer in group}) > 1:
            raise ValueError(
                f"layers {first} to {first + size - 1} differ, so they cannot be stacked"
            )
        stacks.append(jax.tree.map(_joined, *group))
        first += size
    return dataclasses.replace(params, stacks=tuple(stacks))


def _joined(*layers: Any) -> Any:
    on_host = isinstance(layers[0], np.ndarray)
    return np.concatenate(layers) if on_host else jnp.concatenate(layers)


def _split(stack: Any) -> list[Any]:
    n = jax.tree.leaves(stack)[0].shape[0]
    return [jax.tree.map(lambda w, i=i: w[i : i + 1], stack) for i in range(n)]


def per_layer(values: Sequence[int], i: Array | int) -> Array | int:
    """A setting of layer i: a constant where all layers agree, so that kernels can specialise."""
    if len(set(values)) == 1:
        return values[0]
    return values[i] if isinstance(i, int) else jnp.asarray(values)[i]


def runs(kinds: Sequence[Any]) -> list[tuple[Any, range]]:
    """Maximal runs of equal kinds: each becomes one stack."""
    out: list[tuple[Any, range]] = []
    for i, kind in enumerate(kinds):
        if out and out[-1][0] == kind:
            out[-1] = (kind, range(out[-1][1].start, i + 1))
        else:
            out.append((kind, range(i, i + 1)))
    return out
