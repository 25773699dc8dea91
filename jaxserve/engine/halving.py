"""A step's ragged tokens as two steps that take turns in every layer."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from jaxserve.models.ops import Halves, Ops
from kernels_pallas.paged_attention import Ragged


def halves(
    batch: Ragged, num_tokens: int, ops: Callable[[Ragged, Array | int, int], Ops]
) -> Halves:
    """The first half of the real tokens of a step [num_tokens], and the rest.

    A sequence may have tokens in both: keys of the first half are written before the second reads
    any, in every layer, so it attends as it would in one piece.

    Args:
        ops: operations for a part of the step: its batch, the place of its first token in the
            step, and how many there are with padding.
    """
    size = -(-num_tokens // 2)
    total = batch.row_starts[batch.num_seqs]
    middle = (total + 1) // 2
    behind = middle + jnp.arange(size)
    at = jnp.arange(num_tokens)
    place = jnp.where(at < middle, at, size + at - middle)

    def cut(x: Array) -> tuple[Array, Array]:
        return x[:, :size], x.at[:, behind].get(mode="clip")

    def join(a: Array, b: Array) -> Array:
        return jnp.concatenate([a, b], 1).at[:, place].get(mode="clip")

    rows = min(size, batch.kv_lens.shape[0])  # none is without a token
    parts = _first(batch, middle, rows), _rest(batch, middle, rows)
    return Halves((ops(parts[0], 0, size), ops(parts[1], middle, size)), cut, join)


def _first(batch: Ragged, middle: Array, rows: int) -> Ragged:
    """What lies before token `middle`, of which the last sequence may go on behind it."""
    starts, ends = batch.row_starts[: rows + 1], batch.row_starts[1 : rows + 1]
    lens = batch.kv_lens[:rows] - jnp.maximum(ends - middle, 0)
    num_seqs = jnp.sum(batch.row_starts[:-1] < middle, dtype=jnp.int32)
    num_seqs = jnp.minimum(num_seqs, batch.num_seqs)
    return Ragged(jnp.minimum(starts, middle), lens, batch.tables[:rows], num_seqs)


def _rest(batch: Ragged, middle: Array, rows: int) -> Ragged:
    """What lies from token `middle` on."""
    ended = jnp.sum(batch.row_starts[1:] <= middle, dtype=jnp.int32)
    first = jnp.minimum(ended, batch.num_seqs)
    row = first + jnp.arange(rows + 1)
    starts = batch.row_starts.at[row].get(mode="clip")
    starts = jnp.maximum(starts - middle, 0)
    lens = batch.kv_lens.at[row[:-1]].get(mode="clip")
    tables = batch.tables.at[row[:-1]].get(mode="clip")
    return Ragged(starts, lens, tables, batch.num_seqs - first)
