"""Products of Hopper's matrix unit: 64 rows of a warpgroup, float32 sums in its registers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # of a warpgroup: what wgmma fixes


def registers(warpgroups: int) -> int:
    """Of a thread of each, together, as a block of threads starts: equal shares of what there is,
    by eights. Who then asks for more than the others have given back waits for ever."""
    return 512 // warpgroups // 8 * 8 * warpgroups


def pipelined(
    step: Callable[..., Any], compute: Callable[..., None], operands: Sequence[Any], *,
    warpgroups: int, **pipeline: Any,
) -> None:  # fmt: skip
    """Runs step(indices, *tiles, sums) on tiles of the operands while the next ones are loaded.

    Args:
        step: returns the sums.
        compute: is given a function that takes the sums and runs all steps.
        warpgroups: that compute. One loads for itself: several such blocks share an SM, and each
            computes while others wait. If there are several, one more warpgroup loads for them.
        pipeline: the grid, the specs of the operands and the number of steps at a time.
    """
    if warpgroups > 1:
        plgpu.emit_pipeline_warp_specialized(
            step, wg_axis="wg", num_compute_wgs=warpgroups, memory_registers=40,
            compute_context=compute, **pipeline,
        )(*operands)  # fmt: skip
        return

    def run(sums: Any) -> None:
        plgpu.emit_pipeline(lambda *tiles: step(*tiles, sums), **pipeline)(*operands)

    compute(run)


def product(a: Any, b: Any, meanwhile: Callable[[], None] | None = None) -> Array:
    """a @ b of tiles in shared memory, [64, n] in float32. `meanwhile` is done before its end."""

    def scope(total: Any) -> Array:
        plgpu.wgmma(total, a, b)
        if meanwhile is not None:
            meanwhile()
        return total[...]

    return pl.run_scoped(scope, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[1]), jnp.float32))


def add_products(
    sums: Sequence[Array], pairs: Sequence[tuple[Any, Any]], *, simulated: bool
) -> tuple[Array, ...]:
    """sums + a @ b of a pair (a, b) each, in the registers of the sums.

    Args:
        pairs: b is a tile in shared memory, and so is a, or it lies in registers.
        simulated: the simulator knows no sums that go on, and no factors in registers.
    """
    if simulated:
        return tuple(x + _simulated(a, b) for x, (a, b) in zip(sums, pairs, strict=True))

    def multiply(refs: Any) -> None:
        for ref, (a, b) in zip(refs, pairs, strict=True):
            plgpu.wgmma(ref, a, b)

    going_on: Any = tuple(plgpu.WGMMAAccumulatorRef.init(x) for x in sums)
    return pl.run_state(multiply)(going_on)


def _simulated(a: Any, b: Any) -> Array:
    if isinstance(a, jax.Array):
        return jnp.dot(a, b[...], preferred_element_type=jnp.float32)
    return product(a, b)


def across(row: Array, shape: tuple[int, ...]) -> Array:
    """A number per column."""
    return lax.broadcast_in_dim(row, shape, (1,))


def down(column: Array, shape: tuple[int, ...]) -> Array:
    """A number per row."""
    return lax.broadcast_in_dim(column, shape, (0,))


def within(x: Array, end: Array) -> Array:
    """0 <= x < end, for ends that are not negative: one comparison of unsigned numbers, and one
    selection where it is asked."""
    return x.astype(jnp.uint32) < end.astype(jnp.uint32)
