"""Experts that live on many devices: what `Ops.experts` is on a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from kernels_pallas.weight import StackedWeight, unstacked
from moe.dispatch import Dispatch, combine, dispatch
from moe.placement import Placement
from sharding.tree import pytree


@pytree
class PlacedExperts:
    """Experts by slot, and the tables that say which is which; what a layer's `experts` is.

    Attributes:
        weights: `moe.experts.Experts` whose leading axis is slots: all of them outside of
            `shard_map`, this device's within.
        placement: the same on every device. With a leading axis of layers it is stacked and
            sliced like any weight.
    """

    weights: Any
    placement: Placement


def experts(
    d: Dispatch,
    local: Callable[..., Array],
    x: Array,
    ids: Array,
    weights: Array,
    p: PlacedExperts,
    *,
    activation: str,
    replicated: tuple[str, ...] = (),
    num_rows: Array | int | None = None,
) -> Array:
    """Each token's weighted sum over experts wherever they live; bind the first two for `Ops`.

    A shared expert of the layout joins every token's choices, with weight 1 and last.

    Args:
        local: (rows, sizes, experts, activation=) -> answers [R, D]: `moe.experts.experts_on_rows`
            or one of the same contract.
        x: [T, D].
        ids, weights: [T, A], as `moe.experts.experts` takes them.
        replicated: axes along which devices hold the same tokens. Each sends its share of them.
        num_rows: real tokens of x.

    Returns:
        [T, D] in x's type; the same along `replicated`.
    """
    T = x.shape[0]
    num_rows = T if num_rows is None else num_rows
    if d.layout.num_shared:
        shared = jnp.full((T, 1), d.layout.num_experts, ids.dtype)
        routed = jnp.where(ids < d.layout.num_experts, ids, -1)
        ids = jnp.concatenate([routed, shared], 1)
        weights = jnp.concatenate([weights, jnp.ones((T, 1), weights.dtype)], 1)
    if replicated:
        share = -(-T // lax.axis_size(replicated))
        first = lax.axis_index(replicated) * share
        x, ids, weights = (_part(a, first, share, replicated) for a in (x, ids, weights))
        num_rows = num_rows - first
    placement = jax.tree.map(unstacked, p.placement, is_leaf=lambda w: isinstance(w, StackedWeight))
    rows, sizes, receipt = dispatch(d, x, ids, placement, num_rows)
    answers = local(rows, sizes, p.weights, activation=activation)
    y = combine(d, answers, receipt, weights).astype(x.dtype)
    return lax.all_gather(y, replicated, tiled=True)[:T] if replicated else y


def _part(a: Array, first: Array, share: int, axes: tuple[str, ...]) -> Array:
    """Rows [first, first + share) of a, padded to whole shares."""
    a = jnp.pad(a, ((0, share * lax.axis_size(axes) - a.shape[0]), (0, 0)))
    return lax.dynamic_slice_in_dim(a, first, share)
