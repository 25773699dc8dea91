"""Shapes at which flash attention and its backward pass are tested, timed and tuned."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas.flash_attention import reference
from kernels_pallas.op import Case, Cost


def _packed(key: Array, B: int, T: int) -> Array:
    """Segments [B, T] of rows packed with documents of random length, padding at the end."""
    starts = jax.random.bernoulli(key, 4 / T, (B, T))
    segments = jnp.cumsum(starts, axis=1, dtype=jnp.int32) + 1
    return jnp.where(jnp.arange(T) < T - T // 16, segments, 0)


def _case(
    name: str, B: int, T: int, N: int, K: int, H: int, Hv: int = 0, *, backward: bool,
    dtype: Any = jnp.bfloat16, sinks: bool = False, one: bool = False, shipped: bool = False,
    **options: Any,
) -> Case:  # fmt: skip
    """A case of the op, or of its backward pass. If `one`, one document fills each row."""
    Hv, options = Hv or H, {"scale": H**-0.5, **options}

    def make(key: Array) -> tuple[tuple[Array, ...], dict[str, Array]]:
        keys = jax.random.split(key, 7)
        shapes = (B, N, T, H), (B, K, T, H), (B, K, T, Hv), (B, N, T, Hv)
        q, k, v, do = (
            jax.random.normal(x, s, dtype) for x, s in zip(keys[:4], shapes, strict=True)
        )
        segments = jnp.ones((B, T), jnp.int32) if one else _packed(keys[4], B, T)
        arrays = {"sinks": jax.random.normal(keys[5], (N,))} if sinks else {}
        if not backward:
            return (q, k, v, segments), arrays
        o, lse = reference.attend(q, k, v, segments, **arrays, **options)
        dlse = jax.random.normal(keys[6], lse.shape)
        return (q, k, v, segments, o, lse, do, dlse), arrays

    size = jnp.dtype(dtype).itemsize
    moved = size * B * T * (N + K) * (H + Hv) * (2 if backward else 1)  # gradients are written too
    window = min(options.get("window") or T, T)
    seen = window * T - window * (window - 1) / 2  # pairs of a query and a key in one head
    products = 2 * B * N * seen * (H + Hv)
    cost = Cost(moved + 4 * B * N * T, products * (2.5 if backward else 1), jnp.dtype(dtype).name)
    return Case(name, make, options, shipped, cost, tolerance=0.01)


def cases(*, backward: bool) -> tuple[Case, ...]:
    """The cases of `flash_attention`, or of its backward pass."""

    def case(name: str, *sizes: int, **options: Any) -> Case:
        return _case(name, *sizes, backward=backward, **options)

    return (
        case("packed", 1, 256, 2, 1, 128),
        case("two-rows", 2, 128, 1, 1, 64),
        case("window-sinks-cap", 1, 256, 1, 1, 64, window=100, sinks=True, soft_cap=5.0),
        case("4k", 1, 4096, 32, 8, 128, one=True, shipped=True),
        case("8k-window", 1, 8192, 32, 8, 128, window=1024, one=True, shipped=True),
        case("8k-narrow", 1, 8192, 32, 8, 64, sinks=True, one=True, shipped=True),
    )
