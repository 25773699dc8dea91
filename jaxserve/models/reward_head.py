"""A process reward head: how likely a chain of steps is still right, by its hidden states so far.

Every token adds its evidence, two layers over the model's last hidden state of it, and a score is
the sigmoid of the sum. The trunk is that of generation, so a path carries one number along, a fork
copies it, and a score costs nothing more. The state of a step's last token alone says too little:
the model has no reason to keep its doubts there (ARCHITECTURE.md has the figures).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sharding.tree import pytree


@pytree
class RewardHead:
    w_in: Array  # [H, D]
    b_in: Array  # [H]
    w_out: Array  # [1, H]
    b_out: Array  # [1]
    prior: Array  # [], the log-odds of a chain before its first token


def new_reward_head(embed: int, width: int, seed: int) -> RewardHead:
    rng = np.random.default_rng(seed)
    return RewardHead(
        jnp.asarray(rng.standard_normal((width, embed), np.float32) / embed**0.5),
        jnp.zeros(width),
        jnp.asarray(rng.standard_normal((1, width), np.float32) / width),
        jnp.zeros(1),
        jnp.zeros(()),
    )


def evidence(head: RewardHead, x: Array) -> Array:
    """What each token's hidden state [..., D] adds to the log-odds: [...]."""
    hidden = jax.nn.relu(x.astype(jnp.float32) @ head.w_in.T + head.b_in)
    return (hidden @ head.w_out.T + head.b_out)[..., 0]


def log_odds(head: RewardHead, x: Array) -> Array:
    """Log-odds [..., T] that a chain is right so far, for its hidden states [..., T, D]."""
    return head.prior + jnp.cumsum(evidence(head, x), -1)
