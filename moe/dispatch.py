"""Tokens to the devices of their experts, and the experts' answers back.

A row of the receiver says nothing of where it came from or which expert it is for: rows arrive
sorted, and the counts of each pair of devices say the rest. Answers go back the way tokens came.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array, lax

from kernels_pallas.quantize import Int8Rows
from moe import wire
from moe.placement import ExpertLayout, Placement
from moe.transport import Transport, exchange, flat
from sharding.tree import pytree


@dataclass(frozen=True)
class Dispatch:
    """How tokens reach experts.

    Attributes:
        early_int8: tokens are rounded to eight bits before they travel, and answers are bfloat16.
            Otherwise both keep their type.
    """

    layout: ExpertLayout
    transport: Transport
    early_int8: bool = True

    def max_rows(self, num_tokens: int, top_k: int) -> int:
        """Rows that a device can receive, if each of its peers has so many tokens."""
        layout = self.layout
        return layout.num_devices * num_tokens * min(top_k, layout.slots_per_device)


@pytree
class Receipt:
    """What brings answers back.

    Attributes:
        place: [T, A], where a choice lies in the list of sent rows; T * A: nowhere.
        sent: [n, K], rows for each slot of each device.
        received: [n, K], rows of each device for each of this one's slots.
    """

    place: Array
    sent: Array
    received: Array


def choose_slots(
    d: Dispatch, ids: Array, placement: Placement, num_rows: Array | int | None = None
) -> Array:
    """The slot [T, A] for each choice; `num_slots` for none.

    Copies of a routed expert take turns along the tokens of a device. A shared expert's serve a
    block of devices each (§3).

    Args:
        ids: [T, A] int32. Those that are no expert, or that a token has named before, go nowhere.
        num_rows: real tokens; padding goes nowhere.
    """
    layout, (T, A) = d.layout, ids.shape
    source, token = lax.axis_index(d.transport.axes), jnp.arange(T)[:, None]
    earlier = jnp.arange(A)[:, None] > jnp.arange(A)
    again = ((ids[:, :, None] == ids[:, None, :]) & earlier).any(-1)
    real = (ids >= 0) & (ids < layout.num_experts + layout.num_shared) & ~again
    real &= token < (T if num_rows is None else num_rows)
    ids = jnp.where(real, ids, 0)
    copies = placement.num_replicas[ids]
    block = source * copies // layout.num_devices
    copy = jnp.where(ids < layout.num_experts, (source + token) % copies, block)
    return jnp.where(real, placement.slots_of[ids, copy], layout.num_slots)


def send(
    d: Dispatch, x: Array, ids: Array, placement: Placement, num_rows: Array | int | None = None
) -> tuple[Array, Receipt]:
    """Tokens x [T, D] to their experts; must be called by every device of the axes.

    Returns:
        What has come, for `arrived`, and what `reply` and `combine` need.
    """
    T, A = ids.shape
    layout = d.layout
    slot = choose_slots(d, ids, placement, num_rows).reshape(-1)
    order = jnp.argsort(slot, stable=True)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(T * A, dtype=order.dtype))
    place = jnp.where(slot < layout.num_slots, place, T * A).reshape(T, A)
    sent = jnp.zeros(layout.num_slots, jnp.int32).at[slot].add(1, mode="drop")
    sent = sent.reshape(layout.num_devices, layout.slots_per_device)
    tokens = wire.pack(x) if d.early_int8 else x
    came, received = exchange(d.transport, tokens[order // A], sent, d.max_rows(T, A))
    return came, Receipt(place, sent, received)


def arrived(d: Dispatch, came: Array, receipt: Receipt) -> tuple[Array | Int8Rows, Array]:
    """Rows [max_rows, D] for this device's slots, sorted by slot, and how many each slot has
    [slots_per_device]. Rows past the last are undefined."""
    rows = _reordered(flat(came), receipt.received)
    return wire.unpack(rows) if d.early_int8 else rows, receipt.received.sum(0)


def reply(d: Dispatch, y: Array, receipt: Receipt) -> Array:
    """Answers y [max_rows, D] back to whose tokens they are for: what has come, for `combine`."""
    y = y.astype(jnp.bfloat16) if d.early_int8 else y
    rows = _reordered(y, receipt.received.T)
    return exchange(d.transport, rows, receipt.received, receipt.place.size, theirs=receipt.sent)[0]


def combine(came: Array, receipt: Receipt, weights: Array) -> Array:
    """Each token's weighted sum of answers, [T, D] float32.

    A token's answers are added in the order of its choices, so that its sum does not depend on who
    else is there, where experts live or how rows travel.

    Args:
        weights: [T, A].
    """
    back = lax.optimization_barrier(flat(came))  # what is fused with the sum may round it otherwise
    total = jnp.zeros((weights.shape[0], back.shape[1]), jnp.float32)
    for a in range(weights.shape[1]):
        answer = back.at[receipt.place[:, a]].get(mode="fill", fill_value=0)
        total += answer.astype(jnp.float32) * weights[:, a, None].astype(jnp.float32)
    return total


def _reordered(rows: Array, counts: Array) -> Array:
    """Rows that lie by (p, q), as `counts` [P, Q] says, so that they lie by (q, p)."""
    if 1 in counts.shape:
        return rows
    flat, turned = counts.reshape(-1), counts.T.reshape(-1)
    start = (jnp.cumsum(flat) - flat).reshape(counts.shape).T.reshape(-1)
    end = jnp.cumsum(turned)
    row = jnp.arange(rows.shape[0])
    run = jnp.clip(jnp.searchsorted(end, row, side="right"), 0, len(end) - 1)
    return rows.at[start[run] + row - (end - turned)[run]].get(mode="clip")
