"""What hardware is made of: chips, and the networks between them.

Bandwidths are GB/s (10**9 bytes) one way, compute is TFLOPS (TOPS for int8), times are seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

GB = 1e9
GIB = 2**30
KINDS = ("crossbar", "torus")


@dataclass(frozen=True)
class Chip:
    """What one JAX device is: a die, a TPU device or a GPU.

    None: it has no such unit, or nobody knows.

    Attributes:
        bf16, int8, fp8: peak TFLOPS (TOPS) of dense products.
        hbm_gb: its memory in GB, as vendors count it.
        hbm_gbps: the memory's bandwidth.
        usable_gib: GiB that a program may fill, as the compiler for it reports.
    """

    name: str
    bf16: float | None = None
    int8: float | None = None
    fp8: float | None = None
    hbm_gb: float | None = None
    hbm_gbps: float | None = None
    usable_gib: float | None = None

    def __post_init__(self) -> None:
        for field in ("bf16", "int8", "fp8", "hbm_gb", "hbm_gbps", "usable_gib"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise ValueError(
                    f"chip {self.name!r}: {field}={value}; leave out what is not there or not known"
                )

    @property
    def memory_bytes(self) -> int | None:
        """Bytes that a program may fill: what the compiler says, else what the vendor says."""
        if self.usable_gib is not None:
            return int(self.usable_gib * GIB)
        return None if self.hbm_gb is None else int(self.hbm_gb * GB)


@dataclass(frozen=True)
class Fabric:
    """One level of network. See the specification's section 1.4.

    Attributes:
        kind: "crossbar", where all reach all at full rate, or "torus".
        shape: extents of a torus, first the one along which device ids run fastest; or (n,) for a
            crossbar of n devices, (0,) where it joins as many as there are.
        gbps: one way, of each device (crossbar) or each link (torus). None: not known.
        latency_us: of a message (crossbar) or a hop (torus).
        wrap: which axes of a torus close to rings.
        measured_gbps: what programs have reached of `gbps`, where somebody has measured.
        devices_per_node: devices that share a place of the torus, and its links.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    gbps: float | None
    latency_us: float
    wrap: tuple[bool, ...] = ()
    measured_gbps: float | None = None
    devices_per_node: int = 1

    def __post_init__(self) -> None:
        seen = f"fabric {self.name!r}"
        if self.kind not in KINDS:
            raise ValueError(f"{seen}: kind={self.kind!r}, expected one of {KINDS}")
        smallest = 0 if self.kind == "crossbar" else 1
        if not self.shape or min(self.shape) < smallest:
            raise ValueError(f"{seen}: shape={self.shape} has an extent below {smallest}")
        if self.kind == "crossbar" and (len(self.shape) != 1 or self.wrap):
            raise ValueError(f"{seen}: a crossbar has shape (devices,) and no wrap")
        if self.kind == "crossbar" and self.devices_per_node != 1:
            raise ValueError(f"{seen}: a crossbar's rate is each device's; devices_per_node is 1")
        if self.kind == "torus" and len(self.wrap) != len(self.shape):
            raise ValueError(f"{seen}: wrap={self.wrap} says one thing for each of {self.shape}")
        if self.devices_per_node < 1 or self.latency_us < 0:
            raise ValueError(f"{seen}: {self.devices_per_node=}, {self.latency_us=}")
        for rate in (self.gbps, self.measured_gbps):
            if rate is not None and not rate > 0:
                raise ValueError(f"{seen}: {rate} GB/s; leave out what is not known")

    @property
    def size(self) -> int:
        """Devices that it joins; 0 for as many as there are."""
        return math.prod(self.shape) * self.devices_per_node

    @property
    def latency(self) -> float:
        """Seconds."""
        return self.latency_us * 1e-6

    @property
    def rate(self) -> float:
        """Bytes a second, one way, of a device or a link: as measured, else as built.

        Raises:
            ValueError: nobody knows.
        """
        known = self.measured_gbps or self.gbps
        if known is None:
            raise ValueError(
                f"the bandwidth of {self.name!r} is not known: measure it with "
                "probe(measure=True), or describe the hardware in TOML"
            )
        return known * GB

    def links(self, axis: int, extent: int) -> int:
        """Links into each device of a line of `extent` nodes along an axis, at the worst place."""
        ring = self.wrap[axis] and extent == self.shape[axis] and extent > 2
        return 2 if ring else 1

    def hops(self, extents: tuple[int, ...]) -> int:
        """Hops between the two nodes of a block that are the furthest apart."""
        lines = enumerate(extents)
        return sum(n // 2 if self.links(axis, n) == 2 else n - 1 for axis, n in lines)

    def crossing(self, extents: tuple[int, ...]) -> float:
        """Bytes over the busiest link of a block for a byte that each node sends evenly to all.

        A cut in the middle of an axis of A nodes lets half of A/2 nodes' bytes through, by one link
        or, in a ring, by two: A/4 or A/8.
        """
        lines = enumerate(extents)
        return max((n / (4 * self.links(axis, n)) for axis, n in lines if n > 1), default=0.0)

    def block(self, nodes: int, strides: tuple[int, ...] = ()) -> tuple[int, ...]:
        """How many nodes along each axis: the block of neighbours that talk to each other fastest.

        Args:
            strides: nodes from one of them to the next along each axis, where others are between.

        Raises:
            ValueError: no block of that many nodes divides the torus.
        """
        strides = strides or (1,) * len(self.shape)
        room = tuple(n // stride for n, stride in zip(self.shape, strides, strict=True))
        blocks = [block for block in _blocks(room) if math.prod(block) == nodes]
        if not blocks:
            sizes = {math.prod(block) for block in _blocks(room)}
            near = min(sizes, key=lambda size: (abs(size - nodes), size))
            raise ValueError(
                f"no block of {nodes} nodes divides {self.name!r}, of which {room} are to be had; "
                f"the nearest has {near}"
            )

        def cost(block: tuple[int, ...]) -> tuple[float, int, tuple[int, ...]]:
            used = [axis for axis, n in enumerate(block) if n > 1]
            span = tuple(
                n * stride if n > 1 else 1 for n, stride in zip(block, strides, strict=True)
            )
            gather = sum(self.links(axis, span[axis]) for axis in used)
            return self.crossing(span), -gather, block[::-1]  # ties: along the fastest ids

        return min(blocks, key=cost)


def _blocks(room: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Every tuple of extents that divide those of the room."""
    if not room:
        yield ()
        return
    for rest in _blocks(room[1:]):
        yield from ((n, *rest) for n in range(1, room[0] + 1) if room[0] % n == 0)
