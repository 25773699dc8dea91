"""Names that differ between the releases of JAX that jaxserve runs on (0.10.2 to 0.12)."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu


def load_narrow(ref: Any, layout: Any, simulated: bool) -> Any:
    """`ref[...]` in a Mosaic GPU kernel, by so little at a time as the layout says, which the
    simulator of 0.10 does not know."""
    if simulated:
        return plgpu.layout_cast(ref[...], layout)
    at = (...,) if jax.__version_info__ < (0, 11) else ()  # a ref says it itself
    return plgpu.load(ref, *at, layout=layout, optimized=False)


def store_narrow(ref: Any, x: Any) -> None:
    """`ref[...] = x` in a Mosaic GPU kernel, of rows too narrow for all banks or for a sector of
    memory: 0.12 refuses this unless it is told."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, x, optimized=False)  # type: ignore[attr-defined]
    else:
        ref[...] = x


def simulated_tpu() -> Any:
    """What `interpret=` takes to simulate a TPU kernel and look for races."""
    return _looking_for_races(pltpu.InterpretParams)


def _looking_for_races(params: Any) -> Any:
    """To the end, and not to the first of them, as from 0.12 on by default."""
    further = {"on_race": "warn"} if hasattr(params, "on_race") else {}
    return params(detect_races=True, **further)


def tpu_races_found() -> bool:
    """Whether the last simulated TPU kernel had a race: the verdict is kept on a private object."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator

    return simulator.races is not None and bool(simulator.races.races_found)


def simulated_gpu() -> Any:
    """What `interpret=` takes to simulate a Mosaic GPU kernel and look for races."""
    if hasattr(plgpu, "InterpretGPUParams"):  # from 0.11 on
        return _looking_for_races(plgpu.InterpretGPUParams)  # type: ignore[attr-defined]
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    _complete_simulator()
    return _looking_for_races(InterpretGPUParams)


@functools.cache
def _complete_simulator() -> None:
    """Teaches the GPU simulator of 0.10 what that of 0.12 knows: `layout_cast`, which changes no
    value, and `ref.T` as an operand of wgmma, and as a place to load from and to store to."""
    from jax._src.interpreters import mlir
    from jax._src.pallas.mosaic.interpret import utils
    from jax._src.pallas.mosaic.interpret.shared_memory import SharedMemory
    from jax._src.pallas.mosaic_gpu.core import layout_cast_p
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax._src.state.types import TransposeTransform

    mlir.register_lowering(layout_cast_p, lambda _, x, **layout: [x], platform="cpu")

    class Turned(tuple):
        """A range of a buffer whose last two axes are then exchanged."""

    plain_range, plain_check = utils.to_range, gpu_callbacks._validate_transforms
    plain_read, plain_swap = SharedMemory.get_buffer_content, SharedMemory.swap_buffer_content
    plain_outside = gpu_callbacks._handle_out_of_bounds_read

    def to_range(transforms):
        turned, indexers = False, []
        for transform in transforms:
            if isinstance(transform, TransposeTransform):
                turned = not turned
            elif turned:
                *lead, a, b = transform.indices
                indexers.append(SimpleNamespace(indices=(*lead, b, a)))
            else:
                indexers.append(transform)
        found = plain_range(indexers)
        return Turned(found) if turned else found

    def check(transforms):
        plain_check([t for t in transforms if not isinstance(t, TransposeTransform)])

    def seen(x, rnge):
        return x.swapaxes(-1, -2) if isinstance(rnge, Turned) else x

    def read(self, key, rnge, *args, **options):
        found, *rest = plain_read(self, key, tuple(rnge), *args, **options)
        return seen(found, rnge), *rest

    def swap(self, key, rnge, value, *args, **options):
        before, *rest = plain_swap(self, key, tuple(rnge), seen(value, rnge), *args, **options)
        return seen(before, rnge), *rest

    def outside(found, shape, *rest):
        """Asked about whatever is not of the shape of its range."""
        turned = any(isinstance(x, Turned) for x in rest)
        if turned and found is not None and found.shape == (*shape[:-2], *shape[:-3:-1]):
            return found
        return plain_outside(found, shape, *rest)

    utils.to_range, gpu_callbacks._validate_transforms = to_range, check
    gpu_callbacks._handle_out_of_bounds_read = outside
    memory: Any = SharedMemory
    memory.get_buffer_content, memory.swap_buffer_content = read, swap


def reset_simulated_tpu() -> None:
    """Forgets a simulation, which an exception leaves half done."""
    pltpu.reset_tpu_interpret_mode_state()


def gpu_races_found() -> bool:
    """Whether the last simulated GPU kernel had a race, which its results need not show."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as simulator

    return bool(simulator.get_races().races_found)


def reset_simulated_gpu() -> None:
    """Forgets a simulation of a GPU, which an exception leaves half done."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as simulator

    simulator.reset_gpu_interpret_mode_state()
