"""Parts of a softmax that are put together, against the whole of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.paged_attention import merge

EMPTY = np.full((3, 2, 4), np.nan, np.float32), np.full((3, 2), -np.inf, np.float32)


def attend(s, v, sinks=None):
    """(o, lse) of logits [T, N, S] and values [S, H], in float64."""
    lse = np.logaddexp.reduce(s, -1)
    lse = lse if sinks is None else np.logaddexp(lse, sinks)
    return (np.exp(s - lse[..., None]) @ v).astype(np.float32), lse.astype(np.float32)


def draw(seed, size=4.0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((3, 2, 12)) * size, rng.standard_normal((12, 4))


def equal(found, expected):
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)  # an lse of 300 has 24 bits, too


@given(
    seed=st.integers(0, 2**32 - 1),
    cuts=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    size=st.sampled_from([0.1, 4.0, 60.0]),
)
@settings(max_examples=40, deadline=None)
def test_any_order_gives_the_whole(seed, cuts, size):
    s, v = draw(seed, size)
    sinks = s[0, :, 0] * 0.5
    first, second = sorted(cuts)
    ranges = [slice(0, first), slice(first, second), slice(second, 12)]
    a, b, c = (attend(s[..., r], v[r]) if r.start < r.stop else EMPTY for r in ranges)
    own = jnp.zeros((3, 2, 4)), jnp.broadcast_to(sinks, (3, 2))
    equal(merge(*merge(*a, *b), *c), attend(s, v))
    equal(merge(*a, *merge(*b, *c)), attend(s, v))
    equal(merge(*merge(*c, *a), *b), attend(s, v))
    equal(merge(*merge(*a, *merge(*b, *c)), *own), attend(s, v, sinks))
    with_sinks = attend(s[..., ranges[0]], v[ranges[0]], sinks)  # given to one of them
    equal(merge(*with_sinks, *merge(*b, *c)), attend(s, v, sinks))


@pytest.mark.parametrize("nothing", [-np.inf, -1e30])
def test_an_empty_set_changes_nothing(nothing):
    s, v = draw(0)
    some, empty = attend(s, v), (EMPTY[0], np.full((3, 2), nothing, np.float32))
    for found in (merge(*some, *empty), merge(*empty, *some)):
        for x, y in zip(found, some, strict=True):
            np.testing.assert_array_equal(x, y)


def test_two_empty_sets_are_one():
    o, lse = merge(*EMPTY, *EMPTY)
    assert (o == 0).all()
    assert (lse == -np.inf).all()


def test_gradients_are_finite_where_a_set_is_empty():
    s, v = draw(0)
    some = attend(s, v)
    empty = np.zeros((3, 2, 4), np.float32), np.full((3, 2), -1e30, np.float32)
    slopes = jax.grad(lambda *x: sum(jnp.sum(y) for y in merge(*x)), (0, 1, 2, 3))(*some, *empty)
    assert all(np.isfinite(x).all() for x in slopes)
    np.testing.assert_allclose(slopes[0], 1.0, rtol=1e-6)
