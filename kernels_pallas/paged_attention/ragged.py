"""A step's tokens of many sequences, and how their keys and values lie in pages."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from kernels_pallas.paged_attention.codec import put

SHARED_KEYS = {"tpu": 512, "gpu": 256, "cpu": 64}
"""Keys per platform: a group should share a multiple of them. On TPU and CPU they are one block of
the kernel, unless its tile says otherwise; a TPU program with one KV head has blocks twice as
large, and shares an even number of these units. On Hopper they are four blocks, since a share must
be merged."""


class Groups(NamedTuple):
    """Consecutive sequences of a step whose tables begin with the same pages. All int32.

    The first pages[g] pages of sequences firsts[g] to ends[g] (exclusive) are the same, and none of
    these sequences writes to them in this step. Groups do not overlap; a group with
    firsts[g] == ends[g] is padding.

    Groups tell what need not be read twice; they change no result. On TPUs and CPUs keys are added
    in the same blocks and the same order, so no bit of a row depends on its group; on Hopper a
    group is one more share of keys, and merging shares is exact up to rounding. A kernel may ignore
    a group, or those of its pages that do not fill a block of keys.
    """

    firsts: Any  # [C], sequences
    ends: Any  # [C]
    pages: Any  # [C], counts


class Ragged(NamedTuple):
    """Which tokens of a step belong to which sequence. All int32.

    Sequence r owns tokens row_starts[r] to row_starts[r + 1] (exclusive) of the step, which are the
    last ones of its kv_lens[r] tokens. Entries from num_seqs on are padding.
    """

    row_starts: Any  # [R + 1]
    kv_lens: Any  # [R], including this step's tokens
    tables: Any  # [R, M], the block table: pages of each sequence in order
    num_seqs: Any  # []
    groups: Groups | None = None


def locate(batch: Ragged, num_tokens: int) -> tuple[Array, Array]:
    """The sequence of each token [T], and its position there (negative: padding)."""
    t = jnp.arange(num_tokens, dtype=jnp.int32)
    seq = jnp.searchsorted(batch.row_starts[1:], t, side="right").astype(jnp.int32)
    return _positions(batch, t, seq)


def owners(batch: Ragged, num_tokens: int) -> tuple[Array, Array]:
    """As `locate`, but by comparing each token with every sequence: on a GPU this is one fusion,
    and a search would be a loop of kernels."""
    t = jnp.arange(num_tokens, dtype=jnp.int32)
    seq = jnp.sum(batch.row_starts[1:] <= t[:, None], 1, dtype=jnp.int32)
    return _positions(batch, t, seq)


def slots(batch: Ragged, num_tokens: int, page_size: int) -> Array:
    """The slot of each token int32 [T] among those of all pages, page * page_size + the slot in it;
    -1 of padding. One number a token, so that a kernel reads it at once."""
    seq, position = owners(batch, num_tokens)
    page = batch.tables[seq, jnp.maximum(position, 0) // page_size]
    return jnp.where(position >= 0, page * page_size + position % page_size, -1)


def _positions(batch: Ragged, t: Array, seq: Array) -> tuple[Array, Array]:
    """The sequence of each token t [T], and its position there (negative: padding).

    Args:
        seq: of each token [T], past the last one for those of no sequence.
    """
    real = seq < batch.num_seqs
    seq = jnp.minimum(seq, batch.kv_lens.shape[0] - 1)
    position = batch.kv_lens[seq] - (batch.row_starts[seq + 1] - t)
    return seq, jnp.where(real, position, -1)


def write(k_pages, v_pages, k, v, layer, batch: Ragged, seq: Array, position: Array):
    """The caches with this step's keys and values in their slots; rows of padding are dropped.

    Pages may have more lanes than keys, since a TPU wants whole registers: those become 0.

    Args:
        seq, position: of each token [T], as `locate` returns them.
    """
    P, Z = k_pages.shape[1], k_pages.shape[3]
    page = jnp.where(position >= 0, batch.tables[seq, jnp.maximum(position, 0) // Z], P)
    slot = position % Z
    k_pages = put(k_pages, k, layer, page, slot)
    return k_pages, None if v_pages is None else put(v_pages, v, layer, page, slot)
