"""Which body of an op runs, and what is said if none can."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import pytest

from kernels_pallas import tuning
from kernels_pallas.op import Body, Op, UnsupportedError, signature
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
