"""Everything worth knowing about one accelerator, in two commands of ten minutes each.

    python -m benchmarks.accelerator --out DIR --part 1    # are kernels right, and how fast
    python -m benchmarks.accelerator --out DIR --part 2    # whole models, and torch beside them

A stage is a process of its own, because frameworks do not give a card's memory back to each other.
One that fails or takes too long costs the others nothing. Every stage writes its own JSON as it
goes, and stages.json says how each of them ended. `--smoke` runs the same program with tiny sizes,
on whatever there is.
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
from typing import Any

from benchmarks.records import ROOT, machine


@dataclass(frozen=True)
class Stage:
    """A module that is run with arguments, and the seconds that it may take."""

    name: str
    module: str
    arguments: Sequence[str]
    seconds: float


def stages(part: int, out: Path, *, smoke: bool, device: str) -> list[Stage]:
    """What a part consists of. Their seconds add up to under ten minutes."""
    if part == 1:
        small, budget = ["--smoke"] if smoke else [], 60 if smoke else 390
        tables = str(out)
        return [
            Stage(
                "correctness", "benchmarks.accelerator",
                ["--check", "--device", device, "--out", str(out / "correctness.json"), *small],
                150,
            ),
            Stage(
                "kernels", "benchmarks.kernels",
                ["--device", device, "--tune", "--tiles", "6", "--tables", tables, *small,
                 "--budget-seconds", str(budget), "--out", str(out / "kernels.json")],
                budget + 40,
            ),
        ]  # fmt: skip
    shapes = ("tiny", "tiny-moe") if smoke else ("8b", "30b-a3b")
    return [
        Stage(
            f"{shape}-{library}", "benchmarks.random_model",
            [shape, "--library", library, "--out", str(out / f"{shape}-{library}.json")], seconds,
        )
        for shape in shapes
        for library, seconds in (("jaxserve", 170), ("torch", 115))  # ours compiles first
    ]  # fmt: skip


def run(part: int, out: Path, *, smoke: bool = False, device: str = "auto") -> list[dict[str, Any]]:
    """Runs the stages of a part one after the other, and returns how each of them ended."""
    out.mkdir(parents=True, exist_ok=True)
    ended = list[dict[str, Any]]()
    for stage in stages(part, out, smoke=smoke, device=device):
        began = time.monotonic()
        with (out / f"part-{part}.log").open("a") as log:
            print(f"=== {stage.name}", file=log, flush=True)
            code = _wait(stage, log)
        took = round(time.monotonic() - began, 1)
        ended.append({"stage": stage.name, "ended": code, "seconds": took})
        print(json.dumps(ended[-1]), flush=True)
        text = json.dumps({"part": part, "host": machine(), "stages": ended}, indent=1)
        (out / f"stages-{part}.json").write_text(text + "\n")
    return ended


def _wait(stage: Stage, log: Any) -> str:
    command = [sys.executable, "-m", stage.module, *stage.arguments]
    child = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    try:
        return "well" if child.wait(stage.seconds) == 0 else f"exit {child.returncode}"
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        return f"over {stage.seconds:g} s"


def check(device_name: str, out: Path, *, smoke: bool) -> dict[str, Any]:
    """Every body for the device on every case, small and shipped, against the reference."""
    import jax

    from benchmarks.kernels import device_named, name_of, platform_of, versions

    device = device_named(device_name)
    jax.config.update("jax_default_device", device)
    report = {
        "name": "correctness", "device": name_of(device), "kind": device.device_kind,
        "versions": versions(), "host": machine(),
    }  # fmt: skip
    records = list[dict[str, Any]]()
    for line in _checked(platform_of(device), name_of(device), smoke):
        records.append(line)
        print(json.dumps(line), flush=True)
        wrong = [r for r in records if not r["correct"]]
        counts = {"right": len(records) - len(wrong), "not": len(wrong)}
        out.write_text(json.dumps(report | counts | {"records": records}, indent=1) + "\n")
    return report | {"records": records}


def _checked(platform: str, device: str, smoke: bool) -> Iterator[dict[str, Any]]:
    from benchmarks.entrants import Field, short
    from benchmarks.entrants import check as compared
    from benchmarks.programs import input_sets
    from kernels_pallas.registry import OPS

    work = [(op, case) for op in OPS for case in op.cases if not (smoke and case.shipped)]
    for op, case in sorted(work, key=lambda pair: pair[1].shipped):  # small ones first
        if all(body.platform != platform for body in op.bodies.values()):
            continue
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
    parser.add_argument("--out", type=Path, required=True, help="a folder; a file with --check")
    args = parser.parse_args()
    if args.check:
        check(args.device, args.out, smoke=args.smoke)
        return
    for part in [args.part] if args.part else [1, 2]:
        run(part, args.out.resolve(), smoke=args.smoke, device=args.device)


if __name__ == "__main__":
    main()
