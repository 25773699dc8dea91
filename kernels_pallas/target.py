"""What a program is compiled for. It is read from a mesh, never from the devices attached."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jax.sharding import AbstractMesh, Mesh

Platform = Literal["cpu", "gpu", "tpu"]

_DEVICES = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}
"""Device kind -> short name, by which files under tuned/ are called."""

_HOPPER = re.compile(r"\bG?H(100|200|800|20)\b")

_NARROW = ("v4", "v5e", "v5p")  # their matrix unit is 128 x 128


def matrix_unit(device: str) -> int:
    """Columns of a product that a TPU's matrix unit computes at a time, from as many rows of K."""
    return 128 if device in _NARROW else 256


def not_hopper(device: str) -> str | None:
    """Why a kernel for Hopper (sm_90a) cannot run on a GPU; None if it can, or if the device is
    not known. Other generations have no wgmma."""
    if not device or _HOPPER.search(device.upper()):
        return None
    return f"kernels for Hopper need an H100, H200, H800, H20 or GH200, and this is {device!r}"


@dataclass(frozen=True)
class Target:
    """The hardware that a program is compiled for.

    Attributes:
        platform: JAX's name for it.
        device: the model, such as "v6e" or "h200"; "" if it does not matter or is not known.
    """

    platform: Platform
    device: str = ""

    @classmethod
    def of(cls, mesh: Mesh | AbstractMesh | Any) -> Target:
        """The target of a mesh's devices, or of a device, none of which need be attached.

        Raises:
            ValueError: the mesh does not say what its devices are, or they are of no known
                platform.
        """
        if isinstance(mesh, AbstractMesh):
            device: Any = mesh.abstract_device
            if device is None:
                raise ValueError(f"{mesh} does not say what its devices are: give abstract_device")
        else:
            device = mesh.devices.flat[0] if isinstance(mesh, Mesh) else mesh
        kind = str(device.device_kind)
        platform: Any = {"cuda": "gpu"}.get(device.platform, device.platform)
        if platform not in get_args(Platform):
            raise ValueError(f"devices of {platform=}: expected one of {get_args(Platform)}")
        return cls(platform, "" if platform == "cpu" else _DEVICES.get(kind, kind))


CPU = Target("cpu")
