"""Trees of this project side by side: `python -m benchmarks.versions MODEL WORKLOAD TREE TREE ...`.

A tree is a folder: a checkout, or what `git archive` makes. Small gains want care: a process that
starts before others may be slower than they are for as long as it lives, by a tenth here and there.
So each tree has two processes, started in mirrored order behind two that do not count, and its time
is the geometric mean of theirs. All take turns, in an order drawn for every round.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
from collections.abc import Sequence
from math import sqrt
from pathlib import Path

from benchmarks import workloads
from benchmarks.contestants import DTYPES, Contestant
from benchmarks.records import record, write

UNCOUNTED = 2


def compare(args: argparse.Namespace) -> dict[Path, list[float]]:
    """Seconds of every round, for each tree."""
    vocab_size, trees = workloads.vocab_size(args.model), args.trees
    order = [*trees, *reversed(trees)]
    started: list[Contestant] = []
    try:
        for tree in [trees[0]] * UNCOUNTED + order:
            name = f"jaxserve-{args.dtype}"
            started.append(Contestant(name, args.model, args.cores, root=tree))
            started[-1].run(workloads.build(args.workload, vocab_size, args.rounds))
            started[-1].settle()
        processes = list(enumerate(started[UNCOUNTED:]))
        seconds: list[list[float]] = [[] for _ in order]
        for number in range(args.rounds):
            workload = workloads.build(args.workload, vocab_size, number)
            for i, process in random.sample(processes, len(processes)):
                seconds[i].append(process.run(workload)["wall_s"])
    finally:
        for process in started:
            process.close()
    return {tree: means(seconds[i], seconds[~i]) for i, tree in enumerate(trees)}


def a_tree(path: str) -> Path:
    """From another folder Python would run what is installed, and call it by that folder's name."""
    tree = Path(path).resolve()
    if missing := [x for x in ("jaxserve", "benchmarks/peers") if not (tree / x).is_dir()]:
        raise argparse.ArgumentTypeError(f"{path} is no tree of jaxserve: it has no {missing[0]}")
    return tree


def means(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """The geometric mean of two processes, round by round."""
    return [sqrt(a * b) for a, b in zip(first, second, strict=True)]


def speeds(seconds: dict[Path, list[float]]) -> dict[Path, list[float]]:
    """How much faster than the first tree each was in every round, sorted."""
    base = next(iter(seconds.values()))
    return {
        tree: sorted(a / b for a, b in zip(base, got, strict=True)) for tree, got in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("workload", choices=workloads.NAMES)
    parser.add_argument("trees", nargs="+", type=a_tree)
    parser.add_argument("--dtype", choices=DTYPES, default="int8")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2, help="cores that each one is pinned to")
    args = parser.parse_args()
    args.model = args.model.resolve()
    args.cores = sorted(os.sched_getaffinity(0))[-args.threads :]
    seconds = compare(args)
    about = {"model": args.model.name, "threads": args.threads, "dtype": args.dtype}
    for tree, ratios in speeds(seconds).items():
        low, _, high = statistics.quantiles(ratios)
        found = {"speed": round(statistics.median(ratios), 3), "quartiles": [low, high], **about}
        write(record(tree.name, args.workload, seconds[tree], "s", **found))


if __name__ == "__main__":
    main()
