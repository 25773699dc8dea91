"""Which experts a token visits, and with what weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax


@dataclass(frozen=True)
class Router:
    """How scores become a choice.

    Attributes:
        num_experts: E.
        top_k: A, experts per token.
        scoring: "softmax" over all experts (Mixtral, Qwen3, DeepSeek-V2) or "sigmoid" of each
            (DeepSeek-V3).
        normalise: divide the chosen weights by their sum.
        scale: a factor on the weights, applied last.
        num_groups, top_groups: choose only among the `top_groups` best of `num_groups` equal
            groups of experts (DeepSeek's device-limited routing); 1 and 1 switch that off.
        group_score: a group is worth its best expert ("max", V2) or its best two ("top2", V3).
    """

    num_experts: int
    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"

    def __post_init__(self):
        if self.num_experts % self.num_groups or self.top_groups > self.num_groups:
            raise ValueError(f"{self}: groups must be equal, and no more chosen than there are")
        if not 0 < self.top_k <= self.num_experts // self.num_groups * self.top_groups:
            raise ValueError(f"{self}: top_k must be within the experts of the chosen groups")


def route(
    router: Router, logits: Array, bias: Array | None = None, noise: Array | None = None
) -> tuple[Array, Array]:
    """Expert ids [T, A] int32 and weights [T, A] float32 for router logits [T, E].

    Args:
        bias: [E], added to the scores for the choice only, never to the weights (the
            auxiliary-loss-free balancing of DeepSeek-V3).
        noise: [T, E], added to the logits, likewise for the choice only.
    """

    def scored(logits: Array) -> Array:
        return jax.nn.softmax(logits) if router.scoring == "softmax" else jax.nn.sigmoid(logits)

    logits = logits.astype(jnp.float32)
    scores = scored(logits)
    choice = scores if noise is None else scored(logits + noise)
    choice = choice if bias is None else choice + bias.astype(jnp.float32)
    if router.num_groups > 1:
        choice = _limit_to_groups(router, choice)
    ids = lax.top_k(choice, router.top_k)[1]
    weights = jnp.take_along_axis(scores, ids, axis=-1)
    if router.normalise:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return ids, weights * router.scale


def _limit_to_groups(router: Router, choice: Array) -> Array:  # [T, E] -> [T, E]
    """Takes every expert outside the best groups out of the choice."""
    groups = choice.reshape(choice.shape[0], router.num_groups, -1)
    best = lax.top_k(groups, 1 if router.group_score == "max" else 2)[0].sum(-1)
    kept = jax.nn.one_hot(lax.top_k(best, router.top_groups)[1], router.num_groups).sum(1)
    return jnp.where(kept[:, :, None] > 0, groups, -jnp.inf).reshape(choice.shape)
