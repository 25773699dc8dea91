"""Steps and quantized pages of which cases of attention over pages, and of writing, are made."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kernels_pallas.paged_attention.codec import ROTATED, Int4Pages, StaticInt8Pages, empty
from kernels_pallas.paged_attention.ragged import Groups, Ragged

Shared = tuple[tuple[int, int, int], ...]
"""Groups of sequences: of each the first, the one after the last, and the tokens they share."""


def batch(
    new: tuple[int, ...], lens: tuple[int, ...], Z: int, idle: int = 0, shared: Shared = ()
) -> tuple[Ragged, int]:
    """A step whose sequences have their pages scattered, in numpy.

    Args:
        new: tokens of each sequence in this step.
        lens: tokens of each sequence, including these.
        Z: slots in a page.
        idle: sequences of padding that follow.
        shared: groups; if there are any, one group of padding follows.

    Returns:
        The step, and the number of pages.
    """
    M, R = -(-max(lens) // Z), len(new)
    P = R * M + 1
    tables = np.random.default_rng(0).permutation(P)[: R * M].reshape(R, M)
    for first, end, tokens in shared:
        tables[first:end, : tokens // Z] = tables[first, : tokens // Z]
    if shared:  # renumber the pages that are still used
        kept, tables = np.unique(tables, return_inverse=True)
        tables, P = tables.reshape(R, M), len(kept)
    tables = np.concatenate([tables, np.zeros((idle, M), int)])
    starts = np.concatenate([[0], np.cumsum(new), [sum(new)] * idle])
    fields = (starts, [*lens, *[0] * idle], tables, R)
    step = Ragged._make([*(np.asarray(x, np.int32) for x in fields), None])
    if not shared:
        return step, P
    groups = [(first, end, tokens // Z) for first, end, tokens in (*shared, (R, R, 0))]
    return step._replace(groups=Groups(*np.array(groups, np.int32).T)), P


def keys_read(lens: tuple[int, ...], shared: Shared) -> int:
    """Keys that attention reads at least: those that a group shares, once."""
    return sum(lens) - sum((end - first - 1) * n for first, end, n in shared)


def pages_of(
    kind: str, key: Array, shape: tuple[int, ...], parts: tuple[int, ...] | None = None
) -> Any:
    """Random quantized pages [L, P, K, Z, W], whose rows are about as large as normal ones.

    Args:
        kind: "int8", "int4", or "static" for calibrated int8.
        shape: [L, P, K, Z, W].
        parts: lanes of each part of a row.
    """
    a, b = jax.random.split(key)
    pages = empty(jnp.int4 if kind == "int4" else jnp.int8, shape, parts=parts, whole=True)
    if kind == "int4":
        values = jax.random.randint(a, pages.values.shape, 0, 256).astype(jnp.uint8)
        return Int4Pages(values, jax.random.uniform(b, pages.scale.shape) / 4, pages.parts)
    values = jax.random.randint(a, shape, -127, 128).astype(jnp.int8)
    if kind == "static":
        L, _, K, _, W = shape
        return StaticInt8Pages(values, jax.random.uniform(b, (L, K, W)) / 64)
    return type(pages)(values, jax.random.uniform(b, pages.scale.shape) / 64, pages.parts)


def row_bytes(kind: str, lanes: int, parts: tuple[int, ...] | None) -> float:
    """Bytes of so many lanes of a row of `pages_of`, with its scales."""
    if kind == "int4":  # whole parts, which are rotated together
        return -(-lanes // ROTATED) * (ROTATED / 2 + 4)
    return lanes + (4 * len(parts or "1") if kind == "int8" else 0)
