"""The operations of a serving step: which kernels a plan runs, over this step's batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

import kernels_pallas.cpu as cpu
from jaxserve.cache.attend import Beginning, beginning, paged
from jaxserve.engine import sampler
from jaxserve.models.ops import AttendMade, Ops
from jaxserve.models.parallel import parallel_ops, spread
from jaxserve.plan import Plan
from kernels_pallas.paged_attention import Ragged
from kernels_pallas.paged_attention.reference import page_write
from moe.load import add_load
from moe.router import Router
from sharding.mesh import TENSOR


def serving_ops(plan: Plan, batch: Ragged, num_tokens: int) -> Ops:
    """Operations for the plan's kernels, which skip the padding of a bucket of `num_tokens`."""
    num_rows = batch.row_starts[batch.num_seqs]
    ops = _on_mesh(plan, _kernels(plan, num_rows, batch), num_rows)
    if plan.notes_routes:
        ops = replace(ops, record=_note_routes)
    if not (plan.on_mesh and plan.spreads_tokens):
        return ops
    size = num_tokens // plan.parallelism.sequence
    own_rows = jnp.clip(num_rows - lax.axis_index(TENSOR) * size, 0, size)
    own = _on_mesh(plan, _kernels(plan, own_rows, None), own_rows, own=True)
    return replace(ops, spread=spread(own))


def attend_made(
    plan: Plan, step: Ragged, num_tokens: int, part: Ragged, first: Array | int
) -> AttendMade:
    """`cache.attend.beginning` with the plan's kernels."""
    from kernels_pallas.flash_attention import flash_attention  # here, for it imports Pallas

    write: Callable[..., Any] = page_write
    if plan.kernels == "pallas":
        from kernels_pallas.paged_attention import ops

        write = partial(ops.page_write, target=plan.target)
    attention = partial(flash_attention, target=plan.target)
    return beginning(step, num_tokens, part, first, write, attention)


def head_ops(plan: Plan, num_rows: Array) -> Ops:
    """Operations for `logits`, which see sequences instead of tokens."""
    return _on_mesh(plan, _kernels(plan, num_rows, None), num_rows)


def _on_mesh(plan: Plan, ops: Ops, num_rows: Array, *, own: bool = False) -> Ops:
    """`own`: devices along the axis "tensor" have tokens of their own, and not the same ones."""
    if not plan.on_mesh:
        return ops
    split = plan.parallelism.tensor > 1 and not own
    ops = parallel_ops(ops, plan.dispatch, num_rows, split=split)
    return replace(ops, record=partial(_count, num_rows)) if plan.dispatch else ops


def _count(
    num_rows: Array, kv: Any, layer: Array | int, router: Router, scores: Array, ids: Array
) -> Any:
    """The cache with the choices ids [T, A] of a layer's tokens counted."""
    if isinstance(kv, Beginning):
        return replace(kv, kv=_count(num_rows, kv.kv, layer, router, scores, ids))
    assert kv.load is not None, "plans with experts on other devices count what those are asked for"
    return replace(kv, load=add_load(kv.load[0], layer, ids, num_rows)[None])


def _note_routes(kv: Any, layer: Array | int, router: Router, scores: Array, ids: Array) -> Any:
    """The cache with the choices ids [T, A] of a layer's tokens written down."""
    bits = jnp.uint32(1) << (ids % 32).astype(jnp.uint32)
    masks = lax.reduce(bits, jnp.uint32(0), lax.bitwise_or, (1,))
    return replace(kv, routes=lax.dynamic_update_slice(kv.routes, masks[None], (layer, 0)))


def sampling_ops(plan: Plan, num_rows: Array) -> dict[str, Callable[..., Any]]:
    """What `sampler.sample` is given."""
    if plan.kernels == "native":
        return {"argmax": partial(cpu.argmax, num_rows=num_rows)}
    if plan.kernels == "pallas":
        from jaxserve.engine import pallas_ops

        return {"draw": partial(pallas_ops.draw, plan.target)}
    return {"argmax": sampler.argmax}


def _kernels(plan: Plan, num_rows: Array, batch: Ragged | None) -> Ops:
    """Operations of one device by itself; without a batch there is nothing to attend to."""
    if plan.kernels == "reference":
        attend = _no_attention if batch is None else paged(batch)
        return Ops(attend=attend, dtype=plan.activation_dtype)
    if plan.kernels == "native":
        from jaxserve.engine import native_ops

        attend = _no_attention if batch is None else paged(batch, native_ops.attention)
        return native_ops.ops(attend, plan.activation_dtype, num_rows)
    from jaxserve.engine import pallas_ops  # here, for importing Pallas takes a fifth of a second

    attend = _no_attention if batch is None else paged(batch, pallas_ops.attention(plan.target))
    return pallas_ops.ops(plan.target, attend, plan.activation_dtype, num_rows)


def _no_attention(*_: Any, **__: Any) -> Any:
    raise AssertionError("these operations have no keys to attend to")
