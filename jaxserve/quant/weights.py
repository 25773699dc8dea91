"""W8A8: large products in eight bits, everything small and sensitive as it was.

The first of the five measures of CloudMatrix-Infer's scheme (mixed precision) and the form of its
kernels: activations with a scale for each token, made as they come; weights with a scale for each
output, made here; exact integer sums in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxserve.checkpoint.hf import aligned_empty
from jaxserve.checkpoint.quantized import EightBits
from jaxserve.models.family import Family
from kernels_pallas.weight import Int8Weight
from sharding.tree import Weight, is_weight

KEPT = ("embed_tokens", "gate.weight", "router", "kv_b_proj", "eh_proj")
"""Parts of names that stay as they are: tables, which are looked up; routers, whose near ties say
which expert works; matrices that latent attention absorbs into its queries."""


def is_quantized(w: Weight) -> bool:
    """Whether a leaf is held in eight bits."""
    return w.is_matrix and not any(part in w.name for part in KEPT)


def quantize(w: Weight, leaf: np.ndarray | EightBits) -> Int8Weight | np.ndarray:
    """The leaf as it is served: `Int8Weight` of numpy arrays, or itself if it is to be kept."""
    if isinstance(leaf, EightBits):
        stored = Int8Weight(*leaf)
        return stored if is_quantized(w) else np.asarray(stored.dequantized())
    return round_to_int8(leaf) if is_quantized(w) else leaf


def round_to_int8(array: np.ndarray) -> Int8Weight:
    """The nearest eight-bit weight with a scale for each output: the largest becomes 127.

    Args:
        array: [..., *out, K].
    """
    values = aligned_empty(array.shape, np.dtype(np.int8))
    scale = aligned_empty(array.shape[:-1], np.dtype(np.float32))
    for i in range(len(array)):  # a part at a time: floats need four times the room
        part = array[i].astype(np.float32)
        top = np.abs(part).max(-1, keepdims=True)
        steps = np.divide(127.0, top, out=np.zeros_like(top), where=top > 0)
        values[i], scale[i] = np.rint(part * steps), top[..., 0] / 127.0
    return Int8Weight(values, scale)


def weight_bytes(
    family: Family,
    cfg: Any,
    dtype: Any,
    quantization: str | None,
    sizes: Mapping[str, int] | None = None,
) -> int:
    """Memory of a family's weights, or of one device's share, where axes have other `sizes`."""
    sizes = sizes or cfg.sizes
    declared, total = family.declare_params(cfg), 0
    for w in jax.tree.leaves(declared, is_leaf=is_weight):
        shape = w.shape(sizes)
        size = int(np.prod(shape))
        if quantization and is_quantized(w):
            total += size + 4 * int(np.prod(shape[:-1]))
        else:
            total += size * np.dtype(w.dtype or dtype).itemsize
    if quantization and declared.lm_head is None:
        rows, lanes = declared.embed.shape(sizes)
        total += rows * (lanes + 4)  # an eight-bit copy for the head
    return total
