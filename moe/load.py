"""How much each expert is asked for: counted on the device, read without a wait."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array


def no_load(num_layers: int, num_experts: int) -> Array:
    """Counts of one device to begin with, int32 [L, E]."""
    return jnp.zeros((num_layers, num_experts), jnp.int32)


def add_load(load: Array, layer: Array | int, ids: Array, num_rows: Array | int) -> Array:
    """Counts [L, E] with the choices ids [T, A] of a layer's first `num_rows` tokens.

    Ids that are no expert are not counted.
    """
    real = (jnp.arange(ids.shape[0]) < num_rows)[:, None] & (ids >= 0)
    return load.at[layer, jnp.where(real, ids, load.shape[1])].add(1, mode="drop")


def take_load(load: Array) -> tuple[Array, Array]:
    """The sum over devices of [n, L, E], on its way to the host, and zeros to go on with.

    `load` is donated. Nothing waits: the sum's `is_ready()` says when reading it does not either.
    """
    total, fresh = _take(load)
    total.copy_to_host_async()
    return total, fresh


@partial(jax.jit, donate_argnums=0)
def _take(load: Array) -> tuple[Array, Array]:
    return load.sum(0), jnp.zeros_like(load)
