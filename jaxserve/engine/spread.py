"""A program of one rank, run by all ranks of a mesh at once.

A *rank* is a data-parallel replica: a scheduler, a pool of pages and a batch of its own. Its tokens
lie on the devices of a place along the axes "data" and "expert"; heads and wide layers are split
over the axis "tensor" (sharding/mesh.py). The program is traced once, as one device sees it, with
shapes of its own; where devices must hear of each other is in the operations (models/parallel.py).
Arrays of the host come stacked, a row for each rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxserve.engine.signature import Program, empty_state
from jaxserve.plan import Plan
from kernels_pallas.paged_attention.codec import StaticInt8Pages
from sharding.mesh import BATCH, TENSOR, put

_RANKS = P(BATCH)


def spread(program: Program, plan: Plan, mesh: Mesh) -> Program:
    """The program over the whole mesh; weights know their places already."""
    specs = tuple(map(_specs, program.takes, program.arguments, [plan] * len(program.takes)))
    known = dict(zip(program.takes, specs, strict=True)) | {"state": _RANKS, "drawn": P()}
    results = [known[kind] for kind in program.gives]

    def one_rank(*arguments: Any) -> Any:
        local = [
            jax.tree.map(lambda x: x[0], argument) if kind == "host" else argument
            for kind, argument in zip(program.takes, arguments, strict=True)
        ]
        out = program.function(*local)
        outs = out if len(program.gives) > 1 else (out,)
        shared = [
            jax.tree.map(_gathered, o) if kind == "drawn" else o
            for kind, o in zip(program.gives, outs, strict=True)
        ]
        return tuple(shared) if len(shared) > 1 else shared[0]

    function = jax.shard_map(
        one_rank, mesh=mesh, in_specs=specs,
        out_specs=tuple(results) if len(results) > 1 else results[0], check_vma=False,
    )  # fmt: skip
    wholes = [
        _whole(mesh, *each) for each in zip(program.takes, program.arguments, specs, strict=True)
    ]
    return program._replace(function=function, arguments=tuple(wholes))


def empty_states(plan: Plan, cfg: Any, mesh: Mesh) -> Any:
    """`empty_state` of all ranks, each on its own devices."""
    state = jax.eval_shape(lambda: empty_state(plan, cfg))

    def zeros() -> Any:
        return jax.tree.map(lambda a: jax.numpy.zeros(a.shape, a.dtype), wholes)

    wholes = tuple(
        _whole(mesh, kind, part, _specs(kind, part, plan))
        for kind, part in zip(("kv", "state"), state, strict=True)
    )
    places = jax.tree.map(lambda a: a.sharding, wholes)
    return jax.jit(zeros, out_shardings=places)()


def stacked(each: Sequence[Any], mesh: Mesh) -> Any:
    """The ranks' trees of host arrays as one tree, a row for each rank."""
    place = NamedSharding(mesh, _RANKS)

    def join(*arrays: Any) -> Any:
        whole = np.stack(arrays)
        return whole if place.is_fully_addressable else put(whole, place)

    return jax.tree.map(join, *each)


def everywhere(tree: Any, mesh: Mesh) -> Any:
    """Host arrays, whole on every device."""
    place = NamedSharding(mesh, P())
    return jax.tree.map(lambda x: put(x, place), tree)


def on_devices(each: Sequence[Any], mesh: Mesh) -> Any:
    """`stacked`, copied to the devices once for many steps."""
    return jax.device_put(stacked(each, mesh), NamedSharding(mesh, _RANKS))


def _gathered(x: Any) -> Any:
    """Every rank's rows, on every device."""
    return lax.all_gather(x, BATCH, axis=0, tiled=True)


def _specs(kind: str, argument: Any, plan: Plan) -> Any:
    """How the mesh holds an argument, leaf by leaf."""
    if kind == "params":
        return jax.tree.map(lambda a: a.sharding.spec, argument)
    if kind == "kv":
        k, v = (_pages(pages, plan) for pages in (argument.k, argument.v))
        return replace(argument, k=k, v=v, load=jax.tree.map(lambda _: _RANKS, argument.load))
    if kind == "table":
        return jax.tree.map(lambda _: P(), argument)
    return jax.tree.map(lambda _: _RANKS, argument)


def _pages(pages: Any, plan: Plan) -> Any:
    """Pages [L, P, K, ...] belong to a rank, and their heads to its devices where they are split.

    Latent attention has one head, which all of them keep.
    """
    heads = TENSOR if plan.splits_kv_heads else None
    if isinstance(pages, StaticInt8Pages):  # scales [L, K, W] are the same for all ranks
        return StaticInt8Pages(P(None, BATCH, heads), P(None, heads))
    return jax.tree.map(lambda _: P(None, BATCH, heads), pages)


def _whole(mesh: Mesh, kind: str, argument: Any, specs: Any) -> Any:
    """Shapes over all devices, with their places, from what one device has."""

    def leaf(a: Any, spec: P) -> jax.ShapeDtypeStruct:
        if kind == "params":
            return a  # given as a whole
        shape = (mesh_size(mesh, BATCH), *a.shape) if kind == "host" else _grown(mesh, a, spec)
        return jax.ShapeDtypeStruct(shape, a.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(leaf, argument, specs)


def _grown(mesh: Mesh, a: Any, spec: P) -> tuple[int, ...]:
    axes = (*spec, *(None,) * (len(a.shape) - len(spec)))
    return tuple(n * mesh_size(mesh, axis) for n, axis in zip(a.shape, axes, strict=True))


def mesh_size(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    """Devices along some axes of a mesh."""
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return int(np.prod([mesh.shape[name] for name in names], dtype=int))
