"""The device side of the cache: one pool of pages, shared by all sequences.

Pages are arrays of floats, or of eight or four bits with scales beside them, which the operations
alone look into (kernels_pallas/paged_attention/codec.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kernels_pallas.paged_attention.codec import Pages, StaticInt8Pages, empty
from kernels_pallas.target import Target
from sharding.mesh import put
from sharding.tree import pytree


@pytree
class KVCache:
    """What steps write and the next ones find, layer by layer; donated to every one of them.

    A page's keys of one head are contiguous, which is what a kernel reads.

    Attributes:
        load: how often each expert was asked for, where experts are spread over devices.
        routes: of the step's tokens, the experts of each layer as bits (expert e at bit e mod 32),
            where somebody wants to know.
    """

    k: Pages  # [L, P, K, Z, H]
    v: Pages | None  # [L, P, K, Z, Hv]; None where values are lanes of k (latent attention)
    load: Array | None = None  # [1, L, E] int32
    routes: Array | None = None  # [L, T] uint32, for the largest T

    @property
    def page_size(self) -> int:
        return self.k.shape[3]


def storage_dtype(dtype: Any, platform: str) -> Any:
    """The type in which pages keep `dtype`: on CPU, XLA of jax 0.10 copies bfloat16 buffers."""
    return jnp.uint16 if platform == "cpu" and dtype == jnp.bfloat16 else jnp.dtype(dtype)


def stored_shape(kv_shape: tuple[int, int, int], target: Target) -> tuple[int, int, int]:
    """KV heads, and lanes of a key and of a value, as pages have them on some hardware.

    A TPU lays arrays whose last axis is no multiple of 128 out otherwise, and a kernel would pay a
    copy of the whole cache; Hopper moves 64 lanes at a time. What is added is 0 and stays so.
    """
    heads, *lanes = kv_shape
    whole = {"tpu": 128, "gpu": 64}.get(target.platform, 1)
    key, value = (-(-n // whole) * whole for n in lanes)
    return heads, key, value


def page_bytes(
    num_layers: int,
    page_size: int,
    kv_shape: tuple[int, int, int],
    dtype: Any,
    key_parts: tuple[int, ...] | None = None,
    *,
    calibrated: bool = False,
    whole_scales: bool = False,
) -> int:
    """Bytes of one page over all layers, its own scales included; arguments are `allocate`'s."""

    def pool(num_pages: int) -> int:
        shape = num_layers, num_pages, page_size, kv_shape, dtype, None, key_parts
        made = partial(allocate, *shape, calibrated=calibrated, whole_scales=whole_scales)
        leaves = jax.tree.leaves(jax.eval_shape(made))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    return pool(2) - pool(1)


def allocate(
    num_layers: int,
    num_pages: int,
    page_size: int,
    kv_shape: tuple[int, int, int],
    dtype: Any,
    device: Any,
    key_parts: tuple[int, ...] | None = None,
    *,
    calibrated: bool = False,
    whole_scales: bool = False,
) -> KVCache:
    """An empty pool on `device`.

    Args:
        kv_shape: KV heads, and lanes of a key and of a value (0: values are lanes of keys).
        dtype: of the pages. int8 and int4 are rounded, with a scale for each token, head and part.
        key_parts: lanes of a key that are scaled apart, where they are of different kinds.
        calibrated: int8 pages have a scale for each layer, head and lane, which `with_scales` puts
            there.
        whole_scales: rows of scales of a page are padded as a TPU wants them.
    """
    heads, key, value = kv_shape

    def pages(lanes: int, parts: tuple[int, ...] | None) -> Pages:
        shape = num_layers, num_pages, heads, page_size, lanes
        if calibrated:
            return StaticInt8Pages(
                jnp.zeros(shape, dtype, device=device),
                jnp.zeros((num_layers, heads, lanes), device=device),
            )
        if parts:  # the last takes in the lanes that hardware adds
            parts = *parts[:-1], lanes - sum(parts[:-1])
        return empty(dtype, shape, parts=parts, whole=whole_scales, device=device)

    return KVCache(pages(key, key_parts), pages(value, None) if value else None)


def with_scales(kv: KVCache, scales: Sequence[np.ndarray]) -> KVCache:
    """The pool with calibrated scales [L, K, H] of keys, and of values unless they are their lanes.

    Lanes that hardware adds get the scale 0 and stay 0.
    """

    def scaled(pages: Any, scale: np.ndarray) -> Any:
        added = pages.scale.shape[-1] - scale.shape[-1]
        wide = np.pad(scale, ((0, 0), (0, 0), (0, added))).astype(np.float32)
        return replace(pages, scale=put(wide, pages.scale.sharding))

    return replace(
        kv, k=scaled(kv.k, scales[0]), v=None if kv.v is None else scaled(kv.v, scales[1])
    )


def copy_pages(kv: KVCache, source: Array, target: Array) -> KVCache:
    """Copies pages source[i] to target[i] in every layer; targets past the pool are dropped."""

    def copied(pages: Any) -> Any:
        if isinstance(pages, StaticInt8Pages):  # its scales belong to no page
            return replace(pages, values=copied(pages.values))
        return pages.at[:, target].set(pages.at[:, source].get(mode="clip"), mode="drop")

    pages = jax.tree.map(copied, (kv.k, kv.v), is_leaf=lambda x: isinstance(x, StaticInt8Pages))
    return replace(kv, k=pages[0], v=pages[1])
