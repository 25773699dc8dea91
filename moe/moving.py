"""Experts' weights from one placement to another, between two steps of a running engine.

What is moved where is data, so that one compiled program serves every move; where weights are
donated they change in place, a piece of each slot at a time.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from moe.placement import ExpertLayout, Placement
from moe.transport import Transport, exchange

PIECE_BYTES = 1 << 18
"""Of one slot's weights at a time: a device sends at most this much to every slot there is."""


def sources(layout: ExpertLayout, old: Placement, new: Placement) -> np.ndarray:
    """The old slot that each new one takes its expert from, int32 [S] or [L, S].

    Itself if it can, else one of its own device, else copies in turn.
    """
    expert = np.asarray(new.expert_of)[..., None]
    copies = np.take_along_axis(np.asarray(old.num_replicas), expert[..., 0], -1)[..., None]
    held = np.take_along_axis(np.asarray(old.slots_of), expert, -2)  # [..., S, R]
    slot, K = np.arange(layout.num_slots)[:, None], layout.slots_per_device
    near = held // K == slot // K
    choice = np.where(near.any(-1), near.argmax(-1), slot[:, 0] % copies[..., 0])
    choice = np.where((held == slot).any(-1), (held == slot).argmax(-1), choice)
    return np.take_along_axis(held, choice[..., None], -1)[..., 0].astype(np.int32)


def move(transport: Transport, layout: ExpertLayout, weights: Any, source: Array) -> Any:
    """Weights in their new slots; within `shard_map`, called by every device of the axes.

    Args:
        transport: "ragged" moves each weight once; "padded" works everywhere.
        weights: a tree of [L, slots_per_device, ...], this device's slots.
        source: [L, S], as `sources` has it.
    """

    def leaf(w: Array) -> Array:
        def layer(i: Array, w: Array) -> Array:
            return w.at[i].set(_moved(transport, layout, w[i], source[i]))

        return lax.fori_loop(0, w.shape[0], layer, w)

    return jax.tree.map(leaf, weights)


def _moved(transport: Transport, layout: ExpertLayout, w: Array, source: Array) -> Array:
    """One layer's weight [slots_per_device, ...] of this device, in its new slots; source [S]."""
    K, me = layout.slots_per_device, lax.axis_index(transport.axes)
    holder = source // K
    order = jnp.argsort(holder != me, stable=True)  # slots that this device serves come first
    mine = jnp.clip(source[order] - me * K, 0, K - 1)
    counts = (holder == me).astype(jnp.int32).reshape(layout.num_devices, K)
    arrival = jnp.argsort(lax.dynamic_slice_in_dim(holder, me * K, K), stable=True)

    def piece(i: Array, w: Array) -> Array:
        part = lax.dynamic_index_in_dim(w, i, 1, keepdims=False)
        got, _ = exchange(transport, part[mine], counts, K)
        return w.at[arrival, i].set(got)

    pieces = w.reshape(K, _num_pieces(w), -1)
    return lax.fori_loop(0, pieces.shape[1], piece, pieces).reshape(w.shape)


def _num_pieces(w: Array) -> int:
    """The fewest equal pieces of one slot's rows that are small enough, or single rows."""
    rows = w.shape[1] if w.ndim > 2 else 1
    row_bytes = math.prod(w.shape[1:]) // rows * w.dtype.itemsize
    small = [
        n for n in range(1, rows + 1) if rows % n == 0 and rows // n * row_bytes <= PIECE_BYTES
    ]
    return small[0] if small else rows
