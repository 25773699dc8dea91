"""Names that differ between the releases of JAX that jaxserve runs on (0.10.2 to 0.12)."""

from __future__ import annotations

from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu


def simulated_tpu() -> Any:
    """What `interpret=` takes to simulate a TPU kernel and look for races."""
    return pltpu.InterpretParams(detect_races=True)


def tpu_races_found() -> bool:
    """Whether the last simulated TPU kernel had a race: the verdict is kept on a private object."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator

    return simulator.races is not None and bool(simulator.races.races_found)


def simulated_gpu() -> Any:
    """What `interpret=` takes to simulate a Mosaic GPU kernel and look for races."""
    if hasattr(plgpu, "InterpretGPUParams"):  # from 0.11 on
        return plgpu.InterpretGPUParams(detect_races=True)
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams(detect_races=True)


def reset_simulated_tpu() -> None:
    """Forgets a simulation, which an exception leaves half done."""
    pltpu.reset_tpu_interpret_mode_state()
