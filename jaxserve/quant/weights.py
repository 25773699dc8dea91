"""W8A8: large products in eight bits, everything small and sensitive as it was.

The first of the five measures of CloudMatrix-Infer's scheme (mixed precision) and the form of its
kernels: activations with a scale for each token, made as they come; weights with a scale for each
output, made here; exact integer sums in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxserve.checkpoint.hf import aligned_empty
from jaxserve.models.family import Family
from jaxserve.quant.rows import quantize_rows
from kernels_pallas.weight import Int8Weight
from sharding.tree import Weight, is_weight, unstack

KEPT = ("embed_tokens", "gate.weight", "router", "kv_b_proj", "eh_proj")
"""Parts of names that stay as they are: tables, which are looked up; routers, whose near ties say
which expert works; matrices that latent attention absorbs into its queries."""

_CHUNK = 1 << 20  # elements that are float32 at a time


def is_large(w: Weight) -> bool:
    """Whether a leaf is one of those that may be held in eight bits."""
    return w.is_matrix and not any(part in w.name for part in KEPT)


def is_head(w: Weight) -> bool:
    """Whether a leaf is an output head of its own."""
    return is_large(w) and w.axes[0] == "vocab"


def round_to_int8(array: np.ndarray, out: Int8Weight | None = None) -> Int8Weight:
    """The nearest eight-bit weight with a scale for each output: the largest becomes 127.

    Args:
        array: [..., *out, K], floats.
        out: where the result goes, contiguous numpy arrays; by default new ones, which the CPU
            backend takes over.
    """
    if out is None:
        out = Int8Weight(
            aligned_empty(array.shape, np.dtype(np.int8)),
            aligned_empty(array.shape[:-1], np.dtype(np.float32)),
        )
    rows, (values, scale) = _rows(array), (_rows(out.values), out.scale.reshape(-1))
    step = max(1, _CHUNK // max(1, rows.shape[1]))
    for i in range(0, len(rows), step):  # a part at a time: floats need four times the room
        part = slice(i, i + step)
        values[part], scale[part] = quantize_rows(rows[part])
    return out


def _rows(array: np.ndarray) -> np.ndarray:  # [..., K] -> [N, K], the same memory
    return array.reshape(-1, array.shape[-1])


def weight_bytes(
    family: Family,
    cfg: Any,
    dtype: Any,
    quantization: str | None,
    sizes: Mapping[str, int] | None = None,
    in_int8: Callable[[Weight], bool] = is_large,
) -> int:
    """Bytes of a family's weights, or of one device's share, where axes have other `sizes`.

    Args:
        in_int8: which leaves of a layer are held in eight bits, if any are.
    """
    sizes = sizes or cfg.sizes
    declared, total = unstack(family.declare_params(cfg)), 0
    for w in jax.tree.leaves(declared, is_leaf=is_weight):
        shape = w.shape(sizes)
        size = int(np.prod(shape))
        if quantization and in_int8(w):
            total += size + 4 * int(np.prod(shape[:-1]))
        else:
            total += size * np.dtype(w.dtype or dtype).itemsize
    if quantization and declared.lm_head is None:
        rows, lanes = declared.embed.shape(sizes)
        total += rows * (lanes + 4)  # an eight-bit copy for the head
    return total
