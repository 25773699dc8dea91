"""The device side of the cache: one pool of pages, shared by all sequences."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas.target import Target
from sharding.tree import pytree


@pytree
class KVCache:
    """Pages of keys and values; donated to every step that writes them.

    A page's keys of one head are contiguous, which is what a kernel reads.
    """

    k: Array  # [L, P, K, Z, H]
    v: Array | None  # [L, P, K, Z, Hv]; None where values are lanes of k (latent attention)

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


def page_bytes(num_layers: int, page_size: int, kv_shape: tuple[int, int, int], dtype: Any) -> int:
    """Bytes of one page over all layers; `kv_shape` is KV heads and lanes of a key and a value."""
    heads, key, value = kv_shape
    return num_layers * page_size * heads * (key + value) * jnp.dtype(dtype).itemsize


def allocate(
    num_layers: int,
    num_pages: int,
    page_size: int,
    kv_shape: tuple[int, int, int],
    dtype: Any,
    device: Any,
) -> KVCache:
    """An empty pool on `device`."""
    heads, key, value = kv_shape

    def zeros(lanes: int) -> Array:
        return jnp.zeros((num_layers, num_pages, heads, page_size, lanes), dtype, device=device)

    return KVCache(zeros(key), zeros(value) if value else None)


def copy_pages(kv: KVCache, source: Array, target: Array) -> KVCache:
    """Copies pages source[i] to target[i] in every layer; targets past the pool are dropped."""
    return jax.tree.map(
        lambda pages: pages.at[:, target].set(pages.at[:, source].get(mode="clip"), mode="drop"), kv
    )
