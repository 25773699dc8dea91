"""How long a step takes: roofline for each operator, the fabric for each collective, two streams.

An operator takes the longer of its arithmetic and its memory traffic, at the efficiency of its
class. A step is one after the other, or two microbatches interleaved, whichever is shorter:

- decoding on chips that can be partitioned: one stream does attention with c cores, the other the
  MLPs with the rest, and c is chosen (16 of 24 in the paper, "re-balanced as context grows", §5);
  memory and network are not divided;
- elsewhere, and while prompts are read: one microbatch computes while the other's collectives run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial

from jaxserve.deployment.efficiency import CLASSES, CORES, KERNEL_SECONDS
from jaxserve.deployment.operators import Collective, Layers, Operator
from jaxserve.errors import ConfigError
from sharding import collective_time
from sharding.topology import Topology

Waits = dict[str, float]
"""Seconds by the resource that is waited for."""

NETWORK = ("dispatch", "combine", "exchange")


@dataclass(frozen=True)
class Time:
    """Seconds of one operator, with the resource that it waits for, and those on memory alone."""

    seconds: float
    resource: str
    memory: float = 0.0


@dataclass(frozen=True)
class LayerTime:
    """Seconds of a step's layers.

    Attributes:
        seconds: of all layers.
        waits: seconds by resource, of one microbatch after the other.
        microbatches: 1, or 2 interleaved.
        cores: that attention's stream has, where cores are divided.
    """

    seconds: float
    waits: Waits
    microbatches: int = 1
    cores: int | None = None


def check_chip(topology: Topology) -> None:
    """Refuses a chip whose rates are not known."""
    chip = topology.chip
    needed = ("bf16", "hbm_gb", "hbm_gbps")
    if missing := [field for field in needed if getattr(chip, field) is None]:
        raise ConfigError(
            f"{topology.name}: {', '.join(missing)} of {chip.name} are not known, and nothing "
            "can be predicted; describe it in a TOML file, or try cm384-decode or v5p:4x4x4"
        )


def eight_bit_peak(topology: Topology) -> float | None:
    """TOPS in INT8, or TFLOPS in FP8 where that is what the chip has; None: neither."""
    return topology.chip.int8 or topology.chip.fp8


def operator_time(op: Operator, topology: Topology, share: float = 1.0) -> Time:
    """Of an operator that has `share` of the cores."""
    eff, chip = CLASSES[op.kind], topology.chip
    if op.collective is not None:
        return Time(_collective(op.collective, topology, eff.network), f"{op.kind} network")
    peak = (eight_bit_peak(topology) if op.eight_bit else None) or chip.bf16
    assert peak is not None and chip.hbm_gbps is not None  # `check_chip` has seen to it
    if op.passing:
        return Time(op.passing / (share * eff.memory * chip.hbm_gbps * 1e9), "vector work")
    compute = op.flops / (share * eff.compute * peak * 1e12)
    memory = (op.weights + op.cache) / (eff.memory * chip.hbm_gbps * 1e9)
    bound = "compute" if compute >= memory else "memory"
    return Time(max(compute, memory), f"{op.kind} {bound}", memory)


def _collective(c: Collective, topology: Topology, efficiency: float) -> float:
    latency, a_byte = _line(c.kind, topology, c.n)
    return latency + a_byte * c.num_bytes / efficiency


@cache
def _line(kind: str, topology: Topology, n: int) -> tuple[float, float]:
    """Seconds of an empty collective, and more of them for a byte: its time is a straight line."""
    seconds = partial(getattr(collective_time, kind), topology, n=n)
    latency = seconds(0.0)
    return latency, seconds(1.0) - latency


def serial(operators: Iterable[Operator], topology: Topology, share: float = 1.0) -> float:
    """Seconds of one operator after the other."""
    operators = tuple(operators)
    kernels = sum(op.kind != "vector" for op in operators)
    return kernels * KERNEL_SECONDS + sum(
        operator_time(op, topology, share).seconds for op in operators
    )


def waits(operators: Iterable[Operator], topology: Topology, times: int = 1) -> Waits:
    """Of operators that run so many times."""
    found: defaultdict[str, float] = defaultdict(float)
    for op in operators:
        time = operator_time(op, topology)
        found[time.resource] += times * time.seconds
        found["starting kernels"] += times * KERNEL_SECONDS * (op.kind != "vector")
    return dict(found)


def added(*parts: Waits) -> Waits:
    """The sum, resource by resource."""
    resources = dict.fromkeys(resource for part in parts for resource in part)
    return {resource: sum(part.get(resource, 0.0) for part in parts) for resource in resources}


def _layer_waits(layers: tuple[Layers, ...], topology: Topology, microbatches: int) -> Waits:
    return added(*(waits(x.operators, topology, x.count * microbatches) for x in layers))


def whole(layers: tuple[Layers, ...], topology: Topology) -> LayerTime:
    """All tokens at once, one operator after the other."""
    seconds = sum(layer.count * serial(layer.operators, topology) for layer in layers)
    return LayerTime(seconds, _layer_waits(layers, topology, 1))


def divided(layers: tuple[Layers, ...], topology: Topology) -> LayerTime:
    """Two microbatches like `layers`, with cores for attention and cores for MLPs."""
    cores = CORES[topology.chip.name]

    @cache
    def seconds(c: int) -> float:
        return sum(2 * layer.count * _pair(layer, topology, c / cores) for layer in layers)

    low, high = 1, cores - 1
    while low < high:  # a stream's time is convex in its cores, and so are maxima and sums of those
        middle = (low + high) // 2
        if seconds(middle) <= seconds(middle + 1):
            high = middle
        else:
            low = middle + 1
    return LayerTime(seconds(low), _layer_waits(layers, topology, 2), 2, low)


def _pair(layer: Layers, topology: Topology, share: float) -> float:
    """Seconds of a layer in which one microbatch is in attention and the other in the MLP."""
    memory = sum(operator_time(op, topology).memory for op in layer.operators)
    attention = serial(layer.attention, topology, share)
    return max(attention, serial(layer.mlp, topology, 1 - share), memory)


def overlapped(layers: tuple[Layers, ...], topology: Topology) -> LayerTime:
    """Two microbatches like `layers`, one computing while the other communicates."""

    def seconds(layer: Layers) -> float:
        sent = [op for op in layer.operators if op.kind in NETWORK]
        computed = [op for op in layer.operators if op.kind not in NETWORK]
        return max(serial(sent, topology), serial(computed, topology))

    total = sum(2 * layer.count * seconds(layer) for layer in layers)
    return LayerTime(total, _layer_waits(layers, topology, 2), 2)
