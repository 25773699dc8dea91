"""The reference: plain JAX, exact, and with work that follows the real lengths.

Rows that decode are attended together, a block of pages at a time. Rows with a chunk of prompt are
attended one after the other, so that no array is ever tokens x keys.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from kernels_pallas.paged_attention.codec import Pages, take, turned, whole_parts
from kernels_pallas.paged_attention.ragged import Ragged, locate, write
from kernels_pallas.weight import Weight, as_array

_KEYS = 128  # keys attended at a time
_QUERIES = 128  # prompt tokens attended at a time
_HIDDEN = -1e30  # finite: a row that sees nothing must not become NaN


class _Softmax(NamedTuple):
    """A softmax in progress over blocks of keys."""

    top: Array  # [..., ] largest logit yet
    total: Array  # [..., ] sum of exponentials relative to it
    value: Array  # [..., Hv] their weighted values

    def add(self, logits: Array, values: Array, spec: str) -> _Softmax:
        top = jnp.maximum(self.top, logits.max(-1))
        shrink, p = jnp.exp(self.top - top), jnp.exp(logits - top[..., None])
        value = self.value * shrink[..., None] + jnp.einsum(spec, p, values)
        return _Softmax(top, self.total * shrink + p.sum(-1), value)

    def finish(self) -> tuple[Array, Array]:
        total = jnp.maximum(self.total, 1e-30)
        return self.value / total[..., None], self.top + jnp.log(total)


def paged_attention(
    q: Array,  # [T, N, H]
    k: Array,  # [T, K, H]
    v: Array | None,  # [T, K, Hv]; None: the first `value_dim` lanes of k
    k_pages: Pages,  # [L, P, K, Z, H]; uint16 holds bfloat16 bits
    v_pages: Pages | None,  # [L, P, K, Z, Hv]
    layer: Array | int,
    batch: Ragged,
    **options: Any,
) -> tuple[Array, Array, Pages, Pages | None]:
    """Writes k and v to their pages, then attends causally: `page_write` and `page_attention`.

    Returns:
        o, lse, k_pages and v_pages.
    """
    k_pages, v_pages = page_write(k_pages, v_pages, k, v, layer, batch)
    o, lse = page_attention(q, k_pages, v_pages, layer, batch, **options)
    return o, lse, k_pages, v_pages


def page_write(
    k_pages: Pages,  # [L, P, K, Z, W]; uint16 holds bfloat16 bits
    v_pages: Pages | None,  # [L, P, K, Z, Wv]
    k: Array,  # [T, K, H], H <= W
    v: Array | None,  # [T, K, Hv]
    layer: Array | int,
    batch: Ragged,
) -> tuple[Pages, Pages | None]:
    """The caches with the step's keys and values in the slots of their positions; lanes that a key
    lacks become 0. May be donated the caches, and then nothing else of them moves.

    Pages of eight and four bits (codec.py) round a row by itself: by its own scale, or by one that
    was calibrated. A row that is not finite is lost, and no other.
    """
    row, position = locate(batch, k.shape[0])
    return write(k_pages, v_pages, k, v, layer, batch, row, position)


def page_attention(
    q: Array,  # [T, N, H]
    k_pages: Pages,  # [L, P, K, Z, H]; uint16 holds bfloat16 bits
    v_pages: Pages | None,  # [L, P, K, Z, Hv]; None: the first `value_dim` lanes of k_pages
    layer: Array | int,
    batch: Ragged,
    *,
    scale: float,
    window: Array | int = 0,
    sinks: Weight | None = None,  # [N]
    soft_cap: float = 0.0,
    value_dim: int | None = None,
    mass: bool = False,
) -> tuple[Array, ...]:
    """Causal attention over pages that hold this step's keys and values already.

    Pages of eight and four bits (codec.py) count as what they decode to. Rows in four bits are
    rotated; queries and outputs are not.

    Args:
        window: keys at least this far back are hidden; 0 hides none.
        sinks: a logit per head that joins the softmax and carries no value.
        soft_cap: logits become cap * tanh(logits / cap); 0 leaves them.
        value_dim: lanes of a value that count, where pages have more. Those of a key are q's.
        mass: whether to say how much attention each page gets.

    Returns:
        o [T, N, value_dim] and lse [T, N], both float32. `(o, lse)` of disjoint sets of keys merge
        exactly. With `mass` also [T, N, M]: of each page in a token's row of the table, the sum of
        its exponentials relative to lse. Rows of padding are unspecified.
    """
    T, N, H = q.shape
    K, Z = k_pages.shape[2:4]
    row, position = locate(batch, T)
    heads = turned(k_pages, q.astype(jnp.float32)).reshape(T, K, N // K, -1) * scale
    values = value_dim or (H if v_pages is None else v_pages.shape[-1])
    owner = k_pages if v_pages is None else v_pages
    lanes = whole_parts(owner, values)
    keys = partial(_keys, k_pages, v_pages, layer, heads.shape[-1], lanes)
    logits = partial(_mask, window=window, soft_cap=soft_cap)
    if sinks is None:
        sink = jnp.full((K, N // K), _HIDDEN)
    else:
        sink = as_array(sinks).astype(jnp.float32).reshape(K, N // K)
    start = partial(_start, sink, 0.0 if sinks is None else 1.0, lanes)
    o, lse = _decode_rows(heads, batch, Z, keys, logits, start)
    o, lse = jnp.take(o, row, axis=0), jnp.take(lse, row, axis=0)  # per sequence -> per token
    o, lse = _prompt_rows(heads, batch, Z, keys, logits, start, o, lse)
    out = turned(owner, o.reshape(T, N, -1))[..., :values], lse.reshape(T, N)
    if not mass:
        return out
    found = _page_mass(heads, batch.tables[row], position, Z, keys, logits, lse)
    return *out, found.reshape(T, N, -1)


def _keys(k_pages, v_pages, layer, key_dim, value_dim, pages: Array) -> tuple[Array, Array]:
    """Keys and values [..., pages, K, Z, H] of the given pages [..., pages]."""
    k = take(k_pages, layer, pages)
    v = k if v_pages is None else take(v_pages, layer, pages)
    return k[..., :key_dim], v[..., :value_dim]


def _written(v: Array, at: Array, length: Array) -> Array:
    """Values [..., n, K, Z, H] at positions [n, Z], but 0 from `length` on: what lies there is of
    a page's former owner, and might be NaN, which a weight of 0 does not silence."""
    return jnp.where(at[:, None, :, None] < length, v, 0.0)


def _mask(
    logits: Array, query: Array, key: Array, *, window: Array | int, soft_cap: float
) -> Array:
    if soft_cap:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    seen = (key <= query) & ((window == 0) | (query - key < window))
    return jnp.where(seen, logits, _HIDDEN)


def _start(sink: Array, total: float, value_dim: int, *lead: int) -> _Softmax:
    shape = (*lead, *sink.shape)
    return _Softmax(
        jnp.broadcast_to(sink, shape), jnp.full(shape, total), jnp.zeros((*shape, value_dim))
    )


def _decode_rows(heads: Array, batch: Ragged, Z: int, keys, logits, start) -> tuple[Array, Array]:
    """Attention of each sequence's first token of the step: [R, K, G, Hv] and [R, K, G]."""
    tables, n = _whole_blocks(batch.tables, Z)
    R, first = tables.shape[0], batch.row_starts[:-1]
    length = batch.row_starts[1:] - first
    q = jnp.take(heads, first, axis=0, mode="clip")
    position = jnp.where(length == 1, batch.kv_lens - 1, -1)  # others see nothing here
    position = jnp.where(jnp.arange(R) < batch.num_seqs, position, -1)

    def block(j, state: _Softmax) -> _Softmax:
        k, v = keys(lax.dynamic_slice_in_dim(tables, j * n, n, 1))
        s = jnp.einsum("rkgh,rnkzh->rkgnz", q, k)
        at = (j * n + jnp.arange(n))[:, None] * Z + jnp.arange(Z)
        v = _written(v, at, batch.kv_lens[:, None, None, None, None])
        s = logits(s, position[:, None, None, None, None], at)
        return state.add(s.reshape(*s.shape[:3], -1), _merge(v), "rkgs,rksh->rkgh")

    blocks = jnp.max(position, initial=-1) // (n * Z) + 1
    return lax.fori_loop(0, blocks, block, start(R)).finish()


def _merge(v: Array) -> Array:  # [R, n, K, Z, H] -> [R, K, n * Z, H]
    return jnp.moveaxis(v, 2, 1).reshape(v.shape[0], v.shape[2], -1, v.shape[-1])


def _prompt_rows(heads: Array, batch: Ragged, Z: int, keys, logits, start, o: Array, lse: Array):
    """Puts the attention of every sequence with several tokens into o and lse."""
    T, size = heads.shape[0], min(_QUERIES, heads.shape[0])
    tables, n = _whole_blocks(batch.tables, Z)

    def attend(r: Array, first: Array, end: Array) -> tuple[Array, Array, Array]:
        at = jnp.minimum(first, T - size) + jnp.arange(size)  # a slice may not leave the array
        q = lax.dynamic_slice_in_dim(heads, at[0], size)
        position = batch.kv_lens[r] - (batch.row_starts[r + 1] - at)

        def block(j, state: _Softmax) -> _Softmax:
            k, v = keys(lax.dynamic_slice(tables, (r, j * n), (1, n))[0])
            s = jnp.einsum("tkgh,nkzh->tkgnz", q, k)
            key = (j * n + jnp.arange(n))[:, None] * Z + jnp.arange(Z)
            v = _written(v, key, batch.kv_lens[r])
            s = logits(s, position[:, None, None, None, None], key)
            return state.add(s.reshape(*s.shape[:3], -1), _merge(v[None])[0], "tkgs,ksh->tkgh")

        last = batch.kv_lens[r] - (batch.row_starts[r + 1] - jnp.minimum(first + size, end)) - 1
        out = lax.fori_loop(0, last // (n * Z) + 1, block, start(size)).finish()
        return *out, jnp.where((at >= first) & (at < end), at, T)

    def sequence(r, carry):
        first, end = batch.row_starts[r], batch.row_starts[r + 1]

        def chunk(c, carry):
            o, lse = carry
            o_part, lse_part, at = attend(r, first + c * size, end)
            return o.at[at].set(o_part, mode="drop"), lse.at[at].set(lse_part, mode="drop")

        chunks = jnp.where(end - first > 1, -(-(end - first) // size), 0)
        return lax.fori_loop(0, chunks, chunk, carry)

    return lax.fori_loop(0, batch.num_seqs, sequence, (o, lse))


def _page_mass(
    heads: Array, tables: Array, position: Array, Z: int, keys, logits, lse: Array
) -> Array:
    """[T, K, G, M]; one page of every token at a time."""

    def page(j: Array) -> Array:
        s = jnp.einsum("tkgh,tkzh->tkgz", heads, keys(tables[:, j])[0])
        s = logits(s, position[:, None, None, None], j * Z + jnp.arange(Z))
        return jnp.exp(s - lse[..., None]).sum(-1)

    return jnp.moveaxis(lax.map(page, jnp.arange(tables.shape[1])), 0, -1)


def _whole_blocks(tables: Array, Z: int) -> tuple[Array, int]:
    """Tables padded to whole blocks of pages, and pages per block."""
    n = max(1, min(_KEYS // Z, tables.shape[1]))
    return jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % n))), n
