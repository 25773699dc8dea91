"""What each block of threads attends to on Hopper, and where the results of a token will be."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas.paged_attention.mosaic_gpu_blocks import ROWS, Items, Shape
from kernels_pallas.paged_attention.ragged import Groups, Ragged

_FAR = 2**28  # tokens, or parts of pages: behind all that there are


class Spans(NamedTuple):
    """Consecutive tokens of a step that attend to the same pages, in no, one or many items.

    Attributes are those of `Items`, but all int32 [spans], and:
        shares: items that each token is given, for as many shares of the pages.
    """

    seqs: Array
    firsts: Array
    ends: Array
    shifts: Array
    begins: Array
    stops: Array
    shares: Array


def plan(
    batch: Ragged, T: int, seq: Array, window: Array, shape: Shape
) -> tuple[Items, Array, Array | None]:
    """Items; those of each token [1 + shares, T], of its sequence and of its group; and which of
    them there are, where there are groups. A token without a group has its sequence's instead.

    Args:
        seq: of each token [T].
    """
    spans, size = _sequences(batch), shape.groups * shape.tokens
    most = most_items(T, len(spans.seqs), size)
    if not shape.shared or batch.groups is None:
        items, before = _cut(spans, most, shape)
        return _placed(items, shape), _first(spans, before, seq, size)[None], None
    shared, begins, more = _groups(batch, batch.groups, spans, T, window, shape)
    spans = spans._replace(begins=begins)
    (first, before), (items, own) = _cut(shared, more, shape), _cut(spans, most, shape)
    items = jax.tree.map(lambda *x: jnp.concatenate(x), first, items)  # long ones first
    alone = more + _first(spans, own, seq, size)
    t = jnp.arange(T, dtype=jnp.int32)
    member = (shared.firsts[:, None] <= t) & (t < shared.ends[:, None])  # [C, T]
    c = jnp.arange(len(member), dtype=jnp.int32)[:, None]
    group = jnp.sum(jnp.where(member, c, 0), 0, dtype=jnp.int32)
    share = jnp.arange(shape.shared, dtype=jnp.int32)[:, None]
    there = share < jnp.where(jnp.any(member, 0), shared.shares[group], 0)
    shares = jnp.where(there, _first(shared, before, group, size) + share, alone)
    mine = jnp.concatenate([alone[None], shares])
    return _placed(items, shape), mine, jnp.pad(there, ((1, 0), (0, 0)), constant_values=True)


def most_items(T: int, R: int, size: int) -> int:
    """Groups of `size` tokens that R sequences with T of them may need."""
    return max(1, (T + R * (size - 1)) // size)


def held(items: Items, T: int, shape: Shape) -> tuple[Array, Array]:
    """The token [rows] whose queries a row holds, and the number of the row in its tile.

    Tiles are read whole, so rows of other items follow each, and idle ones the last.
    """
    each, most = shape.tokens * shape.piece, len(items.seqs)
    tokens = T * (1 + shape.shared)  # and each of them once more for each share of a group
    most = min(most * (shape.groups * ROWS // shape.piece), tokens * ROWS // each + most)
    most *= shape.piece
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


def _groups(
    batch: Ragged, groups: Groups, seqs: Spans, T: int, window: Array, shape: Shape
) -> tuple[Spans, Array, int]:
    """Groups, the parts [R] that each sequence leaves to its own, and their items, at most.

    Whole blocks of keys are shared, so that no row of a group's items hides a key. A window leaves
    little to share: then nothing is. Items are cut into shares, at most so many for each tile as
    there are cores for if all tokens were one group, all about equally long, none below four
    blocks: a group is few tiles, and its pages may be most of what the step reads.
    """
    C, size = len(groups.firsts), shape.groups * shape.tokens
    member = (groups.firsts[:, None] <= seqs.seqs) & (seqs.seqs < groups.ends[:, None])  # [C, R]
    before = (seqs.firsts + seqs.shifts) // (shape.parts * shape.part)  # pages, without this step's
    pages = jnp.minimum(groups.pages, jnp.min(jnp.where(member, before, _FAR), 1))
    blocks = jnp.where(window > 0, 0, pages * shape.parts // shape.count)
    firsts = batch.row_starts[groups.firsts]
    ends = jnp.where(blocks > 0, batch.row_starts[groups.ends], firsts)
    extra = -(-T // size) * shape.shared
    length = jnp.sum(-(-(ends - firsts) // size) * blocks)
    length = jnp.maximum(-(-length // extra), 4)  # of a share
    shares = jnp.clip(-(-blocks // length), 1, shape.shared)
    begins = jnp.sum(jnp.where(member, (blocks * shape.count)[:, None], 0), 0, dtype=jnp.int32)
    none = jnp.zeros_like(firsts)
    spans = Spans(groups.firsts, firsts, ends, none + _FAR, none, blocks * shape.count, shares)
    most = most_items(T, C, size)
    return spans, begins, min(most * shape.shared, most + extra)


def _cut(spans: Spans, most: int, shape: Shape) -> tuple[Items, Array]:
    """Items of spans, without places, and how many of them lie before each span's. Shares of the
    same tokens are neighbours, and whole blocks of keys."""
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
    return Items(seqs, firsts, ends, shifts, begins, stops, None), before - number


def _placed(items: Items, shape: Shape) -> Items:
    """Items one behind the other."""
    tokens = jnp.where(items.seqs < 0, 0, items.ends - items.firsts)
    pieces = -(-tokens * ROWS // (shape.tokens * shape.piece))
    return items._replace(places=jnp.cumsum(pieces, dtype=jnp.int32) - pieces)


def _first(spans: Spans, before: Array, span: Array, size: int) -> Array:
    """The first item [T] of each token, by its span."""
    t = jnp.arange(len(span), dtype=jnp.int32)
    return before[span] + (t - spans.firsts[span]) // size * spans.shares[span]
