"""jaxserve alone, through `LLM.generate`: `python -m benchmarks.offline MODEL`.

One JSON line for the time from loading to the first token, one until nothing is left to compile,
one per workload, and one for the peak memory.
The same driver runs in `compare.py`; here it runs in this process, where a profiler can see it.
"""

from __future__ import annotations

import argparse
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import workloads
from benchmarks.contestants import DTYPES
from benchmarks.peers import jaxserve as driver
from benchmarks.peers.protocol import Generate, Settings
from benchmarks.records import peak_rss_mib, record, write


def start(settings: Settings, vocab_size: int) -> tuple[Generate, dict[str, float]]:
    """The loaded model, with the seconds from here to its first token and to its last program."""
    begin = time.perf_counter()
    loaded = driver.load(settings)
    workload = workloads.build("ttft_32", vocab_size)
    loaded.generate(workload.prompts, workload.lengths)
    first = time.perf_counter() - begin
    loaded.settle()
    seconds = {"load_to_first_token": first, "load_to_warm": time.perf_counter() - begin}
    return loaded.generate, seconds


def measure(generate: Generate, name: str, vocab_size: int, rounds: int) -> tuple[list[float], str]:
    """Scores of every round after one that warms up, and their unit."""
    scores = []
    for number in range(rounds + 1):
        workload = workloads.build(name, vocab_size, number)
        begin = time.perf_counter()
        generate(workload.prompts, workload.lengths)
        scores.append(workload.score(time.perf_counter() - begin))
    return scores[1:], workload.unit


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--workloads", nargs="*", default=workloads.NAMES, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    size = workloads.vocab_size(args.model)
    settings = Settings(str(args.model), DTYPES[args.dtype], 0, workloads.MAX_LEN)
    about: dict[str, Any] = {"model": args.model.name, "versions": {"jax": version("jax")}}

    def report(workload: str, samples: list[float], unit: str) -> None:
        write(record(f"jaxserve-{args.dtype}", workload, samples, unit, **about))

    generate, seconds = start(settings, size)
    for name, took in seconds.items():
        report(name, [took], "s")
    for name in args.workloads:
        report(name, *measure(generate, name, size, args.rounds))
    report("peak_rss", [peak_rss_mib()], "MiB")


if __name__ == "__main__":
    main()
