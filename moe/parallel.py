"""Experts that live on many devices: what `Ops.experts` is on a mesh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from kernels_pallas.weight import StackedWeight, unstacked
from moe.dispatch import Dispatch, Receipt, arrived, combine, reply, send
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


@pytree
class Visit:
    """A step's tokens at experts that live elsewhere, between `send` and `receive`.

    Attributes:
        receipt: what brings answers back.
        weights: [T, A], of this device's choices.
        rows: as the last part left them: tokens that came, their answers, answers that came.
    """

    receipt: Receipt
    weights: Array
    rows: Any


@dataclass(frozen=True)
class FarExperts:
    """Experts wherever they live, in parts between which rows travel; for `Ops`.

    A shared expert of the layout joins every token's choices, with weight 1 and last.

    Attributes:
        local: (rows, sizes, experts, activation=) -> answers [R, D]: `moe.experts.experts_on_rows`
            or one of the same contract.
        replicated: axes along which devices hold the same tokens. Each sends its share of them.
        num_rows: real tokens.
    """

    d: Dispatch
    local: Callable[..., Array]
    replicated: tuple[str, ...] = ()
    num_rows: Array | int | None = None

    def send(self, x: Array, ids: Array, weights: Array, p: PlacedExperts) -> Visit:
        """Tokens x [T, D] to the experts `ids` [T, A], as `moe.experts.experts` takes them."""
        d, T = self.d, x.shape[0]
        num_rows = T if self.num_rows is None else self.num_rows
        if d.layout.num_shared:
            shared = jnp.full((T, 1), d.layout.num_experts, ids.dtype)
            routed = jnp.where(ids < d.layout.num_experts, ids, -1)
            ids = jnp.concatenate([routed, shared], 1)
            weights = jnp.concatenate([weights, jnp.ones((T, 1), weights.dtype)], 1)
        if self.replicated:
            share = -(-T // lax.axis_size(self.replicated))
            first = lax.axis_index(self.replicated) * share
            x, ids, weights = (_part(a, first, share, self.replicated) for a in (x, ids, weights))
            num_rows = num_rows - first
        tables = jax.tree.map(
            unstacked, p.placement, is_leaf=lambda w: isinstance(w, StackedWeight)
        )
        came, receipt = send(d, x, ids, tables, num_rows)
        return Visit(receipt, weights, came)

    def answer(self, visit: Visit, p: PlacedExperts, *, activation: str) -> Visit:
        """This device's experts over the rows that have come, whoever sent them."""
        rows, sizes = arrived(self.d, visit.rows, visit.receipt)
        return replace(visit, rows=self.local(rows, sizes, p.weights, activation=activation))

    def reply(self, visit: Visit) -> Visit:
        """Answers to where the rows came from."""
        return replace(visit, rows=reply(self.d, visit.rows, visit.receipt))

    def receive(self, visit: Visit, num_tokens: int, dtype: Any) -> Array:
        """Each token's weighted sum [T, D]; the same along `replicated`."""
        y = combine(visit.rows, visit.receipt, visit.weights).astype(dtype)
        if not self.replicated:
            return y
        return lax.all_gather(y, self.replicated, tiled=True)[:num_tokens]

    def __call__(
        self, x: Array, ids: Array, weights: Array, p: PlacedExperts, *, activation: str
    ) -> Array:
        """All of it: what `moe.experts.experts` is on one device."""
        visit = self.answer(self.send(x, ids, weights, p), p, activation=activation)
        return self.receive(self.reply(visit), x.shape[0], x.dtype)


def _part(a: Array, first: Array, share: int, axes: tuple[str, ...]) -> Array:
    """Rows [first, first + share) of a, padded to whole shares."""
    a = jnp.pad(a, ((0, share * lax.axis_size(axes) - a.shape[0]), (0, 0)))
    return lax.dynamic_slice_in_dim(a, first, share)
