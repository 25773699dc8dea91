"""What each program of a plan takes, as shapes: enough to compile it, for absent hardware too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding

from jaxserve.cache import kv_cache
from jaxserve.cache.kv_cache import KVCache
from jaxserve.engine.batch import MAX_STOPS, NoiseArrays, SampleArrays, StepArrays
from jaxserve.engine.programs import decode_loop, forward_step, sample_step, whole_step
from jaxserve.engine.refine import refined_step
from jaxserve.engine.sampler import MAX_BIAS
from jaxserve.models.family import Family
from jaxserve.models.parallel import experts_of
from jaxserve.models.reward_head import evidence
from jaxserve.plan import Plan
from moe.dispatch import Dispatch
from moe.load import no_load
from moe.moving import move
from sharding.mesh import TENSOR

COPIES = 64
"""Pages copied per launch."""

_ints = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)


class Program(NamedTuple):
    """One of `Plan.programs`: what is traced, which arguments it may destroy, and their shapes.

    `takes` and `gives` say of arguments and results how a mesh holds them (engine/spread.py):
    "params"; "kv"; "state", of which each rank has a block of rows; "host", arrays that the host
    packs for each rank; "table", which is the same on every device; "drawn", which every device is
    to know.
    """

    function: Callable[..., Any]
    donated: tuple[int, ...]
    arguments: tuple[Any, ...]
    takes: tuple[str, ...]
    gives: tuple[str, ...]


def program(plan: Plan, family: Family, cfg: Any, params: Any, kind: str, size: int) -> Program:
    """A program of the plan.

    Args:
        params: weights, or their shapes; of a reward head for "evidence".
        kind, size: an entry of `plan.programs`.
    """
    kv, history = jax.eval_shape(partial(empty_state, plan, cfg))
    model, params = (plan, family, cfg), abstract(params)
    if kind in ("forward", "beginning"):
        return Program(
            partial(forward_step, *model, begins=kind == "beginning"), (1,),
            (params, kv, history, step_arrays(plan, size, plan.rows(size))),
            ("params", "kv", "state", "host"), ("state", "kv"),
        )  # fmt: skip
    if kind == "step":
        step = step_arrays(plan, plan.step_tokens(size), size)
        return Program(
            partial(whole_step, *model), (1, 2),
            (params, kv, history, step, sample_arrays(size, cfg.vocab)),
            ("params", "kv", "state", "host", "host"), ("drawn", "state", "kv", "state"),
        )  # fmt: skip
    if kind == "sample":
        last = jax.ShapeDtypeStruct((plan.max_num_seqs, cfg.embed), plan.activation_dtype)
        return Program(
            partial(sample_step, *model), (2,),
            (head(params), last, history, sample_arrays(size, cfg.vocab)),
            ("params", "state", "state", "host"), ("drawn", "state"),
        )  # fmt: skip
    if kind == "refine":
        return _refining(plan, model, (params, kv, history), size, cfg.vocab)
    if kind == "decode":
        drawing = sample_arrays(size, cfg.vocab), _ints((size, MAX_STOPS)), _ints(())
        return Program(
            partial(decode_loop, *model), (1, 2),
            (params, kv, history, step_arrays(plan, size, size), *drawing),
            ("params", "kv", "state", *4 * ("host",)), ("drawn", "kv", "state"),
        )  # fmt: skip
    if kind == "evidence":
        hidden = jax.ShapeDtypeStruct((size, cfg.embed), plan.activation_dtype)
        return Program(evidence, (), (params, hidden), ("table", "state"), ("drawn",))
    if kind == "seed_history":
        row = _ints((plan.max_model_len + 1,))
        return Program(
            _seed_history, (0,), (history, _ints(()), row), ("state", "host", "host"), ("state",)
        )
    if kind == "take_load":
        take = partial(_take_load, plan)
        return Program(take, (0,), (kv,), ("kv",), ("drawn", "kv"))
    if kind == "move_experts":
        assert plan.dispatch is not None, "such plans alone have this program"
        experts = tuple(placed.weights for placed in experts_of(params))
        source = tuple(_ints(placed.placement.expert_of.shape) for placed in experts_of(params))
        function = partial(_move_experts, plan.dispatch)
        return Program(function, (0,), (experts, source), ("params", "table"), ("params",))
    assert kind == "copy_pages"
    pages = _ints((COPIES,))
    return Program(kv_cache.copy_pages, (0,), (kv, pages, pages), ("kv", "host", "host"), ("kv",))


def _refining(plan: Plan, model: tuple[Any, ...], state: Any, tokens: int, vocab: int) -> Program:
    """A step of up to so many tokens, of which those that are drawn may be refined."""
    R = plan.rows(tokens)
    counts, floats = _ints((R,)), jax.ShapeDtypeStruct((R,), jnp.float32)
    noise = NoiseArrays(counts, counts, *4 * (floats,))
    return Program(
        partial(refined_step, *model), (1, 2),
        (*state, step_arrays(plan, tokens, R), sample_arrays(R, vocab), noise),
        ("params", "kv", "state", *3 * ("host",)), ("drawn", "drawn", "state", "kv", "state"),
    )  # fmt: skip


def _take_load(plan: Plan, kv: KVCache) -> tuple[Any, KVCache]:
    """How often experts were asked for [1, L, E], and the cache that has counted nothing.

    Devices that share a rank have counted the same tokens, or each its own.
    """
    load = lax.psum(kv.load, TENSOR) if plan.spreads_tokens else kv.load
    return load, replace(kv, load=jax.tree.map(jnp.zeros_like, kv.load))


def _move_experts(
    dispatch: Dispatch, experts: tuple[Any, ...], sources: tuple[Array, ...]
) -> tuple[Any, ...]:
    """Every stack's experts in their new slots."""
    how = partial(move, dispatch.transport, dispatch.layout)
    return tuple(how(*stack) for stack in zip(experts, sources, strict=True))


def _seed_history(history: Array, slot: Array, row: Array) -> Array:
    """The history with a sequence's tokens in its slot; a slot past the last is nobody's."""
    return history.at[slot].set(row, mode="drop")


def empty_state(plan: Plan, cfg: Any, device: Any = None) -> tuple[KVCache, Array]:
    """One rank's empty cache, and its history [max_num_seqs, max_model_len + 1] of no tokens."""
    kv = kv_cache.allocate(
        cfg.num_layers,
        plan.num_pages + plan.num_copies,
        plan.page_size,
        plan.kv_shape,
        plan.kv_dtype,
        device,
        cfg.key_parts,
        calibrated=plan.kv_calibrated,
        whole_scales=plan.platform == "tpu",
    )
    if plan.dispatch is not None:
        kv = replace(kv, load=no_load(cfg.num_layers, plan.dispatch.layout.num_experts)[None])
    if plan.notes_routes:
        shape = cfg.num_layers, plan.max_num_batched_tokens
        kv = replace(kv, routes=jnp.zeros(shape, jnp.uint32, device=device))
    return kv, jnp.zeros((plan.max_num_seqs, plan.max_model_len + 1), jnp.int32, device=device)


def head(params: Any) -> Any:
    """The weights without the layers: an argument costs the host time, whether used or not."""
    return replace(params, stacks=())


def step_arrays(plan: Plan, tokens: int, rows: int) -> StepArrays:
    tables = _ints((rows, plan.pages_per_seq))
    lines = 6 if plan.group_pages else 3
    return StepArrays(_ints((4, tokens)), _ints((lines, rows + 1)), tables, _ints((2,)))


def sample_arrays(rows: int, vocab: int) -> SampleArrays:
    def array(columns: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, columns), dtype)

    return SampleArrays(
        ints=array(7, jnp.int32),
        floats=array(6, jnp.float32),
        flags=jax.ShapeDtypeStruct((5,), jnp.bool_),
        bias_ids=array(MAX_BIAS, jnp.int32),
        bias=array(MAX_BIAS, jnp.float32),
        mask=array(-(-vocab // 32), jnp.uint32),
    )


def abstract(tree: Any) -> Any:
    """The shapes and types of a tree's arrays, and their places on a mesh."""

    def leaf(a: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(a, "sharding", None)
        on_mesh = sharding if isinstance(sharding, NamedSharding) else None
        return jax.ShapeDtypeStruct(np.shape(a), a.dtype, sharding=on_mesh)

    return jax.tree.map(leaf, tree)
