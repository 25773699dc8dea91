"""The producer warpgroups of Hopper's page attention: they fill the rings with keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.paged_attention.mosaic_gpu_ring import Ring
from kernels_pallas.paged_attention.mosaic_gpu_shape import KEY_CLASSES, Shape
from kernels_pallas.paged_attention.mosaic_gpu_widening import unpack, widen
from kernels_pallas.paged_attention.mosaic_gpu_work import Program, Sources, Work


def produce(program: Program, ring: Ring, work: Work, caches: slice = slice(None)) -> None:
    """Copies the blocks of keys and values that consumers attend to, each as its slot becomes free.

    Blocks of int8 or int4 pages are copied `Shape.raw_stages` steps ahead and converted to bfloat16
    once a slot for that is free.

    Args:
        caches: those that this warpgroup copies. The one that copies int4 keys copies the scales of
            all caches.
    """
    shape = program.shape
    producer = _Producer.of(program, ring, work, caches)
    if shape.quantized:
        pl.loop(0, jnp.minimum(work.blocks, shape.raw_stages))(producer.copy_raw)

    # steps behind the last block only wait for its slots to be free again, as simulators demand
    @pl.loop(0, work.blocks + shape.stages)
    def _step(step: Array) -> None:
        slot, ring = lax.rem(step, jnp.int32(shape.stages)), producer.ring
        for free, *target in zip(
            ring.free, producer.sources.pages, ring.blocks, ring.ready, strict=True
        ):
            pl.when(step >= shape.stages)(partial(plgpu.barrier_wait, free.at[slot]))
            if not shape.quantized:
                pl.when(step < work.blocks)(partial(producer.copy_rows, step, [target]))
        if shape.quantized:
            pl.when(step < work.blocks)(partial(producer.convert, step))


class _Producer(NamedTuple):
    """A producer warpgroup.

    Attributes:
        shape, work: sizes, and the keys to copy.
        head: the KV head.
        sources, ring: pages, scales and rings of the caches that this producer copies; scales of
            int4 pages are those of all caches.
        stored_scales: scales that a row has in its page, for each of `sources.scales`.
        copies_int4_scales: whether it copies and sorts these.
        simulated: whether the simulator runs the kernel.
    """

    shape: Shape
    work: Work
    head: Array
    sources: Sources
    ring: Ring
    stored_scales: tuple[int, ...]
    copies_int4_scales: bool
    simulated: bool

    @classmethod
    def of(cls, program: Program, ring: Ring, work: Work, caches: slice) -> _Producer:
        shape, sources = program.shape, program.sources
        stored_scales = shape.stored_scales_per_row
        sources = sources._replace(pages=sources.pages[caches])
        if not shape.int4:
            sources = sources._replace(scales=sources.scales[caches])
            stored_scales = stored_scales[caches]
        head = lax.div(lax.axis_index("head"), jnp.int32(shape.tiles_per_kv_head))
        return cls(
            shape, work, head, sources, ring.of_caches(caches), stored_scales,
            shape.int4 and not caches.start, program.simulated,
        )  # fmt: skip

    def copies(self, step: Array, keys_per_row: int = 1) -> Iterator[tuple[Array, Any, Any]]:
        """The copies of a step's block: the page, rows of the page, and rows of the block.

        Copies behind the last one repeat it: a barrier counts on all of them.

        Args:
            keys_per_row: keys in a row of pages, 4 of those that are brought sorted.
        """
        shape = self.shape
        size, first = shape.keys_per_copy // keys_per_row, self.work.copy_of_step(step, shape)
        per_page = jnp.int32(shape.copies_per_page)
        for i in range(shape.copies_per_block):
            copy = jnp.minimum(first + i, self.work.end_copy - 1)
            page = self.sources.tables[self.work.seq * shape.table_width + lax.div(copy, per_page)]
            rows = pl.ds(lax.rem(copy, per_page) * size, size)
            yield page, rows, pl.ds(i * size, size)

    def copy_raw(self, step: Array) -> None:
        """Begins to copy a step's block and its scales to the ring of quantized blocks."""
        if not self.shape.int4:
            self.copy_rows(
                step, list(zip(self.sources.pages, self.ring.raw, self.ring.raw_ready, strict=True))
            )
            self.copy_scales(step)
            return
        if self.copies_int4_scales:
            self.copy_int4_scales(step)
        self.copy_int4_rows(step)

    def copy_rows(self, step: Array, targets: list[Any]) -> None:
        """Begins to copy a step's block to targets: pages, the ring's array and its barrier."""
        slot = lax.rem(step, jnp.int32(targets[0][1].shape[0]))
        for page, rows, block_rows in self.copies(step):
            for pages, block, ready in targets:
                lanes = pl.ds(0, block.shape[-1])
                source = pages.at[self.sources.layer[0], page, self.head, rows, lanes]
                plgpu.copy_gmem_to_smem(source, block.at[slot, block_rows], ready.at[slot])

    def copy_int4_rows(self, step: Array) -> None:
        """Begins to copy a step's block of int4 pages, even pairs of keys before odd ones."""
        shape, ring = self.shape, self.ring
        slot = lax.rem(step, jnp.int32(shape.raw_stages))
        half = shape.keys_per_block // KEY_CLASSES
        for page, rows, block_rows in self.copies(step, KEY_CLASSES):
            for pages, raw, ready in zip(self.sources.pages, ring.raw, ring.raw_ready, strict=True):
                for odd in range(2):
                    lanes = pl.ds(0, raw.shape[-1])
                    source = pages.at[self.sources.layer[0], page, self.head, rows, odd, lanes]
                    target = raw.at[slot, pl.ds(odd * half + block_rows.start, block_rows.size)]
                    plgpu.copy_gmem_to_smem(source, target, ready.at[slot])

    def copy_scales(self, step: Array) -> None:
        """Begins to copy the scales of a step's block of int8 pages, if rows have some."""
        layer = self.sources.layer
        for scales, stored, block, ready in zip(
            self.sources.scales, self.stored_scales, self.ring.scales, self.ring.scales_ready,
            strict=True,
        ):  # fmt: skip
            slot = lax.rem(step, jnp.int32(block.shape[0]))
            for page, keys, block_keys in self.copies(step):
                for part in range(block.shape[1]):
                    source = scales.at[layer[0], page, self.head * stored + part, keys]
                    target = block.at[slot, part, block_keys]
                    plgpu.copy_gmem_to_smem(source, target, ready.at[slot])

    def copy_int4_scales(self, step: Array) -> None:
        """Begins to copy the scales of a step's block of int4 pages, of all caches."""
        (block,), (ready,), first = self.ring.raw_scales, self.ring.scales_ready, 0
        layer = self.sources.layer
        slot = lax.rem(step, jnp.int32(self.shape.raw_stages))
        for scales, stored, copied in zip(
            self.sources.scales, self.stored_scales, self.shape.scales_per_row, strict=True
        ):
            for page, keys, block_keys in self.copies(step, KEY_CLASSES):
                for part in range(copied):
                    source = scales.at[layer[0], page, self.head * stored + part, keys]
                    target = block.at[slot, first + part, block_keys]
                    plgpu.copy_gmem_to_smem(source, target, ready.at[slot])
            first += copied

    def convert(self, step: Array) -> None:
        """Makes bfloat16 of a step's block once it is there, and begins to copy the block that
        takes its slot."""
        shape, ring = self.shape, self.ring
        raw_slot, slot = (lax.rem(step, jnp.int32(n)) for n in (shape.raw_stages, shape.stages))
        if self.copies_int4_scales:
            plgpu.barrier_wait(ring.scales_ready[0].at[raw_slot])
            _sort_scales(ring.raw_scales[0].at[raw_slot], ring.scales[0].at[slot])
        for raw, raw_ready, block, ready in zip(
            ring.raw, ring.raw_ready, ring.blocks, ring.ready, strict=True
        ):
            plgpu.barrier_wait(raw_ready.at[raw_slot])
            if shape.int4:
                unpack(raw.at[raw_slot], block.at[slot], KEY_CLASSES, simulated=self.simulated)
            else:  # few registers are left
                lanes = 64 if shape.split_values else 128
                widen(raw.at[raw_slot], block.at[slot], lanes, simulated=self.simulated)
            plgpu.barrier_arrive(ready.at[slot])

        @pl.when(step + shape.raw_stages < self.work.blocks)
        def _() -> None:
            self.copy_raw(step + shape.raw_stages)


def _sort_scales(raw: Any, scales: Any) -> None:
    """Scales [n, keys / 4, 4] in the order of keys [n, keys]: a thread takes one at a time."""
    by_class = raw.at[:, pl.ds(0, scales.shape[1] // KEY_CLASSES)].transpose((0, 2, 1))
    layout = plgpu.Layout.WG_STRIDED(by_class.shape, vec_size=1)
    x = plgpu.layout_cast(by_class[...], layout)
    scales[...] = x.reshape(scales.shape)
