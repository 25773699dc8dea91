"""A step's tokens of many sequences, and how their keys and values lie in pages."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax


class Ragged(NamedTuple):
    """Which tokens of a step belong to whom. All int32.

    Sequence r owns tokens row_starts[r] to row_starts[r + 1] of the step, and they are the last
    ones of its kv_lens[r]. Entries from num_seqs on are padding.
    """

    row_starts: Any  # [R + 1]
    kv_lens: Any  # [R], with this step's tokens
    tables: Any  # [R, M], pages of each sequence in order
    num_seqs: Any  # []


def locate(batch: Ragged, num_tokens: int) -> tuple[Array, Array]:
    """The sequence of each token [T], and its position there (negative: padding)."""
    t = jnp.arange(num_tokens, dtype=jnp.int32)
    row = jnp.searchsorted(batch.row_starts[1:], t, side="right").astype(jnp.int32)
    real = row < batch.num_seqs
    row = jnp.minimum(row, batch.kv_lens.shape[0] - 1)
    position = batch.kv_lens[row] - (batch.row_starts[row + 1] - t)
    return row, jnp.where(real, position, -1)


def owners(batch: Ragged, num_tokens: int) -> tuple[Array, Array]:
    """As `locate`, by comparing with every row: one fusion on a GPU, where a search would be a loop
    of kernels."""
    t = jnp.arange(num_tokens, dtype=jnp.int32)
    row = jnp.sum(batch.row_starts[1:] <= t[:, None], 1, dtype=jnp.int32)
    real = row < batch.num_seqs
    row = jnp.minimum(row, batch.kv_lens.shape[0] - 1)
    position = batch.kv_lens[row] - (batch.row_starts[row + 1] - t)
    return row, jnp.where(real, position, -1)


def write(k_pages, v_pages, k, v, layer, batch: Ragged, row: Array, position: Array):
    """The caches with this step's keys and values in their slots; padding goes nowhere.

    Pages may have more lanes than keys, since a TPU wants whole ones: those become 0.
    """
    P, Z = k_pages.shape[1], k_pages.shape[3]
    page = jnp.where(position >= 0, batch.tables[row, jnp.maximum(position, 0) // Z], P)
    where = (layer, page, slice(None), position % Z)
    k_pages = k_pages.at[where].set(to_stored(k, k_pages), mode="drop")
    if v_pages is not None:
        v_pages = v_pages.at[where].set(to_stored(v, v_pages), mode="drop")
    return k_pages, v_pages


def to_stored(x: Array, pages: Array) -> Array:
    """x as the cache keeps it: uint16 is bfloat16, which jax 0.10 scatters slowly on CPU."""
    if x.shape[-1] < pages.shape[-1]:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, pages.shape[-1] - x.shape[-1])))
    if pages.dtype == jnp.uint16:
        return lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    return x.astype(pages.dtype)


def from_stored(x: Array) -> Array:
    if x.dtype == jnp.uint16:
        x = lax.bitcast_convert_type(x, jnp.bfloat16)
    return x.astype(jnp.float32)
