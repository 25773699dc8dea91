"""The few collectives that steps are made of, by name, inside `jax.shard_map`.

`axes` is an axis of the mesh or a tuple of them, outermost first: ("expert", "tensor") is one group
of expert·tensor devices, numbered as experts are split (`sharding.rules`).
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

Axes = str | tuple[str, ...]


def all_to_all(x: Array, axes: Axes, *, split: int = 0, concat: int = 0) -> Array:
    """Cuts x along `split` into a part for each device, and joins along `concat` what they send.

    Between tokens and heads: `all_to_all(q, "tensor", split=1, concat=0)` takes [T/n, N, H] to
    [T, N/n, H].
    """
    return lax.all_to_all(x, axes, split, concat, tiled=True)


def all_gather(x: Array, axes: Axes, *, axis: int = 0) -> Array:
    """Every device's x, one after the other along `axis`."""
    return lax.all_gather(x, axes, axis=axis, tiled=True)


def reduce_scatter(x: Array, axes: Axes, *, axis: int = 0) -> Array:
    """The sum of every device's x, of which each keeps its part along `axis`."""
    return lax.psum_scatter(x, axes, scatter_dimension=axis, tiled=True)


def ring_shift(x: Array, axis: Axes, by: int = 1) -> Array:
    """The x of the device that is `by` places before, around the ring."""
    n = lax.axis_size(axis)
    return lax.ppermute(x, axis, [(i, (i + by) % n) for i in range(n)])


def ragged_all_to_all(
    x: Array,  # [R, ...] rows to send, those of a device together
    out: Array,  # [Q, ...] what rows that nobody sends are left at
    input_offsets: Array,  # [n] first row for each device
    send_sizes: Array,  # [n] how many
    output_offsets: Array,  # [n] the row of *its* `out` at which they land
    recv_sizes: Array,  # [n] how many each device sends here
    axes: Axes,
    *,
    platform: str,
) -> Array:
    """Sends a number of rows to each device that only running shows, and nothing beside them.

    Args:
        platform: what is compiled for, as JAX calls it. XLA has no such collective for CPU, where
            all rows are gathered instead: the same result, at n times the traffic.
    """
    if platform == "cpu":
        return ragged_all_to_all_reference(
            x, out, input_offsets, send_sizes, output_offsets, recv_sizes, axes
        )
    return lax.ragged_all_to_all(
        x, out, input_offsets, send_sizes, output_offsets, recv_sizes, axis_name=axes
    )


def ragged_all_to_all_reference(
    x: Array,
    out: Array,
    input_offsets: Array,
    send_sizes: Array,
    output_offsets: Array,
    recv_sizes: Array,
    axes: Axes,
) -> Array:
    """`lax.ragged_all_to_all` out of collectives that every platform has.

    `recv_sizes` repeat what the senders' `send_sizes` say, and are not looked at.
    """
    me = lax.axis_index(axes)

    def for_me(table: Array) -> Array:  # [n], by sender
        return lax.all_gather(table, axes)[:, me]

    first, size, start = map(for_me, (input_offsets, send_sizes, output_offsets))
    row = jnp.arange(out.shape[0])[:, None]  # [Q, 1] against [n]
    sent = (start <= row) & (row < start + size)  # [Q, n]
    sender = jnp.argmax(sent, axis=1)
    source = first[sender] + row[:, 0] - start[sender]
    rows = lax.all_gather(x, axes)[sender, jnp.clip(source, 0, x.shape[0] - 1)]
    landed = jnp.any(sent, axis=1).reshape(-1, *(1,) * (out.ndim - 1))
    return jnp.where(landed, rows, out)
