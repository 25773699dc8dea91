"""Which stacks of pages the TPU kernels take."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from kernels_pallas.op import UnsupportedError
from kernels_pallas.paged_attention.codec import (
    Int4Pages,
    Int8Pages,
    QuantizedPages,
    check_alike,
    whole_scales,
)
from kernels_pallas.tpu import LANES

_TABLE = 2**17  # entries: half of a v5e's SMEM


def parts_of(stacks: list[Any]) -> list[tuple[int, ...]]:
    """Of each cache, the lanes of the parts of its rows that have scales of their own; () where
    rows have none."""
    return [pages.parts if isinstance(pages, Int8Pages | Int4Pages) else () for pages in stacks]


def check(stacks: list[Any], table: tuple[int, ...]) -> None:
    """Refuses pages that no TPU kernel takes.

    Args:
        stacks: pages [L, P, K, Z, W] of keys and of values, or of both in one.
        table: the shape of the block table [R, M].

    Raises:
        UnsupportedError: keys and values are of different kinds; pages that are not quantized are
            neither bfloat16 nor float32; W or a part is not a multiple of 128 lanes; Z is not a
            multiple of a register's rows (of 128, where pages hold scales); the block table has
            more than 2**17 entries; rows of scales are not padded (`codec.whole_scales`).
    """
    check_alike(*stacks)
    first, parts = stacks[0], parts_of(stacks)
    if not isinstance(first, QuantizedPages) and first.dtype not in (jnp.bfloat16, jnp.float32):
        raise UnsupportedError(f"pages of {first.dtype}: keep them in bfloat16 or float32")
    if any(n % LANES for each in parts for n in each):
        raise UnsupportedError(f"{parts=} of rows must be multiples of {LANES} lanes")
    lanes = [pages.shape[-1] for pages in stacks]
    if any(n % LANES for n in lanes):  # XLA lays these out by another axis: they would be copied
        raise UnsupportedError(f"pages of {lanes} lanes: pad them to multiples of {LANES}")
    Z, whole = first.shape[3], LANES if parts[0] else 32 // first.dtype.itemsize
    if Z % whole:
        raise UnsupportedError(
            f"{Z=} keys in a page of {first.dtype} must be a multiple of {whole}"
        )
    if math.prod(table) > _TABLE:
        raise UnsupportedError(
            f"a block table {table} has more than {_TABLE} entries: take larger pages"
        )
    rows = [pages.scale.shape[2] for pages, each in zip(stacks, parts, strict=True) if each]
    if any(n != whole_scales(n) for n in rows):  # they would be copied
        raise UnsupportedError(f"{rows} rows of scales: pad them to 1, 2, 4 or eights")
