"""Which named axes of weights are split over which axes of a mesh, while a model is served."""

from __future__ import annotations

from collections.abc import Mapping

from jax.sharding import PartitionSpec

from sharding.mesh import EXPERTS, TENSOR, Parallelism


def rules(parallelism: Parallelism) -> dict[str, str | tuple[str, ...]]:
    wide = ("heads", "kv_heads", "mlp", "shared_mlp", "vocab")
    experts = {"experts": EXPERTS} if parallelism.expert > 1 else {"expert_mlp": TENSOR}
    return {**dict.fromkeys(wide, TENSOR), **experts}


def divisors(parallelism: Parallelism) -> dict[str, int]:
    experts = {"experts": parallelism.expert}
    if parallelism.expert == 1:
        experts = {"expert_mlp": parallelism.tensor}
    wide = ("heads", "kv_heads", "mlp", "shared_mlp", "vocab")
    return {**dict.fromkeys(wide, parallelism.tensor), **experts}


def whole_sizes(sizes: Mapping[str, int], parallelism: Parallelism) -> dict[str, int]:
    """Sizes of every axis over all devices: a KV head that several devices need is there for each."""
    kv = sizes.get("kv_heads", 0)
    return {**sizes, "kv_heads": max(kv, parallelism.tensor)}


def local_sizes(sizes: Mapping[str, int], parallelism: Parallelism) -> dict[str, int]:
    whole = whole_sizes(sizes, parallelism)
    local = dict(whole)
    for axis, count in divisors(parallelism).items():
        if axis == "vocab" and whole[axis] % count:
            continue
        if axis in whole and count > 1:
            if whole[axis] % count:
                raise ValueError(f"{axis}: {whole[axis]} cannot be split over {count} devices")
            local[axis] = whole[axis] // count
    return local


def spec(
    axes: tuple[str, ...], sizes: Mapping[str, int], parallelism: Parallelism
) -> PartitionSpec:
    whole, local = whole_sizes(sizes, parallelism), local_sizes(sizes, parallelism)
    table = rules(parallelism)

    def place(axis: str):
        first = axis.split("*")[0]
        return table[first] if first in whole and whole[first] != local[first] else None

    return PartitionSpec(*map(place, axes))
