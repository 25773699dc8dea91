"""What a device can do at most, measured on it, and the least time that a case could take there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from benchmarks.stopwatch import Launch, race
from kernels_pallas import cpu
from kernels_pallas.op import Cost

_MIB = 2**20


@dataclass(frozen=True)
class Sizes:
    """Of the arrays that rates are measured with; small ones are for trying the program out."""

    bytes: int
    side: int  # of a square matrix

    @classmethod
    def of(cls, platform: str, *, smoke: bool = False) -> Sizes:
        if smoke:
            return cls(4 * _MIB, 128)
        return cls(256 * _MIB, 2048) if platform == "cpu" else cls(1024 * _MIB, 8192)


@dataclass(frozen=True)
class Floor:
    """The least seconds of a case: whatever moves, and whatever is multiplied."""

    bytes: float
    flops: float

    @property
    def seconds(self) -> float:
        return max(self.bytes, self.flops)

    @property
    def bound(self) -> str:
        return "memory" if self.bytes >= self.flops else "arithmetic"


@dataclass(frozen=True)
class Rates:
    """Per second, of the best of many tries: a ceiling that noise does not lower.

    Attributes:
        copy: bytes that are read and written by adding one to an array.
        read: bytes that are read by taking the largest of an array, or by a product with a vector.
        matmul: operations of a square product, by element type, in the precision that XLA takes
            by default (TF32 on a GPU for float32, bfloat16 on a TPU).
    """

    copy: float
    read: float
    matmul: Mapping[str, float]

    def floor(self, cost: Cost) -> Floor:
        """The floor is that of the better of both ways to move bytes. A type whose products were
        not measured counts as float32."""
        rate = self.matmul.get(cost.dtype, self.matmul["float32"])
        return Floor(cost.bytes / max(self.copy, self.read), cost.flops / rate)

    def record(self) -> dict[str, Any]:
        found = asdict(self)
        return {
            "copy_gb_s": round(found["copy"] / 1e9, 2),
            "read_gb_s": round(found["read"] / 1e9, 2),
            "matmul_tflop_s": {k: round(v / 1e12, 4) for k, v in found["matmul"].items()},
        }


def measure(
    device: Any, sizes: Sizes, seconds: float = 1.0, *, done: Callable[[], Any] = lambda: None
) -> Rates:
    """The device's rates. Where several ways lead to a product, the best counts.

    Args:
        done: is called after each rate.
    """
    words = jax.device_put(jnp.zeros(sizes.bytes // 4, jnp.int32), device)
    pieces = words.reshape(-1, 4096)
    moves = {
        "copy": _launch(lambda x: x + 1, words),
        "read": _launch(lambda x: x.max(1), pieces),
    }
    if device.platform == "cpu" and cpu.available():  # XLA's own loops read more slowly
        matrix = jax.device_put(jnp.zeros(pieces.shape), device)
        moves["native"] = _launch(lambda x, w: cpu.linear(x, (w,)), jnp.ones((1, 4096)), matrix)
    took = race(moves, seconds)
    read = min(times.best for name, times in took.items() if name != "copy")
    matmul = dict[str, float]()
    done()
    for dtype in ("bfloat16", "int8", "float32"):
        ways = _products(device, sizes.side, dtype)
        best = min(times.best for times in race(ways, seconds / 2).values())
        matmul[dtype] = 2.0 * sizes.side**3 / best
        done()
    return Rates(2 * sizes.bytes / took["copy"].best, sizes.bytes / read, matmul)


def _products(device: Any, side: int, dtype: str) -> dict[str, Launch]:
    x, w = (_random(device, side, dtype, seed) for seed in range(2))
    total = jnp.int32 if dtype == "int8" else jnp.float32

    def product(x: Array, w: Array) -> Array:
        sums = lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=total)
        return sums if dtype == "int8" else sums.astype(x.dtype)

    ways = {"xla": _launch(product, x, w)}
    if device.platform == "cpu" and cpu.available():
        scales = (jnp.ones(side),) if dtype == "int8" else ()
        y = x.astype(jnp.float32)
        ways["native"] = _launch(lambda y, w, *s: cpu.linear(y, (w,), scales=s), y, w, *scales)
    return ways


def _random(device: Any, side: int, dtype: str, seed: int) -> Array:
    key = jax.random.key(seed)  # random: zeros take less power, and so run at a higher clock
    if dtype == "int8":
        x = jax.random.randint(key, (side, side), -127, 128, jnp.int8)
    else:
        x = jax.random.normal(key, (side, side), dtype)
    return jax.device_put(x, device)


def _launch(function: Callable[..., Any], *args: Array) -> Launch:
    run = jax.jit(function)
    return Launch(lambda: run(*args), jax.block_until_ready)
