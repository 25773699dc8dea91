"""What each block of threads attends to on Hopper, and where the results of a token will be."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from kernels_pallas.paged_attention.mosaic_gpu_blocks import ROWS, Items, Shape
from kernels_pallas.paged_attention.ragged import Ragged

_FAR = 2**28  # tokens, or parts of pages: behind all that there are


class Spans(NamedTuple):
    """Consecutive tokens of a step that attend to the same pages, in no, one or many items.

    All int32 [spans]; as in `Items`, but for

    Attributes:
        shares: items that tokens are given, each for a share of the pages.
    """

    seqs: Array
    firsts: Array
    ends: Array
    shifts: Array
    begins: Array
    stops: Array
    shares: Array


def plan(batch: Ragged, T: int, seq: Array, shape: Shape) -> tuple[Items, Array]:
    """Items, and that of each token [1, T].

    Args:
        seq: of each token [T].
    """
    spans, size = _sequences(batch), shape.groups * shape.tokens
    items, before = _cut(spans, most_items(T, len(spans.seqs), size), shape)
    return items, _first(spans, before, seq, size)[None]


def most_items(T: int, R: int, size: int) -> int:
    """Groups of `size` tokens that R sequences with T of them may need."""
    return max(1, (T + R * (size - 1)) // size)


def held(items: Items, T: int, shape: Shape) -> tuple[Array, Array]:
    """The token [rows] whose queries a row holds, and the number of the row in its tile.

    Tiles are read whole, so rows of other items follow each, and idle ones the last.
    """
    each, most = shape.tokens * shape.piece, len(items.seqs)
    most = min(most * (shape.groups * ROWS // shape.piece), T * ROWS // each + most) * shape.piece
    rows = jnp.arange(most + shape.groups * ROWS, dtype=jnp.int32)
    item = jnp.sum(items.places <= rows[:, None] // shape.piece, 1) - 1
    row = rows - items.places[item] * shape.piece
    token = items.firsts[item] + row // ROWS * shape.tokens + row % ROWS // shape.group
    return jnp.minimum(token, T - 1), row % ROWS


def _sequences(batch: Ragged) -> Spans:
    starts, ends = batch.row_starts[:-1], batch.row_starts[1:]
    r = jnp.arange(starts.shape[0], dtype=jnp.int32)
    ends = jnp.where(r < batch.num_seqs, ends, starts)
    none = jnp.zeros_like(r)
    return Spans(r, starts, ends, batch.kv_lens - ends, none, none + _FAR, none + 1)


def _cut(spans: Spans, most: int, shape: Shape) -> tuple[Items, Array]:
    """Items of spans, and how many of them lie before each span's. Shares of the same tokens are
    neighbours, and whole blocks of keys."""
    size = shape.groups * shape.tokens
    number = -(-(spans.ends - spans.firsts) // size) * spans.shares
    before = jnp.cumsum(number, dtype=jnp.int32)
    i = jnp.arange(most, dtype=jnp.int32)
    span = jnp.minimum(jnp.sum(before <= i[:, None], 1), len(number) - 1)
    seqs, firsts, ends, shifts, begins, stops, shares = (x[span] for x in spans)
    at = i - (before - number)[span]
    firsts = firsts + at // shares * size
    ends = jnp.minimum(firsts + size, ends)
    length = -(-(stops - begins) // (shares * shape.count)) * shape.count
    begins = begins + at % shares * length
    stops = jnp.minimum(begins + length, stops)
    seqs = jnp.where(i < before[-1], seqs, -1)
    pieces = -(-(ends - firsts) * ROWS // (shape.tokens * shape.piece))
    pieces = jnp.where(seqs < 0, 0, pieces)
    places = jnp.cumsum(pieces, dtype=jnp.int32) - pieces
    return Items(seqs, firsts, ends, shifts, begins, stops, places), before - number


def _first(spans: Spans, before: Array, span: Array, size: int) -> Array:
    """The first item [T] of each token, by its span."""
    t = jnp.arange(len(span), dtype=jnp.int32)
    return before[span] + (t - spans.firsts[span]) // size * spans.shares[span]
