"""Attention over the paged cache, as a model asks for it; and among tokens that begin there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jaxserve.cache.kv_cache import KVCache
from jaxserve.models.ops import Attend, AttendMade
from kernels_pallas.paged_attention import Ragged, paged_attention
from kernels_pallas.paged_attention.codec import as_read
from kernels_pallas.paged_attention.ragged import locate
from sharding.tree import pytree


@pytree
class Beginning:
    """A cache in a step whose sequences all begin there, and what it was given of one layer."""

    kv: KVCache
    rows: Array  # [T, W], of the whole step, as they would be read again


def paged(batch: Ragged, kernel: Callable[..., Any] = paged_attention) -> Attend:
    """Attends the step's tokens [1, T] to the pages that `batch` gives their sequences."""

    def attend(
        q: Array, k: Array, v: Array | None, kv: KVCache, layer: Array | int, **options: Any
    ):
        first = None if v is None else v[0]
        o, _, k_pages, v_pages = kernel(q[0], k[0], first, kv.k, kv.v, layer, batch, **options)
        return o.astype(q.dtype)[None], replace(kv, k=k_pages, v=v_pages)

    return attend


def beginning(
    step: Ragged,
    num_tokens: int,
    part: Ragged,
    first: Array | int,
    write: Callable[..., Any],
    attention: Callable[..., tuple[Array, Array]],
) -> AttendMade:
    """Attends tokens of a step to those before them in it; `kv` is a `Beginning`.

    A part of a step is attended where it lies in the whole one, since sums over the same places
    have the same bits: what comes before `first` is there for the sequence that goes on.

    Args:
        step: sequences of the whole step, of `num_tokens`. None has earlier keys.
        part, first: those of the tokens at hand, and the place of the first of these in the step.
        write: `kernels_pallas.paged_attention.reference.page_write`, or one like it.
        attention: likewise `kernels_pallas.flash_attention.reference.attend`.
    """
    row, position = locate(step, num_tokens)
    end = first + part.row_starts[part.num_seqs]
    here = (position >= 0) & (step.row_starts[row + 1] > first) & (jnp.arange(num_tokens) < end)
    segments = jnp.where(here, row + 1, 0)[None]

    def attend(
        q: Array,
        row: Array,
        make: Callable[[Array], tuple[Array, Array]],
        kv: Beginning,
        layer: Array | int,
        *,
        scale: float,
    ) -> tuple[Array, Beginning]:
        pages, _ = write(kv.kv.k, None, row[0], None, layer, part)
        new = as_read(pages, row[0], layer)[:, 0]
        rows = lax.dynamic_update_slice_in_dim(kv.rows, new, first, 0)
        k, v = make(rows[None])
        v = jnp.where(jnp.isfinite(v), v, 0)  # a broken row is known by its key, to itself alone
        whole = jnp.zeros((1, num_tokens, *q.shape[2:]), q.dtype)
        whole = lax.dynamic_update_slice_in_dim(whole, q, first, 1)
        o, _ = attention(*(jnp.swapaxes(x, 1, 2) for x in (whole, k, v)), segments, scale=scale)
        o = lax.dynamic_slice_in_dim(o, first, q.shape[1], 2)
        return jnp.swapaxes(o, 1, 2), Beginning(replace(kv.kv, k=pages), rows)

    return attend
