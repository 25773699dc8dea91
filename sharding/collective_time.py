"""How long collectives take on a topology: what its wires allow, and latencies on top.

A group is n devices whose ids are `stride` apart; in a mesh, an axis' stride is the product of the
axes that come after it. Fabrics work at once, so the slowest decides, and each moves only what has
to pass it: of an all-gather, what a node lacks comes over its network once and is passed on within.
Times are seconds, the least that is possible. Programs are slower; where somebody has measured, a
fabric knows (`Fabric.measured_gbps`).
"""

from __future__ import annotations

import math

from sharding.topology import Leg, Topology


def all_to_all(topology: Topology, num_bytes: float, n: int, stride: int = 1) -> float:
    """Each device has `num_bytes` for the group, an equal part for every member.

    Its own part is counted among those of its innermost neighbours: it passes memory all the same.
    Specification, section 1.4: V / bw in a crossbar, V * (1 - 8/N) / NIC beyond a node of 8, and
    V * A / 8w (4w without wrap) along the longest axis A of a torus.
    """

    def seconds(leg: Leg) -> float:
        members = leg.outer - (leg.inner if leg.inner > 1 else 0)
        sent = num_bytes * members / n
        if leg.fabric.kind == "crossbar":
            return sent / leg.fabric.rate
        together = leg.fabric.devices_per_node  # whatever group they are of, they send as much
        return sent * together * leg.fabric.crossing(leg.extents) / leg.fabric.rate

    legs = topology.legs(n, stride)
    latency = sum(_hops(leg) * leg.fabric.latency for leg in legs)
    return latency + max(map(seconds, legs), default=0.0)


def all_gather(topology: Topology, num_bytes: float, n: int, stride: int = 1) -> float:
    """Each device ends up with `num_bytes`, of which it had an nth."""

    def seconds(leg: Leg) -> float:
        lacking = num_bytes * (leg.outer - leg.inner) / n
        if leg.fabric.kind == "crossbar":
            return lacking / leg.inner / leg.fabric.rate  # members within share the fetching
        groups = leg.fabric.devices_per_node / leg.inner  # on the same links
        return lacking * groups / (_links(leg) * leg.fabric.rate)

    legs = topology.legs(n, stride)
    latency = sum(_rounds(leg) * leg.fabric.latency for leg in legs)
    return latency + max(map(seconds, legs), default=0.0)


def reduce_scatter(topology: Topology, num_bytes: float, n: int, stride: int = 1) -> float:
    """Each device has `num_bytes` and ends up with an nth of the sum: an all-gather backwards."""
    return all_gather(topology, num_bytes, n, stride)


def all_reduce(topology: Topology, num_bytes: float, n: int, stride: int = 1) -> float:
    """Each device has `num_bytes` and ends up with the sum: scattered, then gathered."""
    return 2 * all_gather(topology, num_bytes, n, stride)


def point_to_point(topology: Topology, num_bytes: float, source: int, target: int) -> float:
    """One device sends to another, over the innermost fabric that joins them."""
    for device in (source, target):
        topology.place(device)  # refuses what is not there
    if source == target:
        return 0.0
    for fabric in topology.fabrics:
        if fabric.size and source // fabric.size != target // fabric.size:
            continue
        hops = 1
        if fabric.kind == "torus":
            nodes = source // fabric.devices_per_node, target // fabric.devices_per_node
            hops = _distance(fabric.shape, fabric.wrap, *nodes)
        return hops * fabric.latency + num_bytes / fabric.rate
    raise AssertionError(f"{topology.name}: no fabric joins {source} and {target}")


def _links(leg: Leg) -> float:
    """Links that bring data into a node of a torus for one group, neighbours' groups considered."""
    return sum(
        leg.fabric.links(axis, extent) / stride
        for axis, (extent, stride) in enumerate(zip(leg.extents, leg.strides, strict=True))
        if extent > 1
    )


def _hops(leg: Leg) -> int:
    return leg.fabric.hops(leg.extents) if leg.extents else 1


def _rounds(leg: Leg) -> int:
    """Messages that wait for each other: doubling in a crossbar, a walk through a torus."""
    return _hops(leg) if leg.extents else math.ceil(math.log2(leg.outer / leg.inner))


def _distance(shape: tuple[int, ...], wrap: tuple[bool, ...], a: int, b: int) -> int:
    """Hops between two nodes of a torus, whose ids run fastest along the first axis."""
    hops = 0
    for extent, ring in zip(shape, wrap, strict=True):
        a, x = divmod(a, extent)
        b, y = divmod(b, extent)
        apart = abs(x - y)
        hops += min(apart, extent - apart) if ring else apart
    return hops
