"""Shapes at which writing to pages of eight and four bits, and attention over them, are tested."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas.op import Case, Cost
from kernels_pallas.paged_attention.cases import Shared, keys_read
from kernels_pallas.paged_attention.cases import batch as step_of
from kernels_pallas.paged_attention.codec import ROTATED, Int4Pages, StaticInt8Pages, empty

_L = 2


def pages_of(
    kind: str, key: Array, shape: tuple[int, ...], parts: tuple[int, ...] | None = None
) -> Any:
    """Pages whose rows are as large as normal ones, of "int8", "static" or "int4"."""
    a, b = jax.random.split(key)
    pages = empty(jnp.int4 if kind == "int4" else jnp.int8, shape, parts=parts, whole=True)
    if kind == "int4":
        values = jax.random.randint(a, pages.values.shape, 0, 256).astype(jnp.uint8)
        return Int4Pages(values, jax.random.uniform(b, pages.scale.shape) / 4, pages.parts)
    values = jax.random.randint(a, shape, -127, 128).astype(jnp.int8)
    if kind == "static":
        L, _, K, _, W = shape
        return StaticInt8Pages(values, jax.random.uniform(b, (L, K, W)) / 64)
    return type(pages)(values, jax.random.uniform(b, pages.scale.shape) / 64, pages.parts)


def _row_bytes(kind: str, lanes: int, latent: tuple[int, ...] | None) -> float:
    """Of so many lanes of a row, with its scales."""
    if kind == "int4":  # whole parts, which are turned together
        parts = -(-lanes // ROTATED)
        return parts * (ROTATED / 2 + 4)
    return lanes + (4 * len(latent or "1") if kind == "int8" else 0)


def _writing(
    name: str, kind: str, new: tuple[int, ...], lens: tuple[int, ...], *, K: int, H: int = 128,
    Z: int = 128, W: int = 128, dtype: Any = jnp.bfloat16, idle: int = 0,
    latent: tuple[int, ...] | None = None, shipped: bool = False,
) -> Case:  # fmt: skip
    T = sum(new)
    step, P = step_of(new, lens, Z, idle)

    def make(key: Array) -> tuple[tuple[Any, ...], dict[str, Any]]:
        keys = jax.random.split(key, 4)
        k_pages, v_pages = (pages_of(kind, x, (_L, P, K, Z, W), latent) for x in keys[:2])
        k, v = (jax.random.normal(x, (T, K, H), dtype) for x in keys[2:])
        k_pages, v_pages, k, v = (k_pages, None, k, None) if latent else (k_pages, v_pages, k, v)
        return (k_pages, v_pages, k, v, jnp.int32(1), jax.tree.map(jnp.asarray, step)), {}

    size = jnp.dtype(dtype).itemsize
    cost = Cost((1 if latent else 2) * T * K * (size * H + _row_bytes(kind, W, latent)))
    return Case(name, make, {}, shipped, cost, tolerance=0)


WRITING = (
    _writing("int8", "int8", (1, 70, 1, 9), (140, 200, 9, 256), K=2, idle=2),
    _writing("int8-latent", "int8", (1, 5, 40), (40, 133, 300), K=1, H=192, W=256,
             latent=(128, 128), dtype=jnp.float32),
    _writing("int8-static", "static", (1, 37, 1, 9), (70, 40, 9, 64), K=2, H=100, Z=64, idle=2),
    _writing("int4", "int4", (1, 70, 1, 9), (140, 200, 9, 256), K=2, idle=2),
    _writing("int4-latent", "int4", (1, 5, 40), (40, 133, 300), K=1, H=288, W=384,
             latent=(256, 128), dtype=jnp.float32),
    _writing("int8-decode-128", "int8", (1,) * 128, (2048,) * 128, K=8, shipped=True),
    _writing("int4-decode-128", "int4", (1,) * 128, (2048,) * 128, K=8, shipped=True),
    _writing("int8-static-decode-128", "static", (1,) * 128, (2048,) * 128, K=8, shipped=True),
    _writing("int8-latent-decode-128", "int8", (1,) * 128, (2048,) * 128, K=1, H=576, W=640,
             latent=(512, 128), shipped=True),
    _writing("int4-latent-decode-128", "int4", (1,) * 128, (2048,) * 128, K=1, H=576, W=640,
             latent=(512, 128), shipped=True),
)  # fmt: skip


def _attention(
    name: str, kind: str, new: tuple[int, ...], lens: tuple[int, ...], *, N: int, K: int,
    H: int = 128, Z: int = 128, idle: int = 0, window: int = 0, value_dim: int | None = None,
    latent: tuple[int, ...] | None = None, shipped: bool = False, shared: Shared = (),
    **options: Any,
) -> Case:  # fmt: skip
    T, W = sum(new), -(-H // 128) * 128
    step, P = step_of(new, lens, Z, idle, shared)

    def make(key: Array) -> tuple[tuple[Any, ...], dict[str, Any]]:
        a, b, c = jax.random.split(key, 3)
        k_pages = pages_of(kind, a, (_L, P, K, Z, W), latent)
        v_pages = None if latent else pages_of(kind, b, (_L, P, K, Z, W))
        q = jax.random.normal(c, (T, N, H), jnp.bfloat16)
        arrays = {"window": jnp.int32(window)} if window else {}
        return (q, k_pages, v_pages, jnp.int32(1), jax.tree.map(jnp.asarray, step)), arrays

    values = value_dim or H
    row = _row_bytes(kind, -(-H // 64) * 64, latent) * (1 if latent else 2)
    read = keys_read(lens, shared) * K * row + T * N * (2 * H + 4 * values + 4)
    pairs = sum(n * s - n * (n - 1) / 2 for n, s in zip(new, lens, strict=True))
    cost = Cost(read, 2 * pairs * N * (H + values), "bfloat16")
    options = {"scale": H**-0.5, "value_dim": value_dim, **options}
    bodies = ("mosaic_gpu",) if shared else None  # a TPU shares more keys, whatever their kind
    return Case(name, make, options, shipped, cost, 0.01, bodies)


ATTENTION = (
    _attention("int8", "int8", (1, 20, 1, 3), (200, 20, 9, 300), N=8, K=2, idle=2),
    _attention("int8-windowed", "int8", (1, 30, 1), (290, 70, 5), N=4, K=1, H=64, window=21),
    _attention("int8-groups", "int8", (1, 1), (133, 130), N=2, K=1, shared=((0, 2, 128),)),
    _attention("int8-latent", "int8", (1, 5, 1), (140, 37, 16), N=16, K=1, H=192, value_dim=128,
               latent=(128, 128)),
    _attention("int8-static", "static", (1, 20, 1, 3), (70, 20, 9, 64), N=8, K=2, Z=32, idle=2),
    _attention("int8-static-latent", "static", (1, 5, 1), (40, 37, 16), N=16, K=1, H=192, Z=32,
               value_dim=128, latent=(128, 128)),
    _attention("int4", "int4", (1, 20, 1, 3), (200, 20, 9, 300), N=8, K=2, idle=2),
    _attention("int4-windowed", "int4", (1, 30, 1), (290, 70, 5), N=4, K=1, H=64, window=21),
    _attention("int4-groups", "int4", (1, 1), (133, 130), N=2, K=1, shared=((0, 2, 128),)),
    _attention("int4-latent", "int4", (1, 5, 1), (140, 37, 16), N=16, K=1, H=288, value_dim=256,
               latent=(256, 128)),
    _attention("int8-decode-32k", "int8", (1,) * 32, (32768,) * 32, N=32, K=8, shipped=True),
    _attention("int8-static-decode-32k", "static", (1,) * 32, (32768,) * 32, N=32, K=8,
               shipped=True),
    _attention("int4-decode-32k", "int4", (1,) * 32, (32768,) * 32, N=32, K=8, shipped=True),
    _attention("int8-mixed-2048", "int8", (2048, *(1,) * 32), (2048, *(8192,) * 32), N=32, K=8,
               shipped=True),
    _attention("int8-latent-decode-8k", "int8", (1,) * 32, (8192,) * 32, N=128, K=1, H=576,
               value_dim=512, latent=(512, 128), shipped=True),
    _attention("int4-latent-decode-8k", "int4", (1,) * 32, (8192,) * 32, N=128, K=1, H=576,
               value_dim=512, latent=(512, 128), shipped=True),
)  # fmt: skip
