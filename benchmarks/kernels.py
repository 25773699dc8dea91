"""Every op against its own floor and against the best alternative, on one device.

    python -m benchmarks.kernels --device auto

The device's copy bandwidth and matrix rates come first. Then for each shipped case of each op:
every body for the platform, the op's own XLA form, and what other libraries offer, in turns.
Results are compared with the reference before anything is timed; what is wrong is said to be wrong
and wins nothing. A JSON file is written as it goes. With --tune the best few tiles of each body
race too, and what won is written to kernels_pallas/tuned/, where the chooser reads it.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs room beside it

import jax
import numpy as np
from jax.sharding import Mesh

from benchmarks.ahead import Ahead
from benchmarks.entrants import Checked, Field, check, short
from benchmarks.floors import Floor, Rates, Sizes, measure
from benchmarks.order import Work, bodies_on, wanted
from benchmarks.programs import fits_cache, set_count
from benchmarks.records import ROOT, cpu_name, machine
from benchmarks.reports import Report, fatal
from benchmarks.stopwatch import Times, fastest, race
from jaxserve.plan import memory_limit
from kernels_pallas import tuning
from kernels_pallas.op import Case, Cost, Op
from kernels_pallas.target import Target

_SETS_MEMORY = 16 * 2**30  # bytes that sets of inputs may take, at most
_WORK = 0.2  # seconds of arithmetic that an alternative may waste
_AHEAD = 8  # cases that are compiled together, before any of them is timed


@dataclass(frozen=True)
class Settings:
    """How a run goes.

    Attributes:
        seconds: of timing for each contestant.
        most_floor: seconds; cases whose floor is above are skipped.
        budget: seconds of the whole run; what does not fit is skipped, and said to be.
        tiles: that are tried of each body; 0 does not tune.
        shipped: which cases: those that are shipped, or the small ones of the tests.
    """

    seconds: float = 0.3
    most_floor: float = 0.1
    budget: float = 480.0
    tiles: int = 0
    shipped: bool = True
    torch: bool = True


@dataclass
class Bench:
    """One device, what it can do at most, and what has won there.

    Attributes:
        fatal: ops, cases and bodies that may not run again, as `reports.fatal` says.
    """

    device: Any
    rates: Rates
    settings: Settings
    started: float = field(default_factory=time.monotonic)
    fatal: Set[tuple[str, str, str]] = frozenset()
    ahead: Ahead = field(default_factory=Ahead)
    won: dict[str, dict[str, Any]] = field(default_factory=dict)  # op -> signature -> entry

    def __post_init__(self) -> None:
        self.platform = platform_of(self.device)

    @property
    def left(self) -> float:
        return self.settings.budget - (time.monotonic() - self.started)

    def case(self, op: Op, case: Case) -> list[dict[str, Any]]:
        """Records of one case, one for each contestant."""
        about = {"op": op.name, "case": case.name}
        if reason := self._left_out(op, case):
            return [about | {"skipped": reason}]
        try:
            return [about | line for line in self._race(op, case)]
        except Exception as error:  # one case must not cost the others
            return [about | {"failed": short(error)}]
        finally:
            gc.collect()

    def compile(self, work: Work, done: Callable[[], Any]) -> None:
        """Compiles what the cases will ask for, but for libraries; `done` is called as it goes."""
        fields = [self._field(op, case) for op, case in work if not self._left_out(op, case)]
        programs = [field.programs(tiles=self.settings.tiles) for field in fields]
        self.ahead.fill({k: make for each in programs for k, make in each.items()}, done)

    def _field(self, op: Op, case: Case) -> Field:
        """Of shapes; without what may not run."""
        room = min(_SETS_MEMORY, 0.1 * memory_limit(self.device))
        here = bodies_on(op, case, self.platform)
        without = self.without(op, case)
        return Field.of_shapes(
            op, case, set_count(case, self.platform, room), self.platform, name_of(self.device),
            ahead=self.ahead, without=frozenset(here if "" in without else without),
        )  # fmt: skip

    def without(self, op: Op, case: Case) -> set[str]:
        """Bodies that hung, or ended a process or a card, on this case; "" stands for all."""
        return {body for o, c, body in self.fatal if (o, c) == (op.name, case.name)}

    def _left_out(self, op: Op, case: Case) -> str:
        """Why a case is not run; "" if it is. One without a body says nothing: the engine runs
        other ops there."""
        if not bodies_on(op, case, self.platform):
            return f"no body for {self.platform}"
        assert case.cost is not None
        return self._too_much(self.rates.floor(case.cost), case)

    def _too_much(self, floor: Floor, case: Case) -> str:
        if self.left <= 0:
            return f"the {self.settings.budget:g} seconds of the run are over"
        most = self.settings.most_floor
        if floor.seconds > most:
            return f"its floor is {1e3 * floor.seconds:.0f} ms here, more than {1e3 * most:.0f}"
        shapes = jax.eval_shape(case.make, jax.random.key(0))
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
        if size > 0.25 * memory_limit(self.device):
            return f"its arrays are {size / 2**30:.1f} GiB, more than a quarter of the memory"
        return ""

    def _race(self, op: Op, case: Case) -> Iterator[dict[str, Any]]:
        floor = self.rates.floor(case.cost or Cost(0))
        field = self._field(op, case).filled()
        for body in sorted(field.without):
            yield {"contestant": body, "kind": "body", "skipped": "it was fatal when it last ran"}
        expected = field.expected()
        work = _WORK / max(floor.flops, 1e-9)
        # libraries and XLA run first: whatever a body leaves of the card, these were right
        checked = check([*field.libraries(expected, work, torch=self.settings.torch)])
        checked += check([*field.bodies(expected)])
        if self.settings.tiles:
            checked += check([*field.tuned(expected, self.settings.tiles)])
        times = race({c.entrant.name: c.launch for c in checked if c.launch}, self.settings.seconds)
        best = fastest(times, [c.entrant.name for c in checked if c.entrant.kind != "body"])
        cached = {"from_cache": True} if fits_cache(case, self.platform, len(field.sets)) else {}
        for c in checked:
            line = c.entrant.about() | cached
            if c.problem:
                yield line | {"correct": False, "error": _digits(c.error)} | c.problem
            else:
                rival = (best, times[best]) if best and c.entrant.kind == "body" else None
                figures = _figures(times[c.entrant.name], floor, rival)
                yield line | {"correct": True, "error": _digits(c.error)} | figures
        if self.settings.tiles:
            self._remember(op, case, field.sets[0], checked, times)

    def _remember(
        self, op: Op, case: Case, inputs: Any, checked: Sequence[Checked], times: dict[str, Times]
    ) -> None:
        """Puts down who was fastest, of the implementations that the chooser has."""
        ours = {c.entrant.name: c.entrant for c in checked if c.entrant.implementation}
        winner = fastest(times, list(ours))
        if winner is None or len(ours) < 2:
            return
        args, arrays = inputs
        signature = op.signature(*args, **arrays, **case.options)
        entry = tuning.entry(
            ours[winner].implementation, ours[winner].tile, source="measured", case=case.name,
            date=datetime.date.today().isoformat(), versions=versions(),
            ms={name: _digits(1e3 * times[name].median) for name in ours if name in times},
        )  # fmt: skip
        self.won.setdefault(op.name, {})[signature] = entry


def _figures(times: Times, floor: Floor, best: tuple[str, Times] | None) -> dict[str, Any]:
    """Milliseconds, the share of the floor, and how many times faster than the best alternative."""
    line = {
        "ms": _digits(1e3 * times.median),
        "quartiles": [_digits(1e3 * q) for q in times.quartiles],
        "samples": len(times.samples),
        "host_ms": _digits(1e3 * times.host),
        "floor_ms": {"bytes": _digits(1e3 * floor.bytes), "flops": _digits(1e3 * floor.flops)},
        "bound": floor.bound,
        "share_of_floor": round(floor.seconds / times.median, 3),
    }
    if best is not None:
        line["ratio_to_best_alternative"] = round(best[1].median / times.median, 3)
        line["best_alternative"] = best[0]
    return line


def _digits(x: float) -> float:
    return float(f"{x:.4g}")


def platform_of(device: Any) -> str:
    return Target.of(Mesh(np.array([device]), ("x",))).platform


def name_of(device: Any) -> str:
    """As files of results and tuned tables are called."""
    target = Target.of(Mesh(np.array([device]), ("x",)))
    return target.device.lower().replace(" ", "-") or cpu_name()


def versions() -> dict[str, str]:
    import jaxlib

    found = {"jax": jax.__version__, "jaxlib": jaxlib.version.__version__}
    if torch := sys.modules.get("torch"):
        found["torch"] = torch.__version__
    return found


def print_line(line: dict[str, Any]) -> None:
    words = f"{line['op']:26}{line['case']:34}{line.get('contestant', ''):40}"
    if "ms" in line:
        low, high = line["quartiles"]
        share = f"{100 * line['share_of_floor']:.0f} % of the {line['bound']} floor"
        words += f"{line['ms']:9.4g} ms ({low:.4g}-{high:.4g}), {share}"
        if ratio := line.get("ratio_to_best_alternative"):
            words += f", {ratio:.2f} x {line['best_alternative']}"
    else:
        kinds = ("skipped", "failed", "wrong")
        words += "; ".join(f"{kind}: {line[kind]}" for kind in kinds if kind in line)
    print(words, flush=True)


def summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Where our best body is behind XLA's own form or behind any alternative, and what failed."""
    behind_xla, behind_any, wrong = list[str](), list[str](), list[str]()
    for name in dict.fromkeys(f"{r['op']} {r['case']}" for r in records):
        lines = [r for r in records if f"{r['op']} {r['case']}" == name]
        bodies = [r["ms"] for r in lines if r.get("kind") == "body" and "ms" in r]
        for kinds, behind in ((("xla",), behind_xla), (("xla", "library"), behind_any)):
            others = [r["ms"] for r in lines if r.get("kind") in kinds and "ms" in r]
            if bodies and others and min(bodies) > min(others):
                behind.append(f"{name}: {min(bodies):.4g} against {min(others):.4g} ms")
        wrong += [f"{name} {r['contestant']}" for r in lines if "wrong" in r]
    return {"behind_xla": behind_xla, "behind_an_alternative": behind_any, "wrong": wrong}


def device_named(name: str) -> Any:
    """A device by its platform, or whichever JAX prefers for "auto".

    Raises:
        SystemExit: there is none; it says which there are.
    """
    try:
        return jax.devices()[0] if name == "auto" else jax.devices(name)[0]
    except RuntimeError:
        there = ", ".join(sorted({x.platform for x in jax.devices()}))
        raise SystemExit(
            f"--device {name}: JAX finds none of that name, but {there}; its package for {name} "
            "or JAX_PLATFORMS decides what it looks for"
        ) from None


def run(
    device: Any, settings: Settings, work: Work, out: Path, *,
    sizes: Sizes | None = None, tables: Path = tuning.TUNED, resume: str = "",
    checked: Sequence[Path] = (),
) -> dict[str, Any]:  # fmt: skip
    """Measures everything and returns what is written to `out`.

    Args:
        resume: why an earlier process ended in the middle of the case that `out` tells of.
        checked: earlier reports, whose fatal bodies are not run.
    """
    report, platform = Report.resumed(out, resume), platform_of(device)
    jax.config.update("jax_default_device", device)  # of threads that compile, too
    report.head = {
        "name": "kernels", "device": name_of(device), "kind": device.device_kind,
        "versions": versions(), "host": machine(),
    }  # fmt: skip
    report.write()  # whoever waits for it sees that the device was found
    rates = measure(device, sizes or Sizes.of(platform), done=report.write)
    report.head["rates"] = rates.record()
    print(json.dumps(report.head), flush=True)
    started = time.monotonic() - report.seconds
    lost = set[tuple[str, str, str]]().union(*map(fatal, checked))
    bench = Bench(device, rates, settings, started, fatal=lost)
    for op, case in report.parts(work, _AHEAD, bench.compile):
        found = bench.case(op, case)
        for line in found:
            print_line(line)
        if bench.won:
            tuning.merge(tables / f"{name_of(device)}.json", bench.won)
        report.add(found, summary=summary([*report.records, *found]))
    after = measure(device, sizes or Sizes.of(platform), done=report.write).record()
    written = report.write(summary=summary(report.records), rates_after=after)
    print(json.dumps(written["summary"]), flush=True)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cpu, gpu or tpu")
    parser.add_argument("--ops", nargs="*", default=[], help="names; all if none are given")
    parser.add_argument("--cases", nargs="*", default=[], help="parts of names of cases")
    parser.add_argument("--tune", action="store_true", help="try tiles, and keep what won")
    parser.add_argument("--tiles", type=int, default=12, help="of each body, with --tune")
    parser.add_argument("--seconds", type=float, default=0.3, help="of timing, per contestant")
    parser.add_argument(
        "--budget-seconds", type=float, default=480.0, help="of the whole run; 480 by default"
    )
    parser.add_argument(
        "--most-floor-ms", type=float, help="skip larger cases; 40 on a CPU, or 100"
    )
    parser.add_argument("--no-torch", action="store_true", help="leave torch's ways out")
    parser.add_argument("--tables", type=Path, default=tuning.TUNED, help="of --tune")
    parser.add_argument("--smoke", action="store_true", help="the small cases of the tests")
    parser.add_argument("--out", type=Path, help="benchmarks/results/<device>-<date>.json")
    parser.add_argument("--checked", type=Path, nargs="*", default=[], help="earlier reports")
    parser.add_argument("--resume", default="", metavar="REASON", help="go on with --out")
    args = parser.parse_args()
    device = device_named(args.device)
    most = args.most_floor_ms or (40.0 if platform_of(device) == "cpu" else 100.0)
    settings = Settings(
        args.seconds, most / 1e3, args.budget_seconds, args.tiles if args.tune else 0,
        torch=not args.no_torch, shipped=not args.smoke,
    )  # fmt: skip
    date = datetime.date.today().isoformat()
    out = args.out or ROOT / "benchmarks" / "results" / f"{name_of(device)}-{date}.json"
    try:
        work = wanted(args.ops, args.cases, shipped=settings.shipped)
    except ValueError as error:
        parser.error(str(error))
    sizes = Sizes.of(platform_of(device), smoke=args.smoke)
    run(
        device, settings, work, out, sizes=sizes, tables=args.tables, resume=args.resume,
        checked=args.checked,
    )  # fmt: skip


if __name__ == "__main__":
    main()
