"""Shapes at which attention over pages is tested, compiled, timed and tuned."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kernels_pallas.op import Case, Cost
from kernels_pallas.paged_attention.ragged import Groups, Ragged

Shared = tuple[tuple[int, int, int], ...]
"""Groups: the first sequence, the one behind the last, and the tokens they have in common."""


def batch(
    new: tuple[int, ...], lens: tuple[int, ...], Z: int, idle: int = 0, shared: Shared = ()
) -> tuple[Ragged, int]:
    """A step of sequences with so many new tokens and lengths, whose pages lie scattered, and the
    number of pages. `idle` rows of padding follow, and one group of padding those that are."""
    M, R = -(-max(lens) // Z), len(new)
    P = R * M + 1
    tables = np.random.default_rng(0).permutation(P)[: R * M].reshape(R, M)
    for first, end, tokens in shared:
        tables[first:end, : tokens // Z] = tables[first, : tokens // Z]
    if shared:  # pages that nobody has left are none
        kept, tables = np.unique(tables, return_inverse=True)
        tables, P = tables.reshape(R, M), len(kept)
    tables = np.concatenate([tables, np.zeros((idle, M), int)])
    starts = np.concatenate([[0], np.cumsum(new), [sum(new)] * idle])
    fields = (starts, [*lens, *[0] * idle], tables, R)
    step = Ragged._make([*(np.asarray(x, np.int32) for x in fields), None])
    if not shared:
        return step, P
    groups = [(first, end, tokens // Z) for first, end, tokens in (*shared, (R, R, 0))]
    return step._replace(groups=Groups(*np.array(groups, np.int32).T)), P


def keys_read(lens: tuple[int, ...], shared: Shared) -> int:
    """Keys of sequences that long, each that a group has in common once."""
    return sum(lens) - sum((end - first - 1) * n for first, end, n in shared)


def _case(
    name: str, new: tuple[int, ...], lens: tuple[int, ...], *, N: int, K: int, H: int, Z: int = 64,
    dtype: Any = jnp.bfloat16, idle: int = 0, sinks: bool = False, window: int = 0,
    shipped: bool = False, shared: Shared = (), bodies: tuple[str, ...] | None = None,
    **options: Any,
) -> Case:  # fmt: skip
    L, T, values, W = 2, sum(new), options.get("value_dim"), -(-H // 128) * 128  # whole lanes
    latent = values is not None and values < H
    step, P = batch(new, lens, Z, idle, shared)

    def make(key: Array) -> tuple[tuple[Any, ...], dict[str, Any]]:
        a, b, c, d = jax.random.split(key, 4)
        k_pages = jax.random.normal(a, (L, P, K, Z, W), dtype)
        v_pages = None if latent else jax.random.normal(b, (L, P, K, Z, W), dtype)
        arrays = {"sinks": jax.random.normal(d, (N,))} if sinks else {}
        arrays |= {"window": jnp.int32(window)} if window else {}
        q = jax.random.normal(c, (T, N, H), dtype)
        return (q, k_pages, v_pages, jnp.int32(1), jax.tree.map(jnp.asarray, step)), arrays

    width = -(-H // 64) * (64 if latent else 128)  # lanes that must be brought: whole 64s
    size = jnp.dtype(dtype).itemsize
    keys = keys_read(lens, shared)
    read = keys * K * width * size + T * N * (H * size + 4 * (values or H) + 4)
    pairs = sum(n * s - n * (n - 1) / 2 for n, s in zip(new, lens, strict=True))
    cost = Cost(read, 2 * pairs * N * (H + (values or H)), jnp.dtype(dtype).name)
    tolerance = 0.01 if dtype == jnp.bfloat16 else 1e-5
    everywhere = dtype == jnp.bfloat16 and (values or 0) <= 512
    bodies = bodies or (None if everywhere else ("mosaic_tpu",))
    return Case(name, make, {"scale": H**-0.5, **options}, shipped, cost, tolerance, bodies)


_F32 = {"dtype": jnp.float32, "Z": 8}

CASES = (
    _case("mixed-grouped", (1, 20, 1, 3), (70, 20, 9, 64), N=8, K=2, H=128, Z=16, idle=2),
    _case("decode-f32", (1, 1, 1), (33, 1, 17), N=4, K=4, H=128, **_F32),
    _case("sinks-capped", (2, 9), (40, 25), N=6, K=2, H=128, Z=16, sinks=True, soft_cap=5.0),
    _case("window-64", (1, 30, 1), (90, 70, 5), N=4, K=1, H=64, Z=32, window=21, value_dim=64),
    _case("mass", (1, 3, 40), (300, 17, 50), N=8, K=2, H=128, window=60, mass=True, **_F32),
    _case("mass-bf16", (1, 12), (90, 30), N=4, K=2, H=64, Z=16, window=60, mass=True),
    _case("latent", (1, 5, 1), (40, 37, 16), N=16, K=1, H=192, Z=16, value_dim=128),
    _case("latent-wide", (1, 2, 1), (70, 37, 16), N=16, K=1, H=576, Z=16, value_dim=512, idle=1),
    _case(
        "groups", (1, 1, 1, 9, 1, 2, 1), (40, 541, 600, 533, 40, 514, 530), N=4, K=2, H=128,
        idle=2, shared=((1, 4, 512), (5, 7, 512)), sinks=True, dtype=jnp.float32,
    ),
    _case(
        "groups-bf16", (1, 1, 2, 1), (20, 75, 130, 130), N=4, K=1, H=64, Z=32, idle=1, sinks=True,
        shared=((1, 4, 64),),
    ),
    _case(
        "latent-groups", (1, 1), (70, 85), N=16, K=1, H=576, Z=16, value_dim=512,
        shared=((0, 2, 64),), bodies=("mosaic_gpu",),
    ),
    _case("decode-32k", (1,) * 32, (32768,) * 32, N=32, K=8, H=128, shipped=True),
    _case("decode-32k-8-to-1", (1,) * 32, (32768,) * 32, N=32, K=4, H=128, shipped=True),
    _case("decode-32k-mass", (1,) * 32, (32768,) * 32, N=32, K=4, H=128, mass=True, shipped=True),
    _case(
        "decode-64-of-8k", (1,) * 64, (8704,) * 64, N=32, K=8, H=128, shared=((0, 64, 8192),),
        shipped=True,
    ),
    _case(
        "mixed-2048", (2048, *(1,) * 32), (2048, *(8192,) * 32), N=32, K=8, H=128, shipped=True
    ),
    _case(
        "latent-decode-8k", (1,) * 32, (8192,) * 32, N=128, K=1, H=576, value_dim=512, shipped=True
    ),
    _case(
        "latent-decode-8k-16-heads", (1,) * 32, (8192,) * 32, N=16, K=1, H=576, value_dim=512,
        shipped=True, bodies=("mosaic_gpu",),  # which waits for memory only with few heads
    ),
)  # fmt: skip
