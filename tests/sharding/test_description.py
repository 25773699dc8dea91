"""Hardware in TOML: what is written is read back, and every mistake is named."""

from pathlib import Path

import pytest

from sharding.description import DescriptionError, dump, load, parse
from sharding.hardware import EXAMPLES, GPUS, named

LAB = """
name = "lab"
platform = "gpu"
chip = "h200"
order = ["node:2", "gpu:4"]

[[fabrics]]
name = "nvlink"
kind = "crossbar"
shape = [4]
gbps = 450
latency_us = 1

[[fabrics]]
name = "ethernet"
kind = "crossbar"
shape = [0]
latency_us = 20
"""


def test_a_description_is_read(tmp_path: Path):
    file = tmp_path / "lab.toml"
    file.write_text(LAB)
    lab = load(file)
    assert lab.num_devices == 8
    assert lab.chip == GPUS["h200"]
    assert [fabric.gbps for fabric in lab.fabrics] == [450, None]


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_is_written_is_read_back(name: str):
    topology = named(name)
    assert parse(dump(topology)) == topology


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("platform", "platfrom", "no key 'platfrom'; the nearest is 'platform', known are name"),
        ('"gpu"', '"cuda"', "platform='cuda', expected one of"),
        ("gbps = 450", "gbs = 450", "fabrics[0]: no key 'gbs'; the nearest is 'gbps'"),
        ("gbps = 450", 'gbps = "fast"', "fabrics[0].gbps='fast': expected a number"),
        ("gbps = 450", "gbps = true", "expected a number"),
        ("gbps = 450", "gbps = -1", "-1 GB/s"),
        ("shape = [4]", "shape = 4", "fabrics[0].shape=4: expected a list"),
        ("shape = [4]", "shape = [4.5]", "fabrics[0].shape[0]=4.5: expected a whole number"),
        ('"h200"', '"h201"', "chip='h201': the nearest is 'h200', known are"),
        ('"h200"', "7", "lab: chip=7: expected a table"),
        ('"crossbar"', '"tours"', "kind='tours', expected one of"),
        ('name = "lab"', "", "name must be given"),
        ('name = "nvlink"', "", "fabrics[0]: name must be given"),
        ("[[fabrics]]", "[fabrics]", "no TOML"),
        ('"gpu:4"', '"gpu"', "'gpu' in order"),
        ("shape = [0]", "shape = [6]", "ethernet joins 6 devices"),
    ],
)
def test_mistakes_are_named(old: str, new: str, said: str):
    assert old in LAB
    with pytest.raises(DescriptionError) as error:
        parse(LAB.replace(old, new), "lab")
    assert said in str(error.value)
    assert str(error.value).startswith("lab")
