"""Everything worth knowing about one accelerator, in two commands of ten minutes each.

    python -m benchmarks.accelerator --out DIR --part 1    # are kernels right, and how fast
    python -m benchmarks.accelerator --out DIR --part 2    # whole models, and torch beside them

A stage is a process of its own, because frameworks do not give a card's memory back to each other.
One that fails or takes too long costs the others nothing, and a kernel that hangs, or leaves a card
that answers nobody, costs the other cases little more than a minute. Every stage writes its own
JSON as it goes, and stages-PART.json says how each of them ended. Programs compiled in one stage
are read in the next, from JAX_COMPILATION_CACHE_DIR or a folder that goes with the part.
`--seconds` makes a part shorter; `--smoke` runs the same program with tiny sizes, on whatever there
is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.records import ROOT, machine
from benchmarks.reports import Report, supervised

if TYPE_CHECKING:  # who watches imports no JAX
    from benchmarks.entrants import Field
    from benchmarks.order import Work
    from kernels_pallas.op import Case, Op

PART = 580.0
"""Seconds of a part, unless it is told otherwise."""

_PATIENCE = 75.0  # seconds in which a case has been compiled and compared, or timed
_CLOSING = 30  # seconds of a stage that are left to the last case and to rates at the end
_AHEAD = 16  # cases that are compiled together, before any of them runs


@dataclass(frozen=True)
class Stage:
    """A module that is run with arguments, and the seconds that it may take.

    Attributes:
        report: what it writes case by case, if it can go on behind one that ended it.
        budget: seconds that it is told to go on at most (`--budget-seconds`); 0 if it is not told.
    """

    name: str
    module: str
    arguments: Sequence[str]
    seconds: float
    report: Path | None = None
    budget: float = 0.0


def stages(part: int, out: Path, *, smoke: bool, device: str, seconds: float = PART) -> list[Stage]:
    """What a part consists of, in so many seconds."""
    if part == 1:
        small, check = ["--smoke"] if smoke else [], seconds * 0.26
        correct, found, tuned = (out / f"{x}.json" for x in ("correctness", "kernels", "tiles"))
        tune = ["--tune", "--tiles", "6", "--tables", str(out), "--no-torch"]
        return [
            Stage(
                "correctness", "benchmarks.accelerator",
                ["--check", "--device", device, "--out", str(correct), *small], check, correct,
            ),
            *(
                Stage(
                    path.stem, "benchmarks.kernels",
                    ["--device", device, *small, *more, "--checked", *map(str, checked),
                     "--out", str(path)],
                    seconds * share, path, budget=60.0 if smoke else seconds,
                )
                for path, checked, share, more in (
                    (found, [correct], 0.44, []),
                    (tuned, [correct, found], 0.3, tune),  # one that hangs costs no figure above
                )
            ),
        ]  # fmt: skip
    shapes = ("tiny", "tiny-moe") if smoke else ("8b", "30b-a3b")
    shares = ("jaxserve", 0.32), ("torch", 0.18)  # ours compiles first, and comes first
    return [
        Stage(
            f"{shape}-{library}", "benchmarks.random_model",
            [shape, "--library", library, "--out", str(out / f"{shape}-{library}.json")],
            seconds * share,
        )
        for library, share in shares
        for shape in shapes
    ]  # fmt: skip


def run(
    part: int, out: Path, *, smoke: bool = False, device: str = "auto", seconds: float = PART
) -> list[dict[str, Any]]:
    """Runs the stages of a part one after the other, and returns how each of them ended.

    What a stage leaves of its time is given to the next one.
    """
    out.mkdir(parents=True, exist_ok=True)
    ended, spare = list[dict[str, Any]](), 0.0
    with tempfile.TemporaryDirectory() as programs:
        for stage in stages(part, out, smoke=smoke, device=device, seconds=seconds):
            began, limit = time.monotonic(), stage.seconds + spare
            with (out / f"part-{part}.log").open("a") as log:
                print(f"=== {stage.name}", file=log, flush=True)
                how = _ended(stage, limit, log, Path(programs))
            took = time.monotonic() - began
            spare = max(0.0, limit - took)
            ended.append({"stage": stage.name, "ended": how, "seconds": round(took, 1)})
            last = (out / f"part-{part}.log").read_text().splitlines()[-1]
            if how.startswith("exit") and not last.startswith("==="):
                ended[-1]["said"] = last[:300]
            print(json.dumps(ended[-1]), flush=True)
            text = json.dumps({"part": part, "host": machine(), "stages": ended}, indent=1)
            (out / f"stages-{part}.json").write_text(text + "\n")
    return ended


def _ended(stage: Stage, limit: float, log: Any, programs: Path) -> str:
    """Runs a stage for so many seconds at most, and says how it ended."""
    command = [sys.executable, "-m", stage.module, *stage.arguments]
    if stage.budget:
        budget = min(stage.budget, max(limit / 2, limit - _CLOSING))
        command += ["--budget-seconds", str(round(budget))]
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(programs),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    popen = {"cwd": ROOT, "stdout": log, "stderr": subprocess.STDOUT, "env": cache | os.environ}
    if stage.report:
        stage.report.unlink(missing_ok=True)  # of an earlier run
        return supervised(command, stage.report, patience=_PATIENCE, seconds=limit, **popen)
    child = subprocess.Popen(command, **popen)
    try:
        return "well" if child.wait(limit) == 0 else f"exit {child.returncode}"
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        return f"over {limit:.0f} s"


def check(device_name: str, out: Path, *, smoke: bool, resume: str = "") -> dict[str, Any]:
    """Every body for the device on every case, small and shipped, against the reference."""
    import jax

    from benchmarks.ahead import Ahead
    from benchmarks.entrants import Field
    from benchmarks.kernels import device_named, name_of, platform_of, versions

    device = device_named(device_name)
    jax.config.update("jax_default_device", device)
    report = Report.resumed(out, resume)
    report.head = {
        "name": "correctness", "device": name_of(device), "kind": device.device_kind,
        "versions": versions(), "host": machine(),
    }  # fmt: skip
    platform, ahead = platform_of(device), Ahead()
    report.write()  # whoever waits for it sees that the device was found

    def field(op: Op, case: Case) -> Field:
        return Field.of_shapes(op, case, 1, platform, name_of(device), ahead=ahead)

    def compile(part: Work, done: Callable[[], Any]) -> None:
        programs = [field(op, case).programs(xla=False) for op, case in part]
        ahead.fill({k: make for each in programs for k, make in each.items()}, done)

    for op, case in report.parts(_work(platform, smoke), _AHEAD, compile):
        found = list(_checked(field(op, case)))
        for line in found:
            print(json.dumps(line), flush=True)
        report.add(found)
    wrong = sum(not r["correct"] for r in report.records)
    return report.write(right=len(report.records) - wrong, **{"not": wrong})


def _work(platform: str, smoke: bool) -> list[tuple[Op, Case]]:
    """Cases that have a body there: what will be timed first, a small and a shipped case of each
    op, and then what is left, small before shipped."""
    from benchmarks.order import bodies_on, goals_first, in_turns
    from kernels_pallas.registry import OPS

    here = [(op, case) for op in OPS for case in op.cases if bodies_on(op, case, platform)]
    turns = in_turns([(op, case) for op, case in here if not case.shipped])
    shipped = [] if smoke else in_turns([(op, case) for op, case in here if case.shipped])
    first = len({op.name for op, _ in turns})
    return goals_first([*turns[:first], *shipped[:first], *turns[first:], *shipped[first:]])


def _checked(shapes: Field) -> Iterator[dict[str, Any]]:
    from benchmarks.entrants import check as compared
    from benchmarks.entrants import short

    about, began = {"op": shapes.op.name, "case": shapes.case.name}, time.monotonic()
    try:
        field = shapes.filled()
        expected = field.expected()
        entrants = [e for e in field.bodies(expected) if e.kind == "body"]
        for found in compared(entrants):
            line = {"body": found.entrant.name, "correct": found.launch is not None}
            took = {"error": found.error, "seconds": round(time.monotonic() - began, 1)}
            yield about | line | took | found.problem
    except Exception as error:  # one case must not cost the others
        yield about | {"correct": False, "failed": short(error)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", type=int, choices=[1, 2], help="both if none is given")
    parser.add_argument("--check", action="store_true", help="the correctness stage alone")
    parser.add_argument("--device", default="auto", help="auto, cpu, gpu or tpu")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument("--seconds", type=float, default=PART, help="of each part")
    parser.add_argument("--resume", default="", metavar="REASON", help="go on with --out (--check)")
    parser.add_argument("--out", type=Path, required=True, help="a folder; a file with --check")
    args = parser.parse_args()
    if args.check:
        check(args.device, args.out, smoke=args.smoke, resume=args.resume)
        return
    for part in [args.part] if args.part else [1, 2]:
        run(part, args.out.resolve(), smoke=args.smoke, device=args.device, seconds=args.seconds)


if __name__ == "__main__":
    main()
