"""Which body of an op runs, and what is said if none can."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import tuning
from kernels_pallas.op import Body, Op, UnsupportedError, signature
from kernels_pallas.registry import OPS
from kernels_pallas.target import CPU, Target

TPU = Target("tpu", "v6e")


@dataclass(frozen=True)
class Tile:
    rows: int = 8


def body(name: str, limit: int) -> Body:
    def run(x: Any, *, tile: Tile | None = None, interpret: Any = False) -> str:
        if x.shape[0] > limit:
            raise UnsupportedError(f"{x.shape[0]} rows are more than {limit}")
        return f"{name}-{tile.rows if tile else None}"

    return Body("tpu", run, Tile)


def reference(x: Any) -> str:
    if x.shape[0] > 100:
        raise UnsupportedError("more than 100")
    return "reference"


OP = Op("op", reference, {"small": body("small", 4), "large": body("large", 10)}, ())


@pytest.mark.parametrize(
    ("rows", "target", "expected"),
    [
        (4, TPU, "small-None"),
        (5, TPU, "large-None"),
        (11, TPU, "reference"),
        (4, CPU, "reference"),
        (4, Target("gpu", "h200"), "reference"),
    ],
)
def test_the_first_that_can(rows: int, target: Target, expected: str):
    assert OP(jnp.zeros((rows, 2)), target=target) == expected


@pytest.mark.parametrize(
    "op", [op for op in OPS if "mosaic_gpu" in op.bodies], ids=lambda o: o.name
)
def test_a_gpu_that_is_no_hopper_gets_the_reference(op: Op):
    case = next(case for case in op.cases if case.shipped)
    shapes = jax.eval_shape(case.make, jax.random.key(0))
    for kind in ("NVIDIA A100-SXM4-80GB", "NVIDIA B200", "NVIDIA GeForce RTX 4090"):
        run = partial(op, target=Target("gpu", kind), **case.options)
        module = jax.jit(lambda args, arrays, run=run: run(*args, **arrays)).lower(*shapes)
        assert "mosaic" not in module.as_text()
        with pytest.raises(UnsupportedError, match=f"mosaic_gpu: .* H100, .* this is '{kind}'"):
            jax.eval_shape(
                lambda args, arrays, run=run: run(*args, implementation="mosaic_gpu", **arrays),
                *shapes,
            )
    for kind in ("", "h100", "h200", "NVIDIA H100 NVL", "NVIDIA GH200 480GB", "NVIDIA H20"):
        assert op.bodies["mosaic_gpu"].declines(kind) is None


def test_reasons_are_listed_when_nobody_can():
    with pytest.raises(UnsupportedError) as error:
        OP(jnp.zeros((101, 2)), target=TPU)
    for reason in ("op: nothing", "small: 101 rows", "large: 101 rows", "reference: more than 100"):
        assert reason in str(error.value)


def test_a_named_one_is_taken_or_says_why_not():
    assert OP(jnp.zeros((4, 2)), target=CPU, implementation="large") == "large-None"
    with pytest.raises(UnsupportedError, match=r"more than 4$"):
        OP(jnp.zeros((5, 2)), target=TPU, implementation="small")
    with pytest.raises(UnsupportedError, match=r"'fast', not in \['small', 'large', 'reference'\]"):
        OP(jnp.zeros((5, 2)), target=TPU, implementation="fast")


def test_a_signature_tells_calls_apart_that_compute_different_things():
    x, w = jnp.zeros((4, 2)), jnp.zeros((3, 2), jnp.int8)
    assert signature(x, None, jnp.int32(7)) == "float32[4,2]", "scalars do not count"
    assert signature(x, up=w, up_scale=None, scale=0.5, layer=jnp.int32(1)) == (
        "float32[4,2] up=int8[3,2]"
    )
    assert signature(x, activation="silu", mass=True, causal=False, out_dtype=jnp.bfloat16) == (
        "float32[4,2] activation=silu mass out_dtype=bfloat16"
    )


def test_a_signature_does_not_depend_on_how_arguments_are_passed():
    def reference(x: Any, y: Any = None, *, out_dtype: Any = jnp.float32) -> Any:
        return x

    op, x = Op("op", reference, {}, ()), jnp.zeros((4, 2))
    assert op.signature(x, x) == op.signature(y=x, x=x, out_dtype=jnp.float32)
    assert op.signature(x, x).endswith(" out_dtype=float32")


def test_a_winner_without_sizes_chooses_for_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "TUNED", tmp_path)
    x = jnp.zeros((4, 2))
    entry = tuning.entry("large", None, source="measured")
    tuning.merge(tmp_path / "v6e.json", {"op": {signature(x): entry}})
    try:
        assert OP(x, target=TPU) == "large-None"
    finally:
        tuning.table.cache_clear()


def test_what_was_measured_to_win_comes_first_with_its_tile(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "TUNED", tmp_path)
    tuning.table.cache_clear()
    x, y = jnp.zeros((4, 2)), jnp.zeros((3, 2))
    won = {
        signature(x): {"implementation": "large", "tile": {"rows": 32}},
        signature(y): {"implementation": "reference"},
    }
    (tmp_path / "v6e.json").write_text(json.dumps({"op": won}))
    try:
        assert OP(x, target=TPU) == "large-32"
        assert OP(y, target=TPU) == "reference"
        assert OP(x, target=Target("tpu", "v5e")) == "small-None", "another device"
        assert OP(jnp.zeros((2, 2)), target=TPU) == "small-None", "other shapes"
    finally:
        tuning.table.cache_clear()
