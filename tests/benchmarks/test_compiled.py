"""Which tile the compiler's word rules out, without a compiler."""

from dataclasses import dataclass

import jax
import pytest

from benchmarks import compiled
from benchmarks.compiled import Outcome, shipped, tune
from kernels_pallas.op import Body, Case, Op, tried
from kernels_pallas.registry import OPS


@dataclass(frozen=True)
class Tile:
    rows: int = tried(8, 16, 32)


CASE = Case("case", lambda key: ((jax.random.normal(key, (4, 4)),), {}), shipped=True)
OP = Op("op", lambda x: x, {"body": Body("gpu", lambda x, **_: x, Tile)}, (CASE,))


@pytest.mark.parametrize(
    ("own", "of_rows", "expected"),
    [
        (0, {}, None),  # its own choice stands, and nothing else is compiled
        (40, {8: 40, 16: 12, 32: 20}, 16),
        (8, {8: 16, 16: 8, 32: 9}, None),  # of equals its own
        (None, {8: None, 16: 4, 32: 0}, 32),  # it does not compile
        (None, {8: None, 16: None, 32: None}, None),
    ],
)
def test_a_tile_replaces_a_choice_that_spills_or_does_not_compile(
    own, of_rows, expected, monkeypatch
):
    def outcome(op, name, case, target, tile):
        spills = own if tile is None else of_rows[tile.rows]
        if spills is None:
            return Outcome(tile, failed="too large")
        return Outcome(tile, spills, stands=not spills)

    monkeypatch.setattr(compiled, "_compiled", outcome)
    found, entry = tune(OP, "body", CASE, "h200", most=6)
    assert len(found) == (1 if own == 0 else 1 + len(of_rows))
    if expected is None:
        assert entry is None
    else:
        assert entry["tile"] == {"rows": expected} and entry["source"] == "compiled"
        assert entry["instead_of"] == ("too large" if own is None else f"{own} spills")


def test_targets_are_given_the_bodies_of_their_platform():
    for target, platform in (("h200", "gpu"), ("v6e", "tpu")):
        work = list(shipped(target, [], []))
        assert {op.bodies[name].platform for op, name, _ in work} == {platform}
        assert {op.name for op, _, _ in work} == {
            op.name for op in OPS for body in op.bodies.values() if body.platform == platform
        }
