"""The compiled steps: pure functions of weights, device state and one step's arrays.

`forward_step` ends with the hidden states after each sequence's last token, and `sample_step`
begins with them: logits, the largest array of all, exist for as many rows as draw a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxserve.cache.attend import Beginning
from jaxserve.cache.kv_cache import KVCache
from jaxserve.engine.batch import SampleArrays, StepArrays, StepInputs
from jaxserve.engine.halving import halves
from jaxserve.engine.sampler import Sampled, logprobs_of, sample
from jaxserve.engine.serving_ops import attend_made, head_ops, sampling_ops, serving_ops
from jaxserve.models.family import Family
from jaxserve.models.ops import Ops
from jaxserve.models.parallel import marked
from jaxserve.plan import Plan
from kernels_pallas.paged_attention import Ragged
from sharding.tree import cut

_SCORED = 64  # prompt tokens whose logits exist at a time


class Forward(NamedTuple):
    """What a forward pass leaves behind, beside the cache."""

    last: Any  # [max_num_seqs, D], hidden states after each sequence's last token in the step
    hidden: Any  # [T, D]
    scores: Any  # if asked for, log-probabilities of the targets [T, ...], as `logprobs_of`
    routes: Any = None  # [L, T], as `KVCache.routes`


def forward_step(
    plan: Plan,
    family: Family,
    cfg: Any,
    params: Any,
    kv: KVCache,
    history: Array,
    arrays: StepArrays,
    *,
    begins: bool = False,
) -> tuple[Forward, KVCache]:
    """One step's forward pass, and the cache with its keys.

    Args:
        begins: every sequence of the step begins in it, so that there are no earlier keys.
    """
    x = arrays.unpack()
    hidden, kv = _hidden(plan, family, cfg, params, kv, history, x, begins=begins)
    return left_behind(plan, family, cfg, params, hidden, kv, x), kv


def left_behind(
    plan: Plan, family: Family, cfg: Any, params: Any, hidden: Array, kv: KVCache, x: StepInputs
) -> Forward:
    """What a forward pass leaves that has ended with hidden states [T, D]."""
    last = hidden[jnp.pad(x.last, (0, plan.max_num_seqs - x.last.shape[0]))]

    def head(rows: Array) -> Array:
        return logits_of(plan, family, cfg, params, rows, jnp.int32(rows.shape[0]))

    routes = None if kv.routes is None else kv.routes[:, : hidden.shape[0]]
    return Forward(last, hidden, _score(head, hidden, x), routes)


def sample_step(
    plan: Plan,
    family: Family,
    cfg: Any,
    params: Any,
    last: Array,  # as `Forward.last`
    history: Array,
    arrays: SampleArrays,
) -> tuple[Sampled, Array]:
    """Draws a token for each of the first R sequences of a step, and the history with them."""
    x = arrays.unpack()
    num_rows = jnp.sum(x.lengths > 0, dtype=jnp.int32)
    # XLA's matrix products on GPUs take the slice in, and then fail to compile for one row.
    rows = lax.optimization_barrier(last[: x.lengths.shape[0]])
    logits = logits_of(plan, family, cfg, params, rows, num_rows)
    return sample(logits, history, x, **sampling_ops(plan, num_rows))


def whole_step(
    plan: Plan,
    family: Family,
    cfg: Any,
    params: Any,
    kv: KVCache,
    history: Array,
    arrays: StepArrays,
    sampling: SampleArrays,
) -> tuple[Sampled, Forward, KVCache, Array]:
    """`forward_step` and `sample_step` in one: a decoding step is too short for two programs."""
    forward, kv = forward_step(plan, family, cfg, params, kv, history, arrays)
    sampled, history = sample_step(plan, family, cfg, params, forward.last, history, sampling)
    return sampled, forward, kv, history


def decode_loop(
    plan: Plan,
    family: Family,
    cfg: Any,
    params: Any,
    kv: KVCache,
    history: Array,
    arrays: StepArrays,
    sampling: SampleArrays,
    stops: Array,
    repeats: Array,
) -> tuple[Array, KVCache, Array]:
    """Several decoding steps in one launch; ends early once every sequence has drawn a stop token.

    Args:
        stops: [R, MAX_STOPS], tokens that end each sequence.

    Returns:
        Tokens [decode_steps, R], of which `repeats` rows are drawn; the cache and the history.
    """
    x, drawing = arrays.unpack(), sampling.unpack()
    R = drawing.lengths.shape[0]

    def unfinished(carry: tuple[Array, ...]) -> Array:
        i, _, _, active, _ = carry
        return (i < repeats) & jnp.any(active)

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        i, kv, history, active, tokens = carry
        ragged = x.ragged._replace(kv_lens=x.ragged.kv_lens + i)
        known = jnp.where(i == 0, x.tokens, -1)
        inputs = x._replace(tokens=known, positions=x.positions + i, ragged=ragged)
        hidden, kv = _hidden(plan, family, cfg, params, kv, history, inputs)
        logits = logits_of(plan, family, cfg, params, hidden[x.last], ragged.num_seqs)
        drawing_now = drawing._replace(lengths=drawing.lengths + i)
        how = sampling_ops(plan, ragged.num_seqs)
        sampled, history = sample(logits, history, drawing_now, **how)
        active &= ~jnp.any(sampled.tokens[:, None] == stops, -1)
        return i + 1, kv, history, active, tokens.at[i].set(sampled.tokens)

    active = jnp.arange(R) < x.ragged.num_seqs
    tokens = jnp.zeros((plan.decode_steps, R), jnp.int32)
    carry = lax.while_loop(unfinished, step, (jnp.int32(0), kv, history, active, tokens))
    return carry[4], carry[1], carry[2]


def _hidden(
    plan: Plan,
    family: Family,
    cfg: Any,
    params: Any,
    kv: KVCache,
    history: Array,
    x: StepInputs,
    *,
    begins: bool = False,
) -> tuple[Array, KVCache]:
    """Hidden states [T, D] of a step's tokens, and the cache."""
    params, T = _marked(plan, family, cfg, params), x.tokens.shape[1]

    def operations(part: Ragged, first: Array | int, size: int) -> Ops:
        ops = serving_ops(plan, part, size)
        made = attend_made(plan, x.ragged, T, part, first) if begins else None
        return replace(ops, attend_made=made)

    ops = operations(x.ragged, 0, T)
    if plan.interleaved and T > 1:
        ops = replace(ops, halves=halves(x.ragged, T, operations))
    if not begins:
        return hidden_states(family, cfg, params, kv, history, x, ops)
    begun = Beginning(kv, jnp.zeros((T, cfg.kv_shape[1]), plan.activation_dtype))
    hidden, begun = hidden_states(family, cfg, params, begun, history, x, ops)
    return hidden, begun.kv


def hidden_states(
    family: Family, cfg: Any, params: Any, kv: Any, history: Array, x: StepInputs, ops: Ops
) -> tuple[Array, Any]:
    """Hidden states [T, D] of a step's tokens, and what is carried through the layers."""
    drawn = history[x.slots, x.positions[0]][None]
    tokens = jnp.where(x.tokens < 0, drawn, x.tokens)
    hidden, kv = family.forward(cfg, params, tokens, x.positions, ops, kv)
    return hidden[0], kv


def logits_of(
    plan: Plan, family: Family, cfg: Any, params: Any, rows: Array, num_rows: Array
) -> Array:
    """Logits [R, V] of hidden states [R, D], of which the first `num_rows` are real."""
    params = _marked(plan, family, cfg, params)
    return family.logits(cfg, params, rows[None], head_ops(plan, num_rows))[0]


def _marked(plan: Plan, family: Family, cfg: Any, params: Any) -> Any:
    """Params as the operations of a mesh want them."""
    if not plan.on_mesh:
        return params
    sizes = [len(jax.tree.leaves(stack)[0]) for stack in params.stacks]  # none: `signature.head`
    declared = cut(family.declare_params(cfg), sizes)
    return marked(declared, params, cfg.sizes, plan.parallelism)


def _score(
    head: Callable[[Array], Array], hidden: Array, x: StepInputs
) -> tuple[Array, Array, Array, Array]:
    """Log-probabilities of `targets` for the first `num_scored` tokens, a block at a time."""
    T = hidden.shape[0]
    size = min(_SCORED, T)
    blank = jax.eval_shape(logprobs_of, jax.ShapeDtypeStruct((T, 32), jnp.float32), x.targets)
    start = tuple(jnp.zeros(leaf.shape, leaf.dtype) for leaf in blank)

    def block(i: Array, out: tuple[Array, ...]) -> tuple[Array, ...]:
        at = jnp.minimum(i * size, T - size)
        rows = head(lax.dynamic_slice_in_dim(hidden, at, size)).astype(jnp.float32)
        found = logprobs_of(rows, lax.dynamic_slice_in_dim(x.targets, at, size))
        return tuple(
            lax.dynamic_update_slice_in_dim(o, f, at, 0) for o, f in zip(out, found, strict=True)
        )

    blocks = -(-x.num_scored // size)
    # the condition keeps XLA from hoisting a body that does not depend on i out of an empty loop
    return lax.cond(blocks > 0, lambda: lax.fori_loop(0, blocks, block, start), lambda: start)
