"""Which tokens and pages each program of the TPU's attention is given, decided in plain JAX."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from kernels_pallas.paged_attention.mosaic_tpu_blocks import Shape, Spans
from kernels_pallas.paged_attention.ragged import Groups, Ragged

_FAR = 2**29  # past every position and page, and far from an overflow


def plan(
    batch: Ragged, window: Array, programs: int, shape: Shape
) -> tuple[tuple[Array, Array, Array], Spans]:
    """Cuts spans of tokens into items, one for each program that has tokens of a span.

    Without groups the items do not depend on the layer, so they leave a loop over layers.

    Args:
        window: [1]; shared pages are not used where it hides keys.
        programs: along the grid's second axis.

    Returns:
        `Scalars.item_spans`, `.item_programs` and `.item_starts`; and the spans.
    """
    spans = _sequences(batch)
    span, program = _items(spans, programs, shape.tokens)
    if batch.groups is not None:
        shared, spans = _groups(batch, batch.groups, spans, window, shape)
        first = _items(shared, programs, shape.tokens)
        spans = Spans(*map(_joined, shared, spans))
        span, program = _joined(first[0], span + len(shared.seqs)), _joined(first[1], program)
        order = jnp.argsort(program, stable=True)  # by program, in each of them groups go first
        span, program = span[order], program[order]
    none = program == programs  # these keep the last real program, whose blocks then stay in place
    item_starts = jnp.sum(program < jnp.arange(programs + 1)[:, None], 1).astype(jnp.int32)
    program = jnp.where(none, jnp.max(jnp.where(none, 0, program)), program)
    return (span, program, item_starts), spans


def _joined(*x: Array) -> Array:
    return jnp.concatenate(x)


def _sequences(batch: Ragged) -> Spans:
    """The span of each sequence, without tokens where it is padding."""
    starts, ends = batch.row_starts[:-1], batch.row_starts[1:]
    r = jnp.arange(starts.shape[0], dtype=jnp.int32)
    ends = jnp.where(r < batch.num_seqs, ends, starts)
    none, far = jnp.zeros_like(r), jnp.full_like(r, _FAR)
    return Spans(starts, ends, batch.kv_lens - ends, none, far, r)


def _groups(
    batch: Ragged, groups: Groups, seqs: Spans, window: Array, shape: Shape
) -> tuple[Spans, Spans]:
    """The spans of groups, and those of sequences without the pages that their groups attend.

    A group attends whole blocks, the same ones as each member would alone, so that no bit depends
    on a group. A window moves those blocks, and leaves little to share: then nothing is shared.
    """
    member = (groups.firsts[:, None] <= seqs.seqs) & (seqs.seqs < groups.ends[:, None])  # [C, R]
    before = (seqs.token_begins + seqs.shifts) // shape.page_size  # pages without this step's keys
    pages = jnp.minimum(groups.pages, jnp.min(jnp.where(member, before, _FAR), 1))
    pages = jnp.where(window > 0, 0, pages // shape.block_pages * shape.block_pages)
    begins = batch.row_starts[groups.firsts]
    ends = jnp.where(pages > 0, batch.row_starts[groups.ends], begins)
    far, none = jnp.full_like(pages, _FAR), jnp.zeros_like(pages)
    shared = jnp.sum(jnp.where(member, pages[:, None], 0), 0, dtype=jnp.int32)
    spans = Spans(begins, ends, far, none, pages, groups.firsts)
    return spans, seqs._replace(page_begins=shared)


def _items(spans: Spans, programs: int, tokens: int) -> tuple[Array, Array]:
    """The span and the program of each item, both [programs + V]; `programs` past the last one."""
    begins, ends = spans.token_begins, spans.token_ends
    count = jnp.where(ends > begins, (ends - 1) // tokens - begins // tokens + 1, 0)
    before = jnp.cumsum(count, dtype=jnp.int32)
    i = jnp.arange(programs + len(begins), dtype=jnp.int32)
    span = jnp.minimum(jnp.sum(before <= i[:, None], 1), len(begins) - 1).astype(jnp.int32)
    program = (begins // tokens - before + count)[span] + i
    return span, jnp.where(i < before[-1], program, programs)
