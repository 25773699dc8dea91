"""Groups of a shared prefix in the C++ attention: their pages are read once, and no bit tells."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels_pallas import cpu
from kernels_pallas.cpu import bodies
from kernels_pallas.paged_attention.cases import batch, pages_of
from kernels_pallas.paged_attention.ragged import Groups

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")

Z, T, P, M, R = 16, 96, 300, 24, 12
HEADS = {"grouped": (8, 2, 64), "many": (32, 1, 64), "odd": (6, 2, 80)}  # N, K, H
KINDS = ("float32", "uint16", "int8", "static", "int4")
LATENT = (64, 32)  # a value's lanes, and those that its key has besides


@functools.lru_cache(1)
def arrays_of(kind, N, K, H, latent=False, seed=0):
    """q, k, v and two layers of pages that hold something."""
    keys = jax.random.split(jax.random.key(seed), 5)
    W = sum(LATENT) if latent else H
    q, k, v = (jax.random.normal(x, (T, n, W)) for x, n in zip(keys, (N, K, K), strict=False))

    def pages(key):
        if kind in ("float32", "uint16"):
            x = jax.random.normal(key, (2, P, K, Z, W), "bfloat16" if kind == "uint16" else kind)
            return jax.lax.bitcast_convert_type(x, jnp.uint16) if kind == "uint16" else x
        return pages_of(kind, key, (2, P, K, Z, W), LATENT if latent else None)

    return q, k, None if latent else v, pages(keys[3]), None if latent else pages(keys[4])


@functools.cache
def attention(**options):
    return jax.jit(functools.partial(bodies.paged_attention, scale=0.2, **options))


def padded(step):
    """A step in arrays whose sizes are the same for all, so that there is one program."""
    n, width = step.tables.shape
    starts = np.pad(step.row_starts, (0, R - n), mode="edge")
    tables = np.pad(step.tables, ((0, R - n), (0, M - width)))
    groups = Groups(*(np.pad(x, (0, R // 2 + 1 - len(x))) for x in step.groups))
    lens = np.pad(step.kv_lens, (0, R - n))
    return step._replace(row_starts=starts, kv_lens=lens, tables=tables, groups=groups)


def with_and_without(kind, step, *, window=0, sinks=None, **options):
    """What a step comes to, its pages included, with its groups and without."""
    step, names = padded(step), {"N", "K", "H", "latent"}
    arrays = arrays_of(kind, **{k: v for k, v in options.items() if k in names})
    rest = {k: v for k, v in options.items() if k not in names}
    run = functools.partial(attention(**rest), *arrays, jnp.int32(1), window=window, sinks=sinks)
    return run(step), run(step._replace(groups=None))


@st.composite
def steps(draw):
    """Steps of up to three groups, members of which say one token or some, and others between."""
    new, lens, shared = [], [], []
    for _ in range(draw(st.integers(1, 3))):
        alone, members = draw(st.integers(0, 2)), draw(st.integers(2, 4))
        members = min(members, R - len(new) - alone)
        if members < 2:
            break
        common = draw(st.sampled_from((16, 64, 80, 128, 192)))
        for shares in [False] * alone + [True] * members:
            new.append(draw(st.sampled_from((1, 1, 1, 2, 9))))
            lens.append(new[-1] + common * shares + draw(st.integers(0, 150)))
        shared.append((len(new) - members, len(new), common))
    return batch(tuple(new), tuple(lens), Z, shared=tuple(shared))[0]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", KINDS)
@given(step=steps())
@example(step=batch((1,) * 12, (340,) * 12, Z, shared=((0, 12, 256),))[0])
@settings(max_examples=15, deadline=None)
def test_no_bit_depends_on_a_group(kind, heads, step):
    N, K, H = HEADS[heads]
    found, alone = with_and_without(kind, step, N=N, K=K, H=H)
    jax.tree.map(np.testing.assert_array_equal, found, alone)


VARIANTS = {
    "latent": {"N": 16, "K": 1, "H": 96, "latent": True, "value_dim": LATENT[0]},
    "capped, with sinks": {"N": 4, "K": 2, "H": 64, "soft_cap": 2.0, "sinks": np.ones(4, "f")},
    "windowed": {"N": 4, "K": 2, "H": 64, "window": 90},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_bit_of_other_attention_does(kind, variant):
    step, _ = batch(
        (1, 1, 1, 9, 1, 2, 1), (40, 141, 200, 133, 40, 114, 130), Z, shared=((1, 4, 96), (5, 7, 64))
    )
    found, alone = with_and_without(kind, step, **VARIANTS[variant])
    jax.tree.map(np.testing.assert_array_equal, found, alone)


def where_others_are_nan(step):
    """Outputs of a step whose members but the first have NaN for common pages, and without that."""
    q, k, v, *pages = arrays_of("float32", N=8, K=2, H=64)
    groups = step.groups
    step = padded(step)
    tables, spare = step.tables.copy(), P - 1
    for first, end, n in zip(*groups, strict=True):
        tables[first + 1 : end, :n] = spare
    pages = [x.at[:, spare].set(jnp.nan) for x in pages]
    o = attention()(q, k, v, *pages, jnp.int32(1), step._replace(tables=tables))[0]
    own = attention()(q, k, v, *pages, jnp.int32(1), step)[0]
    return o, own


def test_pages_of_a_group_are_read_once():
    """By each of the tasks that its members are divided among: here that is one for each head."""
    step, _ = batch((1, 1, 1), (200, 300, 70), Z, shared=((0, 2, 64),))
    o, own = where_others_are_nan(step)
    np.testing.assert_array_equal(o, own)
    assert np.isfinite(o).all()


def test_what_fills_no_block_is_read_by_each():
    step, _ = batch((1, 1), (100, 100), Z, shared=((0, 2, 48),))
    assert np.isnan(where_others_are_nan(step)[0]).any()


@pytest.mark.parametrize(
    "groups",
    [
        ((0, 2, 8), (1, 3, 8), (0, 0, 0)),  # they overlap
        ((2, 4, 8), (0, 2, 8)),  # not in order
        ((0, 9, 8),),  # more than there are
        ((-3, 2, 8),),
        ((3, 1, 8),),
        ((0, 4, -8),),
        ((1, 2, 8),),
        ((0, 4, 10**8),),  # more than they have
    ],
)
def test_groups_that_cannot_be_are_passed_over(groups):
    """All sequences begin alike, so whatever is shared is right."""
    step, _ = batch((1, 1, 2, 1), (200, 150, 180, 160), Z, shared=((0, 4, 128),))
    step = step._replace(groups=Groups(*np.array(groups, np.int32).T))
    found, alone = with_and_without("float32", step, N=4, K=2, H=64)
    jax.tree.map(np.testing.assert_array_equal, found, alone)


def test_members_without_tokens_share_nothing():
    step, _ = batch((1, 0, 1), (200, 150, 180), Z, shared=((0, 3, 128),))
    found, alone = with_and_without("float32", step, N=4, K=2, H=64)
    jax.tree.map(np.testing.assert_array_equal, found, alone)
