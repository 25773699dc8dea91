"""Compiles shipped cases in a process of its own, whose compilers were told to report."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from kernels_pallas.registry import OPS
from sharding import compile_only, kernel_report


class Compiled(NamedTuple):
    """What a compiler made of one case."""

    temporaries: int  # bytes
    kernels: list[kernel_report.Kernel]

    @property
    def spills(self) -> int:
        return sum(kernel.spills for kernel in self.kernels)


@contextmanager
def compiler() -> Iterator[Any]:
    """A function (op, body, case, target) -> `Compiled`, of names. Not a fork, for a compiler reads
    its environment once."""
    with tempfile.TemporaryDirectory() as folder:
        start = {"mp_context": get_context("spawn"), "initializer": _prepare}
        with ProcessPoolExecutor(1, initargs=(Path(folder),), **start) as pool:
            yield lambda *names: pool.submit(_compile, *names).result()


def _prepare(folder: Path) -> None:
    jax.config.update("jax_enable_compilation_cache", False)  # programs could not be read back
    kernel_report.prepare(folder)


def _compile(op_name: str, body: str, case_name: str, target: str) -> Compiled:
    op = next(op for op in OPS if op.name == op_name)
    case = op.case(case_name)
    sharding = NamedSharding(compile_only.mesh(target), PartitionSpec())
    args, arrays = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(case.make, jax.random.key(0)),
    )
    tile = op.bodies[body].wanted(target.split(":")[0])
    run = jax.jit(lambda args, arrays: op.run(body, *args, tile=tile, **arrays, **case.options))
    compiled, kernels = kernel_report.compile_with_report(run.lower(args, arrays))
    return Compiled(compiled.memory_analysis().temp_size_in_bytes, kernels)
