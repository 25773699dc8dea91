"""The work of each block of threads of Hopper's page attention, and where a token's results are."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas.hopper import ROWS
from kernels_pallas.paged_attention.mosaic_gpu_shape import Shape
from kernels_pallas.paged_attention.mosaic_gpu_work import Items
from kernels_pallas.paged_attention.ragged import Groups, Ragged

_FAR = 2**28  # tokens, or copies of keys: behind all that there are


class Spans(NamedTuple):
    """Consecutive tokens of a step that attend to the same pages: none, one or many items.

    Attributes are those of `Items`, but all int32 [spans], and:
        splits: of the keys; each token has so many items.
    """

    seqs: Array
    token_begins: Array
    token_ends: Array
    shifts: Array
    copy_begins: Array
    copy_ends: Array
    splits: Array


class Plan(NamedTuple):
    """Items, and which of them hold a token's results.

    Attributes:
        items: what blocks of threads do.
        of_token: int32 [1 + group_splits, T], the item of a token's sequence, and those of its
            group. Where a token has no such item, the first one stands there again.
        valid: bool like of_token, whether it has; None where groups are ignored and all are.
    """

    items: Items
    of_token: Array
    valid: Array | None


def plan(batch: Ragged, T: int, seq: Array, window: Array, shape: Shape) -> Plan:
    """The items of a step.

    Args:
        T: the step's tokens with padding.
        seq: the sequence of each token [T].
        window: int32 [], keys that a token sees; 0 for all.
    """
    spans, size = _sequences(batch), shape.tokens_per_item
    most = most_items(T, len(spans.seqs), size)
    if not shape.group_splits or batch.groups is None:
        items, before = _cut(spans, most, shape)
        items = _with_rows(items, shape)
        return Plan(items, _first_items(spans, before, seq, size)[None], None)
    shared, copy_begins, most_shared = _groups(batch, batch.groups, spans, T, window, shape)
    spans = spans._replace(copy_begins=copy_begins)
    first, before_shared = _cut(shared, most_shared, shape)
    items, before = _cut(spans, most, shape)
    items = jax.tree.map(lambda *x: jnp.concatenate(x), first, items)  # long ones first
    own = most_shared + _first_items(spans, before, seq, size)
    t = jnp.arange(T, dtype=jnp.int32)
    member = (shared.token_begins[:, None] <= t) & (t < shared.token_ends[:, None])  # [C, T]
    c = jnp.arange(len(member), dtype=jnp.int32)[:, None]
    group = jnp.sum(jnp.where(member, c, 0), 0, dtype=jnp.int32)
    split = jnp.arange(shape.group_splits, dtype=jnp.int32)[:, None]
    valid = split < jnp.where(jnp.any(member, 0), shared.splits[group], 0)
    of_group = _first_items(shared, before_shared, group, size) + split
    of_group = jnp.where(valid, of_group, own)
    of_token, items = jnp.concatenate([own[None], of_group]), _with_rows(items, shape)
    return Plan(items, of_token, jnp.pad(valid, ((1, 0), (0, 0)), constant_values=True))


def most_items(T: int, R: int, size: int) -> int:
    """Items of `size` tokens that R sequences with T tokens may need."""
    return max(1, (T + R * (size - 1)) // size)


def rows_of_queries(items: Items, T: int, shape: Shape) -> tuple[Array, Array]:
    """The token [rows] whose query a row holds, and the number of the row in its tile [rows].

    Tiles are read whole, so rows of other items follow each, and idle ones the last.
    """
    tokens_per_align, most = shape.tokens_per_tile * shape.row_align, len(items.seqs)
    tokens = T * (1 + shape.group_splits)  # each has a row for each split of its group's keys
    whole = most * (shape.tiles * ROWS // shape.row_align)
    most = min(whole, tokens * ROWS // tokens_per_align + most)
    most *= shape.row_align
    rows = jnp.arange(most + shape.tiles * ROWS, dtype=jnp.int32)
    item = jnp.sum(items.row_begins <= rows[:, None] // shape.row_align, 1) - 1
    row = rows - items.row_begins[item] * shape.row_align
    token = items.token_begins[item] + row // ROWS * shape.tokens_per_tile
    token = token + row % ROWS // shape.heads_per_tile
    return jnp.minimum(token, T - 1), row % ROWS


def _sequences(batch: Ragged) -> Spans:
    """A span for each sequence; without tokens where it is padding."""
    starts, ends = batch.row_starts[:-1], batch.row_starts[1:]
    r = jnp.arange(starts.shape[0], dtype=jnp.int32)
    ends = jnp.where(r < batch.num_seqs, ends, starts)
    none = jnp.zeros_like(r)
    return Spans(
        seqs=r, token_begins=starts, token_ends=ends, shifts=batch.kv_lens - ends,
        copy_begins=none, copy_ends=none + _FAR, splits=none + 1,
    )  # fmt: skip


def _groups(
    batch: Ragged, groups: Groups, seqs: Spans, T: int, window: Array, shape: Shape
) -> tuple[Spans, Array, int]:
    """A span for each group; the copies [R] of its keys that a sequence leaves to its group; and
    the most items that groups may need.

    Whole blocks of keys are shared, so that no row of a group's items hides a key. A window
    disables sharing, since it leaves little to share.

    A group's pages are split into shares of about equal length, each at least four blocks and at
    most `Shape.group_splits` per tile; otherwise few tiles would read most of the step's pages.
    """
    C, size = len(groups.firsts), shape.tokens_per_item
    member = (groups.firsts[:, None] <= seqs.seqs) & (seqs.seqs < groups.ends[:, None])  # [C, R]
    page_size = shape.copies_per_page * shape.keys_per_copy
    before = (seqs.token_begins + seqs.shifts) // page_size  # pages without a token of this step
    pages = jnp.minimum(groups.pages, jnp.min(jnp.where(member, before, _FAR), 1))
    blocks = jnp.where(window > 0, 0, pages * shape.copies_per_page // shape.copies_per_block)
    begins = batch.row_starts[groups.firsts]
    ends = jnp.where(blocks > 0, batch.row_starts[groups.ends], begins)
    most_splits = -(-T // size) * shape.group_splits  # of all tiles, if all tokens were one group
    length = jnp.sum(-(-(ends - begins) // size) * blocks)
    length = jnp.maximum(-(-length // most_splits), 4)  # blocks of a share
    splits = jnp.clip(-(-blocks // length), 1, shape.group_splits)
    left = (blocks * shape.copies_per_block)[:, None]
    left = jnp.sum(jnp.where(member, left, 0), 0, dtype=jnp.int32)
    none = jnp.zeros_like(begins)
    spans = Spans(
        seqs=groups.firsts, token_begins=begins, token_ends=ends, shifts=none + _FAR,
        copy_begins=none, copy_ends=blocks * shape.copies_per_block, splits=splits,
    )  # fmt: skip
    most = most_items(T, C, size)
    return spans, left, min(most * shape.group_splits, most + most_splits)


def _cut(spans: Spans, most: int, shape: Shape) -> tuple[Items, Array]:
    """Items of spans, still without rows, and how many of them lie before each span's. Splits for
    the same tokens are neighbours, and whole blocks of keys."""
    size = shape.tokens_per_item
    number = -(-(spans.token_ends - spans.token_begins) // size) * spans.splits
    before = jnp.cumsum(number, dtype=jnp.int32)
    i = jnp.arange(most, dtype=jnp.int32)
    span = jnp.minimum(jnp.sum(before <= i[:, None], 1), len(number) - 1)
    of = Spans(*(x[span] for x in spans))
    in_span = i - (before - number)[span]
    token_begins = of.token_begins + in_span // of.splits * size
    token_ends = jnp.minimum(token_begins + size, of.token_ends)
    length = -(-(of.copy_ends - of.copy_begins) // (of.splits * shape.copies_per_block))
    length = length * shape.copies_per_block
    copy_begins = of.copy_begins + in_span % of.splits * length
    copy_ends = jnp.minimum(copy_begins + length, of.copy_ends)
    seqs = jnp.where(i < before[-1], of.seqs, -1)
    items = Items(seqs, token_begins, token_ends, of.shifts, copy_begins, copy_ends, None)
    return items, before - number


def _with_rows(items: Items, shape: Shape) -> Items:
    """Items whose rows lie one behind the other."""
    tokens = jnp.where(items.seqs < 0, 0, items.token_ends - items.token_begins)
    rows = -(-tokens * ROWS // (shape.tokens_per_tile * shape.row_align))  # in whole `row_align`s
    return items._replace(row_begins=jnp.cumsum(rows, dtype=jnp.int32) - rows)


def _first_items(spans: Spans, before: Array, span: Array, size: int) -> Array:
    """The first item [T] of each token, by its span [T]."""
    t = jnp.arange(len(span), dtype=jnp.int32)
    return before[span] + (t - spans.token_begins[span]) // size * spans.splits[span]
