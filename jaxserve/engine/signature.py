"""What each program of a plan takes, as shapes: enough to compile it, for absent hardware too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxserve.cache import kv_cache
from jaxserve.cache.kv_cache import KVCache
from jaxserve.engine.batch import MAX_STOPS, SampleArrays, StepArrays
from jaxserve.engine.programs import decode_loop, forward_step, sample_step, whole_step
from jaxserve.engine.sampler import MAX_BIAS
from jaxserve.models.family import Family
from jaxserve.plan import Plan

COPIES = 64
"""Pages copied per launch."""

_ints = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)


class Program(NamedTuple):
    """One of `Plan.programs`: what is traced, which arguments it may destroy, and their shapes."""

    function: Callable[..., Any]
    donated: tuple[int, ...]
    arguments: tuple[Any, ...]


def program(plan: Plan, family: Family, cfg: Any, params: Any, kind: str, size: int) -> Program:
    """A program of the plan.

    Args:
        params: weights, or their shapes.
        kind, size: an entry of `plan.programs`.
    """
    kv, history = jax.eval_shape(partial(empty_state, plan, cfg, None))
    model, params = (plan, family, cfg), abstract(params)
    if kind == "forward":
        step = step_arrays(plan, size, plan.rows(size))
        return Program(partial(forward_step, *model), (1,), (params, kv, history, step))
    if kind == "step":
        step = step_arrays(plan, plan.step_tokens(size), size)
        arguments = (params, kv, history, step, sample_arrays(size, cfg.vocab))
        return Program(partial(whole_step, *model), (1, 2), arguments)
    if kind == "sample":
        last = jax.ShapeDtypeStruct((plan.max_num_seqs, cfg.embed), plan.activation_dtype)
        arguments = (head(params), last, history, sample_arrays(size, cfg.vocab))
        return Program(partial(sample_step, *model), (2,), arguments)
    if kind == "decode":
        drawing = sample_arrays(size, cfg.vocab), _ints((size, MAX_STOPS)), _ints(())
        arguments = (params, kv, history, step_arrays(plan, size, size), *drawing)
        return Program(partial(decode_loop, *model), (1, 2), arguments)
    if kind == "seed_history":
        row = _ints((plan.max_model_len + 1,))
        return Program(lambda h, slot, row: h.at[slot].set(row), (0,), (history, _ints(()), row))
    assert kind == "copy_pages"
    return Program(kv_cache.copy_pages, (0,), (kv, _ints((COPIES,)), _ints((COPIES,))))


def empty_state(plan: Plan, cfg: Any, device: Any) -> tuple[KVCache, Array]:
    """An empty cache, and a history [max_num_seqs, max_model_len + 1] of no tokens."""
    kv = kv_cache.allocate(
        cfg.num_layers,
        plan.num_pages,
        plan.page_size,
        plan.kv_shape,
        plan.kv_dtype,
        device,
        cfg.key_parts,
        calibrated=plan.kv_calibrated,
        whole_scales=plan.platform == "tpu",
    )
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
        ints=array(6, jnp.int32),
        floats=array(6, jnp.float32),
        flags=jax.ShapeDtypeStruct((4,), jnp.bool_),
        bias_ids=array(MAX_BIAS, jnp.int32),
        bias=array(MAX_BIAS, jnp.float32),
        mask=array(-(-vocab // 32), jnp.uint32),
    )


def abstract(tree: Any) -> Any:
    """The shapes and types of a tree's arrays."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype), tree)
