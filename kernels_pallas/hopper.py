"""Hopper: what its cores have, and products on its tensor cores.

wgmma multiplies 64 rows per warpgroup, with sums in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith

from kernels_pallas.op import UnsupportedError

CORES = 132
"""Streaming multiprocessors of an H100 or H200."""

ROWS = 64
"""Of a product of one warpgroup, as wgmma fixes them."""

WARP_ROWS = 16
"""Of these that one of its four warps holds."""

LINE_BYTES = 128
"""A row of a swizzled tile in shared memory, where copies begin at multiples of as much."""

SHARED_BYTES = 227 * 1024 - 512
"""Shared memory that arrays of a block of threads may take; barriers take the rest."""

PLANNED_BYTES = 224 * 1024
"""Shared memory of a core that tiles are chosen for where none was tuned."""

_FAR = 2**20  # more steps than any loop has


def fit(arrays: Iterable[int], what: str) -> None:
    """Checks that arrays, of so many bytes each, fit into shared memory.

    Args:
        what: names them in the error.

    Raises:
        UnsupportedError: they need more than `SHARED_BYTES`.
    """
    needed = sum(-(-size // 1024) * 1024 for size in arrays)  # Mosaic aligns each to 1024 bytes
    if needed > SHARED_BYTES:
        raise UnsupportedError(
            f"{what} need {needed} bytes of shared memory, and {SHARED_BYTES} are there"
        )


def late(index: Array | int, step: Array) -> Array:
    """`index`, but unknown to a GPU's compiler before `step` is.

    Otherwise the compiler computes addresses before the loop, and keeps them in registers until
    these spill.
    """
    return index + lax.div(step, jnp.int32(_FAR))


def registers(warpgroups: int) -> int:
    """Registers per thread at launch, summed over the warpgroups of a block of threads.

    Each gets an equal share, in multiples of 8. A setmaxnreg that raises the sum above this waits
    until others release registers: for ever, if they do not.
    """
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
    """a @ b of tiles in shared memory, [64, n] in float32.

    Args:
        meanwhile: is called after the product has begun, and before it is waited for.
    """

    def scope(total: Any) -> Array:
        plgpu.wgmma(total, a, b)
        if meanwhile is not None:
            meanwhile()
        return total[...]

    return pl.run_scoped(scope, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[1]), jnp.float32))


def add_products(
    sums: Sequence[Array], pairs: Sequence[tuple[Any, Any]], *, simulated: bool
) -> tuple[Array, ...]:
    """sums + a @ b for each sum and its pair (a, b), accumulated in the registers of the sums.

    Args:
        pairs: b is a tile in shared memory; a is one too, or is in registers.
        simulated: whether the kernel is simulated. The simulator supports neither accumulators that
            begin with a value nor factors in registers.
    """
    if simulated:
        return tuple(x + _simulated(a, b) for x, (a, b) in zip(sums, pairs, strict=True))

    def multiply(refs: Any) -> None:
        for ref, (a, b) in zip(refs, pairs, strict=True):
            plgpu.wgmma(ref, a, b)

    accumulators: Any = tuple(plgpu.WGMMAAccumulatorRef.init(x) for x in sums)
    return pl.run_state(multiply)(accumulators)


def _simulated(a: Any, b: Any) -> Array:
    if isinstance(a, jax.Array):
        return jnp.dot(a, b[...], preferred_element_type=jnp.float32)
    return product(a, b)


def store_rows(pairs: Sequence[tuple[Any, Array]], end: Array, *, simulated: bool) -> None:
    """`ref[:end] = x[:end]` for pairs of global memory and columns x [ROWS, n] of sums.

    A warp stores all of its `WARP_ROWS` rows, or none.

    Args:
        end: int32; rows that are wanted.
        simulated: whether the kernel is simulated. The simulator knows no warps.
    """
    if simulated:
        for first in range(0, ROWS, WARP_ROWS):
            rows = slice(first, first + WARP_ROWS)
            for ref, x in pairs:
                pl.when(first < end)(partial(ref.__setitem__, rows, x[rows]))
        return

    def store(_: Any, end: Any, *pairs: tuple[Any, Any]) -> None:
        i32 = ir.IntegerType.get_signless(32)
        warp = arith.remui(mgpu.warp_idx(), mgpu.c(ROWS // WARP_ROWS, i32))
        first = arith.muli(warp, mgpu.c(WARP_ROWS, i32))
        with mgpu.when(arith.cmpi(arith.CmpIPredicate.slt, first, end.registers.item())):
            for ref, x in pairs:
                x.store_untiled(ref, optimized=False)

    pair = plgpu.RefType(), plgpu.Layout.WGMMA
    arguments = (plgpu.Layout.WG_SPLAT(), *[pair] * len(pairs))
    plgpu.inline_mgpu(arg_types=arguments)(store)(end, *pairs)


def across(row: Array, shape: tuple[int, ...]) -> Array:
    """A number per column, broadcast to all rows."""
    return lax.broadcast_in_dim(row, shape, (1,))


def down(column: Array, shape: tuple[int, ...]) -> Array:
    """A number per row, broadcast to all columns."""
    return lax.broadcast_in_dim(column, shape, (0,))


def within(x: Array, end: Array) -> Array:
    """0 <= x < end, for ends that are not negative, as one comparison of unsigned integers."""
    return x.astype(jnp.uint32) < end.astype(jnp.uint32)
