"""Routings that are hard on a dispatch, and the oracle in NumPy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import Array

KINDS = ("even", "skewed", "few", "one", "holes")


@st.composite
def routings(draw: st.DrawFn, devices: int, tokens: int, top_k: int, experts: int) -> np.ndarray:
    """ids [devices, tokens, top_k]: distinct for each token, or outside of the experts."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(KINDS))
    score = rng.gumbel(size=(devices, tokens, experts))
    if kind == "skewed":  # the first expert is asked for most
        score -= np.arange(experts)
    elif kind == "few":  # most are empty
        score[..., top_k + 1 :] = -np.inf
    elif kind == "one":  # all tokens to the same
        score = np.broadcast_to(rng.permutation(experts) * 1.0, score.shape)
    ids = np.argsort(-score, -1)[..., :top_k].astype(np.int32)
    if kind == "holes":
        ids[rng.random(ids.shape) < 0.3] = rng.choice([-1, experts, experts + 7])
    return ids


def answers(x: Array, sizes: Array, expert_of: Array) -> Array:
    """Rows times 1 + their expert: who answered can be told, and nothing is rounded.

    Rows past the last come out NaN: whoever reads them is found out.
    """
    end, row = jnp.cumsum(sizes), jnp.arange(x.shape[0])
    slot = jnp.clip(jnp.searchsorted(end, row, side="right"), 0, len(end) - 1)
    return jnp.where((row < end[-1])[:, None], x * (1 + expert_of[slot]).astype(x.dtype)[:, None],
                     jnp.nan).astype(x.dtype)  # fmt: skip


def oracle(x: np.ndarray, ids: np.ndarray, weights: np.ndarray, experts: int) -> np.ndarray:
    """What `answers` add up to, with the devices' axis in front: one choice at a time."""
    y = np.zeros(x.shape, np.float64)
    for index in np.ndindex(ids.shape):
        if 0 <= ids[index] < experts:
            y[index[:2]] += weights[index] * (1 + ids[index]) * x[index[:2]].astype(np.float64)
    return y
