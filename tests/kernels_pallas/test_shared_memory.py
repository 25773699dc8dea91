"""Where copies land in a Hopper core's shared memory, which no simulator minds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from benchmarks.entrants import candidates
from kernels_pallas.op import Case, Op, UnsupportedError
from kernels_pallas.registry import OPS

ALIGNED = 128  # bytes: where a copy of a tensor begins, or the card ends the program
TRACED = 32  # tiles of an op, drawn from all


def steps(place: Any) -> Iterator[int]:
    """Bytes by which the beginning of a part of a buffer may move, a number for each index."""
    shape, size = place.ref.shape, place.ref.dtype.itemsize
    for indexer in place.transforms:
        for axis, index in enumerate(indexer.indices):
            begin = index.start if isinstance(index, pl.Slice) else index
            moves = begin if isinstance(begin, int) else shape[axis] > 1
            yield moves * size * math.prod(shape[axis + 1 :])
        shape = [index.size for index in indexer.indices if isinstance(index, pl.Slice)]


def traced(op: Op) -> Iterator[tuple[Case, Any]]:
    """Small cases with what tuning would try, other tiles for each."""
    cases = [c for c in op.cases if not c.shipped and "mosaic_gpu" in (c.bodies or op.bodies)]
    for seed, case in enumerate(cases):
        tiles = candidates(op.bodies["mosaic_gpu"], "h200", TRACED // len(cases), seed)
        yield from ((case, tile) for tile in (None, *tiles))


@pytest.mark.parametrize("op", [x for x in OPS if "mosaic_gpu" in x.bodies], ids=lambda o: o.name)
def test_copies_into_shared_memory_are_aligned(op: Op, monkeypatch):
    uneven, copy = set[tuple[str, tuple[int, ...]]](), plgpu.copy_gmem_to_smem

    def recorded(source: Any, place: Any, *rest: Any, **options: Any) -> None:
        if hasattr(place, "transforms") and any(step % ALIGNED for step in steps(place)):
            uneven.add((str(tile), tuple(place.ref.shape)))
        copy(source, place, *rest, **options)

    monkeypatch.setattr(plgpu, "copy_gmem_to_smem", recorded)
    for case, tile in traced(op):

        def run(args: Any, arrays: Any, tile: Any = tile, case: Case = case) -> Any:
            return op.bodies["mosaic_gpu"].run(*args, tile=tile, **arrays, **case.options)

        try:
            jax.eval_shape(run, *jax.eval_shape(case.make, jax.random.key(0)))
        except UnsupportedError:
            continue
    assert not uneven
