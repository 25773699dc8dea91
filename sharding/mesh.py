"""How work is split, and the mesh on which it is: one list of devices, seen as three axes.

Batch goes over ("data", "expert"), heads over "tensor", experts over ("expert", "tensor") and are
replicated over "data"; `sharding.rules` has the tables. Devices that talk the most lie the closest:
those of the tensor axis, then those of the expert axis.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, Sharding

from sharding.fabric import Fabric
from sharding.multihost import num_processes
from sharding.topology import Topology

AXES = ("data", "expert", "tensor")
BATCH = ("data", "expert")
"""Where ranks lie, each with tokens of its own."""
EXPERTS = ("expert", "tensor")
TENSOR = "tensor"


@dataclass(frozen=True)
class Parallelism:
    """Into how many parts each kind of work is split.

    The paper's decode instance is `Parallelism(data=320, expert=320)`, its prefill instance
    `Parallelism(expert=32, tensor=32, sequence=32)`.

    Attributes:
        data: replicas of attention and dense layers, each with a part of the batch.
        expert: devices over which experts are spread: a multiple of `tensor` that divides the
            number of devices. 1: experts are split by width over `tensor`, like any MLP.
        tensor: devices that share the heads and the width of each replica.
        sequence: 1, or `tensor`: outside of attention those devices split tokens instead.
    """

    data: int = 1
    expert: int = 1
    tensor: int = 1
    sequence: int = 1

    def __post_init__(self) -> None:
        for name in ("data", "expert", "tensor", "sequence"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: a split is a whole number from 1 on")
        if self.expert not in self._workable_experts():
            near = _nearest(self.expert, self._workable_experts())
            raise ValueError(
                f"expert={self.expert} must be 1, or a multiple of tensor={self.tensor} that "
                f"divides the data·tensor={self.num_devices} devices; the nearest is {near}"
            )
        if self.sequence not in (1, self.tensor):
            raise ValueError(
                f"sequence={self.sequence}: tokens are split over the devices of the tensor axis "
                f"or not at all; the nearest is {_nearest(self.sequence, (1, self.tensor))}"
            )

    @classmethod
    def of(
        cls,
        data: int | None = None,
        expert: int | None = None,
        tensor: int | None = None,
        sequence: int | None = None,
    ) -> Parallelism:
        """What was asked for; of a data axis that was not, as much as the experts need."""
        expert, tensor = expert or 1, tensor or 1
        if data is None:
            data = -(-expert // tensor)  # rounded up, so that the error names what was asked
        return cls(data, expert, tensor, sequence or 1)

    @property
    def num_devices(self) -> int:
        return self.data * self.tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sizes of the axes of the mesh."""
        expert = max(self.expert, self.tensor)
        return self.num_devices // expert, expert // self.tensor, self.tensor

    @property
    def abstract_mesh(self) -> AbstractMesh:
        """The mesh's axes and sizes, without devices."""
        return AbstractMesh(self.shape, AXES)

    def _workable_experts(self) -> set[int]:
        return {1} | {self.tensor * k for k in range(1, self.data + 1) if self.data % k == 0}


def mesh(
    parallelism: Parallelism, topology: Topology, devices: Sequence[Any] | None = None
) -> Mesh:
    """The mesh ("data", "expert", "tensor") with each axis on the fastest fabric that is left.

    Args:
        devices: those to take, present or compile-only; None: those that JAX has. They need not be
            of the topology's kind: a modelled machine's program runs on any.

    Raises:
        ValueError: there are too few devices, or the split does not fit the topology's fabrics.
    """
    places = layout(parallelism, topology)
    devices = _in_order(jax.devices() if devices is None else devices, topology)
    if places.max() >= len(devices):
        raise ValueError(
            f"{parallelism} needs {parallelism.num_devices} devices of {topology.name}, up to "
            f"number {places.max()}, and there are {len(devices)}; on CPU, "
            f"JAX_NUM_CPU_DEVICES={topology.num_devices} makes as many"
        )
    return Mesh(np.array(devices, object)[places], AXES)


_VIRTUAL = 64
"""Devices that a CPU makes of itself at most: hundreds would wait for each other for ever."""


def first_devices(count: int) -> list[Any]:
    """As many of JAX's devices; a CPU makes itself virtual ones if JAX has not begun yet.

    Of several processes (sharding/multihost.py) each makes its share of them.

    Raises:
        ValueError: there are fewer.
    """
    share = -(-count // num_processes())
    if jax.config.values["jax_num_cpu_devices"] < share <= _VIRTUAL:
        with contextlib.suppress(RuntimeError):  # it has begun: there are as many as there are
            jax.config.update("jax_num_cpu_devices", share)
    devices = jax.devices()
    if len(devices) < count:
        raise ValueError(
            f"{count} devices are asked for, and there are {len(devices)} of platform "
            f"{devices[0].platform!r}; on CPU, JAX_NUM_CPU_DEVICES={count} makes as many"
        )
    return devices[:count]


def put(x: np.ndarray, sharding: Sharding) -> jax.Array:
    """A host array on devices, of which other processes may have some; compiles nothing."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def layout(parallelism: Parallelism, topology: Topology) -> np.ndarray:
    """Device ids of a topology, in the shape of the mesh: [data, expert, tensor].

    Raises:
        ValueError: the split does not fit the topology's fabrics.
    """
    n = parallelism.num_devices
    if n > topology.num_devices:
        raise ValueError(
            f"{parallelism} needs data·tensor={n} devices, and {topology.name} has "
            f"{topology.num_devices}; the nearest is "
            f"data={max(1, topology.num_devices // parallelism.tensor)}"
        )
    torus = topology.torus()
    if torus is None:
        _check_straddling(parallelism, topology)
        return np.arange(n).reshape(parallelism.shape)
    data, expert, tensor = parallelism.shape
    slices = -(-n // torus.size)
    if data % slices:
        raise ValueError(
            f"{topology.name}: the batch is split over {slices} slices, so data={data} of the mesh "
            f"must be a multiple of {slices}"
        )
    one = _torus_layout((data // slices, expert, tensor), torus)
    return np.concatenate([one + i * torus.size for i in range(slices)])


def _check_straddling(parallelism: Parallelism, topology: Topology) -> None:
    """Refuses devices of a tensor axis of which some share a fast fabric and others do not."""
    tensor = parallelism.tensor
    for fabric in topology.fabrics:
        size = fabric.size
        inside = size == 0 or parallelism.num_devices <= size
        if not inside and size % tensor and tensor % size:
            workable = [k for k in range(1, size + 1) if size % k == 0] + [
                size * -(-tensor // size)
            ]
            raise ValueError(
                f"tensor={tensor} does not divide the {size} devices that {fabric.name!r} of "
                f"{topology.name} joins, nor they it; the nearest is {_nearest(tensor, workable)}"
            )


def _torus_layout(shape: tuple[int, int, int], torus: Fabric) -> np.ndarray:
    """Ids of a block of a torus in the shape of the mesh.

    Each axis, innermost first, takes devices of a node while there are some, and then the block of
    nodes that talk to each other the fastest. Neighbours on an axis are neighbours in the torus.
    """
    ids = np.zeros((), int)
    strides, core, left = (1,) * len(torus.shape), 1, torus.devices_per_node
    node_stride = np.cumprod((1, *torus.shape[:-1]))
    for size in reversed(shape):
        cores = math.gcd(size, left)
        block = torus.block(size // cores, strides)
        nodes = np.array(list(_snake(block))) * strides @ node_stride  # [size / cores]
        axis = nodes[:, None] * torus.devices_per_node + np.arange(cores) * core
        ids = axis.reshape(size, *(1,) * ids.ndim) + ids
        strides = tuple(s * n for s, n in zip(strides, block, strict=True))
        core, left = core * cores, left // cores
    return ids


def _snake(block: tuple[int, ...]) -> Iterable[tuple[int, ...]]:
    """Places of a block, each next to the one before it, the first axis running fastest."""
    if not block:
        yield ()
        return
    line = [range(block[0]), range(block[0] - 1, -1, -1)]
    for i, rest in enumerate(_snake(block[1:])):
        yield from ((x, *rest) for x in line[i % 2])


def _in_order(devices: Sequence[Any], topology: Topology) -> list[Any]:
    """Devices by the ids that the topology gives them."""
    torus = topology.torus()
    if torus is None or getattr(devices[0], "platform", "") != "tpu":
        return sorted(devices, key=lambda d: (d.process_index, d.id))

    def place(device: Any) -> tuple[Any, ...]:
        slice_index = getattr(device, "slice_index", 0)  # absent where there is but one
        return slice_index, *device.coords[::-1], device.core_on_chip

    return sorted(devices, key=place)


def _nearest(seen: int, workable: Iterable[int]) -> int:
    return min(workable, key=lambda n: (abs(n - seen), n))
