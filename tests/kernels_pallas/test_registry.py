"""Every body of every op: against its reference, in a simulator, lowered, and compiled."""

from __future__ import annotations

import re
from functools import cache

import jax
import numpy as np
import pytest

from kernels_pallas.op import Case, Op
from kernels_pallas.registry import OPS
from tests.kernels_pallas import bounds, compiling, simulators

PLATFORMS = {"mosaic_tpu": "tpu", "mosaic_gpu": "cuda"}
TARGETS = {
    "mosaic_tpu": ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"),
    "mosaic_gpu": ("h200:1x1x1",),
}


def rows(shipped: bool | None, *bodies: str) -> list[tuple[Op, str, Case]]:
    """Every (op, body, case) for cases of one kind or both."""
    return [
        (op, body, case)
        for op in OPS
        for body in op.bodies
        for case in op.cases
        if body in (bodies or op.bodies) and body in (case.bodies or op.bodies)
        if shipped in (None, case.shipped)
    ]


def parameter(op: Op, body: str, case: Case, *more: str, slow: bool):
    name = "-".join((op.name, body, case.name, *more))
    return pytest.param(op, body, case, *more, id=name, marks=[pytest.mark.slow] if slow else [])


def words(op: Op, body: str, case: Case) -> set[str]:
    return {op.name, body, *case.name.split("-")}


def table(shipped: bool | None, *bodies: str, slow: tuple[str, ...] = ()):
    """Parameters (op, body, case). `slow` names ops, bodies, or words of cases."""
    return pytest.mark.parametrize(
        ("op", "body", "case"),
        [parameter(*row, slow=bool(words(*row) & {*slow})) for row in rows(shipped, *bodies)],
    )


def compilations(*slow: str):
    """Parameters (op, body, case, target): quick ones take turns with TPUs, two for each case."""
    return pytest.mark.parametrize(
        ("op", "body", "case", "target"),
        [
            parameter(*row, target, slow=bool(words(*row) & {*slow}) or target not in taken)
            for turn, row in enumerate(rows(True, *PLATFORMS))
            for taken in [TARGETS[row[1]][turn % 2 :: 2] or TARGETS[row[1]]]
            for target in TARGETS[row[1]]
        ],
    )


def simulated(body: str):
    return {"mosaic_tpu": True, "mosaic_gpu": simulators.gpu()}.get(body, False)


def agree(found, expected, tolerance: float) -> None:
    """Equality up to `tolerance` of the largest expected value, leaf by leaf."""
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        bound = tolerance * max(1e-30, np.abs(y, where=np.isfinite(y), out=np.zeros_like(y)).max())
        np.testing.assert_allclose(x, y, rtol=0, atol=bound)


@cache
def made(op_name: str, case_name: str):
    """A case's arguments and what its reference says: compiled once for all bodies."""
    [op] = (op for op in OPS if op.name == op_name)
    case = op.case(case_name)

    def reference(args, arrays):
        return op.reference(*args, **arrays, **case.options)

    args, arrays = jax.jit(case.make)(jax.random.key(0))
    return args, arrays, jax.jit(reference)(args, arrays)


@table(False, slow=("mosaic_gpu", "int4", "sample", "packed", "static"))  # seconds each
def test_matches_its_reference(op: Op, body: str, case: Case):
    args, arrays, expected = made(op.name, case.name)

    def run(args, arrays):
        return op.run(body, *args, interpret=simulated(body), **arrays, **case.options)

    try:
        found = jax.block_until_ready(jax.jit(run)(args, arrays))
        assert body != "mosaic_gpu" or not simulators.gpu_races_found()
    finally:  # a simulation that failed would fail the next one
        if body == "mosaic_gpu":
            simulators.reset_gpu()
    agree(found, expected, case.tolerance)


@pytest.mark.parametrize(
    "op", [op for op in OPS if "mosaic_tpu" in op.bodies], ids=lambda o: o.name
)
def test_has_no_race_on_a_simulated_tpu(op: Op):
    """Mosaic GPU kernels are always simulated with race detection, by the test above."""
    case = next(case for case in op.cases if not case.shipped)
    args, arrays, expected = made(op.name, case.name)

    def run(args, arrays):
        simulated = simulators.tpu()
        return op.run("mosaic_tpu", *args, interpret=simulated, **arrays, **case.options)

    try:
        agree(jax.jit(run)(args, arrays), expected, case.tolerance)
        assert not simulators.tpu_races_found()
    finally:
        simulators.reset_tpu()


def abstract(case: Case):
    return jax.eval_shape(case.make, jax.random.key(0))


def callable_of(op: Op, body: str, case: Case):
    return lambda args, arrays: op.run(body, *args, **arrays, **case.options)


@table(True, *PLATFORMS, slow=("int4", "flash_attention_gradient"))
def test_lowers_with_nothing_but_jaxlib(op: Op, body: str, case: Case):
    exported = jax.export.export(
        jax.jit(callable_of(op, body, case)),
        platforms=[PLATFORMS[body]],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")],
    )(*abstract(case))
    assert re.search(r"tpu_custom_call|mosaic_gpu", exported.mlir_module())


def test_a_case_that_is_not_there_is_named():
    with pytest.raises(
        KeyError, match=f"{OPS[0].name} has no case 'odd'; .*{OPS[0].cases[0].name}"
    ):
        OPS[0].case("odd")


def test_layers_that_are_written_out_lower_a_hopper_kernel_once():
    [op] = (op for op in OPS if op.name == "page_attention")
    case = op.case("mixed-grouped")

    def layers(args, arrays):
        q, k_pages, v_pages, _, *rest = args
        for layer in range(3):
            parts = q, k_pages, v_pages, layer, *rest
            o, _, *_ = op.run("mosaic_gpu", *parts, **arrays, **case.options)
            q += o.astype(q.dtype)
        return q

    exported = jax.export.export(
        jax.jit(layers), platforms=["cuda"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")],
    )(*abstract(case))  # fmt: skip
    module = exported.mlir_module()
    assert len(re.findall(r"custom_call @mosaic_gpu", module)) == 1, "and not one for each layer"


@pytest.fixture(scope="module")
def compiled():
    with compiling.compiler() as run:
        yield run


@pytest.mark.aot
@compilations("flash_attention", "flash_attention_gradient", "int4")  # a minute
def test_compiles_for_absent_hardware(op: Op, body: str, case: Case, target: str, compiled):
    """With few temporaries, and with no more spills than bounds.py says and gives reasons for."""
    found, device = compiled(op.name, body, case.name, target), target.split(":")[0]
    assert found.temporaries <= bounds.temporaries(op.name, case, device)
    assert found.spills <= bounds.spills(op.name, case.name, device)
