"""The step that refines tokens: after the plain pass, further passes with other routings.

The plain pass alone writes keys to a sequence's pages. Where its distribution is unsure enough, the
row's last token passes the layers again with noise on its routers. It attends to the pages there
are, but for the last one, of which the row has a copy for as long as the step takes; there it finds
the keys of its own pass. What all passes say is mixed by confidence before anything is drawn
(specification of searches, section 2.4).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxserve.cache.kv_cache import KVCache, copy_pages
from jaxserve.engine.batch import NoiseArrays, SampleArrays, StepArrays, StepInputs
from jaxserve.engine.programs import Forward, hidden_states, left_behind, logits_of
from jaxserve.engine.sampler import Sampled, SampleInputs, confidence, entropy, sample
from jaxserve.engine.serving_ops import sampling_ops, serving_ops
from jaxserve.models.family import Family
from jaxserve.models.ops import Ops, unrecorded
from jaxserve.models.parallel import expert_layers
from jaxserve.plan import Plan
from jaxserve.request import MAX_LOGPROBS
from kernels_pallas.paged_attention import Ragged
from moe.router import Router
from sharding.tree import pytree


@pytree
class Routed:
    """A cache, and which experts the routings so far have asked for some tokens."""

    kv: KVCache
    used: Array  # bool [L, R, E]


class Passes(NamedTuple):
    """Last tokens of rows, those with most passes in front. All [R] but for `tables`."""

    K: Array  # int32, routings in all; 1: the plain one was enough
    tokens: Array  # int32
    positions: Array  # int32
    tables: Array  # int32 [R, M], which end with the row's copy of a page
    keys: Array  # of each row and token
    tau: Array
    reuse: Array
    mix: Array
    spared: Array  # int32, layers with experts at either end that route plainly
    top: Array  # int32, how many of the likeliest tokens the confidence looks at


class Mixture(NamedTuple):
    """Distributions mixed so far, as sums that are kept in logarithms."""

    scores: Array  # [R, V], of exp(confidence / mix) * p
    total: Array  # [R], of exp(confidence / mix)

    @staticmethod
    def of(logits: Array, x: Passes) -> Mixture:
        logprobs = jax.nn.log_softmax(logits)
        top = lax.top_k(logprobs, min(MAX_LOGPROBS, logits.shape[-1]))[0]
        weight = confidence(top, x.top) / x.mix
        return Mixture(logprobs + weight[:, None], weight)

    def add(self, other: Mixture, among: Array) -> Mixture:
        """With the other's rows where they are `among` [R]."""
        scores = jnp.where(among[:, None], jnp.logaddexp(self.scores, other.scores), self.scores)
        return Mixture(scores, jnp.where(among, jnp.logaddexp(self.total, other.total), self.total))


def refined_step(
    plan: Plan,
    family: Family,
    cfg: Any,
    params: Any,
    kv: KVCache,
    history: Array,
    arrays: StepArrays,
    sampling: SampleArrays,
    noise: NoiseArrays,
) -> tuple[Sampled, Array, Forward, KVCache, Array]:
    """`whole_step`, some rows of which are refined; also each row's passes beyond the first [R].

    A row that is not refined has the very logits of the plain pass. Passes run over as many rows
    as the gate lets in, so what they cost follows that number, up to a bucket's padding.
    """
    x, drawing = arrays.unpack(), sampling.unpack()
    R, T = drawing.lengths.shape[0], x.tokens.shape[1]
    used = jnp.zeros((cfg.num_layers, R, cfg.router.num_experts), bool)
    ops = _noting(serving_ops(plan, x.ragged, T), x.last)
    hidden, plain = hidden_states(family, cfg, params, Routed(kv, used), history, x, ops)
    forward = left_behind(plan, family, cfg, params, hidden, plain.kv, x)
    logits = logits_of(plan, family, cfg, params, forward.last[:R], x.ragged.num_seqs)
    logits = logits.astype(jnp.float32)
    K = jnp.where(entropy(jax.nn.log_softmax(logits)) > noise.gate, noise.K, 1)
    order = jnp.argsort(-K, stable=True)
    rows = _in_order(order, K, history, x, drawing, noise)
    kv, tables = _with_copies(plan, plain.kv, rows)
    plain, rows = Routed(kv, plain.used[:, order]), rows._replace(tables=tables)
    mixed, kv = _mixed(plan, family, cfg, params, plain, logits[order], rows)
    logits = logits.at[order].set(mixed)
    sampled, history = sample(logits, history, drawing, **sampling_ops(plan, x.ragged.num_seqs))
    return sampled, K - 1, forward, kv, history


def _in_order(
    order: Array, K: Array, history: Array, x: StepInputs, drawing: SampleInputs, n: NoiseArrays
) -> Passes:
    """What further passes need of each row's last token."""

    def key(seed: Array, position: Array) -> Array:
        return jax.random.fold_in(jax.random.wrap_key_data(seed), position)

    at = x.last[order]
    known, positions = x.tokens[0, at], x.positions[0, at]
    tokens = jnp.where(known < 0, history[x.slots[at], positions], known)
    keys = jax.vmap(key)(drawing.seeds[order], drawing.lengths[order])
    tables, top = x.ragged.tables[order], drawing.confidence_k[order]
    tau, reuse, mix, spared = (setting[order] for setting in (n.tau, n.reuse, n.mix, n.spared))
    return Passes(K[order], tokens, positions, tables, keys, tau, reuse, mix, spared, top)


def _with_copies(plan: Plan, kv: KVCache, x: Passes) -> tuple[KVCache, Array]:
    """The cache with copies of pages that refined rows write to, behind all others, and tables that
    have these in their place [R, M]."""
    rows, index = jnp.arange(len(x.K)), x.positions // plan.page_size
    source, copy = x.tables[rows, index], plan.num_pages + rows

    def one(i: Array, kv: KVCache) -> KVCache:
        return copy_pages(kv, source[i][None], copy[i][None])

    kv = lax.fori_loop(0, jnp.sum(x.K > 1, dtype=jnp.int32), one, kv)  # as many as there are
    return kv, x.tables.at[rows, index].set(copy)


def _mixed(
    plan: Plan, family: Family, cfg: Any, params: Any, plain: Routed, logits: Array, x: Passes
) -> tuple[Array, KVCache]:
    """Logits [R, V] of all passes over rows x, whose plain ones are given, and the cache.

    They are mixed probabilities on the scale of the plain logits.
    """
    R = logits.shape[0]
    depth = _depths(params, cfg.num_layers)

    def routing(j: Array, carry: tuple[Routed, Mixture]) -> tuple[Routed, Mixture]:
        routed, mixture = carry
        n = jnp.sum(j < x.K, dtype=jnp.int32)
        starts = jnp.minimum(jnp.arange(R + 1, dtype=jnp.int32), n)
        ragged = Ragged(starts, x.positions + 1, x.tables, n)
        ops = _disturbed(serving_ops(plan, ragged, R), x, j, depth)
        at = x.tokens[None], x.positions[None]
        hidden, routed = family.forward(cfg, params, *at, ops, routed)
        said = logits_of(plan, family, cfg, params, hidden[0], n).astype(jnp.float32)
        return routed, mixture.add(Mixture.of(said, x), jnp.arange(R) < n)

    carry = plain, Mixture.of(logits, x)
    routed, mixture = lax.fori_loop(1, jnp.max(x.K), routing, carry)
    scale = jax.nn.logsumexp(logits, -1) - mixture.total
    mixed = jnp.where((x.K > 1)[:, None], mixture.scores + scale[:, None], logits)
    return mixed, routed.kv


def _noting(ops: Ops, at: Array) -> Ops:
    """Operations over a `Routed`, which note the experts of tokens `at` [R]."""

    def attend(q: Array, k: Array, v: Any, kv: Routed, layer: Any, **options: Any) -> Any:
        o, inner = ops.attend(q, k, v, kv.kv, layer, **options)
        return o, replace(kv, kv=inner)

    def record(kv: Routed, layer: Any, router: Router, scores: Array, ids: Array) -> Routed:
        inner = ops.record(kv.kv, layer, router, scores, ids)
        asked = jnp.any(ids[at][..., None] == jnp.arange(router.num_experts), 1)
        return replace(kv, kv=inner, used=kv.used.at[layer].set(kv.used[layer] | asked))

    return replace(ops, attend=attend, record=record)


def _disturbed(ops: Ops, x: Passes, j: Array, depth: np.ndarray) -> Ops:
    """Operations of routing j: routers hear noise, and of experts that were asked before."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(x.keys, j)

    def disturb(kv: Routed, layer: Any, scores: Array) -> Array:
        of_layer = jax.vmap(jax.random.fold_in, (0, None))(keys, layer)
        gumbel = jax.vmap(lambda key: jax.random.gumbel(key, scores.shape[-1:]))(of_layer)
        noise = x.tau[:, None] * gumbel - jnp.where(kv.used[layer], x.reuse[:, None], 0.0)
        return jnp.where((jnp.asarray(depth)[layer] >= x.spared)[:, None], noise, 0.0)

    noting = _noting(replace(ops, record=unrecorded), jnp.arange(len(x.K)))
    return replace(noting, disturb=disturb)


def _depths(params: Any, num_layers: int) -> np.ndarray:
    """How many layers with experts lie before or behind each, whichever are fewer: [L]."""
    mixtures = expert_layers(params)
    depth = np.full(num_layers, -1, np.int32)
    for rank, layer in enumerate(mixtures):
        depth[layer] = min(rank, len(mixtures) - 1 - rank)
    return depth
