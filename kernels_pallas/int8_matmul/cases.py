"""Cases of the W8A8 product: layers of Llama 3 8B, and the shapes that CloudMatrix384 published."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas.op import Case, Cost


def case(
    T: int, N: int, K: int, *, layers: int = 0, biased: bool = False, shipped: bool = False,
    activation: str | None = None, out_dtype: Any = jnp.bfloat16,
) -> Case:  # fmt: skip
    """x [T, K] times w [N, K]; if `layers` > 0, w is the last of so many in a stack."""

    def weight(key: Array) -> tuple[Array, Array]:
        a, b = jax.random.split(key)
        shape = (layers, N) if layers else (N,)
        scale = jax.random.uniform(b, shape, jnp.float32, 0.5, 1.5) / (127 * K**0.5)
        return jax.random.randint(a, (*shape, K), -127, 128, jnp.int8), scale

    def make(key: Array) -> tuple[tuple[Array, ...], dict[str, Array]]:
        a, b, c, d, e = jax.random.split(key, 5)
        x = jax.random.randint(a, (T, K), -127, 128, jnp.int8)
        x_scale = jax.random.uniform(b, (T,), jnp.float32, 0.0, 2 / 127)
        w, w_scale = weight(c)
        arrays = dict[str, Array]()
        if layers:
            arrays["layer"] = jnp.int32(layers - 1)
        if activation:
            arrays["up"], arrays["up_scale"] = weight(d)
        if biased:
            arrays["bias"] = jax.random.normal(e, w_scale.shape, jnp.bfloat16)
        return (x, x_scale, w, w_scale), arrays

    options = {"out_dtype": out_dtype} | ({"activation": activation} if activation else {})
    count, width = 2 if activation else 1, jnp.dtype(out_dtype).itemsize
    cost = Cost(count * N * K + T * K + T * N * width, 2.0 * count * T * N * K, "int8")
    words = [f"{T}x{N}x{K}", f"L{layers}" if layers else "", activation, "bias" if biased else ""]
    name = "-".join(w for w in (*words, jnp.dtype(out_dtype).name) if w)
    # float32 results differ by how a compiler joins multiplications and additions
    return Case(name, make, options, shipped, cost, tolerance=1e-6 if width == 4 else 0.004)


CASES = (
    case(8, 256, 256, layers=3, biased=True, out_dtype=jnp.float32),
    case(8, 128, 384, layers=11),
    case(48, 384, 256, out_dtype=jnp.float32),
    case(300, 256, 128, biased=True),
    case(16, 256, 256, activation="silu", layers=2, out_dtype=jnp.float32),
    case(256, 128, 256, activation="gelu_tanh"),
    *(
        case(T, N, K, layers=4, shipped=True)
        for N, K in ((4096, 4096), (4096, 14336))
        for T in (8, 64, 2048)
    ),
    *(case(T, 14336, 4096, layers=4, activation="silu", shipped=True) for T in (8, 64, 2048)),
    case(7168, 4096, 4096, shipped=True),
    case(2048, 7168, 8192, shipped=True),
)
