"""Everything worth knowing about one accelerator, in two commands of ten minutes each.

    python -m benchmarks.accelerator --out DIR --part 1    # are kernels right, and how fast
    python -m benchmarks.accelerator --out DIR --part 2    # whole models, and torch beside them

A stage is a process of its own, because frameworks do not give a card's memory back to each other.
One that fails or takes too long costs the others nothing, and a kernel that hangs, or leaves a card
that answers nobody, costs the other cases little more than a minute. Every stage writes its own
JSON as it goes, and stages-PART.json says how each of them ended. `--seconds` makes a part shorter;
`--smoke` runs the same program with tiny sizes, on whatever there is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.records import ROOT, machine
from benchmarks.reports import Report, supervised

if TYPE_CHECKING:  # who watches imports no JAX
    from kernels_pallas.op import Case, Op

PART = 580.0
"""Seconds of a part, unless it is told otherwise."""

_PATIENCE = 75.0  # seconds in which a case has been compiled and compared, or timed


@dataclass(frozen=True)
class Stage:
    """A module that is run with arguments, and the seconds that it may take.

    Attributes:
        report: what it writes case by case, if it can go on behind one that ended it.
    """

    name: str
    module: str
    arguments: Sequence[str]
    seconds: float
    report: Path | None = None


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
                     "--budget-seconds", str(60 if smoke else round(seconds * share - 30)),
                     "--out", str(path)],
                    seconds * share, path,
                )
                for path, checked, share, more in (
                    (found, [correct], 0.44, []),
                    (tuned, [correct, found], 0.3, tune),  # one that hangs costs no figure above
                )
            ),
        ]  # fmt: skip
    shapes = ("tiny", "tiny-moe") if smoke else ("8b", "30b-a3b")
    shares = ("jaxserve", 0.29), ("torch", 0.2)  # ours compiles first
    return [
        Stage(
            f"{shape}-{library}", "benchmarks.random_model",
            [shape, "--library", library, "--out", str(out / f"{shape}-{library}.json")],
            seconds * share,
        )
        for shape in shapes
        for library, share in shares
    ]  # fmt: skip


def run(
    part: int, out: Path, *, smoke: bool = False, device: str = "auto", seconds: float = PART
) -> list[dict[str, Any]]:
    """Runs the stages of a part one after the other, and returns how each of them ended."""
    out.mkdir(parents=True, exist_ok=True)
    ended = list[dict[str, Any]]()
    for stage in stages(part, out, smoke=smoke, device=device, seconds=seconds):
        began = time.monotonic()
        with (out / f"part-{part}.log").open("a") as log:
            print(f"=== {stage.name}", file=log, flush=True)
            how = _ended(stage, log)
        took = round(time.monotonic() - began, 1)
        ended.append({"stage": stage.name, "ended": how, "seconds": took})
        print(json.dumps(ended[-1]), flush=True)
        text = json.dumps({"part": part, "host": machine(), "stages": ended}, indent=1)
        (out / f"stages-{part}.json").write_text(text + "\n")
    return ended


def _ended(stage: Stage, log: Any) -> str:
    command = [sys.executable, "-m", stage.module, *stage.arguments]
    popen = {"cwd": ROOT, "stdout": log, "stderr": subprocess.STDOUT}
    if stage.report:
        stage.report.unlink(missing_ok=True)  # of an earlier run
        return supervised(command, stage.report, patience=_PATIENCE, seconds=stage.seconds, **popen)
    child = subprocess.Popen(command, **popen)
    try:
        return "well" if child.wait(stage.seconds) == 0 else f"exit {child.returncode}"
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        return f"over {stage.seconds:g} s"


def check(device_name: str, out: Path, *, smoke: bool, resume: str = "") -> dict[str, Any]:
    """Every body for the device on every case, small and shipped, against the reference."""
    import jax

    from benchmarks.kernels import device_named, name_of, platform_of, versions

    device = device_named(device_name)
    jax.config.update("jax_default_device", device)
    report = Report.resumed(out, resume)
    report.head = {
        "name": "correctness", "device": name_of(device), "kind": device.device_kind,
        "versions": versions(), "host": machine(),
    }  # fmt: skip
    platform = platform_of(device)
    for op, case in report.each(_work(platform, smoke)):
        found = list(_checked(op, case, platform, name_of(device)))
        for line in found:
            print(json.dumps(line), flush=True)
        report.add(found)
    wrong = sum(not r["correct"] for r in report.records)
    return report.write(right=len(report.records) - wrong, **{"not": wrong})


def _work(platform: str, smoke: bool) -> list[tuple[Op, Case]]:
    """Cases of ops that have a body there, small ones first, and of all ops in turns."""
    from benchmarks.kernels import in_turns
    from kernels_pallas.registry import OPS

    here = [op for op in OPS if any(body.platform == platform for body in op.bodies.values())]
    work = [(op, case) for op in here for case in op.cases if not (smoke and case.shipped)]
    return sorted(in_turns(work), key=lambda pair: pair[1].shipped)


def _checked(op: Op, case: Case, platform: str, device: str) -> Iterator[dict[str, Any]]:
    from benchmarks.entrants import Field, short
    from benchmarks.entrants import check as compared
    from benchmarks.programs import input_sets

    about, began = {"op": op.name, "case": case.name}, time.monotonic()
    try:
        field = Field(op, case, input_sets(case, platform, 0, most=1), platform, device)
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
    parser.add_argument("--part", type=int, choices=[1, 2])
    parser.add_argument("--check", action="store_true", help="the correctness stage alone")
    parser.add_argument("--device", default="auto")
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
