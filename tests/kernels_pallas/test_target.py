"""What a program is compiled for comes from its mesh."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh

from kernels_pallas.target import CPU, Target


class Device:
    def __init__(self, platform: str, kind: str):
        self.platform, self.device_kind = platform, kind


class FakeMesh(Mesh):
    """A mesh of a device that JAX does not know."""

    def __new__(cls, device: Device):
        return object.__new__(cls)

    def __init__(self, device: Device):
        self.__dict__["devices"] = np.array([device], object)


@pytest.mark.parametrize(
    ("platform", "kind", "expected"),
    [
        ("tpu", "TPU v5 lite", Target("tpu", "v5e")),
        ("tpu", "TPU7x", Target("tpu", "tpu7x")),
        ("gpu", "NVIDIA H200", Target("gpu", "h200")),
        ("cuda", "NVIDIA H200", Target("gpu", "h200")),
        ("gpu", "NVIDIA B300", Target("gpu", "NVIDIA B300")),
        ("cpu", "cpu", CPU),
    ],
)
def test_devices_have_short_names(platform: str, kind: str, expected: Target):
    assert Target.of(FakeMesh(Device(platform, kind))) == expected


def test_the_mesh_at_hand_is_of_cpus():
    assert Target.of(Mesh(np.array(jax.devices()[:1]), ("x",))) == CPU


def test_what_a_mesh_does_not_say_is_asked_for():
    with pytest.raises(ValueError, match="give abstract_device"):
        Target.of(AbstractMesh((1,), ("x",)))
    with pytest.raises(ValueError, match="platform='rocket'"):
        Target.of(FakeMesh(Device("rocket", "")))
