"""Cases of the grouped product: experts of Qwen3-30B-A3B and of one DeepSeek-V3 shard."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas.op import Case, Cost


def case(
    M: int, E: int, N: int, K: int, *, layers: int = 0, padding: int = 0, present: float = 1.0,
    dtype: Any = jnp.bfloat16, out_dtype: Any = jnp.bfloat16, shipped: bool = False,
) -> Case:  # fmt: skip
    """M rows, of which the last `padding` belong to no expert.

    Args:
        layers: in the stack of weights, of which the last one is used; 0 for no stack.
        present: the share of the experts that may have rows.
    """

    def make(key: Array) -> tuple[tuple[Array, ...], dict[str, Array]]:
        a, b, c, d, e, f = jax.random.split(key, 6)
        stack = (layers, E, N) if layers else (E, N)
        chosen = jax.random.randint(a, (M - padding,), 0, E)
        kept = jax.random.permutation(b, E)[: max(1, int(E * present))]
        chosen = kept[chosen % kept.shape[0]]
        sizes = (chosen[:, None] == jnp.arange(E)).sum(0, dtype=jnp.int32)
        arrays = {"layer": jnp.int32(layers - 1)} if layers else {}
        if dtype == jnp.int8:
            x, w = (jax.random.randint(k, s, -127, 128, jnp.int8)
                    for k, s in ((c, (M, K)), (d, (*stack, K))))  # fmt: skip
            arrays["x_scale"] = jax.random.uniform(e, (M,), jnp.float32, 0.0, 2 / 127)
            arrays["w_scale"] = jax.random.uniform(f, stack, jnp.float32, 0.5, 1.5) / (127 * K**0.5)
        else:
            x = jax.random.normal(c, (M, K), dtype)
            w = jax.random.normal(d, (*stack, K), dtype) * K**-0.5
        return (x, w, sizes), arrays

    size, width = jnp.dtype(dtype).itemsize, jnp.dtype(out_dtype).itemsize
    read = E * (1 - (1 - 1 / E) ** M)  # experts that M random rows choose
    cost = Cost(
        size * (M * K + read * N * K) + width * M * N, 2.0 * M * N * K, jnp.dtype(dtype).name
    )
    words = (
        f"{M}x{E}x{N}x{K}", f"L{layers}" * (layers > 0), f"pad{padding}" * (padding > 0),
        f"{present}" * (present < 1), jnp.dtype(dtype).name, jnp.dtype(out_dtype).name,
    )  # fmt: skip
    options = {"out_dtype": out_dtype}
    tolerance = 1e-5 if width == 4 else 0.004
    return Case("-".join(w for w in words if w), make, options, shipped, cost, tolerance)


_SHIPPED = (
    *((M, 128, 1536, 2048) for M in (64 * 8, 2048 * 8)),
    *((M, 128, 2048, 768) for M in (64 * 8, 2048 * 8)),
    *((M, 8, 4096, 7168) for M in (256, 4096)),
)
CASES = (
    case(64, 4, 128, 256, out_dtype=jnp.float32),
    case(70, 5, 256, 128, layers=2, padding=13, present=0.7),
    case(100, 3, 128, 128, padding=90, out_dtype=jnp.float32),
    case(90, 6, 128, 256, layers=3, padding=5, present=0.5, dtype=jnp.int8, out_dtype=jnp.float32),
    case(33, 3, 128, 128, dtype=jnp.int8),
    *(case(*shape, layers=2, dtype=dtype, shipped=True)
      for dtype in (jnp.bfloat16, jnp.int8) for shape in _SHIPPED),
)  # fmt: skip
