"""Writing a step's keys and values into their pages, in place: the op, and its cases."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas.op import Body, Case, Cost, Op
from kernels_pallas.paged_attention import mosaic_gpu_writing, mosaic_tpu_writing
from kernels_pallas.paged_attention.cases import batch as step_of
from kernels_pallas.paged_attention.coded_cases import WRITING
from kernels_pallas.paged_attention.reference import page_write as reference
from kernels_pallas.target import not_hopper


def _case(
    name: str, new: tuple[int, ...], lens: tuple[int, ...], *, K: int, H: int = 128, Z: int = 64,
    W: int = 128, dtype: Any = jnp.bfloat16, idle: int = 0, latent: bool = False,
    shipped: bool = False,
) -> Case:  # fmt: skip
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


CASES = (
    _case("mixed", (1, 37, 1, 9), (70, 40, 9, 64), K=2, Z=32, idle=2),
    _case("f32", (1, 1, 20), (33, 1, 17 + 20), K=4, Z=8, H=64, dtype=jnp.float32),
    _case("latent", (1, 5, 1), (40, 37, 16), K=1, Z=16, H=192, W=256, latent=True),
    _case("decode-256", (1,) * 256, (2048,) * 256, K=8, shipped=True),
    _case("latent-decode-128", (1,) * 128, (2048,) * 128, K=1, H=576, W=640, latent=True,
          shipped=True),
    *WRITING,
)  # fmt: skip

page_write = Op(
    "page_write",
    reference,
    {
        "mosaic_tpu": Body("tpu", mosaic_tpu_writing.page_write, mosaic_tpu_writing.TpuTile),
        "mosaic_gpu": Body(
            "gpu", mosaic_gpu_writing.page_write, mosaic_gpu_writing.GpuTile, declines=not_hopper
        ),
    },
    CASES,
    in_place=((0, 0), (1, 1)),
)
