"""Tiles for hardware that is not there: `python -m benchmarks.compiled v6e`.

Compiles every shipped case of every body for a target (v5e, v5p, v6e, tpu7x, h200) and reads what
the compiler says of registers. A body's own choice of tile stands unless it does not compile or, on
a GPU, spills; then the candidate that spills least takes its place, and is written to
kernels_pallas/tuned/ as "compiled". That rules tiles out. It ranks none: no time is predicted,
XLA's own form is not judged, and a measurement overrules it.

Spills on a TPU are reported but decide nothing. A block of 1024 x 512 x 4096 of the int8 product,
multiplied in one go, spilled 6,300 times in 4,400 bundles, and one of 128 x 256 x 4096 70 times in
620; but the first does 16 times the work: fewer than half the bundles for the whole product, and a
fraction of the reads.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.entrants import candidates, short
from benchmarks.kernels import versions
from benchmarks.order import chosen
from benchmarks.programs import runner
from kernels_pallas import tuning
from kernels_pallas.op import Case, Op
from sharding import compile_only, kernel_report

TARGETS = {
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
    "h200": "h200:1x1x1",
}


@dataclass(frozen=True)
class Outcome:
    """What a compiler made of a body with a tile.

    Attributes:
        spills: registers stored and loaded again for lack of room (TPU), or bytes of them (GPU).
        length: bundles of instructions (TPU).
        failed: why there is no program; "" if there is one.
        stands: whether nothing speaks against it.
    """

    tile: Any
    spills: int = 0
    length: int = 0
    failed: str = ""
    stands: bool = False


def tune(op: Op, name: str, case: Case, target: str, most: int) -> tuple[list[Outcome], Any]:
    """What was tried, and the entry for the table: None where a body's own choice stands."""
    tried = list[Outcome]()
    for tile in (None, *candidates(op.bodies[name], target, most)):
        outcome = _compiled(op, name, case, target, tile or op.bodies[name].wanted(target))
        tried.append(dataclasses.replace(outcome, tile=tile))
        if tried[-1].stands:
            break
    usable = [outcome for outcome in tried if not outcome.failed]
    best = min(usable, key=lambda outcome: outcome.spills, default=None)  # the first of equals
    if best is None or best.tile is None:
        return tried, None
    return tried, tuning.entry(
        name, best.tile, source="compiled", case=case.name, versions=versions(),
        date=datetime.date.today().isoformat(), spills=best.spills,
        instead_of=tried[0].failed or f"{tried[0].spills} spills",
    )  # fmt: skip


def _compiled(op: Op, name: str, case: Case, target: str, tile: Any) -> Outcome:
    mesh = compile_only.mesh(TARGETS[target])
    try:
        inputs = abstract(case, NamedSharding(mesh, PartitionSpec()))
        lowered = jax.jit(runner(op, case, name, tile)).lower(inputs)
        _, kernels = kernel_report.compile_with_report(lowered)
    except compile_only.AbsentCompilerError:
        raise
    except Exception as error:  # a refusal, or a compiler's: too large, not aligned
        return Outcome(tile, failed=short(error))
    spills, length = (sum(k.spills + k.fills for k in kernels), sum(k.length for k in kernels))
    return Outcome(tile, spills, length, stands=target != "h200" or not spills)


def abstract(case: Case, sharding: Any = None) -> Any:
    shapes = jax.eval_shape(case.make, jax.random.key(0))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


def shipped(target: str, ops: list[str], cases: list[str]) -> Iterator[tuple[Op, str, Case]]:
    """Every body for the target's platform, with the shipped cases that it takes."""
    platform = "gpu" if target == "h200" else "tpu"
    for op, case in chosen(ops, cases, shipped=True):
        for name, body in op.bodies.items():
            if body.platform == platform and (case.bodies is None or name in case.bodies):
                yield op, name, case


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="+", choices=list(TARGETS))
    parser.add_argument("--ops", nargs="*", default=[])
    parser.add_argument("--cases", nargs="*", default=[])
    parser.add_argument("--tiles", type=int, default=6, help="tried where a body's own fails")
    parser.add_argument("--out", type=Path, default=tuning.TUNED, help="the folder of tables")
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)  # programs could not be read back
    with tempfile.TemporaryDirectory() as folder:
        kernel_report.prepare(Path(folder))
        for target in args.targets:
            for op, name, case in shipped(target, args.ops, args.cases):
                tried, entry = tune(op, name, case, target, args.tiles)
                outcomes = [
                    asdict(o) | {"tile": None if o.tile is None else asdict(o.tile)} for o in tried
                ]
                line = {"target": target, "op": op.name, "body": name, "case": case.name}
                print(json.dumps(line | {"tried": outcomes}), flush=True)
                if entry:
                    args_, arrays = abstract(case)
                    signature = op.signature(*args_, **arrays, **case.options)
                    found = {op.name: {signature: entry}}
                    tuning.merge(args.out / f"{target}.json", found)


if __name__ == "__main__":
    main()
