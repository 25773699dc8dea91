"""Products with stored weights against numpy."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.linear import GATES, gated_linear, linear
from kernels_pallas.quantize import quantize_rows
from kernels_pallas.weight import Int8Weight, StackedWeight, as_array, expert_of


def draw(shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def wide(x):
    return np.asarray(x, np.float64)


@given(seed=st.integers(0, 2**32), rows=st.integers(1, 9), out=st.integers(1, 9))
@settings(max_examples=15, deadline=None)
def test_a_product_is_numpys(seed, rows, out):
    x, w = draw((rows, 8), seed), draw((out, 8), seed + 1)
    np.testing.assert_allclose(linear(x, w), wide(x) @ wide(w).T, rtol=1e-5, atol=1e-5)


def test_several_weights_split_and_joined_heads():
    x = draw((2, 3, 8))
    wq, wk, wo = draw((4, 5, 8), 1), draw((2, 5, 8), 2), draw((8, 20), 3)
    q, k = linear(x, wq, wk)
    assert q.shape == (2, 3, 4, 5)
    assert k.shape == (2, 3, 2, 5)
    np.testing.assert_allclose(q, np.einsum("btd,nhd->btnh", x, wq), rtol=1e-5, atol=1e-5)
    joined = np.asarray(q).reshape(2, 3, 20)
    np.testing.assert_allclose(linear(joined, wo), joined @ wide(wo).T, rtol=1e-5, atol=1e-5)


def test_bfloat16_weights_accumulate_in_float32():
    x, w = draw((4, 512)), draw((16, 512), 1).astype(jnp.bfloat16)
    rounded = wide(x.astype(jnp.bfloat16))
    y = linear(x, w)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, rounded @ wide(w).T, rtol=1e-4, atol=1e-4)
    assert linear(x.astype(jnp.bfloat16), w).dtype == jnp.bfloat16


def test_a_weight_in_its_stack_is_the_layers_own():
    stack, x = draw((3, 6, 8)), draw((5, 8), 1)
    stacked = StackedWeight(stack, jnp.int32(1))
    assert stacked.shape == (6, 8)
    assert stacked.dtype == jnp.float32
    np.testing.assert_array_equal(as_array(stacked), stack[1])
    np.testing.assert_array_equal(linear(x, stacked), linear(x, stack[1]))
    run = jax.jit(lambda s, i: linear(x, StackedWeight(s, i)))
    np.testing.assert_allclose(run(stack, 2), linear(x, stack[2]), rtol=1e-6, atol=1e-6)


def test_an_expert_is_read_from_either_form():
    stack = draw((3, 4, 5, 6))
    for expert in range(4):
        np.testing.assert_array_equal(expert_of(stack[2], jnp.int32(expert)), stack[2, expert])
        one = expert_of(StackedWeight(stack, jnp.int32(2)), jnp.int32(expert))
        np.testing.assert_array_equal(one, stack[2, expert])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


FORMULAS = {
    "silu": lambda g, u: g * sigmoid(g) * u,
    "gelu_tanh": lambda g, u: (
        g * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))) * u
    ),
    "swiglu_oai": lambda g, u: (
        (np.clip(u, -7, 7) + 1) * np.minimum(g, 7) * sigmoid(1.702 * np.minimum(g, 7))
    ),
}


def test_every_gate_has_its_formula():
    assert FORMULAS.keys() == GATES.keys()


@pytest.mark.parametrize("activation", FORMULAS)
def test_a_gated_product_is_its_formula(activation):
    x, gate, up = draw((4, 8)) * 4, draw((6, 8), 1), draw((6, 8), 2)
    expected = FORMULAS[activation](wide(x) @ wide(gate).T, wide(x) @ wide(up).T)
    assert np.abs(expected).max() > 10, "the clamps of gpt-oss are not reached"
    y = gated_linear(x, gate, up, activation=activation)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("activation", FORMULAS)
def test_gradients_are_finite_differences(activation):
    x, gate, up = draw((4, 8)), draw((6, 8), 1), draw((6, 8), 2)

    def loss(x, gate, up):
        return jnp.sum(jnp.sin(gated_linear(x, gate, up, activation=activation)))

    jax.test_util.check_grads(loss, (x, gate, up), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_long_row_that_is_not_finite_stays_so_among_any_number(bad: float):
    """XLA's maximum forgets NaN on CPU where rows are long or many."""
    w = Int8Weight(*quantize_rows(jnp.ones((4, 128))))
    for T in (1, 8, 33):
        x = np.random.default_rng(0).normal(size=(T, 128)).astype(np.float32)
        x[T // 2, 77] = bad
        y = np.asarray(jax.jit(linear)(x, w))
        assert not np.isfinite(y[T // 2]).any()
        assert np.isfinite(np.delete(y, T // 2, 0)).all()
