"""How Hopper's page attention is tiled: from what is asked for to the sizes of its kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import jax.numpy as jnp
from jax import Array

from kernels_pallas.hopper import CORES, ROWS
from kernels_pallas.op import UnsupportedError, tried
from kernels_pallas.paged_attention.codec import (
    Int4Pages,
    Int8Pages,
    QuantizedPages,
    check_alike,
    whole_parts,
)
from kernels_pallas.paged_attention.mosaic_gpu_items import most_items
from kernels_pallas.paged_attention.mosaic_gpu_shape import Shape
from kernels_pallas.paged_attention.ragged import Ragged
from kernels_pallas.softmax import LOG2E

_SHARED_BYTES = 227 * 1024  # of shared memory that a block of threads may take
_VALUE_LANES = 256  # whose outputs a warpgroup's registers hold
_LONG = 2048  # keys that a sequence may have: of fewer, too many share a block with the last
_SCALES = 32  # 128 bytes, at whose multiples a copy to shared memory may begin


@dataclass(frozen=True)
class GpuTile:
    """Sizes that may be tuned; 0 leaves a choice.

    Attributes:
        keys: attended at a time.
        stages: blocks of keys that are in shared memory or on their way; of quantized pages, those
            that are on their way.
        tiles: of 64 rows that share a block's keys.
        turns: warpgroups that attend for the same rows, each to every other block of keys.
        ping_pong: 1 or 0, whether two tiles of rows alternate at the tensor cores.
        splits: of a sequence's keys.
    """

    keys: int = tried(0, 64, 128)
    stages: int = tried(0, 2, 4)
    tiles: int = 0
    turns: int = tried(0, 1)
    ping_pong: int = 1
    splits: int = tried(0, 4, 8, 16)


@dataclass(frozen=True)
class _Problem:
    """What is asked for, as far as sizes depend on it.

    Attributes:
        tokens, sequences: of a step, at most.
        table_width: pages that a sequence may have.
        page_size: keys in a page.
        kv_heads: heads of keys.
        group_heads: query heads that share a KV head.
        key_lanes, value_lanes: that are copied.
        values_in_keys: whether values are lanes of keys.
        split_values: whether two warpgroups share them.
        quantized: whether pages are int8 or int4.
        mass: whether masses of pages are asked for.
        groups: whether sequences of the step may form groups.
    """

    tokens: int
    sequences: int
    table_width: int
    page_size: int
    kv_heads: int
    group_heads: int
    key_lanes: int
    value_lanes: int
    values_in_keys: bool
    split_values: bool
    quantized: bool
    mass: bool
    groups: bool

    @property
    def max_keys(self) -> int:
        """Keys that a sequence may have."""
        return self.table_width * self.page_size

    @property
    def prompts(self) -> bool:
        """Whether a sequence has many tokens in the step, on average."""
        return self.tokens > 4 * self.sequences

    @property
    def pairs_tiles(self) -> bool:
        """Whether prompts fill two tiles of rows, which then share what is copied, if registers and
        shared memory have room for both."""
        return self.prompts and not self.values_in_keys

    @property
    def narrow(self) -> bool:
        """Whether registers and shared memory have room for a second tile of rows, or for larger
        blocks of keys."""
        return self.key_lanes + self.value_lanes <= 256


def shape_of(
    tile: GpuTile, q: Array, k_pages: Any, v_pages: Any, batch: Ragged, *, value_dim: int,
    mass: bool, scale: float, soft_cap: float,
) -> Shape:  # fmt: skip
    """The kernel's sizes for `mosaic_gpu.page_attention`.

    Raises:
        UnsupportedError: scale <= 0 or soft_cap < 0; keys and values in pages of two kinds, or of
            another type than bfloat16, int8 or int4; lanes of keys, of values or of their parts
            that are no multiples of 64, or too many values for registers; pages whose size is no
            power of two from 8 (from 32 with scales in them); a tile of more than two warpgroups,
            or with too many stages for shared memory.
    """
    (T, N, H), K, Z = q.shape, k_pages.shape[2], k_pages.shape[3]
    check_alike(*([k_pages] if v_pages is None else [k_pages, v_pages]))
    if scale <= 0 or soft_cap < 0:
        raise UnsupportedError(
            f"{scale=}, {soft_cap=}: the largest product must have the largest logit"
        )
    key_lanes, value_lanes, split_values = _lanes(H, value_dim, k_pages, v_pages)
    key_parts, value_parts = _parts(key_lanes, value_lanes, k_pages, v_pages)
    problem = _Problem(
        tokens=T, sequences=batch.tables.shape[0], table_width=batch.tables.shape[1], page_size=Z,
        kv_heads=K, group_heads=N // K, key_lanes=key_lanes, value_lanes=value_lanes,
        values_in_keys=v_pages is None, split_values=split_values,
        quantized=isinstance(k_pages, QuantizedPages), mass=mass,
        groups=batch.groups is not None,
    )  # fmt: skip
    tiles_per_kv_head = _tiles_per_kv_head(problem.group_heads)
    heads_per_tile = problem.group_heads // tiles_per_kv_head
    tokens_per_tile = ROWS // heads_per_tile
    keys = _keys_per_block(tile, problem)
    tiles, turns = _warpgroups(tile, problem, keys)
    splits, group_splits = _all_splits(
        tile, problem, keys, tokens_per_item=tiles * tokens_per_tile, heads=K * tiles_per_kv_head
    )
    keys_per_copy = min(Z, keys)
    shape = Shape(
        heads_per_tile=heads_per_tile, tiles_per_kv_head=tiles_per_kv_head,
        tokens_per_tile=tokens_per_tile, tiles=tiles, turns=turns,
        ping_pong=bool(tile.ping_pong) and tiles > 1 and not problem.quantized,
        splits=splits, group_splits=group_splits,
        keys_per_copy=keys_per_copy, copies_per_page=Z // keys_per_copy,
        copies_per_block=keys // keys_per_copy, table_width=problem.table_width,
        quantized=problem.quantized, int4=isinstance(k_pages, Int4Pages),
        key_lanes=key_lanes, value_lanes=value_lanes, values_in_keys=problem.values_in_keys,
        split_values=split_values, key_parts=key_parts, value_parts=value_parts,
        stored_scales_per_row=tuple(
            len(x.parts) for x in (k_pages, v_pages) if isinstance(x, Int8Pages | Int4Pages)
        ),
        logit_scale=scale / soft_cap if soft_cap else scale * LOG2E,
        soft_cap=soft_cap * LOG2E if soft_cap else 0.0,
        mass=mass,
    )  # fmt: skip
    try:
        return _with_stages(shape, tile.stages)
    except UnsupportedError:
        if tile.turns or turns == 1:
            raise
        # two warpgroups want two slots; one that takes all blocks is content with one
        return _with_stages(replace(shape, turns=1), tile.stages)


def _lanes(H: int, value_dim: int, k_pages: Any, v_pages: Any) -> tuple[int, int, bool]:
    """Lanes of keys and of values that are copied, and whether two warpgroups share the values.

    Raises:
        UnsupportedError: pages have fewer lanes, or registers hold fewer values.
    """
    W, in_keys = k_pages.shape[-1], v_pages is None
    keys = whole_parts(k_pages, H)
    values = whole_parts(k_pages if in_keys else v_pages, value_dim)
    keys, values = -(-keys // 64) * 64, -(-values // 64) * 64
    split = in_keys and values > _VALUE_LANES
    if split:
        values = -(-values // 128) * 128  # two halves
        keys = max(keys, values)
    stored = W if in_keys else min(W, v_pages.shape[-1])
    most = 2 * _VALUE_LANES if in_keys else _VALUE_LANES
    if keys > W or values > stored or values > most:
        raise UnsupportedError(
            f"keys of {H} and values of {value_dim} lanes in pages of {W}: "
            f"whole 64s, and values up to {most}"
        )
    return keys, values, split


def _parts(
    key_lanes: int, value_lanes: int, k_pages: Any, v_pages: Any
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lanes of the parts of keys and of values with scales of their own, as far as they are copied;
    none of pages without such scales.

    Raises:
        UnsupportedError: another type of pages than bfloat16, int8 or int4; parts that are no
            multiples of 64 lanes; pages whose scales are no multiple of 32.
    """
    stacks = (k_pages, k_pages if v_pages is None else v_pages)
    if not isinstance(k_pages, QuantizedPages) and k_pages.dtype != jnp.bfloat16:
        raise UnsupportedError(f"pages of {k_pages.dtype}: keep them in bfloat16, int8 or int4")
    if not isinstance(k_pages, Int8Pages | Int4Pages):
        return (), ()

    def copied(pages: Any, lanes: int) -> tuple[int, ...]:
        begins = [0, *accumulate(pages.parts)]
        pairs = zip(pages.parts, begins, strict=False)
        return tuple(min(n, lanes - begin) for n, begin in pairs if begin < lanes)

    of_keys, of_values = copied(stacks[0], key_lanes), copied(stacks[1], value_lanes)
    if any(n % 64 for n in (*of_keys, *of_values)):
        raise UnsupportedError(
            f"{stacks[0].parts=} of keys, {stacks[1].parts=} of values: whole 64s, as tiles are"
        )
    Z = k_pages.shape[3]
    if Z % _SCALES:
        kind = "int4" if isinstance(k_pages, Int4Pages) else "int8"
        raise UnsupportedError(
            f"{Z=} scales of a page of {kind}: whole {_SCALES}s, which a copy fills"
        )
    return of_keys, of_values


def _tiles_per_kv_head(heads: int) -> int:
    """The fewest equal parts of the query heads of a KV head that each fit into a tile's rows."""
    return next(n for n in range(1, heads + 1) if heads % n == 0 and heads // n <= ROWS)


def _keys_per_block(tile: GpuTile, problem: _Problem) -> int:
    """Keys that are attended at a time: 128 where there is room for them and they are worth it.

    Raises:
        UnsupportedError: they are neither whole pages nor equal parts of one.
    """
    # A larger block shares among more keys what it costs beside them. That pays for prompts over
    # bfloat16 pages, and over quantized ones for decode steps, if sequences are long.
    worth = problem.pairs_tiles
    if problem.quantized:
        worth = not worth and problem.max_keys >= _LONG
    room = problem.narrow and not (problem.values_in_keys or problem.mass)
    keys, Z = tile.keys or (128 if room and worth else 64), problem.page_size
    if Z % 8 or max(Z, keys) % min(Z, keys) or keys % 64 or keys > 256:
        raise UnsupportedError(f"{Z=} keys in a page: a power of two, from 8; and {keys=}: 64s")
    return keys


def _warpgroups(tile: GpuTile, problem: _Problem, keys: int) -> tuple[int, int]:
    """Tiles of rows in a block of threads, and consumer warpgroups that take turns for each.

    Raises:
        UnsupportedError: the two make more than two consumers, or than one where two warpgroups
            share the values of a tile.
    """
    tiles = tile.tiles or (2 if problem.pairs_tiles and problem.narrow else 1)
    # a decode step has few rows: a second warpgroup has registers for outputs of its own, unless
    # they are taken, and is worth it where a sequence may have four blocks
    registers_taken = (
        problem.split_values or tiles > 1 or (problem.quantized and problem.value_lanes > 128)
    )
    turns = tile.turns or (1 if registers_taken or 4 * keys > problem.max_keys else 2)
    if tiles * turns > (1 if problem.split_values else 2):
        most = "two warpgroups in all"
        if problem.split_values:
            most = "one, whose values two warpgroups share"
        raise UnsupportedError(f"{tiles=} of rows, {turns=} in which they take keys: {most}")
    return tiles, turns


def _all_splits(
    tile: GpuTile, problem: _Problem, keys: int, *, tokens_per_item: int, heads: int
) -> tuple[int, int]:
    """Splits of a sequence's keys, and of the keys that a group shares; 0 of these where groups are
    ignored: their tokens would share no tile of rows, or little of one.

    Args:
        keys: of a block.
        tokens_per_item: tokens in a block of threads.
        heads: tiles of heads, each of which is a block of threads.
    """
    blocks = most_items(problem.tokens, problem.sequences, tokens_per_item) * heads
    steps = problem.max_keys // keys
    splits = tile.splits or _splits(blocks, steps, prompts=problem.prompts)
    if not problem.groups or problem.prompts or tokens_per_item == 1 or problem.mass:
        return splits, 0
    return splits, _group_splits(-(-problem.tokens // tokens_per_item) * heads * splits)


def _splits(blocks: int, steps: int, prompts: bool) -> int:
    """Splits of a sequence's keys: the fewest with which cores are about as busy as they can be.

    Args:
        blocks: blocks of threads if keys were not split; one fills a core.
        steps: blocks of keys of the longest sequence. A split is of at least four, or merging takes
            longer.
        prompts: whether rows are many; each of their outputs would be written once for each split.
    """
    most = max(1, min(16, steps // 4, CORES // blocks if prompts else steps))
    times = [-(-blocks * n // CORES) / n for n in range(1, most + 1)]
    return next(n for n, time in enumerate(times, 1) if time <= 1.1 * min(times))


def _group_splits(blocks: int) -> int:
    """Splits of the keys that a group shares, if one group of all tokens were so many blocks of
    threads. Merging reads all splits in any step, so there are at most 8."""
    return max(1, min(8, CORES // blocks))


def _with_stages(shape: Shape, wanted: int) -> Shape:
    """The shape with rings as deep as shared memory allows, or as `wanted`.

    Both depths are multiples of `Shape.turns`, so a slot always serves the same warpgroup.
    Otherwise the second one would see the parity of a finished phase and read a stale block.

    Raises:
        UnsupportedError: shared memory is too small.
    """
    fixed = _fixed_bytes(shape)
    block, raw = _block_bytes(shape)
    room = _SHARED_BYTES - fixed
    if shape.quantized:
        stages = 2 if shape.turns > 1 or room >= 2 * (block + raw) else 1
        raw_stages = wanted or max(1, min(6, (room - stages * block) // raw))
        raw_stages = max(2, raw_stages // 2 * 2) if shape.turns > 1 else raw_stages
        bits = "four" if shape.int4 else "eight"
        used, rings = (
            stages * block + raw_stages * raw,
            f"{stages} + {raw_stages} in {bits} bits of",
        )
    else:
        stages, raw_stages = wanted or max(2, min(6, room // block)), 0
        stages = max(1, stages // shape.turns) * shape.turns
        used, rings = stages * block, f"{stages}"
    if used > room:
        raise UnsupportedError(
            f"{rings} blocks of {shape.keys_per_block} keys of {shape.key_lanes} and values of "
            f"{shape.value_lanes} lanes need {fixed + used} bytes of shared memory, and "
            f"{_SHARED_BYTES} are there"
        )
    return replace(shape, stages=stages, raw_stages=raw_stages)


def _fixed_bytes(shape: Shape) -> int:
    """Bytes of shared memory beside the rings: the queries; for each of their rows weights and a
    rescaling factor, or outputs, lse and what warpgroups that take turns exchange; barriers, and
    room between arrays."""
    if shape.split_values:
        row, barriers = 2 * shape.weights_per_key * shape.keys_per_block + 4, 2048
    else:
        row, barriers = 128 + 4 + 8 * shape.turns, 3072
    return shape.tiles * ROWS * (2 * shape.key_lanes + row) + barriers


def _block_bytes(shape: Shape) -> tuple[int, int]:
    """Bytes of a block in bfloat16, and of one as quantized pages hold it, both with scales."""
    lanes = sum(shape.cache_lanes)
    scales = 4 * (shape.int4_scale_rows if shape.int4 else sum(shape.scales_per_row))
    block = shape.keys_per_block * (2 * lanes + scales)
    if shape.int4:
        return block, shape.keys_per_block * lanes // 2 + 4 * math.prod(shape.raw_scales)
    return block, shape.keys_per_block * (lanes + scales)
