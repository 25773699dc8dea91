"""The operations of a serving step: which kernels a plan runs, over this step's batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from jax import Array

import kernels_pallas.cpu as cpu
from jaxserve.cache.attend import paged
from jaxserve.cache.kv_cache import KVCache
from jaxserve.engine import sampler
from jaxserve.models.ops import Ops
from jaxserve.models.parallel import parallel_ops
from jaxserve.plan import Plan
from kernels_pallas.paged_attention import Ragged
from moe.load import add_load
from moe.router import Router


def serving_ops(plan: Plan, batch: Ragged) -> Ops:
    """Operations for the plan's kernels, which skip the padding of a bucket."""
    num_rows = batch.row_starts[batch.num_seqs]
    if plan.kernels == "reference":
        ops = Ops(attend=paged(batch), dtype=plan.activation_dtype)
    else:
        ops = _kernels(plan, num_rows, batch)
    return _on_mesh(plan, ops, num_rows)


def head_ops(plan: Plan, num_rows: Array) -> Ops:
    """Operations for `logits`, which see sequences instead of tokens."""
    if plan.kernels == "reference":
        ops = Ops(attend=_no_attention, dtype=plan.activation_dtype)
    else:
        ops = _kernels(plan, num_rows, None)
    return _on_mesh(plan, ops, num_rows)


def _on_mesh(plan: Plan, ops: Ops, num_rows: Array) -> Ops:
    if not plan.on_mesh:
        return ops
    ops = parallel_ops(ops, plan.dispatch, num_rows, split=plan.parallelism.tensor > 1)
    return replace(ops, record=partial(_count, num_rows)) if plan.dispatch else ops


def _count(
    num_rows: Array, kv: KVCache, layer: Array | int, router: Router, scores: Array, ids: Array
) -> KVCache:
    """The cache with the choices ids [T, A] of a layer's tokens counted."""
    assert kv.load is not None, "plans with experts on other devices count what those are asked for"
    return replace(kv, load=add_load(kv.load[0], layer, ids, num_rows)[None])


def sampling_ops(plan: Plan, num_rows: Array) -> dict[str, Callable[..., Any]]:
    """What `sampler.sample` is given."""
    if plan.kernels == "native":
        return {"argmax": partial(cpu.argmax, num_rows=num_rows)}
    if plan.kernels == "pallas":
        from jaxserve.engine import pallas_ops

        return {"draw": partial(pallas_ops.draw, plan.target)}
    return {"argmax": sampler.argmax}


def _kernels(plan: Plan, num_rows: Array, batch: Ragged | None) -> Ops:
    if plan.kernels == "native":
        from jaxserve.engine import native_ops

        attend = _no_attention if batch is None else paged(batch, native_ops.attention)
        return native_ops.ops(attend, plan.activation_dtype, num_rows)
    from jaxserve.engine import pallas_ops  # here, for importing Pallas takes a fifth of a second

    attend = _no_attention if batch is None else paged(batch, pallas_ops.attention(plan.target))
    return pallas_ops.ops(plan.target, attend, plan.activation_dtype, num_rows)


def _no_attention(*_: Any, **__: Any) -> Any:
    raise AssertionError("the head of a model does not attend")
