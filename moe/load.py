"""How much each expert is asked for: counted on the device, in layers as they come."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def no_load(num_layers: int, num_experts: int) -> Array:
    """Counts of one device to begin with, int32 [L, E]."""
    return jnp.zeros((num_layers, num_experts), jnp.int32)


def add_load(load: Array, layer: Array | int, ids: Array, num_rows: Array | int) -> Array:
    """Counts [L, E] with the choices ids [T, A] of a layer's first `num_rows` tokens.

    Ids that are no expert are not counted. Choices are compared with every expert rather than
    scattered to theirs, which a TPU would do one by one.
    """
    real = (jnp.arange(ids.shape[0]) < num_rows)[:, None, None]
    chosen = real & (ids[:, :, None] == jnp.arange(load.shape[1]))
    return load.at[layer].add(chosen.sum((0, 1), dtype=load.dtype))
