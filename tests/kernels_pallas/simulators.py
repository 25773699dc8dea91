"""The simulators of TPU and GPU kernels, under one name in all releases of JAX (0.10.2 to 0.12)."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu


def tpu() -> Any:
    """What `interpret=` takes to simulate a TPU kernel and look for races."""
    return _looking_for_races(pltpu.InterpretParams)


def _looking_for_races(params: Any) -> Any:
    """Simulates to the end: from 0.12 on, a race raises unless it is to warn."""
    more = {"on_race": "warn"} if hasattr(params, "on_race") else {}
    return params(detect_races=True, **more)


def tpu_races_found() -> bool:
    """Whether the last simulated TPU kernel had a race, which a private object of JAX remembers."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator

    return simulator.races is not None and bool(simulator.races.races_found)


def gpu() -> Any:
    """What `interpret=` takes to simulate a Mosaic GPU kernel and look for races."""
    if hasattr(plgpu, "InterpretGPUParams"):  # from 0.11 on
        return _looking_for_races(plgpu.InterpretGPUParams)  # type: ignore[attr-defined]
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    _complete_simulator()
    return _looking_for_races(InterpretGPUParams)


def gpu_races_found() -> bool:
    """Whether the last simulated GPU kernel had a race: its results may be right all the same."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as simulator

    return bool(simulator.get_races().races_found)


def reset_tpu() -> None:
    """Clears the state of a TPU's simulation, which an exception leaves behind."""
    pltpu.reset_tpu_interpret_mode_state()


def reset_gpu() -> None:
    """Clears the state of a GPU's simulation, which an exception leaves behind."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as simulator

    simulator.reset_gpu_interpret_mode_state()


@functools.cache
def _complete_simulator() -> None:
    """Adds to the GPU simulator of 0.10 what that of 0.12 supports.

    These are `layout_cast`, which changes no value, and `ref.T`, as an operand of wgmma and as a
    place to load from and to store to.
    """
    from jax._src.interpreters import mlir
    from jax._src.pallas.mosaic.interpret import utils
    from jax._src.pallas.mosaic.interpret.shared_memory import SharedMemory
    from jax._src.pallas.mosaic_gpu.core import layout_cast_p
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax._src.state.types import TransposeTransform

    mlir.register_lowering(layout_cast_p, lambda _, x, **layout: [x], platform="cpu")

    class Transposed(tuple):
        """A range of a buffer whose last two axes are exchanged after it is read."""

    plain_range, plain_check = utils.to_range, gpu_callbacks._validate_transforms
    plain_read, plain_swap = SharedMemory.get_buffer_content, SharedMemory.swap_buffer_content
    plain_outside = gpu_callbacks._handle_out_of_bounds_read

    def to_range(transforms):
        transposed, indexers = False, []
        for transform in transforms:
            if isinstance(transform, TransposeTransform):
                transposed = not transposed
            elif transposed:
                *lead, a, b = transform.indices
                indexers.append(SimpleNamespace(indices=(*lead, b, a)))
            else:
                indexers.append(transform)
        found = plain_range(indexers)
        return Transposed(found) if transposed else found

    def check(transforms):
        plain_check([t for t in transforms if not isinstance(t, TransposeTransform)])

    def seen(x, rnge):
        return x.swapaxes(-1, -2) if isinstance(rnge, Transposed) else x

    def read(self, key, rnge, *args, **options):
        found, *rest = plain_read(self, key, tuple(rnge), *args, **options)
        return seen(found, rnge), *rest

    def swap(self, key, rnge, value, *args, **options):
        before, *rest = plain_swap(self, key, tuple(rnge), seen(value, rnge), *args, **options)
        return seen(before, rnge), *rest

    def outside(found, shape, *rest):
        """Called when what was found has another shape than its range."""
        transposed = any(isinstance(x, Transposed) for x in rest)
        if transposed and found is not None and found.shape == (*shape[:-2], *shape[:-3:-1]):
            return found
        return plain_outside(found, shape, *rest)

    utils.to_range, gpu_callbacks._validate_transforms = to_range, check
    gpu_callbacks._handle_out_of_bounds_read = outside
    memory: Any = SharedMemory
    memory.get_buffer_content, memory.swap_buffer_content = read, swap
