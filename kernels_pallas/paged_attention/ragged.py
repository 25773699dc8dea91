"""A step's tokens of many sequences, and how their keys and values lie in pages."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from kernels_pallas.paged_attention.codec import put

SHARED_KEYS = {"tpu": 512, "gpu": 256, "cpu": 64}
"""Keys of which a platform's kernel is given whole multiples to share. On TPU and CPU they are one
of its blocks, unless it is told otherwise, or half a block on a TPU where a program has one head of
keys, and shares an even number of them; on Hopper, four, for a share that must be merged."""


class Groups(NamedTuple):
    """Neighbours in a step whose tables begin with the same pages. All int32.

    Sequences firsts[g] to ends[g] of the step have their first pages[g] pages in common, and none
    of them writes there in this step. Groups do not overlap; where firsts[g] == ends[g] is none.

    This says what need not be read twice and changes no result. On TPUs and CPUs keys are added up
    in the same blocks and the same order, so not a bit of a row depends on its group; on Hopper a
    group is one more share of keys, and shares merge but for rounding. A kernel may pass over a
    group, or over those of its pages that fill no whole block of keys.
    """

    firsts: Any  # [C]
    ends: Any  # [C]
    pages: Any  # [C]


class Ragged(NamedTuple):
    """Which tokens of a step belong to whom. All int32.

    Sequence r owns tokens row_starts[r] to row_starts[r + 1] of the step, and they are the last
    ones of its kv_lens[r]. Entries from num_seqs on are padding.
    """

    row_starts: Any  # [R + 1]
    kv_lens: Any  # [R], with this step's tokens
    tables: Any  # [R, M], pages of each sequence in order
    num_seqs: Any  # []
    groups: Groups | None = None


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


def slots(batch: Ragged, num_tokens: int, page_size: int) -> Array:
    """The slot of each token int32 [T] among those of all pages, page * page_size + the slot in it;
    -1 of padding. One number a token, so that a kernel reads it at once."""
    row, position = owners(batch, num_tokens)
    page = batch.tables[row, jnp.maximum(position, 0) // page_size]
    return jnp.where(position >= 0, page * page_size + position % page_size, -1)


def write(k_pages, v_pages, k, v, layer, batch: Ragged, row: Array, position: Array):
    """The caches with this step's keys and values in their slots; padding goes nowhere.

    Pages may have more lanes than keys, since a TPU wants whole ones: those become 0.
    """
    P, Z = k_pages.shape[1], k_pages.shape[3]
    page = jnp.where(position >= 0, batch.tables[row, jnp.maximum(position, 0) // Z], P)
    slot = position % Z
    k_pages = put(k_pages, k, layer, page, slot)
    return k_pages, None if v_pages is None else put(v_pages, v, layer, page, slot)
