"""Pages that a group has in common, on Hopper: read once, and joined with what each member has."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.hopper import ROWS
from kernels_pallas.paged_attention import Groups, Ragged, mosaic_gpu, reference
from tests.kernels_pallas.simulating import on_hopper
from tests.sparing import sparing

Z, M, BLOCK = 32, 12, 64  # keys of a page, pages of a sequence, keys of a block
T, R = 24, 6


def step_of(new, lens, groups, idle=0):
    """A step whose groups share no page yet: all tables are of pages of their own."""
    starts, tables = np.cumsum([0, *new, *[0] * idle]), np.arange((len(new) + idle) * M)
    fields = starts, [*lens, *[0] * idle], tables.reshape(-1, M), len(new)
    step = Ragged._make([*(np.asarray(x, np.int32) for x in fields), None])
    return step._replace(groups=Groups(*np.array(groups, np.int32).reshape(-1, 3).T))


def alike(step, read=0):
    """The step with groups' pages in its tables, or with those of them that members read
    themselves, where whole blocks of `read` keys are shared."""
    tables = step.tables.copy()
    before = (step.kv_lens - np.diff(step.row_starts)) // Z  # pages without a token of this step
    for first, end, pages in zip(*step.groups, strict=True):
        whole = min([pages, *before[first:end]])
        shared = whole * Z // read * read // Z if read else 0
        tables[first:end, shared:whole] = tables[first : first + 1, shared:whole]
    return jax.tree.map(jnp.asarray, step._replace(tables=tables))


@st.composite
def steps(draw):
    """Up to six sequences of none to four new tokens, cut into groups of all kinds."""
    n = draw(st.integers(1, R))
    new = draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))
    lens = [x + draw(st.integers(0, M * Z - x)) for x in new]
    cuts = sorted(draw(st.lists(st.integers(0, n), min_size=4, max_size=4)))
    groups = [(*pair, draw(st.integers(0, M))) for pair in itertools.pairwise(cuts)]
    return step_of(new, lens, groups, idle=R - n)


def attended(operands, caches, shape, interpret):
    """What the kernel makes of its items, and NaN where no token is."""
    layer, window, tables, items, queries = operands
    row, key = jnp.arange(shape.tiles * ROWS), jnp.arange(M * Z)
    at = row // ROWS * shape.tokens_per_tile + row % ROWS // shape.heads_per_tile
    table = tables.reshape(-1, M)[items.seqs]
    k, v = (jnp.moveaxis(x[layer[0], table], 1, 2).astype(jnp.float32) for x in caches)
    k, v = (x.reshape(*x.shape[:2], M * Z, -1) for x in (k, v))  # [items, heads, keys, lanes]
    rows = items.row_begins[:, None] * shape.row_align + row
    s = jnp.einsum("hirw,ihkw->ihrk", queries[:, rows].astype(jnp.float32), k) * shape.logit_scale
    back = (items.token_begins[:, None] + at + items.shifts[:, None])[..., None] - key
    reach = jnp.where(window[0] > 0, window[0], 2**30)
    copy = key // shape.keys_per_copy
    told = (copy >= items.copy_begins[:, None]) & (copy < items.copy_ends[:, None])
    p = jnp.where((told[:, None] & (back >= 0) & (back < reach))[:, None], jnp.exp2(s), 0)
    total = p.sum(-1, keepdims=True)
    o, lse = jnp.einsum("ihrk,ihkw->hirw", p / total, v), jnp.log(total[..., 0])
    real = (at < (items.token_ends - items.token_begins)[:, None]) & (items.seqs >= 0)[:, None]
    real &= row % ROWS < shape.tokens_per_tile * shape.heads_per_tile
    kept = jnp.full((*queries.shape[:2], v.shape[-1]), jnp.nan)
    kept = kept.at[:, jnp.where(real, rows, len(kept[0]))].set(o, mode="drop")
    return kept[None], jnp.where(real[:, None], lse, jnp.nan)[None]


@functools.cache
def both(keys, window):
    def run(q, k, v, told, step, sinks):
        rest = {"scale": 0.1, "sinks": sinks, "window": jnp.int32(window)}
        tile = mosaic_gpu.GpuTile(keys=keys, splits=1, turns=1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mosaic_gpu, "_launch", attended)
            found = mosaic_gpu.page_attention(q, k, v, 0, told, tile=tile, **rest)
        return found, reference.page_attention(q, k, v, 0, step, **rest)

    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize(
    ("heads", "keys", "window"), sparing([(4, 64, 0), (4, 64, 70), (32, 128, 0)], (4, 64, 0))
)
@given(step=steps(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_items_add_up_to_attention(heads, keys, window, step, seed):
    """Whatever the groups, and though members' own tables lead elsewhere; kernels do as told."""
    rng = np.random.default_rng(seed)
    pages = jnp.asarray(rng.standard_normal((2, 1, step.tables.size, 2, Z, 64)), jnp.bfloat16)
    q = jnp.asarray(rng.standard_normal((T, heads, 64)), jnp.bfloat16)
    sinks = jnp.asarray(rng.standard_normal(heads), jnp.float32)
    told = alike(step, 0 if window else keys)
    found, expected = both(keys, window)(q, *pages, told, alike(step), sinks)
    real = slice(step.row_starts[-1])
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x[real], y[real], rtol=0.01, atol=0.01)


def run(step, heads, splits=1, **options):
    """The simulated kernel where pages that it need not read are NaN, and the reference."""
    expected, told = alike(step), alike(step, BLOCK)
    values = np.random.default_rng(0).standard_normal((1, step.tables.size, 1, Z, 64))
    values[:, np.setdiff1d(told.tables, expected.tables)] = np.nan
    pages = jnp.asarray(values, jnp.bfloat16)
    q = jax.random.normal(jax.random.key(0), (int(step.row_starts[-1]), heads, 64), jnp.bfloat16)
    options, tile = {"scale": 0.2, **options}, mosaic_gpu.GpuTile(splits=splits)
    attend = functools.partial(mosaic_gpu.page_attention, q, pages, pages, 0, told, **options)
    found = on_hopper(functools.partial(attend, tile=tile))
    return found, reference.page_attention(q, pages, pages, 0, expected, **options)


SIMULATED = {
    "two tokens, and pages behind blocks": ((1, 2, 1), (65, 104, 70), [(0, 2, 3), (3, 3, 0)], 4),
    "more rows than a tile": ((1, 1, 1), (70, 65, 140), [(0, 3, 2)], 32),
    "shares of keys": ((1, 1), (370, 360), [(0, 2, 11)], 2),
    "none in common": ((1, 1), (40, 70), [(0, 2, 0)], 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SIMULATED)
def test_pages_of_a_group_are_read_once_on_hopper(name):
    """What other members' tables name there instead is NaN: nobody looks at it."""
    *fields, heads = SIMULATED[name]
    found, expected = run(step_of(*fields), heads, sinks=jnp.full((heads,), 0.5))
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0.02, atol=0.02)


@pytest.mark.slow
def test_shares_of_a_groups_keys_are_split_on():
    """As those of members are, where blocks of threads are few."""
    found, expected = run(step_of((1, 1), (300, 80), [(0, 2, 2)]), 2, splits=2)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0.02, atol=0.02)
