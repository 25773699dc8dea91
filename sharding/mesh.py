"""From a split of the work to a mesh of devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

AXES = ("data", "expert", "tensor")
BATCH = ("data", "expert")
"""Axes along which ranks lie, each with tokens of its own."""
TENSOR = "tensor"
EXPERTS = ("expert", "tensor")


@dataclass(frozen=True)
class Parallelism:
    data: int = 1
    expert: int = 1
    tensor: int = 1
    sequence: int = 1

    @property
    def num_devices(self) -> int:
        return self.data * self.tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        group = max(self.expert, self.tensor)
        return self.num_devices // group, group // self.tensor, self.tensor


def mesh(parallelism: Parallelism, devices: Sequence[Any]) -> Mesh:
    return Mesh(np.array(devices).reshape(parallelism.shape), AXES)


def first_devices(count: int) -> list[Any]:
    """As many devices; on a CPU, virtual ones are made if JAX has not begun yet."""
    if jax.config.jax_num_cpu_devices < count:
        try:
            jax.config.update("jax_num_cpu_devices", count)
        except RuntimeError:
            pass
    devices = jax.devices()
    if len(devices) < count:
        raise ValueError(
            f"{count} devices are asked for, and there are {len(devices)}. On a CPU, set "
            f"JAX_NUM_CPU_DEVICES={count} before JAX begins"
        )
    return devices[:count]
