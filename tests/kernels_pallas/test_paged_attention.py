"""Ragged paged attention against a plain loop over sequences, tokens and heads."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.paged_attention import Ragged, gathered, paged_attention
from kernels_pallas.weight import StackedWeight
from tests.sparing import sparing

L, LAYER, Z, M, R, T, H = 2, 1, 4, 5, 5, 16, 8
P = R * M + 2


def naive(q, k, v, k_pages, v_pages, batch, *, scale, window, sinks, soft_cap, value_dim):
    """o, lse and the pages after this step, in float64 and with plain loops."""
    k_pages, v_pages = k_pages.copy(), None if v_pages is None else v_pages.copy()
    starts, lens, tables, n = batch
    group = q.shape[1] // k.shape[1]
    at = {}  # token -> (sequence, position)
    for r in range(n):
        for t in range(starts[r], starts[r + 1]):
            at[t] = r, lens[r] - (starts[r + 1] - t)
    for t, (r, p) in at.items():  # everybody writes before anybody reads
        k_pages[LAYER, tables[r, p // Z], :, p % Z] = k[t]
        if v_pages is not None:
            v_pages[LAYER, tables[r, p // Z], :, p % Z] = v[t]
    values = k_pages[..., :value_dim] if v_pages is None else v_pages
    o = np.zeros((*q.shape[:2], values.shape[-1]))
    lse = np.zeros(q.shape[:2])
    for t, (r, p) in at.items():
        first = max(0, p - window + 1) if window else 0
        slots = [(tables[r, s // Z], s % Z) for s in range(first, p + 1)]
        for head in range(q.shape[1]):
            keys = np.array([k_pages[LAYER, page, head // group, z] for page, z in slots])
            vals = np.array([values[LAYER, page, head // group, z] for page, z in slots])
            s = keys.astype(np.float64) @ q[t, head].astype(np.float64) * scale
            s = soft_cap * np.tanh(s / soft_cap) if soft_cap else s
            top = max(s.max(), -np.inf if sinks is None else sinks[head])
            total = np.exp(s - top).sum() + (0 if sinks is None else np.exp(sinks[head] - top))
            o[t, head] = np.exp(s - top) @ vals.astype(np.float64) / total
            lse[t, head] = top + np.log(total)
    return o, lse, k_pages, v_pages, sorted(at)


@st.composite
def batches(draw):
    """Row starts, lengths, tables and count: chunks, decodes, idle rows, shared pages, padding."""
    n = draw(st.integers(0, R))
    starts, lens = [0], []
    pages = draw(st.permutations(range(P)))
    tables = np.array(pages[: R * M], np.int32).reshape(R, M)
    for r in range(n):
        new = draw(st.integers(0, min(6, T - starts[-1])))
        before = draw(st.integers(0, M * Z - new))
        if new == 0 and draw(st.booleans()):
            before = 0  # an empty sequence
        starts.append(starts[-1] + new)
        lens.append(before + new)
        if r and draw(st.booleans()):  # whole pages that this row only reads may be a neighbour's
            whole = draw(st.integers(0, min(before, lens[r - 1]) // Z))
            tables[r, :whole] = tables[r - 1, :whole]
    starts += [starts[-1]] * (R - n)
    lens += [0] * (R - n)
    return np.array(starts, np.int32), np.array(lens, np.int32), tables, n


VARIANTS = {
    "one head": {"N": 1, "K": 1},
    "grouped": {"N": 4, "K": 2},
    "all share one": {"N": 4, "K": 1, "window": 3},
    "window": {"N": 2, "K": 2, "window": 6},
    "sinks": {"N": 4, "K": 2, "sinks": True, "window": 5},
    "soft cap": {"N": 2, "K": 1, "soft_cap": 2.0},
    "wide values": {"N": 2, "K": 2, "Hv": 12},
    "values in keys": {"N": 4, "K": 1, "value_dim": 5},
    "bfloat16 as bits": {"N": 4, "K": 2, "dtype": np.uint16},
    "latent bits and sinks": {"N": 2, "K": 1, "value_dim": 6, "dtype": np.uint16, "sinks": True},
}


def compiled(kernel):
    static, fast = ("scale", "soft_cap", "value_dim"), {"xla_backend_optimization_level": 0}
    return jax.jit(kernel, static_argnames=static, compiler_options=fast)


attention = compiled(paged_attention)
KERNELS = {"reference": attention, "gathered": compiled(gathered.paged_attention)}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("variant", sparing(VARIANTS, "grouped", "sinks", "values in keys"))
@given(batch=batches(), seed=st.integers(0, 2**32))
@settings(max_examples=15, deadline=None)
def test_it_is_the_plain_loop(variant, kernel, batch, seed):
    check(batch, seed, kernel, **VARIANTS[variant])


def check(
    batch,
    seed,
    kernel="reference",
    *,
    N,
    K,
    Hv=H,
    window=0,
    sinks=False,
    soft_cap=0.0,
    value_dim=None,
    dtype=np.float32,
):
    rng = np.random.default_rng(seed)
    starts, lens, tables, n = batch
    tokens, num_pages = max(T, int(starts[-1])), max(P, int(tables.max()) + 1)

    def draw(*shape):
        x = rng.standard_normal(shape).astype(np.float32)
        return x.astype(ml_dtypes.bfloat16).astype(np.float32) if dtype == np.uint16 else x

    q, k = draw(tokens, N, H) * 2, draw(tokens, K, H)
    k_pages = draw(L, num_pages, K, Z, H)
    v, v_pages = None, None
    if value_dim is None:
        v, v_pages = draw(tokens, K, Hv), draw(L, num_pages, K, Z, Hv)
    options = {"scale": 0.6, "soft_cap": soft_cap, "value_dim": value_dim}
    sink = rng.standard_normal(N).astype(np.float32) if sinks else None
    o, lse, k_after, v_after, real = naive(
        q, k, v, k_pages, v_pages, batch, window=window, sinks=sink, **options
    )
    stored = [None if x is None else store(x, dtype) for x in (k_pages, v_pages)]
    ragged = Ragged(*(jnp.asarray(x, jnp.int32) for x in (starts, lens, tables, n)))
    got_o, got_lse, got_k, got_v = KERNELS[kernel](
        q, k, v, *stored, jnp.int32(LAYER), ragged, window=jnp.int32(window), sinks=sink, **options
    )
    assert got_o.dtype == got_lse.dtype == jnp.float32
    np.testing.assert_allclose(got_o[np.array(real, int)], o[real], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got_lse[np.array(real, int)], lse[real], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(load(got_k), k_after)
    assert (got_v is None) == (v_pages is None)
    if got_v is not None:
        np.testing.assert_array_equal(load(got_v), v_after)


def store(x, dtype):
    return x.astype(ml_dtypes.bfloat16).view(np.uint16) if dtype == np.uint16 else x


def load(x):
    x = np.asarray(x)
    return x.view(ml_dtypes.bfloat16).astype(np.float32) if x.dtype == np.uint16 else x


def test_more_keys_and_queries_than_one_block():
    """A chunk of 300 beside a decode row 290 long: several blocks of both."""
    per_row = 80
    tables = np.random.default_rng(0).permutation(2 * per_row).astype(np.int32).reshape(2, -1)
    starts, lens = np.array([0, 300, 301], np.int32), np.array([310, 290], np.int32)
    for variant in ({"N": 4, "K": 2}, {"N": 2, "K": 1, "value_dim": 4, "window": 150}):
        check((starts, lens, tables, 2), 0, **variant)


def test_a_token_sees_what_its_neighbour_writes_in_the_same_step():
    tables = np.array([[0, 1], [0, 2]], np.int32)  # row 1 reads the page that row 0 writes
    check((np.array([0, 4, 6], np.int32), np.array([4, 6], np.int32), tables, 2), 0, N=2, K=1)


def test_disjoint_sets_of_keys_merge_exactly():
    rng = np.random.default_rng(0)
    rows, K, N = 3, 2, 4
    k_pages = rng.standard_normal((L, P, K, Z, H)).astype(np.float32)
    v_pages = rng.standard_normal((L, P, K, Z, H)).astype(np.float32)
    q = rng.standard_normal((rows, N, H)).astype(np.float32)
    tables = np.arange(rows * M, dtype=np.int32).reshape(rows, M)
    lens, split = np.array([17, 20, 9]), 2 * Z  # keys of the first two pages, and the others

    def run(tables, lens):
        """Decodes a token whose key and value are those that its slot has already."""
        page, slot = tables[np.arange(rows), (lens - 1) // Z], (lens - 1) % Z
        own_k, own_v = (pages[LAYER, page, :, slot] for pages in (k_pages, v_pages))
        starts = jnp.arange(rows + 1, dtype=jnp.int32)
        batch = Ragged(starts, jnp.asarray(lens, jnp.int32), jnp.asarray(tables), jnp.int32(rows))
        o, lse, *_ = attention(q, own_k, own_v, k_pages, v_pages, LAYER, batch, scale=0.5)
        return np.asarray(o, np.float64), np.asarray(lse, np.float64)

    whole, whole_lse = run(tables, lens)
    parts = [run(tables, np.full(rows, split)), run(tables[:, split // Z :], lens - split)]
    lse = np.logaddexp(parts[0][1], parts[1][1])
    merged = sum(o * np.exp(part - lse)[..., None] for o, part in parts)
    np.testing.assert_allclose(lse, whole_lse, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(merged, whole, rtol=1e-5, atol=1e-5)


def test_sinks_in_their_stack_are_the_layers_own():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((4, 2, H)).astype(np.float32) for _ in range(3))
    pages = jnp.zeros((1, 2, 2, Z, H))
    sinks = jnp.asarray(rng.standard_normal((3, 2)), jnp.float32)
    starts, lens = jnp.array([0, 4], jnp.int32), jnp.array([4], jnp.int32)
    batch = Ragged(starts, lens, jnp.zeros((1, 1), jnp.int32), jnp.int32(1))

    def run(sinks):
        return attention(q, k, v, pages, pages, 0, batch, scale=1.0, sinks=sinks)[0]

    stacked = run(StackedWeight(sinks, jnp.int32(2)))
    np.testing.assert_allclose(stacked, run(sinks[2]), rtol=1e-6, atol=1e-6)
