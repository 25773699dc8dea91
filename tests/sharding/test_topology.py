"""Hardware described once: the figures of the specification's section 1, and what follows."""

import dataclasses

import pytest

from sharding.fabric import Chip, Fabric
from sharding.hardware import EXAMPLES, GENERATIONS, GPUS, named
from sharding.topology import Topology

CM384 = named("cm384")


def test_cloudmatrix_is_as_large_as_the_paper_says():
    assert CM384.num_devices == 768
    assert CM384.parts == {"node": 48, "npu": 8, "die": 2}
    assert named("cm384-decode").num_devices == 320
    assert named("cm384-prefill").num_devices == 32


def test_cloudmatrix_device_ids():
    for node, npu, die in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (47, 7, 1)]:
        device = CM384.device_id(node=node, npu=npu, die=die)
        assert device == node * 16 + npu * 2 + die
        assert CM384.place(device) == {"node": node, "npu": npu, "die": die}
    assert sorted(CM384.device_id(**CM384.place(d)) for d in range(768)) == list(range(768))


def test_uplinks_of_a_node_carry_its_npus():
    """7 L1 chips of 16 links with 28 GB/s: what 8 NPUs of 2 dies have together, and no more."""
    ub = next(fabric for fabric in CM384.fabrics if fabric.name == "ub")
    assert ub.gbps is not None
    dies = CM384.parts["npu"] * CM384.parts["die"]
    assert ub.gbps == 7 * 224 / 8
    assert 7 * 16 * 28 == dies * ub.gbps == 3136
    assert CM384.parts["node"] * dies * ub.gbps == 150_528  # GB/s through the second tier
    assert 7 * 16 * 48 * 28 == 150_528  # of 112 chips with 48 ports


def test_planes_of_cloudmatrix():
    rates = {fabric.name: fabric.gbps for fabric in CM384.fabrics}
    assert rates == {"die": 270, "ub": 196, "rdma": 200 / 8}
    assert 8 * 2 * 200 == 3200  # Gb/s of a node
    assert 2 * CM384.chip.bf16 == 752 and 2 * CM384.chip.int8 == 1504  # type: ignore[operator]
    assert CM384.chip.fp8 is None
    assert 2 * CM384.chip.hbm_gb == 128 and 2 * CM384.chip.hbm_gbps == 3200  # type: ignore[operator]


@pytest.mark.parametrize(
    "name, both_ways, links",
    [("v5e", 400, 4), ("v5p", 1200, 6), ("v6e", 800, 4), ("tpu7x", 1200, 6)],
)
def test_links_of_a_tpu_add_up(name: str, both_ways: float, links: int):
    generation = GENERATIONS[name]
    assert links == 2 * len(generation.pod)
    assert links * generation.link_gbps * 2 == both_ways


def test_two_devices_are_a_tpu7x_chip():
    chip, devices = GENERATIONS["tpu7x"].chip, GENERATIONS["tpu7x"].devices_per_chip
    whole = [devices * x for x in (chip.bf16, chip.fp8, chip.hbm_gb, chip.hbm_gbps) if x]
    assert whole == [2307, 4614, 192, 7380]
    assert chip.int8 is None
    assert named("tpu7x:4x4x10").num_devices == 320  # the paper's own 160 x 2


@pytest.mark.parametrize(
    "name, wrap",
    [
        ("v5e:16x16", (True, True)),
        ("v5e:8x16", (False, True)),
        ("v6e:8x8", (False, False)),
        ("v5p:4x4x20", (True, True, True)),
        ("v5p:8x8x5", (True, True, False)),
        ("v5p:2x4x4", (False, False, False)),  # not a whole cube
        ("tpu7x:4x4x10", (True, True, False)),
        ("tpu7x:4x4x12", (True, True, True)),
    ],
)
def test_which_axes_close_to_rings(name: str, wrap: tuple[bool, ...]):
    torus = named(name).torus()
    assert torus is not None and torus.wrap == wrap


def test_memory_is_what_compilers_report():
    usable = {kind: generation.chip.usable_gib for kind, generation in GENERATIONS.items()}
    assert usable == {"v5e": 15.75, "v5p": 95.74, "v6e": 31.25, "tpu7x": 94.75}
    assert GENERATIONS["v5e"].chip.memory_bytes == 15.75 * 2**30
    assert GPUS["h200"].memory_bytes == 141e9
    assert Chip("unknown").memory_bytes is None


def test_gpus_of_a_node_and_beyond():
    two = named("h100:1x2x8")
    assert two.num_devices == 16
    assert [(f.name, f.gbps, f.size) for f in two.fabrics] == [("nvlink", 450, 8), ("nic", 50, 0)]
    assert [f.rate for f in named("h800:1x1x8").fabrics] == [160e9, 50e9]  # the paper's baseline
    assert named("b200:1x1x8").fabrics[0].gbps == 900


def test_a_target_for_the_compilers_that_there_are():
    targets = {name: named(name).target for name in EXAMPLES}
    assert targets["v5p:4x4x20"] == "v5p:4x4x20" and targets["h200:1x1x8"] == "h200:1x1x8"
    assert targets["cm384"] == targets["h100:1x1x8"] == targets["cpu:8"] == ""


@pytest.mark.parametrize(
    "name, said",
    [
        ("cm38", "nearest is 'cm384'"),
        ("v5:4x4", "nearest is 'v5"),
        ("h300:1x1x8", "nearest is 'h"),
        ("h100", "nearest is 'h100:1x1x8'"),
        ("cpu", "nearest is 'cpu:8'"),
        ("v5e:32x32", "the nearest is v5e:16x16"),
        ("v5p:3x4x4", "the nearest is v5p:4x4x4"),
        ("v5p:28x28x28", "at most 6144 chips"),
        ("tpu7x:4x4", "expected 3 whole numbers, such as tpu7x:4x4x4"),
        ("v5e:axb", "expected 2 whole numbers"),
        ("h100:1x1x16", "try h100:1x2x8"),
        ("cpu:0", "expected 1 whole numbers"),
    ],
)
def test_names_that_are_refused(name: str, said: str):
    with pytest.raises(ValueError, match=name.partition(":")[0]) as error:
        named(name)
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["v5e:30x30", "v5p:30x2x7", "tpu7x:1x1x1", "v5p:28x28x28"])
def test_the_slice_that_is_proposed_exists(name: str):
    with pytest.raises(ValueError, match="the nearest is") as error:
        named(name)
    assert named(str(error.value).rpartition(" ")[2])


def test_a_topology_is_refused_that_contradicts_itself():
    with pytest.raises(ValueError, match="innermost first, but ub joins 768, die joins 2"):
        dataclasses.replace(CM384, fabrics=CM384.fabrics[1::-1])
    with pytest.raises(ValueError, match="joins 2 devices, and node:48·npu:8·die:2 are 768"):
        dataclasses.replace(CM384, fabrics=CM384.fabrics[:1])
    with pytest.raises(ValueError, match="'die' in order"):
        dataclasses.replace(CM384, order=("node:48", "die"))
    with pytest.raises(ValueError, match="each named once"):
        dataclasses.replace(CM384, order=("die:2", "die:2"))
    with pytest.raises(ValueError, match="platform='cuda'"):
        dataclasses.replace(CM384, platform="cuda")
    with pytest.raises(ValueError, match="no fabrics"):
        dataclasses.replace(CM384, fabrics=())
    with pytest.raises(ValueError, match="npu=8, expected 0 to 7"):
        CM384.device_id(node=0, npu=8, die=0)
    with pytest.raises(ValueError, match="told by"):
        CM384.device_id(node=0)
    with pytest.raises(ValueError, match="device 768, expected 0 to 767"):
        CM384.place(768)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"kind": "ring"}, "kind='ring'"),
        ({"wrap": (True,)}, "says one thing for each"),
        ({"shape": (0, 4)}, "extent below 1"),
        ({"gbps": 0}, "0 GB/s"),
        ({"devices_per_node": 0}, "devices_per_node=0"),
        ({"kind": "crossbar"}, "shape .devices,. and no wrap"),
    ],
)
def test_a_fabric_is_refused_that_contradicts_itself(fields: dict, said: str):
    good = Fabric("ici", "torus", (4, 4), 50, 1, (False, False))
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(good, **fields)


def test_legs_are_the_fabrics_that_a_group_spans():
    def names(topology: Topology, n: int, stride: int = 1) -> list[tuple[str, int, int]]:
        return [(leg.fabric.name, leg.inner, leg.outer) for leg in topology.legs(n, stride)]

    assert names(CM384, 1) == []
    assert names(CM384, 2) == [("die", 1, 2)]
    assert names(CM384, 320) == [("die", 1, 2), ("ub", 2, 320)]
    assert names(CM384, 160, 2) == [("ub", 1, 160)]  # one die of each NPU
    gpus = named("h100:1x4x8")
    assert names(gpus, 4) == [("nvlink", 1, 4)]
    assert names(gpus, 16) == [("nvlink", 1, 8), ("nic", 8, 16)]
    assert names(gpus, 8, 4) == [("nvlink", 1, 2), ("nic", 2, 8)]
    with pytest.raises(ValueError, match="64 devices, 1 apart, are not within 32"):
        gpus.legs(64)


def test_a_block_of_a_torus_is_near_a_cube():
    torus = named("v5p:4x4x20").torus()
    assert torus is not None
    assert torus.block(4) == (4, 1, 1)  # a ring: twice the links of a 2x2
    assert torus.block(8) == (4, 2, 1)
    assert torus.block(320) == (4, 4, 20)
    with pytest.raises(ValueError, match=r"no block of 7 nodes.*nearest has 8"):
        torus.block(7)
