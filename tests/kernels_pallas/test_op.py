"""Weights in their stacks and with low-rank additions stand for plain arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.linear import gated_linear, linear
from kernels_pallas.weight import LowRankWeight, StackedWeight, as_array

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(("out", "into"), [((6,), (5,)), ((2, 3), (5,)), ((5,), (2, 3))])
@pytest.mark.parametrize("stacked", [False, True])
def test_a_low_rank_addition(out, into, stacked):
    rank, lead = 2, (3,) if stacked else ()
    w = LowRankWeight(normal(*lead, *out, *into), normal(*lead, rank, *into),
                      normal(*lead, *out, rank), 0.5)  # fmt: skip
    whole = w.merged()
    if stacked:
        w = jax.tree.map(lambda a: StackedWeight(a, 1), w)
        whole = whole[1]
    np.testing.assert_allclose(as_array(w), whole, atol=1e-5)
    want = as_array(w.base) + 0.5 * jnp.tensordot(as_array(w.up), as_array(w.down), 1)
    np.testing.assert_allclose(whole, want, atol=1e-5)
    if len(into) == 1:  # products sum along one axis; training merges any
        x = normal(4, *into)
        np.testing.assert_allclose(linear(x, w), linear(x, whole), atol=1e-4)


def test_the_sum_is_made_in_the_wider_type_and_comes_back():
    base, down, up = normal(6, 5).astype(jnp.bfloat16), normal(2, 5), normal(6, 2)
    whole = LowRankWeight(base, down, up, 0.5).merged()
    assert whole.dtype == jnp.bfloat16
    want = base.astype(jnp.float32) + 0.5 * up @ down
    np.testing.assert_array_equal(whole, want.astype(jnp.bfloat16))


def test_gradients_reach_both_factors():
    base, down, up, x = normal(6, 5), normal(2, 5), normal(6, 2), normal(3, 5)

    def through(down, up):
        w = LowRankWeight(base, down, up, 2.0)
        return gated_linear(x, w, base, activation="silu").sum()

    def plain(down, up):
        return gated_linear(x, base + 2.0 * up @ down, base, activation="silu").sum()

    for got, want in zip(*(jax.grad(f, (0, 1))(down, up) for f in (through, plain)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
