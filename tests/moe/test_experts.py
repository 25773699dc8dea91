"""Grouped products of experts against a plain loop over tokens and choices."""

import dataclasses

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.weight import StackedWeight
from moe.experts import BLOCK_ROWS, Experts, experts

D, F = 8, 6


def draw(E, seed=0, biased=False, layers=None):
    rng = np.random.default_rng(seed)
    lead = () if layers is None else (layers,)

    def weight(*shape):
        return jnp.asarray(rng.standard_normal((*lead, E, *shape)), jnp.float32)

    biases = (weight(F), weight(F), weight(D)) if biased else (None,) * 3
    return Experts(weight(F, D), weight(F, D), weight(D, F), *biases)


def naive(x, ids, weights, p):
    """silu(x gate) * (x up) down, one choice at a time."""
    x = np.asarray(x, np.float64)
    gate, up, down = (np.asarray(w, np.float64) for w in (p.w_gate, p.w_up, p.w_down))
    biases = [0 if b is None else np.asarray(b) for b in (p.b_gate, p.b_up, p.b_down)]
    b_gate, b_up, b_down = (
        np.broadcast_to(b, (len(gate), n)) for b, n in zip(biases, (F, F, D), strict=True)
    )
    out = np.zeros_like(x)
    for t, (chosen, share) in enumerate(zip(ids, weights, strict=True)):
        for e, w in zip(chosen, share, strict=True):
            if 0 <= e < len(gate):
                g, u = gate[e] @ x[t] + b_gate[e], up[e] @ x[t] + b_up[e]
                out[t] += w * (down[e] @ (g / (1 + np.exp(-g)) * u) + b_down[e])
    return out


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("T", "A", "E"), [(1, 1, 1), (3, 2, 4), (50, 3, 5), (7, 4, 40)])
@given(seed=st.integers(0, 2**32), skew=st.booleans())
@settings(max_examples=5, deadline=None)
def test_experts_are_the_plain_loop(T, A, E, biased, seed, skew):
    """Also with ids outside the experts, and with every token at one expert."""
    rng = np.random.default_rng(seed)
    p = draw(E, seed, biased)
    x = jnp.asarray(rng.standard_normal((T, D)), jnp.float32)
    ids = np.full((T, A), E - 1) if skew else rng.integers(-1, E + 1, (T, A))
    weights = rng.random((T, A)).astype(np.float32)
    y = run(x, jnp.asarray(ids, jnp.int32), jnp.asarray(weights), p)
    assert y.dtype == x.dtype
    np.testing.assert_allclose(y, naive(x, ids, weights, p), rtol=1e-4, atol=1e-4)


@jax.jit
def run(x, ids, weights, p):
    return experts(x, ids, weights, p, activation="silu")


@pytest.mark.parametrize("T", [1, BLOCK_ROWS - 1, BLOCK_ROWS, BLOCK_ROWS + 1, 5 * BLOCK_ROWS])
def test_every_choice_counts_once(T):
    """Experts that answer 1 whatever they see: a token's answer is then its weights' sum."""
    E, A = 6, 3
    ones = Experts(
        jnp.zeros((E, F, D)), jnp.zeros((E, F, D)), jnp.zeros((E, D, F)),
        jnp.zeros((E, F)), jnp.zeros((E, F)), jnp.ones((E, D)),
    )  # fmt: skip
    rng = np.random.default_rng(T)
    ids = np.stack([rng.permutation(E)[:A] for _ in range(T)]).astype(np.int32)
    weights = rng.random((T, A)).astype(np.float32)
    y = run(jnp.zeros((T, D)), jnp.asarray(ids), jnp.asarray(weights), ones)
    np.testing.assert_allclose(y, np.repeat(weights.sum(1)[:, None], D, 1), rtol=1e-6)


@pytest.mark.parametrize("biased", [False, True])
def test_weights_in_their_stack_are_the_layers_own(biased):
    stack, rng = draw(4, layers=3, biased=biased), np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((9, D)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, 4, (9, 2)), jnp.int32)
    weights = jnp.asarray(rng.random((9, 2)), jnp.float32)
    for layer in range(3):
        own = jax.tree.map(lambda w, i=layer: w[i], stack)
        stacked = jax.tree.map(lambda w, i=layer: StackedWeight(w, jnp.int32(i)), stack)
        np.testing.assert_allclose(
            run(x, ids, weights, stacked), run(x, ids, weights, own), rtol=1e-6, atol=1e-6
        )


def test_bfloat16_weights_accumulate_in_float32():
    p = draw(4)
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), p)
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((9, D)), jnp.bfloat16)
    ids, weights = rng.integers(0, 4, (9, 2)), rng.random((9, 2)).astype(np.float32)
    y = run(x, jnp.asarray(ids, jnp.int32), jnp.asarray(weights), narrow)
    assert y.dtype == jnp.bfloat16
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), narrow)
    expected = naive(x.astype(jnp.float32), ids, weights, wide)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=0.05, atol=0.1)


def test_gradients_reach_tokens_weights_and_experts():
    p, rng = draw(3, biased=True), np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((4, D)) * 0.3, jnp.float32)
    ids = jnp.asarray(rng.integers(0, 2, (4, 2)), jnp.int32)  # nobody visits the last expert
    weights = jnp.asarray(rng.random((4, 2)), jnp.float32)

    @jax.jit
    def loss(x, weights, p):
        return jnp.sum(jnp.sin(experts(x, ids, weights, p, activation="silu")))

    jax.test_util.check_grads(
        loss, (x, weights, p), order=1, modes=["rev"], atol=5e-2, rtol=5e-2, eps=1e-2
    )
    unvisited = dataclasses.astuple(jax.grad(loss, 2)(x, weights, p))
    assert not any(np.any(g[2]) for g in unvisited)
