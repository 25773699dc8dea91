"""All-to-all of rows by remote DMA, straight into the receivers' memory; TPU.

Rows are sent without a handshake (CloudMatrix-Infer's FusedDispatch, §3): every device keeps a
static landing buffer of two blocks for each peer, and copies what arrives there into one contiguous
result. Counts travel beside the first block; a DMA semaphore tells that a block is complete.

Two blocks are necessary and sufficient. In each round every pair of devices exchanges one message
each way: a block, or a flag from a device that has no block left. A device that has a peer's
message of round r knows that the peer has unloaded round r - 1, so its own block of round r + 1
overwrites nothing unread. With one block, a fast device would overwrite what a slow one has not yet
read. No device is more than one round ahead of another, so two semaphores serve all peers: a TPU
has memory for 512, and EP320 has 320 peers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.op import UnsupportedError
from kernels_pallas.tpu import LANES


@dataclass(frozen=True)
class Tile:
    """Static memory where rows land.

    Attributes:
        block_rows: rows in a block, which is sent by one copy.
        num_blocks: blocks that each peer has here. One is a race, which a test shows.
    """

    block_rows: int = 8
    num_blocks: int = 2


def push(
    rows: Array,  # [M, W], ordered by destination: those for device 0 first
    counts: Array,  # [n, K] int32, rows for each device, in K parts
    num_out: int,
    *,
    axes: tuple[str, ...],
    tile: Tile | None = None,
    interpret: Any = False,
    collective_id: int = 0,
) -> tuple[Array, Array]:
    """Sends each row to its device.

    Must run inside `jax.shard_map` on every device of `axes`, which count as one flattened axis of
    n devices.

    Args:
        tile: the landing blocks; a block has no more rows than `rows` or the result.
        num_out: rows of the result, at least as many as can arrive: more would be written past its
            end.
        interpret: what `pallas_call` takes, for devices that are not TPUs.
        collective_id: names the barrier; programs that may run at the same time need different
            ones.

    Returns:
        The rows sent to this device [num_out, W], ordered by sender, undefined past the last one;
        and how many each device sent [n, K].

    Raises:
        UnsupportedError: W is not a multiple of 128.
    """
    M, W = rows.shape
    n, K = counts.shape
    if W % LANES:
        raise UnsupportedError(f"push: rows of {W} entries, which must be a multiple of {LANES}")
    tile, totals = tile or Tile(), counts.sum(1)
    tile = replace(tile, block_rows=min(tile.block_rows, M, num_out))
    header = _header(totals, counts)
    row, landing = (W // LANES, LANES), (tile.num_blocks, n, tile.block_rows)
    anywhere, scalars = pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pltpu.SMEM)
    dma = pltpu.SemaphoreType.DMA
    out, headers, _ = pl.pallas_call(
        partial(_kernel, axes=axes, tile=tile),
        out_shape=(
            jax.ShapeDtypeStruct((num_out, *row), rows.dtype),
            jax.ShapeDtypeStruct(header.shape, jnp.int32),
            jax.ShapeDtypeStruct((*landing, *row), rows.dtype),
        ),
        in_specs=[scalars, scalars, anywhere, anywhere],
        out_specs=(anywhere,) * 3,
        scratch_shapes=[
            pltpu.SMEM((n,), jnp.int32),
            pltpu.SMEM((n,), jnp.int32),
            pltpu.SMEM(header.shape[1:], jnp.int32),
            dma((tile.num_blocks,)),
            pltpu.SemaphoreType.REGULAR((2,)),
            dma((4,)),
        ],
        compiler_params=pltpu.CompilerParams(collective_id=collective_id, has_side_effects=True),
        interpret=interpret,
        name="push",
    )(totals, jnp.cumsum(totals) - totals, header, rows.reshape(M, *row))
    return out.reshape(num_out, W), headers.reshape(n, -1)[:, 1 : 1 + K]


def _header(totals: Array, counts: Array) -> Array:
    """What each device is told: its rows in all, then its counts [n, lines, 128]."""
    n, K = counts.shape
    header = jnp.concatenate([totals[:, None], counts], 1)
    lines = -(-(K + 1) // LANES)
    return jnp.pad(header, ((0, 0), (0, lines * LANES - K - 1))).reshape(n, lines, LANES)


class _Refs(NamedTuple):
    """What the kernel reads and writes on one of n devices. A row is [S, 128].

    Attributes:
        send_counts, send_begins: rows for each device, and the first of them in `rows` [n]; SMEM.
        header: the counts for each device, as they are sent [n, lines, 128].
        rows: to be sent [M, S, 128].
        out: rows that were received [num_out, S, 128].
        headers: what each device sent of its `header` [n, lines, 128].
        landing: where peers write [num_blocks, n, block_rows, S, 128].
        recv_counts, recv_begins: rows of each device, and the first of them in `out` [n]; SMEM.
        header_here: one of `headers`, in SMEM, where it can be read [lines, 128].
        blocks_arrived, flags_arrived: semaphores of blocks [num_blocks] and of flags [2], by round.
        header_arrived, sent, unloaded, header_read: semaphores of copies.
    """

    send_counts: Any
    send_begins: Any
    header: Any
    rows: Any
    out: Any
    headers: Any
    landing: Any
    recv_counts: Any
    recv_begins: Any
    header_here: Any
    blocks_arrived: Any
    flags_arrived: Any
    header_arrived: Any
    sent: Any
    unloaded: Any
    header_read: Any


@dataclass(frozen=True)
class _Exchange:
    """One device's part in an exchange.

    Attributes:
        axes: names of the mesh axes over which devices exchange.
        sizes: devices along each axis.
        tile: the landing blocks.
        me: this device's number along the flattened axes, an int32.
        refs: what it reads and writes.
    """

    axes: tuple[str, ...]
    sizes: list[int]
    tile: Tile
    me: Array
    refs: _Refs

    def for_each_peer(self, act: Callable[[Any], None]) -> None:
        """Acts on every device, itself last. Each begins with its successor, so that not all write
        to the same device at the same time."""
        n = math.prod(self.sizes)

        @pl.loop(1, n + 1)
        def _(k):
            act(lax.rem(self.me + k, jnp.int32(n)))

    def device_id(self, j: Array) -> Any:
        """Device j, by its index along each mesh axis."""
        strides = [math.prod(self.sizes[i + 1 :]) for i in range(len(self.sizes))]
        parts = zip(self.axes, strides, self.sizes, strict=True)
        return {axis: lax.rem(lax.div(j, jnp.int32(s)), jnp.int32(m)) for axis, s, m in parts}

    def num_rounds(self, j: Array) -> Array:
        """Rounds in which this device and device j exchange messages."""
        most = jnp.maximum(self.refs.send_counts[j], self.refs.recv_counts[j])
        return lax.div(most + (self.tile.block_rows - 1), jnp.int32(self.tile.block_rows))

    def header_to(self, j: Array) -> Any:
        """The copy of this device's counts to device j."""
        source, target = self.refs.header.at[j], self.refs.headers.at[self.me]
        return self._remote_copy(source, target, self.refs.header_arrived, j)

    def block_to(self, j: Array, r: Array | int, row: Array | int, count: int) -> Any:
        """The copy of `count` rows, from `row` of round r's block, to device j."""
        begin = self.refs.send_begins[j] + r * self.tile.block_rows + row
        source = self.refs.rows.at[pl.ds(begin, count)]
        slot = self._slot(r)
        target = self.refs.landing.at[slot, self.me, pl.ds(row, count)]
        return self._remote_copy(source, target, self.refs.blocks_arrived.at[slot], j)

    def block_from(self, j: Array, r: Array | int, row: Array | int, count: int) -> Any:
        """A copy like the one from device j, to wait for: only its size matters."""
        slot = self._slot(r)
        source = self.refs.rows.at[pl.ds(0, count)]
        target = self.refs.landing.at[slot, j, pl.ds(row, count)]
        return self._remote_copy(source, target, self.refs.blocks_arrived.at[slot], j)

    def unload(self, j: Array, r: Array | int, row: Array | int, count: int) -> Any:
        """The copy of rows that arrived from device j to their place in the result."""
        source = self.refs.landing.at[self._slot(r), j, pl.ds(row, count)]
        begin = self.refs.recv_begins[j] + r * self.tile.block_rows + row
        target = self.refs.out.at[pl.ds(begin, count)]
        return pltpu.make_async_copy(source, target, self.refs.unloaded)

    def for_each_copy(
        self, count: Array, r: Array | int, act: Callable[[Array | int, int], None]
    ) -> None:
        """Acts on the copies that round r makes of `count` rows: one of a whole block, or the last
        rows one by one, since the size of a copy is static."""
        left = count - r * self.tile.block_rows

        @pl.when(left >= self.tile.block_rows)
        def _():
            act(0, self.tile.block_rows)

        @pl.when(left < self.tile.block_rows)
        def _():
            @pl.loop(0, jnp.maximum(left, 0))
            def _(k):
                act(k, 1)

    def await_all_devices(self) -> None:
        """A barrier: before a peer is in the kernel, its landing buffer is memory of others."""
        barrier = pltpu.get_barrier_semaphore()
        self.for_each_peer(lambda j: pl.semaphore_signal(barrier, 1, device_id=self.device_id(j)))
        pl.semaphore_wait(barrier, math.prod(self.sizes))

    def read_headers(self) -> None:
        """Finds out how many rows each device sends, and where they belong in the result."""
        refs = self.refs

        def read(j, total):
            copy = pltpu.make_async_copy(refs.headers.at[j], refs.header_here, refs.header_read)
            copy.start()
            copy.wait()
            refs.recv_counts[j], refs.recv_begins[j] = refs.header_here[0, 0], total
            return total + refs.recv_counts[j]

        lax.fori_loop(0, math.prod(self.sizes), read, jnp.int32(0))

    def send(self, r: Array | int) -> None:
        """Starts the copies of round r to all peers."""
        self._for_each_block(self.refs.send_counts, r, self.block_to, "start")

    def send_flags(self, r: Array) -> None:
        """Signals the peers that send a block in round r and get none."""

        def act(j):
            done = r * self.tile.block_rows >= self.refs.send_counts[j]

            @pl.when(done & (r < self.num_rounds(j)))
            def _():
                flag = self.refs.flags_arrived.at[lax.rem(r, 2)]
                pl.semaphore_signal(flag, 1, device_id=self.device_id(j))

        self.for_each_peer(act)

    def receive(self, r: Array | int) -> None:
        """Waits for all messages of round r, unloads them, and waits until this device's own are
        sent."""
        refs = self.refs

        def await_message(j):
            self.for_each_copy(
                refs.recv_counts[j], r, lambda *rows: self.block_from(j, r, *rows).wait_recv()
            )
            done = (r > 0) & (r * self.tile.block_rows >= refs.recv_counts[j])

            @pl.when(done & (r < self.num_rounds(j)))
            def _():
                pl.semaphore_wait(refs.flags_arrived.at[lax.rem(r, 2)], 1)

        self.for_each_peer(await_message)  # all of them: a semaphore does not tell whose came first
        self._for_each_block(refs.recv_counts, r, self.unload, "start")
        self._for_each_block(refs.recv_counts, r, self.unload, "wait")
        self._for_each_block(refs.send_counts, r, self.block_to, "wait_send")

    def _for_each_block(
        self, counts: Any, r: Array | int, copy: Callable[..., Any], act: str
    ) -> None:
        """Starts or awaits the copies of round r, for as many rows of each peer."""
        self.for_each_peer(
            lambda j: self.for_each_copy(
                counts[j], r, lambda *rows: getattr(copy(j, r, *rows), act)()
            )
        )

    def _slot(self, r: Array | int) -> Array:
        """The landing block of round r."""
        return lax.rem(r, self.tile.num_blocks)

    def _remote_copy(self, source: Any, target: Any, arrived: Any, j: Array) -> Any:
        return pltpu.make_async_remote_copy(
            source, target, self.refs.sent, arrived, device_id=self.device_id(j)
        )


def _kernel(*refs: Any, axes: tuple[str, ...], tile: Tile) -> None:
    """Sends counts and a first block to every peer, then exchanges the other blocks by rounds."""
    sizes, me = [lax.axis_size(axis) for axis in axes], jnp.int32(0)
    for axis, size in zip(axes, sizes, strict=True):
        me = me * size + lax.axis_index(axis)
    *rest, semaphores = refs
    exchange = _Exchange(axes, sizes, tile, me, _Refs(*rest, *(semaphores.at[i] for i in range(4))))

    exchange.await_all_devices()
    exchange.for_each_peer(lambda j: exchange.header_to(j).start())
    exchange.send(0)
    exchange.for_each_peer(lambda j: exchange.header_to(j).wait_recv())
    exchange.read_headers()
    exchange.for_each_peer(lambda j: exchange.header_to(j).wait_send())
    exchange.receive(0)

    def most(j, r):
        return jnp.maximum(r, exchange.num_rounds(j))

    @pl.loop(1, lax.fori_loop(0, math.prod(sizes), most, jnp.int32(1)))
    def _(r):
        exchange.send(r)
        exchange.send_flags(r)
        exchange.receive(r)
