"""Names that differ between the releases of JAX that jaxserve runs on (0.10.2 to 0.12)."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu


def load_narrow(ref: Any, layout: Any, simulated: bool) -> Any:
    """`ref[...]` in a Mosaic GPU kernel, in loads as narrow as the layout makes them.

    Mosaic refuses these unless it is told that they are meant. The simulator of 0.10 does not
    support `plgpu.load`.

    Args:
        simulated: whether the kernel is simulated.
    """
    if simulated:
        return plgpu.layout_cast(ref[...], layout)
    at = (...,) if jax.__version_info__ < (0, 11) else ()  # from 0.11 on a ref is loaded as a whole
    return plgpu.load(ref, *at, layout=layout, optimized=False)


def store_narrow(ref: Any, x: Any) -> None:
    """`ref[...] = x` in a Mosaic GPU kernel, for rows too narrow to fill all banks of shared memory
    or a sector of global memory: 0.12 refuses this unless it is told that it is meant."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, x, optimized=False)  # type: ignore[attr-defined]
    else:
        ref[...] = x
