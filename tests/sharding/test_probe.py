"""What there is, described: a CPU host here, and accelerators by compile-only devices."""

import os
from types import SimpleNamespace

import jax
import pytest

from sharding import compile_only
from sharding.probe import probe


def test_a_host_is_described_without_claims():
    topology = probe()
    assert topology.platform == "cpu"
    assert topology.num_devices == jax.device_count()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert topology.chip.memory_bytes == pytest.approx(total / jax.device_count(), rel=0.01)
    chip, memory = topology.chip, topology.fabrics[0]
    assert chip.bf16 is chip.int8 is chip.hbm_gbps is memory.gbps is None


def test_a_host_is_measured_on_request():
    topology = probe(measure=True)
    assert 0.1 < topology.fabrics[0].rate / 1e9 < 5000  # any machine that could run this
    assert topology.chip.bf16 and 1e-4 < topology.chip.bf16 < 1000
    assert topology.chip.int8 and topology.chip.fp8 is None


@pytest.mark.mesh
def test_devices_of_a_host_share_its_memory():
    topology = probe()
    assert topology.name == "cpu:8" and topology.num_devices == 8
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert topology.chip.memory_bytes == pytest.approx(total / 8, rel=0.01)


@pytest.mark.aot
@pytest.mark.parametrize("name", ["v5e:4x4", "v5p:2x2x4", "tpu7x:2x2x1", "h200:1x2x8", "v6e:2x4"])
def test_accelerators_are_told_by_their_kind(name: str):
    try:
        devices = compile_only.devices(name)
    except compile_only.AbsentCompilerError as absent:
        pytest.skip(str(absent))
    assert probe(devices).name == name


@pytest.mark.parametrize("target", ["h200", "h200:8", "v6e", "sm_90a", "v6e:8x", ""])
def test_targets_of_another_form_are_refused(target: str):
    with pytest.raises(ValueError, match=r"target=.*v6e:8x8.*h200:1x1x8"):
        compile_only.mesh(target)


def test_what_nobody_described_is_refused():
    device = SimpleNamespace(platform="gpu", device_kind="NVIDIA H20", process_index=0)
    with pytest.raises(ValueError, match=r"no description of 'NVIDIA H20'.*in TOML"):
        probe([device])
