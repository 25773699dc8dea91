"""What a decoder layer runs on CPU, as ops: contracts in plain JAX, and bodies in C++."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas import cpu
from kernels_pallas import linear as products
from kernels_pallas import rms_norm as norms
from kernels_pallas.cpu import bodies
from kernels_pallas.op import Body, Case, Cost, NoTile, Op, UnsupportedError
from kernels_pallas.paged_attention import reference as pages
from kernels_pallas.paged_attention.cases import Shared, batch, keys_read
from kernels_pallas.quantize import quantize_rows
from kernels_pallas.weight import Int8Weight, StackedWeight


def _native(kernel: Callable[..., Any]) -> dict[str, Body]:
    def run(*args: Any, tile: NoTile | None = None, interpret: Any = False, **options: Any) -> Any:
        if not cpu.available():
            raise UnsupportedError("no C++ kernels here: they need a CPU and a C++ compiler")
        if options.get("activation", "silu") not in ("silu", "gelu_tanh"):
            raise UnsupportedError(f"activation={options['activation']!r}: silu or gelu_tanh")
        return kernel(*args, **options)

    return {"native": Body("cpu", run, NoTile)}


def _weight(key: Array, L: int, N: int, K: int, dtype: Any) -> StackedWeight:
    """The last of L layers [N, K]."""
    w = jax.random.normal(key, (L, N, K)) * K**-0.5
    stack = Int8Weight(*quantize_rows(w)) if dtype == jnp.int8 else w.astype(dtype)
    return StackedWeight(stack, jnp.int32(L - 1))


def _product(
    T: int, N: int, K: int, dtype: Any, *, activation: str = "", shipped: bool = False
) -> Case:
    """x [T, K] with one weight [N, K], or with the two of a gated MLP."""
    count, size = 2 if activation else 1, jnp.dtype(dtype).itemsize

    def make(key: Array) -> tuple[tuple[Any, ...], dict[str, Any]]:
        a, *keys = jax.random.split(key, 1 + count)
        return (jax.random.normal(a, (T, K)), *(_weight(k, 2, N, K, dtype) for k in keys)), {}

    cost = Cost(
        count * N * K * size + 4 * T * (K + N), 2.0 * count * T * N * K, jnp.dtype(dtype).name
    )
    options = {"activation": activation} if activation else {}
    # a sum of rounded products depends on its order
    tolerance = 1e-5 if dtype == jnp.float32 or dtype == jnp.int8 else 1e-4
    return Case(f"{T}x{N}x{K}-{cost.dtype}", make, options, shipped, cost, tolerance)


def _norm(T: int, D: int, *, shipped: bool = False) -> Case:
    def make(key: Array) -> tuple[tuple[Array, Array], dict[str, Any]]:
        a, b = jax.random.split(key)
        return (jax.random.normal(a, (1, T, D)), jax.random.normal(b, (D,))), {}

    return Case(f"{T}x{D}", make, {"eps": 1e-6}, shipped, Cost(8.0 * T * D, dtype="float32"))


def _attention(
    name: str, new: tuple[int, ...], lens: tuple[int, ...], *, N: int, K: int, H: int, Z: int = 32,
    dtype: Any = jnp.uint16, shared: Shared = (), shipped: bool = False,
) -> Case:  # fmt: skip
    step, P = batch(new, lens, Z, shared=shared)
    T, size = sum(new), jnp.dtype(dtype).itemsize

    def make(key: Array) -> tuple[tuple[Any, ...], dict[str, Any]]:
        keys = jax.random.split(key, 5)
        q, *kv = (jax.random.normal(k, (T, n, H)) for k, n in zip(keys, (N, K, K), strict=False))
        caches = (jax.random.normal(k, (2, P, K, Z, H)) for k in keys[3:])
        if dtype == jnp.uint16:
            caches = (jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), dtype) for x in caches)
        return (q, *kv, *caches, jnp.int32(1), jax.tree.map(jnp.asarray, step)), {}

    pairs = sum(n * s - n * (n - 1) / 2 for n, s in zip(new, lens, strict=True))
    cost = Cost(
        2.0 * keys_read(lens, shared) * K * H * size + 8 * T * N * H, 4 * pairs * N * H,
        "float32" if dtype == jnp.float32 else "bfloat16",
    )  # fmt: skip
    tolerance = 1e-5 if dtype == jnp.float32 else 0.01
    return Case(name, make, {"scale": H**-0.5}, shipped, cost, tolerance)


linear = Op(
    "linear",
    products.linear,
    _native(bodies.linear),
    (
        _product(3, 40, 70, jnp.float32),
        _product(9, 64, 96, jnp.bfloat16),
        _product(20, 33, 64, jnp.int8),
        *(
            _product(T, 4096, 4096, dtype, shipped=True)
            for dtype in (jnp.bfloat16, jnp.int8)
            for T in (1, 16, 256)
        ),
    ),
)

gated_linear = Op(
    "gated_linear",
    products.gated_linear,
    _native(bodies.gated_linear),
    (
        _product(3, 40, 70, jnp.float32, activation="silu"),
        _product(20, 33, 64, jnp.int8, activation="gelu_tanh"),
        *(
            _product(T, 3072, 1024, dtype, activation="silu", shipped=True)
            for dtype in (jnp.bfloat16, jnp.int8)
            for T in (1, 16, 256)
        ),
    ),
)

rms_norm = Op(
    "rms_norm",
    norms.rms_norm,
    _native(bodies.rms_norm),
    (_norm(5, 100), _norm(512, 4096, shipped=True)),
)

paged_attention = Op(
    "paged_attention",
    pages.paged_attention,
    _native(bodies.paged_attention),
    (
        _attention("mixed-f32", (1, 9, 1), (30, 9, 17), N=4, K=2, H=64, Z=8, dtype=jnp.float32),
        _attention("mixed", (1, 9, 1), (30, 9, 17), N=4, K=2, H=64, Z=8),
        _attention(
            "groups", (1, 1, 3, 1), (90, 80, 75, 30), N=4, K=2, H=64, Z=8, shared=((0, 3, 64),)
        ),
        _attention("decode-16x2k", (1,) * 16, (2048,) * 16, N=16, K=8, H=128, shipped=True),
        _attention(
            "decode-16-of-2k",
            (1,) * 16,
            (2112,) * 16,
            N=16,
            K=8,
            H=128,
            shared=((0, 16, 2048),),
            shipped=True,
        ),
        _attention("prompt-1k", (1024,), (1024,), N=16, K=8, H=128, shipped=True),
    ),
    in_place=((3, 2), (4, 3)),
)

CPU_OPS = (linear, gated_linear, rms_norm, paged_attention)
