"""Ready descriptions of hardware, by name.

=====================  =============================================================================
"cm384"                CloudMatrix384; "cm384-decode" and "cm384-prefill" are the paper's instances
"v5p:4x4x20"           slices of TPU v5e, v5p, v6e and tpu7x of any extent that exists
"h200:1x2x8"           slices x hosts x GPUs, also h100, h800 and b200
"cpu:8"                devices that share a host's memory
=====================  =============================================================================

Figures are those of the specification, section 1; a comment marks what is a placeholder or from
memory there, and what the specification does not have and is our own. `probe` describes what is
attached, `description.load` what is in a file of yours.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass

from sharding.fabric import Chip, Fabric
from sharding.topology import Topology

# --- CloudMatrix384 ------------------------------------------------------------------------------

DIE_910C = Chip("Ascend 910C die", bf16=376, int8=752, hbm_gb=64, hbm_gbps=1600)
"""FP8 is not there."""

_CM384_FABRICS = (
    Fabric("die", "crossbar", (2,), 270, 0.2),  # its latency is a placeholder there
    # All dies reach each other as fast as within a node, nearly (164 of 167 GB/s reading). What is
    # measured is writing, which is how dispatch and combine send.
    Fabric("ub", "crossbar", (768,), 196, 1.9, measured_gbps=135),
    Fabric("rdma", "crossbar", (0,), 25, 5.0),  # its latency is a placeholder there
)
_CM384_NODES = {
    "cm384": 48,
    "cm384-decode": 20,  # 160 NPUs, 320 dies: attention DP320, experts EP320
    "cm384-prefill": 2,  # 16 NPUs, 32 dies: one of six instances
}


def _cm384(name: str) -> Topology:
    order = (f"node:{_CM384_NODES[name]}", "npu:8", "die:2")
    return Topology(name, "npu", DIE_910C, _CM384_FABRICS, order)


# --- TPU -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Generation:
    """One kind of TPU.

    Attributes:
        chip: what one JAX device has.
        pod: extents of all that there is.
        link_gbps: ICI, one way, of each link.
        dcn_gbps: of each device, between slices.
        cube: axes close to rings where they are multiples of it, given a whole cube of it; or, of a
            2D torus, where they are as long as it.
        largest_job: chips that one program may have.
        devices_per_chip: in JAX.
    """

    chip: Chip
    pod: tuple[int, ...]
    link_gbps: float
    dcn_gbps: float
    cube: int
    largest_job: int
    devices_per_chip: int = 1


_HOP_US = 1.0  # 0.5 to 1 there, by way of illustration
_DCN_US = 10.0  # our own placeholder
_CORE_TO_CORE_GBPS = 600.0  # six ICI links (from memory)
_CORE_TO_CORE_US = 0.2  # our own placeholder

GENERATIONS = {
    "v5e": _Generation(
        Chip("TPU v5e", bf16=197, int8=393, hbm_gb=16, hbm_gbps=819, usable_gib=15.75),
        (16, 16), 50, 25 / 8, 16, 256,
    ),
    "v5p": _Generation(
        Chip("TPU v5p", bf16=459, int8=918, fp8=459, hbm_gb=95, hbm_gbps=2765, usable_gib=95.74),
        (16, 20, 28), 100, 50 / 8, 4, 6144,
    ),
    "v6e": _Generation(
        Chip("TPU v6e", bf16=918, int8=1836, fp8=918, hbm_gb=32, hbm_gbps=1638, usable_gib=31.25),
        (16, 16), 100, 100 / 8, 16, 256,
    ),
    # Two devices a chip: half of the chip's 2,307 and 4,614 TFLOPS, 192 GB and 7,380 GB/s each.
    "tpu7x": _Generation(
        Chip("TPU7x", bf16=1153.5, fp8=2307, hbm_gb=96, hbm_gbps=3690, usable_gib=94.75),
        (16, 24, 24), 100, 100 / 8 / 2, 4, 9216, devices_per_chip=2,
    ),
}  # fmt: skip


def _tpu(name: str) -> Topology:
    kind, _, extent = name.partition(":")
    generation = GENERATIONS[kind]
    shape = _slice(name, generation)
    if len(shape) == 2:
        wrap = tuple(n == generation.cube for n in shape)
    else:
        cubes = all(n >= generation.cube for n in shape)
        wrap = tuple(cubes and n % generation.cube == 0 for n in shape)
    devices = generation.devices_per_chip
    ici = Fabric(
        "ici", "torus", shape, generation.link_gbps, _HOP_US, wrap, devices_per_node=devices
    )
    cores = (Fabric("chip", "crossbar", (devices,), _CORE_TO_CORE_GBPS, _CORE_TO_CORE_US),)
    dcn = Fabric("dcn", "crossbar", (0,), generation.dcn_gbps, _DCN_US)
    order = [f"{axis}:{n}" for axis, n in zip("xyz", shape, strict=False)][::-1]
    order += [f"core:{devices}"] if devices > 1 else []
    fabrics = (*(cores if devices > 1 else ()), ici, dcn)
    return Topology(name, "tpu", generation.chip, fabrics, tuple(order), target=f"{kind}:{extent}")


def _slice(name: str, generation: _Generation) -> tuple[int, ...]:
    """Extents of a slice, refused where there is no such slice."""
    rank = len(generation.pod)
    shape = _extents(name, rank, "x".join("4" * rank))
    pod = sorted(generation.pod)
    even = all(n % 2 == 0 for n in shape[:2])  # hosts have 2x2 chips, or 2x4
    fits = all(n <= most for n, most in zip(sorted(shape), pod, strict=True))
    if even and fits and math.prod(shape) <= generation.largest_job:
        return shape
    near = [max(2, round(n / 2) * 2) if i < 2 else max(1, n) for i, n in enumerate(shape)]
    order = sorted(range(rank), key=lambda i: near[i])
    for i, most in zip(order, pod, strict=True):
        near[i] = min(near[i], most)
    while math.prod(near) > generation.largest_job:
        longest = max(range(rank), key=lambda i: near[i])
        near[longest] -= 2 if longest < 2 else 1
    raise ValueError(
        f"{name}: hosts of 2x2 chips make the first two extents even, a pod is "
        f"{'x'.join(map(str, generation.pod))} and a program has at most "
        f"{generation.largest_job} chips; the nearest is "
        f"{name.partition(':')[0]}:{'x'.join(map(str, near))}"
    )


# --- NVLink nodes --------------------------------------------------------------------------------

_NVLINK_US = 1.0  # our own placeholder
_NIC_US = 5.0  # our own placeholder
_NIC_GBPS = 50.0  # of each GPU (from memory)
_GPUS_PER_NODE = 8

GPUS = {
    "h100": Chip("H100 SXM", bf16=989, int8=1979, fp8=1979, hbm_gb=80, hbm_gbps=3350),
    "h200": Chip("H200 SXM", bf16=989, int8=1979, fp8=1979, hbm_gb=141, hbm_gbps=4800),
    "b200": Chip("B200 SXM", bf16=2250, int8=4500, fp8=4500, hbm_gb=180, hbm_gbps=8000),
    # An H100 whose NVLink is cut down.
    "h800": Chip("H800", bf16=989, int8=1979, fp8=1979, hbm_gb=80, hbm_gbps=3350),
}
_NVLINK_GBPS = {"h100": 450.0, "h200": 450.0, "b200": 900.0, "h800": 200.0}
_NVLINK_MEASURED = {"h800": 160.0}  # usable, of 200 (from memory)
_COMPILED_FOR = {"h200"}  # sharding/compile_only.py has a description of the card


def _gpu(name: str) -> Topology:
    kind, _, _ = name.partition(":")
    slices, hosts, gpus = _extents(name, 3, "1x1x8")
    if gpus > _GPUS_PER_NODE:
        raise ValueError(
            f"{name}: a host has at most {_GPUS_PER_NODE} GPUs; "
            f"try {kind}:{slices}x{hosts * -(-gpus // _GPUS_PER_NODE)}x{_GPUS_PER_NODE}"
        )
    nvlink = Fabric(
        "nvlink", "crossbar", (gpus,), _NVLINK_GBPS[kind], _NVLINK_US,
        measured_gbps=_NVLINK_MEASURED.get(kind),
    )  # fmt: skip
    nic = Fabric("nic", "crossbar", (0,), _NIC_GBPS, _NIC_US)
    order = (f"slice:{slices}", f"host:{hosts}", f"gpu:{gpus}")
    target = name if kind in _COMPILED_FOR else ""
    return Topology(name, "gpu", GPUS[kind], (nvlink, nic), order, target)


# --- CPU -----------------------------------------------------------------------------------------


def _cpu(name: str) -> Topology:
    (devices,) = _extents(name, 1, "8")
    memory = Fabric("memory", "crossbar", (devices,), None, 0.0)
    return Topology(name, "cpu", Chip("CPU"), (memory,), (f"device:{devices}",))


# --- by name -------------------------------------------------------------------------------------

EXAMPLES = (*_CM384_NODES, "v5e:16x16", "v5p:4x4x20", "v6e:16x16", "tpu7x:4x4x10", "h100:1x1x8",
            "h200:1x1x8", "b200:1x1x8", "h800:1x40x8", "cpu:8")  # fmt: skip
"""A name of each kind."""


def named(name: str) -> Topology:
    """The description of a machine; see the top of this file for names.

    Raises:
        ValueError: there is no such machine, or no slice of such extents.
    """
    kind, colon, _ = name.partition(":")
    if name in _CM384_NODES:
        return _cm384(name)
    builders = {**dict.fromkeys(GENERATIONS, _tpu), **dict.fromkeys(GPUS, _gpu), "cpu": _cpu}
    if colon and kind in builders:
        return builders[kind](name)
    known = [*_CM384_NODES, *builders]
    if name in builders:
        near = next(example for example in EXAMPLES if example.startswith(f"{name}:"))
    else:
        match = difflib.get_close_matches(name if name.startswith("cm") else kind, known, 1, 0.0)[0]
        near = next(e for e in EXAMPLES if e == match or e.startswith(f"{match}:"))
    raise ValueError(
        f"no hardware is called {name!r}; the nearest is {near!r}, known are {', '.join(known)} "
        "(with extents such as v5p:4x4x20), and a TOML file can describe any other"
    )


def _extents(name: str, rank: int, example: str) -> tuple[int, ...]:
    kind, _, text = name.partition(":")
    parts = text.split("x")
    if len(parts) != rank or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"{name!r}: expected {rank} whole numbers, such as {kind}:{example}")
    return tuple(map(int, parts))
