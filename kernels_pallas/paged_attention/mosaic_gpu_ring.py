"""The rings of shared memory through which blocks of keys and values pass on Hopper.

Blocks of bfloat16 pages arrive as they are multiplied. Those of int8 or int4 pages arrive in a ring
of their own, and the producer that copies them also converts them to bfloat16 in the other ring:
wgmma cannot multiply floats by integers, and the conversion is exact. Scales stay apart, and are
applied to logits and weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.paged_attention.mosaic_gpu_shape import Shape


class Ring(NamedTuple):
    """Shared memory and its barriers, each with an entry for each cache: keys, then values.

    Attributes:
        blocks: bfloat16 [stages, keys, lanes].
        raw: int8 [raw_stages, keys, lanes], or uint8 [raw_stages, keys / 2, lanes] of int4 pages,
            even pairs of keys before odd ones.
        scales: float32 [raw_stages + stages, scales, keys]. They stay until their block's slot is
            free, so nobody moves them. Those of int4 pages are one array for all caches, sorted
            like keys: [stages, scales, keys].
        raw_scales: float32 `Shape.raw_scales` in each of raw_stages slots: those of int4 pages as
            they arrive.
        free: consumers say that they have read a slot of `blocks`; that of keys comes first.
        ready: a slot of `blocks` is full.
        raw_ready: a slot of `raw` is full.
        scales_ready: a slot of `scales`, or of `raw_scales`, is full.
    """

    blocks: tuple[Any, ...]
    raw: tuple[Any, ...]
    scales: tuple[Any, ...]
    raw_scales: tuple[Any, ...]
    free: tuple[Any, ...]
    ready: tuple[Any, ...]
    raw_ready: tuple[Any, ...]
    scales_ready: tuple[Any, ...]

    @classmethod
    def scratch(cls, shape: Shape, consumers: int) -> Ring:
        """The arrays and barriers that a kernel asks for.

        Args:
            consumers: warpgroups that read each block.
        """
        raw_lanes = shape.cache_lanes if shape.quantized else ()
        rows, dtype, arrivals = shape.keys_per_block, jnp.int8, shape.copies_per_block
        if shape.int4:
            rows, dtype, arrivals = rows // 2, jnp.uint8, 2 * shape.copies_per_block
        # a slot is filled by one producer, or by copies
        ready = 1 if shape.quantized else shape.copies_per_block
        scales, raw_scales, scales_ready = _scales(shape)
        return cls(
            tuple(
                plgpu.SMEM((shape.stages, shape.keys_per_block, n), jnp.bfloat16)
                for n in shape.cache_lanes
            ),
            tuple(plgpu.SMEM((shape.raw_stages, rows, n), dtype) for n in raw_lanes),
            tuple(plgpu.SMEM(x, jnp.float32) for x in scales),
            tuple(plgpu.SMEM(x, jnp.float32) for x in raw_scales),
            tuple(_barriers(shape.stages, consumers) for _ in shape.cache_lanes),
            tuple(_barriers(shape.stages, ready) for _ in shape.cache_lanes),
            tuple(_barriers(shape.raw_stages, arrivals) for _ in raw_lanes),
            tuple(_barriers(*x) for x in scales_ready),
        )

    def of_caches(self, caches: slice) -> Ring:
        """What some of the caches pass through. Scales of int4 pages are one array for all."""
        names = ["blocks", "raw", "free", "ready", "raw_ready"]
        names += [] if self.raw_scales else ["scales", "scales_ready"]
        return self._replace(**{name: getattr(self, name)[caches] for name in names})

    def scales_of(self, cache: int, step: Array, shape: Shape) -> Any:
        """The scales [scales, keys] of a step's block, once they are there. Those of int4 pages are
        there when the keys are."""
        if shape.int4:
            rows = pl.ds(sum(shape.scales_per_row[:cache]), shape.scales_per_row[cache])
            return self.scales[0].at[lax.rem(step, jnp.int32(shape.stages)), rows]
        slot = lax.rem(step, jnp.int32(self.scales[cache].shape[0]))
        plgpu.barrier_wait(self.scales_ready[cache].at[slot])
        return self.scales[cache].at[slot]


def _scales(shape: Shape) -> tuple[list[Any], list[Any], list[tuple[int, int]]]:
    """Shapes of `Ring.scales` and `Ring.raw_scales`, and barriers: how many, of how many copies."""
    copies = [shape.copies_per_block * n for n in shape.scales_per_row]
    if shape.int4:
        scales = shape.stages, shape.int4_scale_rows, shape.keys_per_block
        raw_scales = shape.raw_stages, *shape.raw_scales
        return [scales], [raw_scales], [(shape.raw_stages, sum(copies))]
    slots = shape.raw_stages + shape.stages
    scales_of = [(slots, n, shape.keys_per_block) for n in shape.scales_per_row]
    return scales_of, [], [(slots, n) for n in copies]


def _barriers(number: int, arrivals: int) -> Any:
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=number)
