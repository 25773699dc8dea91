"""Training a reward head on a frozen model: what it sees, and a logistic loss over step labels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxserve.models.family import Family
from jaxserve.models.reward_head import RewardHead, log_odds, new_reward_head
from jaxserve.train.data import Batch
from jaxserve.train.loss import num_experts, training_ops
from moe.losses import empty_tally

_ROWS = 256  # texts of one forward pass


class Judged(NamedTuple):
    """Texts as a model sees them, and which of their tokens end a step that has been judged."""

    hidden: np.ndarray  # [n, T, D]
    labels: np.ndarray  # float32 [n, T]: 1 right, 0 wrong
    judged: np.ndarray  # float32 [n, T]: 1 where there is a label


def judged(
    family: Family,
    cfg: Any,
    params: Any,
    texts: Sequence[Sequence[int]],
    step_token: int,
    labels: Sequence[Sequence[bool]],
) -> Judged:
    """Hidden states of tokenised texts; the k-th `step_token` of a text has its k-th label."""
    length = max(map(len, texts))
    tokens = np.zeros((len(texts), length), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    ends = tokens == step_token
    marks = np.zeros(tokens.shape, np.float32)
    marks[ends] = np.concatenate([np.asarray(x, np.float32) for x in labels])
    run = jax.jit(partial(_hidden, family, cfg, params))
    padded = np.pad(tokens, ((0, -len(texts) % _ROWS), (0, 0)))
    parts = [np.asarray(run(padded[i : i + _ROWS])) for i in range(0, len(padded), _ROWS)]
    return Judged(np.concatenate(parts)[: len(texts)], marks, ends.astype(np.float32))


def _hidden(family: Family, cfg: Any, params: Any, tokens: Array) -> Array:
    at = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    batch = Batch(tokens, tokens, tokens, jnp.ones_like(tokens), at)
    ops = training_ops(batch, jnp.float32, num_experts=num_experts(cfg))
    tally = empty_tally(cfg.num_layers, num_experts(cfg))
    return family.forward(cfg, params, tokens, at, ops, tally)[0]


def fit_reward_head(
    data: Judged,
    *,
    width: int = 512,
    steps: int = 3000,
    rows: int = 128,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> RewardHead:
    """A head for those texts. Right and wrong steps weigh the same in all.

    Raises:
        ValueError: there are only right steps, or only wrong ones.
    """
    share = float(data.labels.sum() / data.judged.sum())
    if share in (0.0, 1.0):
        raise ValueError(f"labels must be of both kinds; {share:.0%} of the steps are right")
    balance = np.where(data.labels > 0, 0.5 / share, 0.5 / (1 - share)).astype(np.float32)
    weights = data.judged * balance
    rng = np.random.default_rng(seed)
    tx = optax.adamw(optax.cosine_decay_schedule(learning_rate, steps), weight_decay=1e-3)
    head: Any = new_reward_head(data.hidden.shape[-1], width, seed)
    state, update = tx.init(head), jax.jit(partial(_update, tx))
    for _ in range(steps):
        some = rng.integers(0, len(weights), rows)
        head, state = update(head, state, data.hidden[some], data.labels[some], weights[some])
    return head


def _update(
    tx: optax.GradientTransformation,
    head: Any,
    state: Any,
    hidden: Array,
    labels: Array,
    weights: Array,
) -> tuple[Any, Any]:
    def loss(head: RewardHead) -> Array:
        each = optax.sigmoid_binary_cross_entropy(log_odds(head, hidden), labels)
        return (weights * each).sum() / jnp.maximum(weights.sum(), 1.0)

    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integers
        updates, state = tx.update(jax.grad(loss)(head), state, head)
    return optax.apply_updates(head, updates), state
