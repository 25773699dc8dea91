"""Shapes at which writing to pages is tested, compiled, timed and tuned."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas.op import Case, Cost
from kernels_pallas.paged_attention.cases import batch as step_of
from kernels_pallas.paged_attention.cases import pages_of, row_bytes


def _case(
    name: str, new: tuple[int, ...], lens: tuple[int, ...], *, K: int, H: int = 128, Z: int = 64,
    W: int = 128, dtype: Any = jnp.bfloat16, idle: int = 0, latent: bool = False,
    shipped: bool = False,
) -> Case:  # fmt: skip
    """A case over pages of floats; fields are those of `batch`.

    Args:
        K, H: KV heads, and lanes of new rows.
        Z, W: slots and lanes of a page.
        latent: whether values are lanes of keys.
    """
    L, T = 2, sum(new)
    step, P = step_of(new, lens, Z, idle)

    def make(key: Array) -> tuple[tuple[Any, ...], dict[str, Any]]:
        keys = jax.random.split(key, 4)
        k_pages, v_pages = (jax.random.normal(x, (L, P, K, Z, W), dtype) for x in keys[:2])
        k, v = (jax.random.normal(x, (T, K, H)) for x in keys[2:])
        k_pages, v_pages, k, v = (k_pages, None, k, None) if latent else (k_pages, v_pages, k, v)
        return (k_pages, v_pages, k, v, jnp.int32(1), jax.tree.map(jnp.asarray, step)), {}

    cost = Cost((1 if latent else 2) * T * K * (4 * H + W * jnp.dtype(dtype).itemsize))
    return Case(name, make, {}, shipped, cost, tolerance=0)


def _quantized(
    name: str, kind: str, new: tuple[int, ...], lens: tuple[int, ...], *, K: int, H: int = 128,
    Z: int = 128, W: int = 128, dtype: Any = jnp.bfloat16, idle: int = 0,
    latent: tuple[int, ...] | None = None, shipped: bool = False,
) -> Case:  # fmt: skip
    """A case over quantized pages, of a `kind` that `pages_of` names.

    Args:
        latent: lanes of each part of a key of which values are lanes.
    """
    T = sum(new)
    step, P = step_of(new, lens, Z, idle)

    def make(key: Array) -> tuple[tuple[Any, ...], dict[str, Any]]:
        keys = jax.random.split(key, 4)
        k_pages, v_pages = (pages_of(kind, x, (2, P, K, Z, W), latent) for x in keys[:2])
        k, v = (jax.random.normal(x, (T, K, H), dtype) for x in keys[2:])
        k_pages, v_pages, k, v = (k_pages, None, k, None) if latent else (k_pages, v_pages, k, v)
        return (k_pages, v_pages, k, v, jnp.int32(1), jax.tree.map(jnp.asarray, step)), {}

    size = jnp.dtype(dtype).itemsize
    cost = Cost((1 if latent else 2) * T * K * (size * H + row_bytes(kind, W, latent)))
    return Case(name, make, {}, shipped, cost, tolerance=0)


CASES = (
    _case("mixed", (1, 37, 1, 9), (70, 40, 9, 64), K=2, Z=32, idle=2),
    _case("f32", (1, 1, 20), (33, 1, 17 + 20), K=4, Z=8, H=64, dtype=jnp.float32),
    _case("latent", (1, 5, 1), (40, 37, 16), K=1, Z=16, H=192, W=256, latent=True),
    _case("decode-256", (1,) * 256, (2048,) * 256, K=8, shipped=True),
    _case("latent-decode-128", (1,) * 128, (2048,) * 128, K=1, H=576, W=640, latent=True,
          shipped=True),
    _quantized("int8", "int8", (1, 70, 1, 9), (140, 200, 9, 256), K=2, idle=2),
    _quantized("int8-latent", "int8", (1, 5, 40), (40, 133, 300), K=1, H=192, W=256,
               latent=(128, 128), dtype=jnp.float32),
    _quantized("int8-static", "static", (1, 37, 1, 9), (70, 40, 9, 64), K=2, H=100, Z=64, idle=2),
    _quantized("int4", "int4", (1, 70, 1, 9), (140, 200, 9, 256), K=2, idle=2),
    _quantized("int4-latent", "int4", (1, 5, 40), (40, 133, 300), K=1, H=288, W=384,
               latent=(256, 128), dtype=jnp.float32),
    _quantized("int8-decode-128", "int8", (1,) * 128, (2048,) * 128, K=8, shipped=True),
    _quantized("int4-decode-128", "int4", (1,) * 128, (2048,) * 128, K=8, shipped=True),
    _quantized("int8-static-decode-128", "static", (1,) * 128, (2048,) * 128, K=8, shipped=True),
    _quantized("int8-latent-decode-128", "int8", (1,) * 128, (2048,) * 128, K=1, H=576, W=640,
               latent=(512, 128), shipped=True),
    _quantized("int4-latent-decode-128", "int4", (1,) * 128, (2048,) * 128, K=1, H=576, W=640,
               latent=(512, 128), shipped=True),
)  # fmt: skip
