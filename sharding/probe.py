"""Describes the machine that this process runs on, as a Topology."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sharding.fabric import GIB, Chip, Fabric
from sharding.hardware import named
from sharding.topology import Topology

_TPU_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}
_GPU_KINDS = ("H100", "H200", "B200", "H800")  # as in "NVIDIA H100 80GB HBM3"


def probe(devices: Sequence[Any] | None = None, *, measure: bool = False) -> Topology:
    """The topology of the devices of this program, all processes together.

    TPUs and GPUs are told by their kind and described as `hardware.named` does. Of a CPU host the
    devices are counted and its memory is shared among them. bf16, int8 and all bandwidths are None,
    or measured in a second or two with `measure=True`; fp8, and a network between hosts, stay None.

    Args:
        devices: described instead of those that JAX has; compile-only devices will do.
        measure: times products and a copy on all devices of this host at once. CPU only: the
            figures of others are known.

    Raises:
        ValueError: accelerators that nobody has described here; describe them in TOML.
    """
    devices = jax.devices() if devices is None else devices
    kind = str(devices[0].device_kind)
    if devices[0].platform == "tpu" and kind in _TPU_KINDS:
        return _tpu(_TPU_KINDS[kind], devices)
    if devices[0].platform in ("gpu", "cuda"):
        name = next((name for name in _GPU_KINDS if name in kind.split()), None)
        if name is not None:
            return _gpu(name.lower(), devices)
    if devices[0].platform == "cpu":
        return _cpu(devices, measure)
    raise ValueError(
        f"no description of {kind!r} (platform {devices[0].platform!r}): write one in TOML and "
        "read it with sharding.description.load"
    )


def _tpu(kind: str, devices: Sequence[Any]) -> Topology:
    low = [min(axis) for axis in zip(*(d.coords for d in devices), strict=True)]
    high = [max(axis) for axis in zip(*(d.coords for d in devices), strict=True)]
    shape = [b - a + 1 for a, b in zip(low, high, strict=True)]
    rank = 3 if kind in ("v5p", "tpu7x") else 2
    return named(f"{kind}:{'x'.join(map(str, shape[:rank]))}")


def _gpu(kind: str, devices: Sequence[Any]) -> Topology:
    slices = {getattr(d, "slice_index", 0) for d in devices}  # absent where there is but one
    hosts = {(getattr(d, "slice_index", 0), d.process_index) for d in devices}
    return named(f"{kind}:{len(slices)}x{len(hosts) // len(slices)}x{len(devices) // len(hosts)}")


def _cpu(devices: Sequence[Any], measure: bool) -> Topology:
    hosts = len({d.process_index for d in devices})
    local = len(devices) // hosts
    usable = _host_memory() / local / GIB  # devices of a host share it
    chip = Chip(f"CPU ({os.cpu_count()} cores)", usable_gib=round(usable, 3))
    memory = Fabric("memory", "crossbar", (local,), None, 0.0)
    if measure:
        here = [d for d in devices if d.process_index == jax.process_index()]
        chip = replace(chip, hbm_gbps=_copy_gbps(here), **_tflops(here))
        memory = replace(memory, gbps=chip.hbm_gbps)  # a collective copies through memory
    if hosts == 1:
        return Topology(f"cpu:{local}", "cpu", chip, (memory,), (f"device:{local}",))
    network = Fabric("network", "crossbar", (0,), None, 0.0)
    order = (f"host:{hosts}", f"device:{local}")
    return Topology(f"cpu:{hosts}x{local}", "cpu", chip, (memory, network), order)


def _host_memory() -> int:
    """Bytes of memory of this host."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemTotal")


def _copy_gbps(devices: Sequence[Any]) -> float:
    """GB/s of each device that copies while its neighbours do: bytes read and written."""
    size = 32 * 2**20
    arrays = [jax.device_put(jnp.ones(size, jnp.float32), device) for device in devices]
    return 2 * 4 * size / _seconds(lambda x: x + 1, arrays) / 1e9


def _tflops(devices: Sequence[Any]) -> dict[str, float]:
    """TFLOPS of each device at square products while its neighbours work."""
    n = 1024

    def product(x: jax.Array) -> jax.Array:
        whole = jnp.issubdtype(x.dtype, jnp.integer)
        sums = jnp.matmul(x, x, preferred_element_type=jnp.int32 if whole else jnp.float32)
        return sums.astype(x.dtype)

    def tflops(dtype: Any) -> float:
        arrays = [jax.device_put(jnp.ones((n, n), dtype), device) for device in devices]
        return 2 * n**3 / _seconds(product, arrays) / 1e12

    return {"bf16": tflops(jnp.bfloat16), "int8": tflops(jnp.int8)}


def _seconds(f: Callable[[jax.Array], jax.Array], arrays: list[jax.Array]) -> float:
    """The best of five calls on all arrays at once, each on its device and written in place."""
    step = jax.jit(f, donate_argnums=0)  # fresh pages would cost more than the copy
    best = float("inf")
    for attempt in range(6):  # the first compiles
        start = time.perf_counter()
        arrays = jax.block_until_ready([step(x) for x in arrays])
        if attempt:
            best = min(best, time.perf_counter() - start)
    return best
