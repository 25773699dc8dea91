"""The static sizes of Hopper's page attention, from which both of its kernels are traced.

Two keys of int4 pages share a byte, and registers cannot interleave rows. So a block of such keys
is kept in another order: first all keys whose number is a multiple of four, then those with the
remainder 1, and so on. Copies separate even from odd pairs of keys, and the low and high halves of
bytes do the rest. Attention does not depend on the order of keys, as long as scales and masks
follow it (`Shape.key_of_column`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from kernels_pallas.hopper import WARP_ROWS, registers
from kernels_pallas.paged_attention.codec import block_of

KEY_CLASSES = 4
"""Keys of int4 pages are sorted by their number modulo 4: a half of a byte, of an even or odd
pair."""

_PADDING = 8  # rows: if scales filled their array, Mosaic would take a transposed view for flat


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the kernels know while they are traced.

    Tiles of queries. A tile is the 64 rows of a warpgroup: some tokens, and for each of them the
    query heads that share a KV head, or a part of those.

    Attributes:
        heads_per_tile: query heads in a tile; a token has so many neighbouring rows.
        tiles_per_kv_head: tiles that the query heads of one KV head fill.
        tokens_per_tile: tokens in a tile.
        tiles: tiles in a block of threads, each for other tokens and all for the same keys.
        turns: consumer warpgroups that attend for the same tile, each to every other block of keys.
        ping_pong: whether the warpgroups of two tiles alternate at the tensor cores, one
            multiplying while the other computes its softmax.

    Splits of the keys, each of which is a block of threads of its own.

    Attributes:
        splits: of the keys of every item.
        group_splits: at most so many more of the keys that a group of sequences shares; 0 where
            groups are ignored.

    Pages, blocks of keys and the rings of shared memory that they pass through.

    Attributes:
        keys_per_copy: keys that one TMA copy brings: those of a page, or a part of them.
        copies_per_page: copies that a page takes.
        copies_per_block: copies that a block of keys takes.
        table_width: entries in a row of the block table.
        stages: blocks of bfloat16 in shared memory.
        raw_stages: blocks in shared memory of int8 or int4 as pages hold them; 0 where pages are
            bfloat16.
        quantized: whether pages are int8 or int4, so that blocks become bfloat16 in shared memory.
        int4: whether pages are `Int4Pages`.

    Lanes of keys and values, and their scales.

    Attributes:
        key_lanes: lanes of a key that are copied.
        value_lanes: lanes of a value that are copied.
        values_in_keys: whether values are the first lanes of keys, as latent attention has them.
        split_values: whether two warpgroups share the lanes of values (`mosaic_gpu_latent`).
        key_parts: lanes of each part of a key with a scale of its own, as far as they are copied.
        value_parts: the same of a value.
        stored_scales_per_row: scales that a row of each cache has in its page, copied or not.

    Softmax.

    Attributes:
        logit_scale: what products of queries and keys are multiplied by: inside tanh where there
            is a cap, or else to be logits of base 2.
        soft_cap: the cap of logits of base 2; 0 where there is none.
        mass: whether sums of exponentials are also written for each copy, as masses of pages.
    """

    heads_per_tile: int
    tiles_per_kv_head: int
    tokens_per_tile: int
    tiles: int
    turns: int
    ping_pong: bool

    splits: int
    group_splits: int

    keys_per_copy: int
    copies_per_page: int
    copies_per_block: int
    table_width: int
    stages: int = 0
    raw_stages: int = 0
    quantized: bool
    int4: bool

    key_lanes: int
    value_lanes: int
    values_in_keys: bool
    split_values: bool
    key_parts: tuple[int, ...]
    value_parts: tuple[int, ...]
    stored_scales_per_row: tuple[int, ...]

    logit_scale: float
    soft_cap: float
    mass: bool

    @property
    def keys_per_block(self) -> int:
        """Keys that are attended at a time."""
        return self.copies_per_block * self.keys_per_copy

    @property
    def tokens_per_item(self) -> int:
        """Tokens that a block of threads attends for."""
        return self.tiles * self.tokens_per_tile

    @property
    def consumers(self) -> int:
        """Warpgroups that compute."""
        return self.tiles * self.turns

    @property
    def producers(self) -> int:
        """Warpgroups that fill the ring. Where blocks are converted on their way, keys and values
        have one each; all others would wait for a single one."""
        return 2 if self.quantized and not self.values_in_keys else 1

    @property
    def registers(self) -> tuple[int, int]:
        """Of a producer's thread and of a consumer's; 0 for both of only two warpgroups, which have
        enough as it is. Masks take more where keys are sorted."""
        warpgroups = self.consumers + self.producers
        if warpgroups == 2:
            return 0, 0
        few = (40 if self.int4 else 48) if self.quantized else 24
        left = registers(warpgroups) - self.producers * few
        return few, min(248, left // self.consumers // 8 * 8)

    @property
    def exp2_scale(self) -> float:
        """What products of queries and keys, or tanh of them, are multiplied by to be logits of
        base 2."""
        return self.soft_cap or self.logit_scale

    @property
    def row_align(self) -> int:
        """Rows of queries and results at whose multiples items begin: as many as are stored or not,
        by a warp from registers where values are split, or by a copy from shared memory."""
        return WARP_ROWS if self.split_values else 8

    @property
    def cache_lanes(self) -> tuple[int, ...]:
        """Lanes that are copied of a row of each cache."""
        return (self.key_lanes,) if self.values_in_keys else (self.key_lanes, self.value_lanes)

    @property
    def scales_per_row(self) -> tuple[int, ...]:
        """Scales that are copied of a row of each cache; empty where rows have none."""
        parts = (self.key_parts,) if self.values_in_keys else (self.key_parts, self.value_parts)
        return tuple(len(each) for each in parts) if self.key_parts else ()

    @property
    def weights_per_key(self) -> int:
        """Weights that a row has for a key: one for each part of a value with a scale of its own,
        which the weight is multiplied by."""
        return max(1, len(self.value_parts))

    @property
    def int4_scale_rows(self) -> int:
        """Rows of scales of an int4 block, those of keys and values together: an even number, since
        128 threads sort them and a row may have 64."""
        return -(-sum(self.scales_per_row) // 2) * 2

    @property
    def raw_scales(self) -> tuple[int, int, int]:
        """The array [rows, keys / 4, 4] that scales of an int4 block arrive in, with padding."""
        keys = self.keys_per_block // KEY_CLASSES + _PADDING
        return self.int4_scale_rows, keys, KEY_CLASSES

    @property
    def out_dtype(self) -> Any:
        """The type of outputs. Splits of wide rows are written and read as often as many int4 keys,
        whose own rounding is ninety times that of bfloat16."""
        return jnp.bfloat16 if self.int4 and self.splits > 1 else jnp.float32

    @property
    def store_lanes(self) -> int:
        """Lanes of outputs that a copy to global memory takes at a time: 128 bytes of a row."""
        return 128 // jnp.dtype(self.out_dtype).itemsize

    def value_slices(self, first: int, end: int, widest: int) -> list[tuple[int, int, int]]:
        """Lanes of values from `first` to `end` as products take them, no more than `widest` at a
        time: (first lane, lanes, the part of values that they are of)."""
        ends = list(accumulate(self.value_parts)) or [self.value_lanes]
        return [
            (lane, min(widest, part_end - lane, end - lane), part)
            for part, (begin, part_end) in enumerate(zip([0, *ends], ends, strict=False))
            for lane in range(max(begin, first), min(part_end, end), widest)
        ]

    def hadamard_block(self, part: int) -> int:
        """Lanes of a part of int4 values that one Hadamard matrix rotates."""
        return block_of(self.value_parts[part])

    def key_of_column(self, column: Array) -> Array:
        """The key of a block that a column of its logits belongs to."""
        if not self.int4:
            return column
        size = jnp.full_like(column, self.keys_per_block // KEY_CLASSES)
        return KEY_CLASSES * lax.rem(column, size) + lax.div(column, size)

    def columns_of_copy(self, copy: int) -> list[tuple[int, int]]:
        """The columns of a block's logits that a copy brought keys for, as ranges (begin, end)."""
        classes = KEY_CLASSES if self.int4 else 1
        n = self.keys_per_copy // classes
        starts = range(copy * n, self.keys_per_block, self.keys_per_block // classes)
        return [(start, start + n) for start in starts]
