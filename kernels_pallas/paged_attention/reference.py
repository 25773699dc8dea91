"""The reference: plain JAX, exact, and with work proportional to the real lengths.

Sequences that decode are attended together, a block of pages at a time. Those with a chunk of a
prompt are attended one after another, so that no array is ever tokens x keys.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from kernels_pallas.paged_attention.checking import check_attention, check_write
from kernels_pallas.paged_attention.codec import Pages, rotated, take, whole_parts
from kernels_pallas.paged_attention.ragged import Ragged, locate, write
from kernels_pallas.softmax import MASK_VALUE
from kernels_pallas.weight import Weight, as_array

_KEYS = 128  # keys attended at a time
_QUERIES = 128  # prompt tokens attended at a time


class _Softmax(NamedTuple):
    """A softmax in progress over blocks of keys."""

    row_max: Array  # [...], the largest logit yet
    row_sum: Array  # [...], the sum of exponentials relative to it
    value: Array  # [..., Hv], the sum of values weighted by them

    def add(self, logits: Array, values: Array, spec: str) -> _Softmax:
        """With a block of keys, whose weights [..., S] and values `spec` multiplies."""
        row_max = jnp.maximum(self.row_max, logits.max(-1))
        rescale, p = jnp.exp(self.row_max - row_max), jnp.exp(logits - row_max[..., None])
        value = self.value * rescale[..., None] + jnp.einsum(spec, p, values)
        return _Softmax(row_max, self.row_sum * rescale + p.sum(-1), value)

    def finish(self) -> tuple[Array, Array]:
        """o [..., Hv] and lse [...]."""
        row_sum = jnp.maximum(self.row_sum, 1e-30)
        return self.value / row_sum[..., None], self.row_max + jnp.log(row_sum)


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
    """Writes k and v to their pages, then attends causally: `page_write`, then `page_attention`.

    Args:
        options: of `page_attention`, but for `mass`.

    Returns:
        o [T, N, Hv] and lse [T, N], both float32, k_pages and v_pages.
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
    lacks become 0. The caches may be donated: then nothing else of them is copied.

    Quantized pages (codec.py) round each row on its own, by its own scale or by a calibrated one,
    so a row that is not finite spoils no other.

    Raises:
        ValueError: shapes and types do not go together.
    """
    check_write(k_pages, v_pages, k, v, layer, batch)
    seq, position = locate(batch, k.shape[0])
    return write(k_pages, v_pages, k, v, layer, batch, seq, position)


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

    Quantized pages (codec.py) stand for the rows that they dequantize to. Queries and outputs are
    never rotated, though rows in four bits are.

    Args:
        scale: what products of queries and keys are multiplied by to be logits.
        window: keys at least this far back are hidden; 0 hides none.
        sinks: a logit per head that joins the softmax and carries no value.
        soft_cap: logits become cap * tanh(logits / cap); 0 leaves them.
        value_dim: lanes of a value that are used, where pages have more. Keys use q's lanes.
        mass: whether to return how much attention each page gets.

    Returns:
        o [T, N, value_dim] and lse [T, N], both float32. `(o, lse)` of disjoint sets of keys can be
        merged (merging.py). With `mass` also [T, N, M]: for each page in a token's row of the
        block table, the sum of its exponentials relative to lse. Rows of padding are unspecified.

    Raises:
        ValueError: shapes and types do not go together.
    """
    check_attention(q, k_pages, v_pages, layer, batch, sinks=sinks, value_dim=value_dim)
    T, N, H = q.shape
    K, Z = k_pages.shape[2:4]
    seq, position = locate(batch, T)
    heads = rotated(k_pages, q.astype(jnp.float32)).reshape(T, K, N // K, -1) * scale
    values = value_dim or (H if v_pages is None else v_pages.shape[-1])
    owner = k_pages if v_pages is None else v_pages
    lanes = whole_parts(owner, values)
    keys = partial(_keys, k_pages, v_pages, layer, heads.shape[-1], lanes)
    logits = partial(_mask, window=window, soft_cap=soft_cap)
    if sinks is None:
        sink = jnp.full((K, N // K), MASK_VALUE)
    else:
        sink = as_array(sinks).astype(jnp.float32).reshape(K, N // K)
    start = partial(_start, sink, 0.0 if sinks is None else 1.0, lanes)
    o, lse = _decode_rows(heads, batch, Z, keys, logits, start)
    o, lse = jnp.take(o, seq, axis=0), jnp.take(lse, seq, axis=0)  # per sequence -> per token
    o, lse = _prompt_rows(heads, batch, Z, keys, logits, start, o, lse)
    out = rotated(owner, o.reshape(T, N, -1))[..., :values], lse.reshape(T, N)
    if not mass:
        return out
    sums = _page_mass(heads, batch.tables[seq], position, Z, keys, logits, lse)
    return *out, sums.reshape(T, N, -1)


def _keys(k_pages, v_pages, layer, key_dim, value_dim, pages: Array) -> tuple[Array, Array]:
    """Keys and values [..., pages, K, Z, H] of the given pages [..., pages]."""
    k = take(k_pages, layer, pages)
    v = k if v_pages is None else take(v_pages, layer, pages)
    return k[..., :key_dim], v[..., :value_dim]


def _written(v: Array, at: Array, length: Array) -> Array:
    """Values [..., n, K, Z, H] at positions [n, Z], but 0 from `length` on: slots there hold rows
    of the page's former owner, which might be NaN, and a weight of 0 does not silence a NaN."""
    return jnp.where(at[:, None, :, None] < length, v, 0.0)


def _mask(
    logits: Array, query: Array, key: Array, *, window: Array | int, soft_cap: float
) -> Array:
    """Logits after the cap, masked where a key's position is hidden from the query's."""
    if soft_cap:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    seen = (key <= query) & ((window == 0) | (query - key < window))
    return jnp.where(seen, logits, MASK_VALUE)


def _start(sink: Array, row_sum: float, value_dim: int, *lead: int) -> _Softmax:
    """A softmax [*lead, K, G] whose maximum is the sinks [K, G], and whose sum is `row_sum`."""
    shape = (*lead, *sink.shape)
    return _Softmax(
        jnp.broadcast_to(sink, shape), jnp.full(shape, row_sum), jnp.zeros((*shape, value_dim))
    )


def _decode_rows(heads: Array, batch: Ragged, Z: int, keys, logits, start) -> tuple[Array, Array]:
    """Attention of the sequences that have one token in the step: [R, K, G, Hv] and [R, K, G]."""
    tables, n = _whole_blocks(batch.tables, Z)
    R, first = tables.shape[0], batch.row_starts[:-1]
    length = batch.row_starts[1:] - first
    q = jnp.take(heads, first, axis=0, mode="clip")
    position = jnp.where(length == 1, batch.kv_lens - 1, -1)  # others see no key here
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
    """o and lse with the attention of every sequence that has several tokens in the step."""
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
    """The mass of each page [T, K, G, M], one page of every token at a time."""

    def page(j: Array) -> Array:
        s = jnp.einsum("tkgh,tkzh->tkgz", heads, keys(tables[:, j])[0])
        s = logits(s, position[:, None, None, None], j * Z + jnp.arange(Z))
        return jnp.exp(s - lse[..., None]).sum(-1)

    return jnp.moveaxis(lax.map(page, jnp.arange(tables.shape[1])), 0, -1)


def _whole_blocks(tables: Array, Z: int) -> tuple[Array, int]:
    """Tables, padded to whole blocks of pages, and pages per block."""
    n = max(1, min(_KEYS // Z, tables.shape[1]))
    return jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % n))), n
