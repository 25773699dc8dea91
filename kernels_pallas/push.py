"""Rows pushed straight into the memory of the devices they are meant for; TPU.

Nothing is asked before a row is sent (CloudMatrix-Infer's FusedDispatch, §3): every peer has a
static landing place for every other, of two blocks, and unloads it into one contiguous result.
Counts travel beside the first block; that a block is complete is told by its DMA semaphore.

Two blocks are what it takes. In a round every pair exchanges a message each way: a block, or a flag
from who has none left. Who has a peer's message of round r knows that round r - 1 was unloaded
there, and so that its block of round r + 1 falls on nothing unread. With one block, a fast device
would write over what a slow one has not read. Nobody is more than a round ahead, so two semaphores
serve all peers: a TPU has memory for 512, and EP320 has 320 peers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.op import UnsupportedError

_LANES = 128


@dataclass(frozen=True)
class Tile:
    """Static memory for landing rows: `num_blocks` of `block_rows` from each peer."""

    block_rows: int = 8
    num_blocks: int = 2  # fewer is a race, which a test shows


def push(
    rows: Array,  # [M, W], those for device 0 first, and so on
    counts: Array,  # [n, K] int32, rows for each device in K parts
    num_out: int,
    *,
    axes: tuple[str, ...],
    tile: Tile | None = None,
    interpret: Any = False,
    collective_id: int = 0,
) -> tuple[Array, Array]:
    """Rows for this device [num_out, W], those of device 0 first, and how many each sent [n, K].

    Runs inside `jax.shard_map`, on every device of the axes, which count as one. What lies past the
    last row is undefined.

    Args:
        num_out: no less than what may arrive, or memory beyond is written to.
        collective_id: of the barrier; programs that may run at once need different ones.

    Raises:
        UnsupportedError: a row is no multiple of 128 entries.
    """
    M, W = rows.shape
    n, K = counts.shape
    if W % _LANES:
        raise UnsupportedError(f"push: rows of {W} entries, which must be a multiple of {_LANES}")
    tile, sent = tile or Tile(), counts.sum(1)
    tile = replace(tile, block_rows=min(tile.block_rows, M, num_out))
    header = jnp.concatenate([sent[:, None], counts], 1)
    lines = -(-(K + 1) // _LANES)
    header = jnp.pad(header, ((0, 0), (0, lines * _LANES - K - 1))).reshape(n, lines, _LANES)
    row, landing = (W // _LANES, _LANES), (tile.num_blocks, n, tile.block_rows)
    anywhere, scalars = pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pltpu.SMEM)
    dma = pltpu.SemaphoreType.DMA
    arrived, theirs, _ = pl.pallas_call(
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
            pltpu.SMEM((lines, _LANES), jnp.int32),
            dma((tile.num_blocks,)),
            pltpu.SemaphoreType.REGULAR((2,)),
            dma((4,)),
        ],
        compiler_params=pltpu.CompilerParams(collective_id=collective_id, has_side_effects=True),
        interpret=interpret,
        name="push",
    )(sent, jnp.cumsum(sent) - sent, header, rows.reshape(M, *row))
    return arrived.reshape(num_out, W), theirs.reshape(n, -1)[:, 1 : 1 + K]


def _kernel(
    sent, first, header, rows,  # [n], [n], [n, lines, 128], [M, S, 128]
    arrived, theirs, landing,  # [num_out, S, 128], [n, lines, 128], [blocks, n, rows, S, 128]
    due, place, line,  # [n], [n], [lines, 128]
    blocks_here, flags_here, others,  # semaphores: [blocks], [2], [4]
    *, axes: tuple[str, ...], tile: Tile,
):  # fmt: skip
    sizes = [lax.axis_size(axis) for axis in axes]
    n, B = math.prod(sizes), tile.block_rows
    me = jnp.int32(0)
    for axis, size in zip(axes, sizes, strict=True):
        me = me * size + lax.axis_index(axis)
    counts_here, sending, unloading, reading = (others.at[i] for i in range(4))

    def device(j: Array) -> Any:
        strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
        parts = zip(axes, strides, sizes, strict=True)
        return {axis: lax.rem(lax.div(j, jnp.int32(s)), jnp.int32(m)) for axis, s, m in parts}

    def peers(act: Callable[[Any], None]) -> None:
        """Everybody in turn, beginning behind oneself, so that not all write to one at once."""

        @pl.loop(1, n + 1)
        def _(k):
            act(lax.rem(me + k, jnp.int32(n)))

    def remote(source, target, arrival, j):
        return pltpu.make_async_remote_copy(source, target, sending, arrival, device_id=device(j))

    def pieces(count: Array, r: Array | int, act: Callable[[Array | int, int], None]) -> None:
        """What round r moves of `count` rows: a block at once, or the last rows one by one."""
        left = count - r * B

        @pl.when(left >= B)
        def _():
            act(0, B)

        @pl.when(left < B)
        def _():
            @pl.loop(0, jnp.maximum(left, 0))
            def _(k):
                act(k, 1)

    def rounds(j: Array) -> Array:
        return lax.div(jnp.maximum(sent[j], due[j]) + (B - 1), jnp.int32(B))

    def counts_to(j):
        return remote(header.at[j], theirs.at[me], counts_here, j)

    def block_to(j, r, at, size):
        source = rows.at[pl.ds(first[j] + r * B + at, size)]
        slot = lax.rem(r, tile.num_blocks)
        target = landing.at[slot, me, pl.ds(at, size)]
        return remote(source, target, blocks_here.at[slot], j)

    def block_from(j, r, at, size):
        slot = lax.rem(r, tile.num_blocks)
        source, target = rows.at[pl.ds(0, size)], landing.at[slot, j, pl.ds(at, size)]
        return remote(source, target, blocks_here.at[slot], j)  # only the size is looked at

    def unloaded(j, r, at, size):
        source = landing.at[lax.rem(r, tile.num_blocks), j, pl.ds(at, size)]
        target = arrived.at[pl.ds(place[j] + r * B + at, size)]
        return pltpu.make_async_copy(source, target, unloading)

    def send(r: Array | int) -> None:
        peers(lambda j: pieces(sent[j], r, lambda *piece: block_to(j, r, *piece).start()))

    def tell(r: Array) -> None:
        """A flag to those who have blocks for us, and get none."""

        def act(j):
            @pl.when((r * B >= sent[j]) & (r < rounds(j)))
            def _():
                pl.semaphore_signal(flags_here.at[lax.rem(r, 2)], 1, device_id=device(j))

        peers(act)

    def receive(r: Array | int) -> None:
        def await_message(j):
            pieces(due[j], r, lambda *piece: block_from(j, r, *piece).wait_recv())

            @pl.when((r > 0) & (r * B >= due[j]) & (r < rounds(j)))
            def _():
                pl.semaphore_wait(flags_here.at[lax.rem(r, 2)], 1)

        peers(await_message)  # all of them: what has come first is not said
        peers(lambda j: pieces(due[j], r, lambda *piece: unloaded(j, r, *piece).start()))
        peers(lambda j: pieces(due[j], r, lambda *piece: unloaded(j, r, *piece).wait()))
        peers(lambda j: pieces(sent[j], r, lambda *piece: block_to(j, r, *piece).wait_send()))

    barrier = pltpu.get_barrier_semaphore()  # until a peer is here, its landing is others' memory
    peers(lambda j: pl.semaphore_signal(barrier, 1, device_id=device(j)))
    pl.semaphore_wait(barrier, n)
    peers(lambda j: counts_to(j).start())
    send(0)
    peers(lambda j: counts_to(j).wait_recv())

    def read_counts(j, total):
        copy = pltpu.make_async_copy(theirs.at[j], line, reading)
        copy.start()
        copy.wait()
        due[j], place[j] = line[0, 0], total
        return total + due[j]

    lax.fori_loop(0, n, read_counts, jnp.int32(0))
    peers(lambda j: counts_to(j).wait_send())
    receive(0)
    last = lax.fori_loop(0, n, lambda j, r: jnp.maximum(r, rounds(j)), jnp.int32(1))

    @pl.loop(1, last)
    def _(r):
        send(r)
        tell(r)
        receive(r)
