"""Meshes of devices that are not there, for programs that are compiled and never run.

Needs the extra `aot`: libtpu or jax-cuda13-plugin, of the release that goes with the installed JAX.
No driver and no device are needed.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # asks no metadata server
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # silences a complaint; any target can be chosen
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile at once
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # no CUDA libraries are installed
}

_TARGET = re.compile(r"h200:\d+x\d+x\d+|(?!h200)\w+:\d+(x\d+)*")


class AbsentCompilerError(RuntimeError):
    """The compiler for a target is not installed."""


def mesh(target: str, shape: Sequence[int] = (1,), names: Sequence[str] = ("x",)) -> Mesh:
    """A mesh of compile-only devices.

    Args:
        target: "v6e:8x8" (also v4, v5e, v5p, tpu7x) or "h200:1x1x8" (slices x hosts x GPUs).
        shape: of the mesh; the first devices of the topology are taken.

    Raises:
        AbsentCompilerError: the extra `aot` is not installed, or not of the right release.
        ValueError: a target of another form, or a mesh larger than it.
    """
    there = np.array(devices(target))
    count = int(np.prod(shape))
    if count > there.size:
        raise ValueError(f"{target} has {there.size} devices, and a mesh {shape} needs {count}")
    return Mesh(there[:count].reshape(shape), names)


def devices(target: str) -> tuple[Any, ...]:
    """All devices of a target, in the compiler's order.

    Raises:
        AbsentCompilerError, ValueError: as `mesh` does.
    """
    return tuple(_topology(target).devices)


@functools.cache
def _topology(target: str):
    if not _TARGET.fullmatch(target):
        raise ValueError(
            f"{target=}: expected a TPU and its slice, as v6e:8x8, or slices, hosts and GPUs, as "
            f"h200:1x1x8"
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    kind, _, extent = target.partition(":")
    try:
        if kind != "h200":
            return topologies.get_topology_desc(platform="tpu", topology_name=target)
        return topologies.get_topology_desc(
            platform="cuda", topology_name="", topology=extent,
            target_config=(Path(__file__).parent / "h200.txtpb").read_text(),
        )  # fmt: skip
    except (RuntimeError, ModuleNotFoundError, FileNotFoundError) as error:
        raise AbsentCompilerError(
            f"no compiler for {target}: pip install 'jaxserve[aot]' ({error})"
        ) from error
