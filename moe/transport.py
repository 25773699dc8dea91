"""Rows to the devices they are meant for: one contract, three ways to keep it.

All run inside `jax.shard_map`, over axes that count as one, the last of them fastest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from kernels_pallas.push import push

Way = Literal["padded", "ragged", "push"]


@dataclass(frozen=True)
class Transport:
    """How rows travel.

    Attributes:
        axes: of the mesh, between whose devices they do.
        way: a key of `WAYS`.
        platform: what is compiled for; "cpu" knows no ragged all-to-all and is given a stand-in.
        capacity_factor: of "padded": rows for each peer and round, relative to an even spread.
        interpret: of "push": what `pallas_call` takes, for devices that are not TPUs.
    """

    axes: tuple[str, ...]
    way: Way = "padded"
    platform: Literal["cpu", "gpu", "tpu"] = "cpu"
    capacity_factor: float = 1.25
    interpret: Any = False

    def __post_init__(self):
        if self.way not in WAYS:
            raise ValueError(f"way={self.way!r} is none of {', '.join(WAYS)}")
        if self.capacity_factor <= 0:
            raise ValueError(f"capacity_factor={self.capacity_factor} must be positive: try 1.25")


def exchange(
    transport: Transport,
    rows: Array,  # [M, W], those for device 0 first, and so on; what follows them stays here
    counts: Array,  # [n, K] int32, rows for each device; what the K numbers are is the caller's
    num_out: int,
    theirs: Array | None = None,  # [n, K], if it is known already
) -> tuple[Array, Array]:
    """Rows for this device [num_out, ...], those of device 0 first, and how many each sent [n, K].

    Rows keep their order, and nothing is dropped. What lies past the last row is undefined. A row
    has the shape in which it travelled, of W entries (`flat`).

    Args:
        num_out: never less than what may arrive.
    """
    return WAYS[transport.way](transport, rows, counts, num_out, theirs)


def flat(rows: Array) -> Array:
    """Rows [M, W] of what `exchange` says.

    It is for the caller to do: XLA makes it a copy, and what is to be computed meanwhile must come
    before that (jaxserve/models/interleaved.py).
    """
    return rows.reshape(rows.shape[0], -1)


def starts(counts: Array) -> Array:
    """Where each run begins, if runs of `counts` [n] lie one behind the other."""
    return jnp.cumsum(counts) - counts


def capacity(transport: Transport, num_rows: int, most: int, num_devices: int) -> int:
    """Rows for each peer and round of "padded".

    Args:
        num_rows: that a device sends, if all of its tokens are real.
        most: that it can send to one peer.
    """
    even = -(-num_rows * transport.capacity_factor // num_devices)
    return max(1, min(int(even), most))


def _padded(
    transport: Transport, rows: Array, counts: Array, num_out: int, theirs: Array | None
) -> tuple[Array, Array]:
    """All-to-all of equal parts, repeated until the fullest part is through."""
    axes, n = transport.axes, lax.axis_size(transport.axes)
    theirs = _swap(counts, axes) if theirs is None else theirs
    sent, due = counts.sum(1), theirs.sum(1)
    few, many = sorted((rows.shape[0], num_out))
    part = capacity(transport, few, many // n, n)
    # groups that share no row still agree on rounds: some barriers are the whole mesh's
    rounds = lax.pmax(-(-sent.max() // part), jax.sharding.get_abstract_mesh().manual_axes)

    def places(sizes: Array, r: Array, outside: int) -> Array:  # [n * part]
        k = r * part + jnp.arange(part)
        at = starts(sizes)[:, None] + k
        return jnp.where(k < sizes[:, None], at, outside).reshape(-1)

    def one_round(state: tuple[Array, Array]) -> tuple[Array, Array]:
        r, arrived = state
        out = rows.at[places(sent, r, rows.shape[0])].get(mode="fill", fill_value=0)
        got = lax.all_to_all(out, axes, 0, 0, tiled=True)
        return r + 1, arrived.at[places(due, r, num_out)].set(got, mode="drop")

    empty = jnp.zeros((num_out, *rows.shape[1:]), rows.dtype)
    return lax.while_loop(lambda s: s[0] < rounds, one_round, (jnp.int32(0), empty))[1], theirs


def _ragged(
    transport: Transport, rows: Array, counts: Array, num_out: int, theirs: Array | None
) -> tuple[Array, Array]:
    """Just the rows that there are, to places that their receivers have announced."""
    theirs = _swap(counts, transport.axes) if theirs is None else theirs
    sent, due = counts.sum(1), theirs.sum(1)
    there = _swap(starts(due), transport.axes)
    move = _stand_in if transport.platform == "cpu" else lax.ragged_all_to_all
    rows = _packed(rows) if transport.platform == "tpu" else rows
    out = jnp.zeros((num_out, *rows.shape[1:]), rows.dtype)
    return move(rows, out, starts(sent), sent, there, due, axis_name=transport.axes), theirs


def _packed(rows: Array) -> Array:
    """Rows [M, W] as a TPU's ragged all-to-all would shape them anyway: whole words, whose entries
    lie in as many sublanes."""
    sublanes = 4 // rows.dtype.itemsize
    if rows.shape[1] % sublanes:
        return rows
    return rows.reshape(rows.shape[0], sublanes, -1)


def _stand_in(rows, out, start, sent, there, due, *, axis_name) -> Array:
    """`lax.ragged_all_to_all` where XLA lacks it: everybody gets everything, and keeps its own."""
    rows, start, sent, there = (lax.all_gather(a, axis_name) for a in (rows, start, sent, there))
    me, r = lax.axis_index(axis_name), jnp.arange(out.shape[0])

    def take(source: Array, out: Array) -> Array:
        k = r - there[source, me]
        mine = rows[source].at[k + start[source, me]].get(mode="clip")
        return jnp.where(((k >= 0) & (k < sent[source, me]))[:, None], mine, out)

    return lax.fori_loop(0, rows.shape[0], take, out)


def _swap(x: Array, axes: tuple[str, ...]) -> Array:
    """Entry j of x [n, ...] to device j."""
    return lax.all_to_all(x, axes, 0, 0, tiled=True)


def _push(
    transport: Transport, rows: Array, counts: Array, num_out: int, theirs: Array | None
) -> tuple[Array, Array]:
    """Rows written to their receivers' memory, with counts behind them instead of before."""
    return push(rows, counts, num_out, axes=transport.axes, interpret=transport.interpret)


WAYS: dict[str, Callable[..., tuple[Array, Array]]] = {
    "padded": _padded,
    "ragged": _ragged,
    "push": _push,
}
