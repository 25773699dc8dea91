"""Shapes at which attention over pages is tested, compiled, timed and tuned."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas.op import Case, Cost
from kernels_pallas.paged_attention.cases import Shared, keys_read, pages_of, row_bytes
from kernels_pallas.paged_attention.cases import batch as step_of


def case(
    name: str, new: tuple[int, ...], lens: tuple[int, ...], *, N: int, K: int, H: int, Z: int = 64,
    dtype: Any = jnp.bfloat16, idle: int = 0, sinks: bool = False, window: int = 0,
    shipped: bool = False, shared: Shared = (), bodies: tuple[str, ...] | None = None,
    **options: Any,
) -> Case:  # fmt: skip
    """A case over pages of floats; fields are those of `batch`, and options those of the op.

    Args:
        N, K: query heads and KV heads.
        H: lanes of a query.
        Z: slots in a page.
        bodies: that take it; by default all, or those for TPUs where it is too much for Hopper.
    """
    L, T, values, W = 2, sum(new), options.get("value_dim"), -(-H // 128) * 128  # whole lanes
    latent = values is not None and values < H
    step, P = step_of(new, lens, Z, idle, shared)

    def make(key: Array) -> tuple[tuple[Any, ...], dict[str, Any]]:
        a, b, c, d = jax.random.split(key, 4)
        k_pages = jax.random.normal(a, (L, P, K, Z, W), dtype)
        v_pages = None if latent else jax.random.normal(b, (L, P, K, Z, W), dtype)
        arrays = {"sinks": jax.random.normal(d, (N,))} if sinks else {}
        arrays |= {"window": jnp.int32(window)} if window else {}
        q = jax.random.normal(c, (T, N, H), dtype)
        return (q, k_pages, v_pages, jnp.int32(1), jax.tree.map(jnp.asarray, step)), arrays

    width = -(-H // 64) * (64 if latent else 128)  # lanes that must be read: whole 64s
    size = jnp.dtype(dtype).itemsize
    keys = keys_read(lens, shared)
    read = keys * K * width * size + T * N * (H * size + 4 * (values or H) + 4)
    pairs = sum(n * s - n * (n - 1) / 2 for n, s in zip(new, lens, strict=True))
    cost = Cost(read, 2 * pairs * N * (H + (values or H)), jnp.dtype(dtype).name)
    tolerance = 0.01 if dtype == jnp.bfloat16 else 1e-5
    everywhere = dtype == jnp.bfloat16 and (values or 0) <= 512
    bodies = bodies or (None if everywhere else ("mosaic_tpu",))
    return Case(name, make, {"scale": H**-0.5, **options}, shipped, cost, tolerance, bodies)


def quantized_case(
    name: str, kind: str, new: tuple[int, ...], lens: tuple[int, ...], *, N: int, K: int,
    H: int = 128, Z: int = 128, idle: int = 0, window: int = 0, value_dim: int | None = None,
    latent: tuple[int, ...] | None = None, shipped: bool = False, shared: Shared = (),
    bodies: tuple[str, ...] | None = None, **options: Any,
) -> Case:  # fmt: skip
    """A case over quantized pages, of a `kind` that `pages_of` names.

    Args:
        latent: lanes of each part of a key of which values are lanes.
    """
    T, W = sum(new), -(-H // 128) * 128
    step, P = step_of(new, lens, Z, idle, shared)

    def make(key: Array) -> tuple[tuple[Any, ...], dict[str, Any]]:
        a, b, c = jax.random.split(key, 3)
        k_pages = pages_of(kind, a, (2, P, K, Z, W), latent)
        v_pages = None if latent else pages_of(kind, b, (2, P, K, Z, W))
        q = jax.random.normal(c, (T, N, H), jnp.bfloat16)
        arrays = {"window": jnp.int32(window)} if window else {}
        return (q, k_pages, v_pages, jnp.int32(1), jax.tree.map(jnp.asarray, step)), arrays

    values = value_dim or H
    row = row_bytes(kind, -(-H // 64) * 64, latent) * (1 if latent else 2)
    read = keys_read(lens, shared) * K * row + T * N * (2 * H + 4 * values + 4)
    pairs = sum(n * s - n * (n - 1) / 2 for n, s in zip(new, lens, strict=True))
    cost = Cost(read, 2 * pairs * N * (H + values), "bfloat16")
    options = {"scale": H**-0.5, "value_dim": value_dim, **options}
    # A TPU shares larger units, and alike whatever the kind of pages: cases of floats show it.
    bodies = bodies or (("mosaic_gpu",) if shared else None)
    return Case(name, make, options, shipped, cost, 0.01, bodies)


_F32 = {"dtype": jnp.float32, "Z": 8}

CASES = (
    case("mixed-grouped", (1, 20, 1, 3), (70, 20, 9, 64), N=8, K=2, H=128, Z=16, idle=2),
    case("decode-f32", (1, 1, 1), (33, 1, 17), N=4, K=4, H=128, **_F32),
    case("sinks-capped", (2, 9), (40, 25), N=6, K=2, H=128, Z=16, sinks=True, soft_cap=5.0),
    case("window-64", (1, 30, 1), (90, 70, 5), N=4, K=1, H=64, Z=32, window=21, value_dim=64),
    case("mass", (1, 3, 40), (300, 17, 50), N=8, K=2, H=128, window=60, mass=True, **_F32),
    case("mass-bf16", (1, 12), (90, 30), N=4, K=2, H=64, Z=16, window=60, mass=True),
    case("latent", (1, 5, 1), (40, 37, 16), N=16, K=1, H=192, Z=16, value_dim=128),
    case("latent-wide", (1, 2, 1), (70, 37, 16), N=16, K=1, H=576, Z=16, value_dim=512, idle=1),
    case(
        "groups", (1, 1, 1, 9, 1, 2, 1), (40, 541, 600, 533, 40, 514, 530), N=4, K=2, H=128,
        idle=2, shared=((1, 4, 512), (5, 7, 512)), sinks=True, dtype=jnp.float32,
    ),
    case(
        "groups-bf16", (1, 1, 2, 1), (20, 75, 130, 130), N=4, K=1, H=64, Z=32, idle=1, sinks=True,
        shared=((1, 4, 64),),
    ),
    case(
        "latent-groups", (1, 1), (70, 85), N=16, K=1, H=576, Z=16, value_dim=512,
        shared=((0, 2, 64),), bodies=("mosaic_gpu",),
    ),
    case("decode-32k", (1,) * 32, (32768,) * 32, N=32, K=8, H=128, shipped=True),
    case("decode-32k-8-to-1", (1,) * 32, (32768,) * 32, N=32, K=4, H=128, shipped=True),
    case("decode-32k-mass", (1,) * 32, (32768,) * 32, N=32, K=4, H=128, mass=True, shipped=True),
    case(
        "decode-64-of-8k", (1,) * 64, (8704,) * 64, N=32, K=8, H=128, shared=((0, 64, 8192),),
        shipped=True,
    ),
    case(
        "mixed-2048", (2048, *(1,) * 32), (2048, *(8192,) * 32), N=32, K=8, H=128, shipped=True
    ),
    case(
        "latent-decode-8k", (1,) * 32, (8192,) * 32, N=128, K=1, H=576, value_dim=512, shipped=True
    ),
    case(
        "latent-decode-8k-16-heads", (1,) * 32, (8192,) * 32, N=16, K=1, H=576, value_dim=512,
        shipped=True, bodies=("mosaic_gpu",),  # which waits for memory only with few heads
    ),
    quantized_case("int8", "int8", (1, 20, 1, 3), (200, 20, 9, 300), N=8, K=2, idle=2),
    quantized_case("int8-windowed", "int8", (1, 30, 1), (290, 70, 5), N=4, K=1, H=64, window=21),
    quantized_case("int8-groups", "int8", (1, 1), (133, 130), N=2, K=1, shared=((0, 2, 128),)),
    quantized_case("int8-latent", "int8", (1, 5, 1), (140, 37, 16), N=16, K=1, H=192, value_dim=128,
               latent=(128, 128)),
    quantized_case("int8-static", "static", (1, 20, 1, 3), (70, 20, 9, 64), N=8, K=2, Z=32, idle=2),
    quantized_case("int8-static-latent", "static", (1, 5, 1), (40, 37, 16), N=16, K=1, H=192, Z=32,
               value_dim=128, latent=(128, 128)),
    quantized_case("int4", "int4", (1, 20, 1, 3), (200, 20, 9, 300), N=8, K=2, idle=2),
    quantized_case("int4-windowed", "int4", (1, 30, 1), (290, 70, 5), N=4, K=1, H=64, window=21),
    quantized_case("int4-groups", "int4", (1, 1), (133, 130), N=2, K=1, shared=((0, 2, 128),)),
    quantized_case("int4-latent", "int4", (1, 5, 1), (140, 37, 16), N=16, K=1, H=288, value_dim=256,
               latent=(256, 128)),
    quantized_case("int8-decode-32k", "int8", (1,) * 32, (32768,) * 32, N=32, K=8, shipped=True),
    quantized_case("int8-static-decode-32k", "static", (1,) * 32, (32768,) * 32, N=32, K=8,
               shipped=True),
    quantized_case("int4-decode-32k", "int4", (1,) * 32, (32768,) * 32, N=32, K=8, shipped=True),
    quantized_case("int8-mixed-2048", "int8", (2048, *(1,) * 32), (2048, *(8192,) * 32), N=32, K=8,
               shipped=True),
    quantized_case("int8-latent-decode-8k", "int8", (1,) * 32, (8192,) * 32, N=128, K=1, H=576,
               value_dim=512, latent=(512, 128), shipped=True),
    quantized_case("int8-latent-decode-8k-16-heads", "int8", (1,) * 32, (8192,) * 32, N=16, K=1,
               H=576, value_dim=512, latent=(512, 128), shipped=True, bodies=("mosaic_gpu",)),
    quantized_case("int4-latent-decode-8k", "int4", (1,) * 32, (8192,) * 32, N=128, K=1, H=576,
               value_dim=512, latent=(512, 128), shipped=True),
)  # fmt: skip
