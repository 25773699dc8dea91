"""Routing against a plain loop over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe.router import Router, route


def scores_of(router, logits):
    logits = logits.astype(np.float64)
    if router.scoring == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def all_differ(router, logits, bias):
    """No two experts of a token score alike in float32, where either may come first."""
    ranked = np.sort(scores_of(router, logits) + (0 if bias is None else bias), -1)
    return np.all(np.diff(ranked) > 1e-6 * np.abs(ranked[:, 1:]))


def naive(router, logits, bias=None):
    """Experts in order of choice, and weights, one token at a time."""
    ids, weights = [], []
    for score in scores_of(router, logits):
        choice = score if bias is None else score + bias
        groups = np.split(np.arange(len(score)), router.num_groups)
        best = 1 if router.group_score == "max" else 2
        worth = [np.sort(choice[g])[-best:].sum() for g in groups]
        kept = np.argsort(worth)[::-1][: router.top_groups] if router.num_groups > 1 else [0]
        allowed = np.concatenate([groups[i] for i in kept])
        chosen = allowed[np.argsort(choice[allowed])[::-1][: router.top_k]]
        weight = score[chosen]
        ids.append(chosen)
        weights.append(weight / (weight.sum() if router.normalise else 1) * router.scale)
    return np.array(ids), np.array(weights)


ROUTERS = [
    Router(8, 3),
    Router(8, 3, normalise=False, scale=2.5),
    Router(8, 1, normalise=False),
    Router(8, 8),
    Router(8, 3, num_groups=4, top_groups=2, normalise=False, scale=1.5),
    Router(12, 4, scoring="sigmoid", num_groups=3, top_groups=2, group_score="top2", scale=2.5),
    Router(8, 2, scoring="sigmoid", normalise=False),
]


@pytest.mark.parametrize("router", ROUTERS)
@given(seed=st.integers(0, 2**32), spread=st.sampled_from([0.1, 1.0, 8.0]), biased=st.booleans())
@settings(max_examples=10, deadline=None)
def test_routing_is_the_plain_loop(router, seed, spread, biased):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((5, router.num_experts)) * spread).astype(np.float32)
    bias = rng.standard_normal(router.num_experts).astype(np.float32) if biased else None
    assume(all_differ(router, logits, bias))
    ids, weights = route(router, jnp.asarray(logits), None if bias is None else jnp.asarray(bias))
    expected_ids, expected_weights = naive(router, logits, bias)
    assert ids.dtype == jnp.int32
    assert weights.dtype == jnp.float32
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(weights, expected_weights, rtol=2e-5, atol=1e-7)


def test_a_bias_moves_the_choice_and_never_the_weights():
    router = Router(4, 1, scoring="sigmoid", normalise=False)
    logits, bias = jnp.array([[2.0, 1.0, 0.0, -1.0]]), jnp.array([0.0, 0.0, 0.0, 9.0])
    ids, weights = route(router, logits, bias)
    assert ids.tolist() == [[3]]
    np.testing.assert_allclose(weights, jax.nn.sigmoid(jnp.array([[-1.0]])), rtol=1e-6)


def test_normalised_weights_sum_to_the_scale():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((64, 16)), jnp.bfloat16)
    for scoring in ("softmax", "sigmoid"):
        weights = route(Router(16, 5, scoring, scale=2.5), logits)[1]
        np.testing.assert_allclose(weights.sum(-1), 2.5, rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 9},
        {"top_k": 0},
        {"top_k": 2, "num_groups": 3},
        {"top_k": 2, "num_groups": 4, "top_groups": 5},
        {"top_k": 5, "num_groups": 4, "top_groups": 2},
    ],
)
def test_an_impossible_choice_is_refused(settings):
    with pytest.raises(ValueError, match="Router"):
        Router(8, **settings)
