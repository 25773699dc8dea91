"""Experts' weights from one placement to another, between two steps of a running engine.

What is moved where is data, so that one compiled program serves every move; weights are donated and
change in place, a piece of each slot at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from moe.parallel import PlacedExperts
from moe.placement import ExpertLayout, Placement
from moe.transport import Transport, exchange

PIECE_BYTES = 1 << 18
"""Of one slot's weights at a time: a device sends at most this much to every slot there is."""


def sources(layout: ExpertLayout, old: Placement, new: Placement) -> np.ndarray:
    """The old slot that each new one takes its expert from, int32 [S] or [L, S].

    Itself if it can, else one of its own device, else copies in turn.
    """
    if np.ndim(new.expert_of) == 2:
        pairs = ((_layer(old, i), _layer(new, i)) for i in range(len(new.expert_of)))
        return np.stack([sources(layout, *pair) for pair in pairs])
    slots = np.arange(layout.num_slots)
    copies = np.asarray(old.num_replicas)[new.expert_of]
    choice = np.asarray(old.slots_of)[new.expert_of, slots % copies]
    for slot, expert in enumerate(np.asarray(new.expert_of)):
        held = np.asarray(old.slots_of)[expert][: copies[slot]]
        near = held[held // layout.slots_per_device == slot // layout.slots_per_device]
        if near.size:
            choice[slot] = slot if slot in near else near[0]
    return choice.astype(np.int32)


def _layer(placement: Placement, i: int) -> Placement:
    return jax.tree.map(lambda a: np.asarray(a)[i], placement)


def mover(
    mesh: Mesh, layout: ExpertLayout, transport: Transport, *, stacked: bool
) -> Callable[[PlacedExperts, Array | np.ndarray, Placement], PlacedExperts]:
    """A compiled (experts, sources, new placement) -> experts, in that placement.

    The experts are donated. With `stacked`, weights are [L, S, ...] and tables [L, ...].

    Args:
        transport: "ragged" moves each weight once; "padded" works everywhere.
    """
    slots = PartitionSpec(*((None,) if stacked else ()), transport.axes)

    def move(weights, source: Array):
        def leaf(w: Array) -> Array:
            def layer(i: Array, w: Array) -> Array:
                return w.at[i].set(_moved(transport, layout, w[i], source[i]))

            if stacked:
                return lax.fori_loop(0, w.shape[0], layer, w)
            return _moved(transport, layout, w, source)

        return jax.tree.map(leaf, weights)

    on_mesh = jax.shard_map(
        move, mesh=mesh, in_specs=(slots, PartitionSpec()), out_specs=slots, check_vma=False
    )

    def run(p: PlacedExperts, source: Array, new: Placement) -> PlacedExperts:
        return PlacedExperts(on_mesh(p.weights, source), new)

    return jax.jit(run, donate_argnums=0)


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
