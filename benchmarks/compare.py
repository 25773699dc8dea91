"""Contestants side by side, alternating: `python -m benchmarks.compare MODEL A-bf16 B-f32 ...`.

All are loaded at first and only one works at a time. For each workload, round 1 goes to every
contestant in turn, then round 2, and so on, so that a busy minute hurts all alike. Ratios are of
medians, to the first contestant named.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import workloads
from benchmarks.contestants import PEERS, Contestant, Failed
from benchmarks.records import record, write
from benchmarks.workloads import Workload

WARM_UP = 1_000_000  # a round that no measurement uses
LESS_IS_BETTER = ("ttft_32", "cold_start", "warm_start", "peak_rss")


@dataclass
class Scores:
    """What one contestant made of one workload."""

    values: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    outputs: list[list[int]] = field(default_factory=list)  # of the last round

    def add(self, workload: Workload, answer: dict[str, Any], clock: str) -> None:
        self.values.append(workload.score(answer[f"{clock}_s"]))
        self.wall_s.append(round(answer["wall_s"], 4))
        self.cpu_s.append(round(answer["cpu_s"], 4))
        self.outputs = answer["outputs"]


class Comparison:
    """The contestants that could load, and the medians they reached by workload."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.vocab_size = workloads.vocab_size(args.model)
        self.medians: dict[str, dict[str, float]] = {}
        self.peak: dict[str, float] = {}
        self.contestants = list(filter(None, map(self._load, args.contestants)))

    def _load(self, name: str) -> Contestant | None:
        try:
            contestant = Contestant(name, self.args.model, self.args.cores)
            seconds = contestant.settle()
        except Failed as failure:
            _note(failure)
            return None
        _note(f"{name}: {contestant.versions}, settled in {seconds:.1f} s")
        return contestant

    def run(self, name: str) -> None:
        """All rounds of one workload. A contestant that fails is out of this workload only."""
        scores = {c.name: Scores() for c in self.contestants}
        for number in (WARM_UP, *range(self.args.rounds)):
            workload = workloads.build(name, self.vocab_size, number)
            for contestant in [c for c in self.contestants if c.name in scores]:
                try:
                    answer = contestant.run(workload)
                except Failed as failure:
                    _note(f"{name}: {failure}")
                    del scores[contestant.name]
                    continue
                self.peak[contestant.name] = answer["peak_rss_mib"]
                if number != WARM_UP:
                    scores[contestant.name].add(workload, answer, self.args.clock)
        self._report(workload, scores)

    def _report(self, workload: Workload, scores: dict[str, Scores]) -> None:
        for contestant in [c for c in self.contestants if c.name in scores]:
            got, first = scores[contestant.name], next(iter(scores.values()))
            same = sum(a == b for a, b in zip(first.outputs, got.outputs, strict=True))
            more = {"clock": self.args.clock, "wall_s": got.wall_s, "cpu_s": got.cpu_s}
            more["same_tokens"] = f"{same}/{len(workload.prompts)}"
            self._write(contestant, workload.name, got.values, workload.unit, **more)

    def peak_memory(self) -> None:
        for contestant in [c for c in self.contestants if c.name in self.peak]:
            self._write(contestant, "peak_rss", [self.peak[contestant.name]], "MiB")

    def starts(self) -> None:
        """From a fresh process to its first token, with an empty compile cache and a full one."""
        for contestant in self.contestants:  # closed by now: only the names and versions are used
            seconds: dict[str, list[float]] = {"cold_start": [], "warm_start": []}
            for _ in range(self.args.starts):
                with tempfile.TemporaryDirectory(prefix="start-") as cache:
                    for samples in seconds.values():
                        samples.append(self._start(contestant.name, Path(cache)))
            for kind, samples in seconds.items():
                self._write(contestant, kind, samples, "s", clock="wall")

    def _start(self, name: str, cache: Path) -> float:
        begin = time.perf_counter()
        contestant = Contestant(name, self.args.model, self.args.cores, cache)
        try:
            contestant.run(workloads.build("ttft_32", self.vocab_size))
            return time.perf_counter() - begin
        finally:
            contestant.close()

    def close(self) -> None:
        for contestant in self.contestants:
            contestant.close()

    def _write(
        self,
        contestant: Contestant,
        workload: str,
        samples: Sequence[float],
        unit: str,
        **more: Any,
    ) -> None:
        self.medians.setdefault(workload, {})[contestant.name] = statistics.median(samples)
        about = {"model": self.args.model.name, "threads": len(self.args.cores)}
        line = record(
            contestant.name, workload, samples, unit, versions=contestant.versions, **about, **more
        )
        write(line)
        if self.args.out:
            write(line, self.args.out)


def table(medians: dict[str, dict[str, float]], names: Sequence[str]) -> str:
    """Medians by workload, each with its ratio to the first name: above 1 is better than it."""
    rows = [["workload", *names], ["---"] * (len(names) + 1)]
    for workload, got in medians.items():
        rows.append([workload, *(_cell(workload, got, name, names[0]) for name in names)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(workload: str, medians: dict[str, float], name: str, first: str) -> str:
    if name not in medians:
        return "-"
    if first not in medians:
        return f"{medians[name]:.4g}"
    ratio = medians[name] / medians[first]
    return f"{medians[name]:.4g} ({1 / ratio if workload in LESS_IS_BETTER else ratio:.2f}x)"


def _note(message: object) -> None:
    print(f"# {message}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("contestants", nargs="+", help=f"PEER-DTYPE; peers are {', '.join(PEERS)}")
    parser.add_argument(
        "--workloads", nargs="*", default=workloads.NAMES, choices=workloads.NAMES, metavar="NAME"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="cores that each one is pinned to")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--starts", type=int, default=0, help="fresh processes to time as well")
    parser.add_argument("--out", type=Path, help="append the records to this file")
    args = parser.parse_args()
    args.cores = sorted(os.sched_getaffinity(0))[-args.threads :]
    return args


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or stopped drivers would stay behind
    comparison = Comparison(_arguments())
    try:
        for name in comparison.args.workloads:
            comparison.run(name)
        comparison.peak_memory()
    finally:
        comparison.close()
    if comparison.args.starts:
        comparison.starts()
    print(table(comparison.medians, comparison.args.contestants))


if __name__ == "__main__":
    main()
