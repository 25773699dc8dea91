"""Kernels for Hopper executed as what they are compiled to, wherever they are called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.op import Op
from kernels_pallas.paged_attention import (
    mosaic_gpu_int4_writing,
    mosaic_gpu_int8_writing,
    mosaic_gpu_writing,
)
from tests.kernels_pallas.hopper import launch
from tests.kernels_pallas.hopper.block import Schedule
from tests.kernels_pallas.hopper.memory import Findings

_WRITING = (mosaic_gpu_writing, mosaic_gpu_int8_writing, mosaic_gpu_int4_writing)

Changed = Callable[[launch.Compiled], launch.Compiled]


@contextmanager
def executing(
    changed: Changed = lambda kernel: kernel, seed: int = 0, schedule: Schedule | None = None
) -> Iterator[Findings]:
    """Kernels that are called meanwhile are compiled, changed and executed; what was wrong.

    Args:
        seed: of the order in which warpgroups and copies go on, and of what nobody has written.
        schedule: when copies happen; if None, the seed draws one for every block of threads.
    """
    findings = Findings()

    def run(function: Callable[..., Any], *operands: Any) -> Any:
        found, wrong = launch.executed(
            function, *operands, changed=changed, seed=seed, schedule=schedule
        )
        findings.update(wrong)
        return found

    kernel = plgpu.kernel
    with ExitStack() as stack:
        made = lambda *args, **options: partial(run, kernel(*args, **options))  # noqa: E731
        stack.enter_context(mock.patch.object(plgpu, "kernel", made))
        for module in _WRITING:  # these return arrays that they were given, which a jit must make
            stack.enter_context(mock.patch.object(module, "_launch", _launched(module, run)))
        yield findings


def _launched(module: Any, run: Callable[..., Any]) -> Callable[..., Any]:
    whole = module._launch
    return lambda *operands, **options: run(partial(whole, **options), *operands)


def case_of(op: Op, name: str) -> tuple[tuple[Any, ...], dict[str, Any], Mapping[str, Any]]:
    """Arguments, arrays and options of a case."""
    case = op.case(name)
    return *case.make(jax.random.key(3)), case.options


def agree(found: Any, expected: Any, tolerance: float) -> None:
    """Trees are alike but for a share of the largest value; what is not finite is the same."""
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        x, y = (np.asarray(each, np.float32) for each in (x, y))
        largest = np.abs(y, where=np.isfinite(y), out=np.zeros_like(y)).max(initial=0)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * float(largest))
