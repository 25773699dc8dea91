"""A Hopper core's shared memory: where copies land in it, and what it has room for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from benchmarks.entrants import candidates
from kernels_pallas import hopper
from kernels_pallas.grouped_matmul import mosaic_gpu as grouped_matmul
from kernels_pallas.int8_matmul import mosaic_gpu as int8_matmul
from kernels_pallas.op import Case, Op, UnsupportedError
from kernels_pallas.registry import OPS
from tests.sparing import sparing

ALIGNED = 128  # bytes: where a copy of a tensor begins, or the card ends the program
TRACED = 32  # tiles of an op, drawn from all
SIZES = 72  # as many that are lowered
HOPPER = {op.name: op for op in OPS if "mosaic_gpu" in op.bodies}
QUICK = [name for name in HOPPER if name != "page_attention"]


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


@pytest.mark.parametrize("name", sparing(HOPPER, *QUICK))
def test_copies_into_shared_memory_are_aligned(name: str, monkeypatch):
    op = HOPPER[name]
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


def lowered(op: Op, case: Case, tile: Any) -> None:
    def run(args: Any, arrays: Any) -> Any:
        return op.bodies["mosaic_gpu"].run(*args, tile=tile, **arrays, **case.options)

    jax.export.export(
        jax.jit(run),
        platforms=["cuda"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")],
    )(*jax.eval_shape(case.make, jax.random.key(0)))


@pytest.mark.slow
@pytest.mark.parametrize("op", HOPPER.values(), ids=HOPPER)
def test_tiles_that_do_not_fit_are_refused_before_they_are_lowered(op: Op):
    """What tuning tries lowers, or raises `UnsupportedError`, and nothing of Mosaic's."""
    shipped = [c for c in op.cases if c.shipped and "mosaic_gpu" in (c.bodies or op.bodies)]
    fitting = 0
    for seed, case in enumerate(shipped):
        for tile in candidates(op.bodies["mosaic_gpu"], "h200", -(-SIZES // len(shipped)), seed):
            try:
                lowered(op, case, tile)
            except UnsupportedError:
                continue
            fitting += 1
    assert fitting or not list(op.bodies["mosaic_gpu"].tiles("h200"))


LARGE = {
    "int8_matmul": int8_matmul.Tile(256, 2, 256, 4),
    "grouped_matmul": grouped_matmul.Tile(128, 2, 128, 128, 3),
}


@pytest.mark.parametrize("name", LARGE)
def test_products_name_the_shared_memory_that_is_not_there(name: str):
    op = HOPPER[name]
    case = next(case for case in op.cases if case.shipped)
    with pytest.raises(UnsupportedError, match=r"Tile.* need \d+ bytes of shared memory, and 23"):
        lowered(op, case, LARGE[name])


def test_what_just_fits_is_lowered():
    """Barriers, which are not counted, find room in what is left for them."""
    op = HOPPER["grouped_matmul"]
    case = next(case for case in op.cases if case.shipped and "7168-L2-int8" in case.name)
    tile = grouped_matmul.Tile(64, 2, 128, 128, 4)
    assert hopper.SHARED_BYTES - 1024 <= sum(tile.shared(1, 2)) <= hopper.SHARED_BYTES
    lowered(op, case, tile)
