"""What keeps a router from sending everybody to the same experts."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from moe.router import Router
from sharding.tree import pytree


@pytree
class Tally:
    """Routing of a forward pass, added up layer by layer."""

    balance: Array  # [], sum over layers of the balance loss
    load: Array  # [L, E], tokens that chose each expert


def empty_tally(num_layers: int, num_experts: int) -> Tally:
    return Tally(jnp.float32(0), jnp.zeros((num_layers, num_experts), jnp.float32))


def balance_loss(router: Router, scores: Array, load: Array, real: Array) -> Array:
    """E * sum over experts of (share of choices) * (mean probability): 1 where all are equal.

    As in Switch Transformers (Fedus et al., 2021), and for sigmoid scores as in DeepSeek-V3, whose
    probabilities are scores divided by their sum.

    Args:
        scores: [T, E], logits.
        load: [E], choices of real tokens.
        real: [T], 1.0 for tokens that count and 0.0 for padding.
    """
    scores = scores.astype(jnp.float32)
    if router.scoring == "softmax":
        p = jax.nn.softmax(scores)
    else:
        p = jax.nn.sigmoid(scores)
        p = p / p.sum(-1, keepdims=True)
    count = jnp.maximum(real.sum(), 1.0)
    mean = (p * real[:, None]).sum(0) / count
    return router.num_experts * jnp.sum(load / (count * router.top_k) * mean)


def record(real: Array) -> Callable[[Tally, Array | int, Router, Array, Array], Tally]:
    """What a model's `Ops.record` is while it trains; `real` [T] is as in `balance_loss`."""

    def add(tally: Tally, layer: Array | int, router: Router, scores: Array, ids: Array) -> Tally:
        chosen = jax.nn.one_hot(ids, router.num_experts).sum(1) * real[:, None]  # [T, E]
        load = chosen.sum(0)
        balance = balance_loss(router, scores, load, real)
        return Tally(tally.balance + balance, tally.load.at[layer].add(load))

    return add
