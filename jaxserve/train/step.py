"""One update: gradients of the loss, clipped, through AdamW."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxserve.train.config import OptimizerConfig
from jaxserve.train.data import Batch
from jaxserve.train.loss import Metrics
from sharding.tree import pytree

Loss = Callable[[Any, Any, Batch], tuple[Array, Metrics]]
"""(trainable, frozen, batch) -> what is minimised, and what is reported."""


@pytree
class TrainState:
    """What a run changes."""

    step: Array  # int32 []
    trainable: Any
    optimizer: Any


def optimizer(config: OptimizerConfig, steps: int, decayed: Any) -> optax.GradientTransformation:
    """AdamW with its schedule; `decayed` says for each leaf whether it decays."""
    warmup = min(config.warmup_steps, steps)
    rate = optax.warmup_cosine_decay_schedule(
        0.0 if warmup else config.learning_rate,
        config.learning_rate,
        warmup,
        max(steps, warmup + 1),
        config.learning_rate * config.final_ratio,
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(rate, b2=config.b2, weight_decay=config.weight_decay, mask=decayed),
    )


def start(tx: optax.GradientTransformation, trainable: Any) -> TrainState:
    return TrainState(jnp.int32(0), trainable, tx.init(trainable))


def train_step(
    tx: optax.GradientTransformation, loss: Loss, state: TrainState, frozen: Any, batch: Batch
) -> tuple[TrainState, Metrics]:
    """The state after one update; donate the one before."""
    (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.trainable, frozen, batch)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integers
        updates, opt = tx.update(grads, state.optimizer, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    metrics = metrics._replace(grad_norm=optax.tree.norm(grads))
    return TrainState(state.step + 1, trainable, opt), metrics


def compiled(tx: optax.GradientTransformation, loss: Loss) -> Callable[..., Any]:
    """`train_step` as a program that takes (state, frozen, batch)."""
    return jax.jit(partial(train_step, tx, loss), donate_argnums=0)
