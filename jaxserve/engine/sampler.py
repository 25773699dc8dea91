"""From logits to tokens, on the device.

Everything a request may ask for is in one program: parts that no row of the batch needs are
skipped at run time by `lax.cond`, so the number of programs does not grow with features.

A row's random number depends on its own seed and the position of the token, never on its batch:
the same text comes out alone, batched, preempted or forked.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxserve.request import MAX_LOGPROBS
from kernels_pallas.draw import draw

MAX_BIAS = 512
"""Most entries of one request's `logit_bias`."""

_LOW = -1e30


class SampleInputs(NamedTuple):
    """One row per sequence [R]; arrays that a feature needs are zeros where nobody uses it."""

    slots: Any  # int32, row of `history`; the last row of it is for padding
    lengths: Any  # int32, tokens before the one to draw
    prompt_lens: Any  # int32
    top_k: Any  # int32, 0: all
    seeds: Any  # uint32 [R, 2]
    temperature: Any  # float32, 0: greedy
    top_p: Any
    min_p: Any
    repetition: Any
    presence: Any
    frequency: Any
    bias_ids: Any  # int32 [R, MAX_BIAS]
    bias: Any  # float32 [R, MAX_BIAS]
    mask: Any  # uint32 [R, ceil(V / 32)], permitted tokens
    use_penalties: Any  # bool [], as are the following
    use_bias: Any
    use_mask: Any
    use_logprobs: Any
    use_stats: Any
    confidence_k: Any  # int32 [R], of `observe`


class Sampled(NamedTuple):
    tokens: Any  # int32 [R]; -1: the logits were not finite
    logprob: Any  # float32 [R]
    rank: Any  # int32 [R], 1 is the most likely
    top_ids: Any  # int32 [R, MAX_LOGPROBS]
    top_logprobs: Any  # float32 [R, MAX_LOGPROBS]
    stats: Any  # float32 [R, 4], as `observe`


def argmax(x: Array) -> tuple[Array, Array]:
    """The first largest entry of each row [R, V], and its value: infinite where any is NaN.

    Two plain reductions: XLA:CPU's own argmax is ten times slower. Its maximum of a long row
    forgets a NaN, so that must be said in another way.
    """
    top = jnp.max(jnp.where(jnp.isnan(x), jnp.inf, x), -1)
    ids = jnp.arange(x.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where(x == top[:, None], ids, x.shape[-1] - 1), -1), top


def sample(
    logits: Array,
    history: Array,
    x: SampleInputs,
    *,
    argmax: Callable[[Array], tuple[Array, Array]] = argmax,
    draw: Callable[..., Array] = draw,
) -> tuple[Sampled, Array]:
    """Draws a token per row of logits [R, V] and appends it to history [S, max_len].

    As in vLLM, bias comes before penalties. Log-probabilities are the model's own, before either,
    and before mask and temperature.

    Args:
        argmax, draw: implementations of the functions of those names.
    """
    logits = logits.astype(jnp.float32)
    edits = x.use_penalties | x.use_bias | x.use_mask
    plain = ~(edits | jnp.any(x.temperature > 0))
    likely, best = argmax(logits)
    choose = partial(_choose, argmax, draw)
    tokens = lax.cond(plain, lambda s, h, x: likely, choose, logits, history, x)
    # NaN and infinity make the maximum infinite or NaN; a mask that forbids all leaves it finite
    tokens = jnp.where(jnp.isfinite(best), tokens, -1)
    logprob, rank, ids, top = lax.cond(x.use_logprobs, logprobs_of, _no_logprobs, logits, tokens)
    unseen = jnp.zeros((logits.shape[0], 4), jnp.float32)
    stats = lax.cond(x.use_stats, observe, lambda *_: unseen, logits, tokens, x.confidence_k)
    history = history.at[x.slots, x.lengths].set(tokens, mode="drop")
    return Sampled(tokens, logprob, rank, ids, top, stats), history


def _choose(argmax: Any, draw: Any, logits: Array, history: Array, x: SampleInputs) -> Array:
    """The general case: edited scores, some rows greedy and some drawn."""
    edits = x.use_penalties | x.use_bias | x.use_mask
    scores = lax.cond(edits, _edit, lambda s, h, x: s, logits, history, x)
    greedy, _ = argmax(scores)
    drawn = lax.cond(
        jnp.any(x.temperature > 0), partial(_draw, draw), lambda s, x: greedy, scores, x
    )
    return jnp.where(x.temperature > 0, drawn, greedy)


# ---- what changes the scores -----------------------------------------------------------------


def _edit(scores: Array, history: Array, x: SampleInputs) -> Array:
    scores = lax.cond(x.use_bias, _add_bias, lambda s, x: s, scores, x)
    scores = lax.cond(x.use_penalties, _penalise, lambda s, h, x: s, scores, history, x)
    return lax.cond(x.use_mask, _apply_mask, lambda s, x: s, scores, x)


def _penalise(scores: Array, history: Array, x: SampleInputs) -> Array:
    """OpenAI's presence and frequency penalties over the output, CTRL's repetition over all."""
    tokens = history[x.slots]  # [R, max_len]
    place = jnp.arange(tokens.shape[1])
    rows = jnp.arange(scores.shape[0])[:, None]

    def count(seen: Array) -> Array:
        ids = jnp.where(seen, tokens, scores.shape[1])
        return jnp.zeros_like(scores).at[rows, ids].add(1.0, mode="drop")

    known = place < x.lengths[:, None]
    output = count(known & (place >= x.prompt_lens[:, None]))
    repeated = (count(known) > 0) & (x.repetition[:, None] != 1.0)
    divided = jnp.where(scores > 0, scores / x.repetition[:, None], scores * x.repetition[:, None])
    scores = jnp.where(repeated, divided, scores)
    presence = jnp.where(output > 0, x.presence[:, None], 0.0)
    return scores - output * x.frequency[:, None] - presence


def _add_bias(scores: Array, x: SampleInputs) -> Array:
    return scores.at[jnp.arange(scores.shape[0])[:, None], x.bias_ids].add(x.bias, mode="drop")


def _apply_mask(scores: Array, x: SampleInputs) -> Array:
    ids = jnp.arange(scores.shape[1])
    allowed = (x.mask[:, ids // 32] >> (ids % 32).astype(jnp.uint32)) & 1
    return jnp.where(allowed == 1, scores, _LOW)


# ---- drawing ---------------------------------------------------------------------------------


def _draw(draw: Any, scores: Array, x: SampleInputs) -> Array:
    u = _uniform(x.seeds, x.lengths)
    return draw(scores, u, x.temperature, x.top_k, x.top_p, x.min_p)


def _uniform(seeds: Array, positions: Array) -> Array:
    """A number in [0, 1) for each row, of its seed and position alone."""

    def one(seed: Array, position: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(seed), position))

    return jax.vmap(one)(seeds, positions)


# ---- what is reported ------------------------------------------------------------------------


def logprobs_of(logits: Array, tokens: Array) -> tuple[Array, Array, Array, Array]:
    """Log-probability and rank of the given tokens [R], and the most likely ones."""
    total = jax.nn.logsumexp(logits, -1)
    chosen = jnp.take_along_axis(logits, jnp.maximum(tokens, 0)[:, None], -1)
    top, ids = lax.top_k(logits, min(MAX_LOGPROBS, logits.shape[-1]))
    pad = ((0, 0), (0, MAX_LOGPROBS - top.shape[-1]))
    return (
        chosen[:, 0] - total,
        jnp.sum(logits > chosen, -1, dtype=jnp.int32) + 1,
        jnp.pad(ids, pad),
        jnp.pad(top - total[:, None], pad, constant_values=-jnp.inf),
    )


def observe(logits: Array, tokens: Array, k: Array) -> Array:
    """What a search wants to know of each token [R]: its log-probability, the entropy of the
    distribution, the margin between the two likeliest tokens, and the mean negative
    log-probability of the k [R] likeliest (at most MAX_LOGPROBS). float32 [R, 4], in nats."""
    total = jax.nn.logsumexp(logits, -1)
    chosen = jnp.take_along_axis(logits, jnp.maximum(tokens, 0)[:, None], -1)[:, 0]
    logprobs = logits - total[:, None]
    top = lax.top_k(logprobs, min(MAX_LOGPROBS, logits.shape[-1]))[0]
    margin = top[:, 0] - top[:, min(1, top.shape[-1] - 1)]
    return jnp.stack([chosen - total, entropy(logprobs), margin, confidence(top, k)], -1)


def entropy(logprobs: Array) -> Array:
    """Of each distribution [R, V], in nats: [R]."""
    return -jnp.sum(jnp.where(logprobs > _LOW, jnp.exp(logprobs) * logprobs, 0.0), -1)


def confidence(top: Array, k: Array) -> Array:
    """Mean negative log-probability of the first k [R] of each row's likeliest [R, n]: [R]."""
    among = jnp.arange(top.shape[-1]) < k[:, None]
    return -(jnp.sum(jnp.where(among, top, 0.0), -1) / jnp.sum(among, -1, dtype=jnp.float32))


def _no_logprobs(logits: Array, tokens: Array) -> tuple[Array, Array, Array, Array]:
    R = logits.shape[0]
    return (
        jnp.zeros(R, jnp.float32),
        jnp.zeros(R, jnp.int32),
        jnp.zeros((R, MAX_LOGPROBS), jnp.int32),
        jnp.zeros((R, MAX_LOGPROBS), jnp.float32),
    )
