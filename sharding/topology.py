"""A machine as fabrics around chips, described once.

`sharding.hardware.named` has ready descriptions, `sharding.description.load` reads a user's own,
and `sharding.probe.probe` describes the machine that it runs on. `sharding.collective_time` says
how long its collectives take, and `sharding.mesh` lays meshes on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sharding.fabric import Chip, Fabric

PLATFORMS = ("cpu", "gpu", "tpu", "npu")


@dataclass(frozen=True)
class Leg:
    """What a group of devices does on one fabric of those that it spans.

    Attributes:
        inner: members that the fabrics below have joined already.
        outer: members that this fabric joins.
        extents: of a torus, the block from the group's first node to its last; () for a crossbar.
        strides: nodes from one member to the next along each axis of it. As many groups, each with
            the same to do, lie side by side there and share the links.
    """

    fabric: Fabric
    inner: int
    outer: int
    extents: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()


@dataclass(frozen=True)
class Topology:
    """Devices of one kind, and what joins them.

    Attributes:
        name: as `named` takes it.
        platform: "cpu", "gpu", "tpu" as JAX says; "npu" for what is modelled only.
        fabrics: innermost first.
        order: parts of a device id, outermost first: ("node:48", "npu:8", "die:2") makes
            id = node * 16 + npu * 2 + die.
        target: what `compile_only.mesh` calls it; "" where there is no compiler.
    """

    name: str
    platform: str
    chip: Chip
    fabrics: tuple[Fabric, ...]
    order: tuple[str, ...]
    target: str = ""

    def __post_init__(self) -> None:
        if self.platform not in PLATFORMS:
            raise ValueError(
                f"{self.name}: platform={self.platform!r}, expected one of {PLATFORMS}"
            )
        if not self.fabrics:
            raise ValueError(f"{self.name}: no fabrics; even devices of one host are joined by one")
        sizes = [fabric.size or math.inf for fabric in self.fabrics]
        if sizes != sorted(sizes):
            seen = ", ".join(f"{f.name} joins {f.size or 'all'}" for f in self.fabrics)
            raise ValueError(f"{self.name}: fabrics come innermost first, but {seen}")
        if sizes[-1] < self.num_devices:
            raise ValueError(
                f"{self.name}: {self.fabrics[-1].name} joins {self.fabrics[-1].size} devices, and "
                f"{'·'.join(self.order)} are {self.num_devices}; add the fabric that joins them all"
            )

    @property
    def parts(self) -> dict[str, int]:
        """Parts of a device id and how many there are of each, outermost first."""
        parts = {}
        for entry in self.order:
            name, _, count = entry.partition(":")
            if not name.isidentifier() or not count.isdecimal() or int(count) < 1:
                raise ValueError(f"{self.name}: {entry!r} in order; expected such as 'node:48'")
            parts[name] = int(count)
        if not parts or len(parts) != len(self.order):
            raise ValueError(f"{self.name}: {self.order=} needs one or more parts, each named once")
        return parts

    @property
    def num_devices(self) -> int:
        return math.prod(self.parts.values())

    def device_id(self, **place: int) -> int:
        """The id of a device by its place, as `device_id(node=3, npu=1, die=0)`."""
        parts = self.parts
        if place.keys() != parts.keys():
            raise ValueError(f"{self.name}: a device is told by {list(parts)}, not {list(place)}")
        device = 0
        for part, count in parts.items():
            if not 0 <= place[part] < count:
                raise ValueError(f"{self.name}: {part}={place[part]}, expected 0 to {count - 1}")
            device = device * count + place[part]
        return device

    def place(self, device: int) -> dict[str, int]:
        """Where a device is; undoes `device_id`."""
        if not 0 <= device < self.num_devices:
            raise ValueError(f"{self.name}: device {device}, expected 0 to {self.num_devices - 1}")
        place = {}
        for part, count in reversed(self.parts.items()):
            device, place[part] = divmod(device, count)
        return {part: place[part] for part in self.parts}

    def legs(self, n: int, stride: int = 1) -> tuple[Leg, ...]:
        """The fabrics that n devices span whose ids are `stride` apart, innermost first.

        Raises:
            ValueError: there are not that many devices, or no block of a torus has that many.
        """
        if n < 1 or stride < 1 or n * stride > self.num_devices:
            raise ValueError(
                f"{self.name}: {n} devices, {stride} apart, are not within {self.num_devices}"
            )
        legs, inner = [], 1
        for fabric in self.fabrics:
            outer = min(n, max(1, fabric.size // stride)) if fabric.size else n
            if outer > inner:
                legs.append(_leg(fabric, inner, outer, stride))
            inner = outer
        return tuple(legs)

    def torus(self) -> Fabric | None:
        """Its torus, where it has one."""
        return next((fabric for fabric in self.fabrics if fabric.kind == "torus"), None)


def _leg(fabric: Fabric, inner: int, outer: int, stride: int) -> Leg:
    if fabric.kind == "crossbar":
        return Leg(fabric, inner, outer)
    if outer % inner:
        raise ValueError(f"{outer} devices do not fill nodes of {inner} in {fabric.name!r}")
    strides = fabric.block(max(1, stride // fabric.devices_per_node))
    counts = fabric.block(outer // inner, strides)
    spans = (n * s if n > 1 else 1 for n, s in zip(counts, strides, strict=True))
    return Leg(fabric, inner, outer, tuple(spans), strides)
