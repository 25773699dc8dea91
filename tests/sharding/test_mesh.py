"""Splits that fit, splits that do not, and which devices end up beside each other."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from sharding import compile_only
from sharding.fabric import Chip, Fabric
from sharding.hardware import named
from sharding.mesh import Parallelism, layout, mesh
from sharding.topology import Topology


@pytest.mark.parametrize(
    "parallelism, shape",
    [
        (Parallelism(), (1, 1, 1)),
        (Parallelism(data=320, expert=320), (1, 320, 1)),  # the paper's decode instance
        (Parallelism(expert=32, tensor=32, sequence=32), (1, 1, 32)),  # and its prefill instance
        (Parallelism(data=4, tensor=2), (4, 1, 2)),
        (Parallelism(data=4, expert=4, tensor=2), (2, 2, 2)),
        (Parallelism.of(expert=8), (1, 8, 1)),
        (Parallelism.of(expert=8, tensor=4), (1, 2, 4)),
        (Parallelism.of(tensor=4), (1, 1, 4)),
    ],
)
def test_axes_of_a_split(parallelism: Parallelism, shape: tuple[int, ...]):
    assert parallelism.shape == shape
    assert np.prod(shape) == parallelism.num_devices


@pytest.mark.parametrize(
    "split, said",
    [
        ({"data": 320, "expert": 300}, "data·tensor=320 devices; the nearest is 320"),
        ({"data": 8, "expert": 3, "tensor": 2}, "multiple of tensor=2"),
        ({"data": 8, "expert": 6, "tensor": 2}, "the nearest is 4"),
        ({"tensor": 4, "sequence": 2}, "the nearest is 1"),
        ({"tensor": 8, "sequence": 6}, "the nearest is 8"),
        ({"data": 0}, "data=0: a split is a whole number"),
        ({"tensor": 2.0}, "tensor=2.0"),
    ],
)
def test_splits_that_are_refused(split: dict, said: str):
    with pytest.raises(ValueError) as error:
        Parallelism(**split)
    assert said in str(error.value)


def test_experts_alone_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="expert=10 must be 1, or a multiple of tensor=4"):
        Parallelism.of(expert=10, tensor=4)


def test_a_topology_that_is_too_small_is_named():
    with pytest.raises(ValueError, match=r"16 devices, and h100:1x1x8 has 8; .* data=2"):
        layout(Parallelism(data=4, tensor=4), named("h100:1x1x8"))


def test_tensor_groups_do_not_straddle_nodes():
    gpus = named("h100:1x3x8")
    with pytest.raises(
        ValueError, match=r"tensor=6 does not divide the 8 .*'nvlink'.* nearest is 4"
    ):
        layout(Parallelism(data=4, tensor=6), gpus)
    assert layout(Parallelism(tensor=6), gpus).tolist() == [[list(range(6))]]
    assert layout(Parallelism(tensor=24), gpus).shape == (1, 1, 24)


def test_crossbars_have_the_tensor_axis_innermost():
    ids = layout(Parallelism(data=8, expert=8, tensor=4), named("h100:1x4x8"))
    assert ids.shape == (4, 2, 4)
    nodes = ids // 8
    assert (nodes == nodes[:, :1, :1]).all()  # a node holds an expert group and its tensor groups
    decode = layout(Parallelism(data=320, expert=320), named("cm384-decode"))
    assert decode.ravel().tolist() == list(range(320))


SPLITS = [
    ("v5e:16x16", (64, 1, 4)),
    ("v5e:16x16", (1, 16, 16)),
    ("v5e:8x8", (4, 2, 8)),
    ("v6e:16x16", (1, 256, 1)),
    ("v5p:4x4x20", (1, 320, 1)),
    ("v5p:4x4x20", (10, 1, 32)),  # which mesh_utils.create_device_mesh does not find
    ("v5p:4x4x20", (5, 2, 32)),
    ("v5p:4x4x4", (2, 2, 8)),  # a part of it
    ("tpu7x:4x4x10", (1, 320, 1)),
    ("tpu7x:4x4x10", (10, 8, 4)),
    ("tpu7x:4x4x12", (8, 3, 16)),
]


def split(shape: tuple[int, int, int]) -> Parallelism:
    data, expert, tensor = shape
    return Parallelism(data * expert, expert * tensor, tensor)


def coordinates(topology: Topology, ids: np.ndarray) -> np.ndarray:
    """Places of devices in the torus: [..., axes]."""
    places = [topology.place(int(device)) for device in ids.ravel()]
    axes = [axis for axis in "xyz" if axis in topology.parts]
    return np.array([[p[a] for a in axes] for p in places]).reshape(*ids.shape, len(axes))


@pytest.mark.parametrize("name, shape", SPLITS)
def test_neighbours_of_the_tensor_axis_are_ici_neighbours(name: str, shape: tuple[int, int, int]):
    topology = named(name)
    ids = layout(split(shape), topology)
    assert ids.shape == shape
    assert len(set(ids.ravel().tolist())) == ids.size
    places = coordinates(topology, ids)
    hops = np.abs(np.diff(places, axis=2)).sum(-1)
    assert hops.max(initial=0) <= 1


@pytest.mark.parametrize("name, shape", SPLITS)
def test_heavier_axes_reach_less_far(name: str, shape: tuple[int, int, int]):
    """The furthest that data of an axis travels: tensor no further than any block of its size."""
    topology = named(name)
    torus = topology.torus()
    assert torus is not None
    places = coordinates(topology, layout(split(shape), topology))
    tensor_nodes = max(1, shape[2] // torus.devices_per_node)
    extents = places.max(axis=2) - places.min(axis=2) + 1  # [data, expert, axes]
    assert (extents == torus.block(tensor_nodes)).all()


def test_slices_are_told_apart_by_the_data_axis():
    ring = Fabric("ici", "torus", (4,), 50, 1, (True,))
    dcn = Fabric("dcn", "crossbar", (0,), 3, 10)
    two = Topology("two", "tpu", Chip("x"), (ring, dcn), ("slice:2", "x:4"))
    assert layout(Parallelism(data=4, tensor=2), two).tolist() == [
        [[0, 1]], [[2, 3]], [[4, 5]], [[6, 7]],
    ]  # fmt: skip
    with pytest.raises(ValueError, match="over 2 slices, so data=1"):
        layout(Parallelism(tensor=8), two)


@pytest.mark.aot
@pytest.mark.parametrize(
    "name, shape", [SPLITS[0], SPLITS[5], SPLITS[9], ("h200:1x2x8", (2, 2, 4))]
)
def test_absent_devices_make_the_same_mesh(name: str, shape: tuple[int, int, int]):
    topology = named(name)
    try:
        devices = compile_only.devices(topology.target)
    except compile_only.AbsentCompilerError as absent:
        pytest.skip(str(absent))
    there = mesh(split(shape), topology, devices)
    assert dict(there.shape) == dict(zip(("data", "expert", "tensor"), shape, strict=True))
    ids = layout(split(shape), topology)
    for at in itertools.islice(np.ndindex(*shape), 0, None, 7):
        device = there.devices[at]
        if topology.platform == "tpu":
            place = topology.place(int(ids[at]))
            seen = (*device.coords, device.core_on_chip)
            axes = [place.get(axis, 0) for axis in ("x", "y", "z", "core")]
            assert list(seen) == axes
        else:
            assert device.id == ids[at]


@pytest.mark.mesh
def test_devices_that_are_there_make_a_mesh():
    there = mesh(Parallelism(data=4, expert=4, tensor=2), named("cpu:8"))
    assert dict(there.shape) == {"data": 2, "expert": 2, "tensor": 2}
    assert there.axis_types == (AxisType.Auto,) * 3
    assert there.devices.ravel().tolist() == jax.devices()
    # A modelled machine's program runs on what there is.
    prefill = dataclasses.replace(named("cm384-prefill"), order=("node:1", "npu:4", "die:2"))
    assert mesh(Parallelism(expert=8, tensor=8, sequence=8), prefill).shape["tensor"] == 8
    with pytest.raises(ValueError, match=r"needs 16 devices .* there are 8; on CPU, JAX_NUM_CPU"):
        mesh(Parallelism(data=16), named("cm384-prefill"))
