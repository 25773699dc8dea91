"""How far the defaults are from the best settings: `python -m benchmarks.defaults MODEL`.

Every setting is an engine of its own in this process; they take turns, round after round. One JSON
line per engine and workload, then a table of rates relative to the defaults.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import workloads
from benchmarks.records import record, write
from jaxserve import LLM, SamplingParams

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "tokens-256": {"max_num_batched_tokens": 256},
    "tokens-1024": {"max_num_batched_tokens": 1024},
    "page-16": {"page_size": 16},
    "page-64": {"page_size": 64},
    "seqs-32": {"max_num_seqs": 32},
    "seqs-128": {"max_num_seqs": 128},
    "steps-4": {"decode_steps": 4},
}
WORKLOADS = ("single_decode", "batch16_decode", "prefill_1x1024", "mixed_64", "prefix_32")


def engines(model: Path) -> dict[str, LLM]:
    """Warm engines, with room for every workload and no more."""
    made = {}
    for name, settings in SETTINGS.items():
        pages = 32_768 // settings.get("page_size", 32)
        made[name] = LLM(
            model,
            tokenizer=False,
            progress=False,
            background_compile=False,
            max_model_len=workloads.MAX_LEN,
            num_pages=pages,
            **settings,
        )
    return made


def rate(llm: LLM, workload: workloads.Workload) -> float:
    params = [SamplingParams(temperature=0, max_tokens=n) for n in workload.lengths]
    begin = time.perf_counter()
    llm.generate(workload.prompts, params)
    return workload.score(time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workloads", nargs="*", default=WORKLOADS)
    parser.add_argument("--out", type=Path, help="append the records to this file")
    args = parser.parse_args()
    size = workloads.vocab_size(args.model)
    llms = engines(args.model)
    scores: dict[tuple[str, str], list[float]] = defaultdict(list)
    for number in range(args.rounds + 1):
        for workload_name in args.workloads:
            for name, llm in llms.items():
                score = rate(llm, workloads.build(workload_name, size, number))
                if number:  # the first round warms up
                    scores[name, workload_name].append(score)
    for (name, workload_name), samples in scores.items():
        write(record(name, workload_name, samples, "tok/s", model=args.model.name), args.out)
    print("| setting |", " | ".join(args.workloads), "|")
    print("|---" * (len(args.workloads) + 1) + "|")
    for name in llms:
        ratios = [median(scores[name, w]) / median(scores["default", w]) for w in args.workloads]
        print(f"| {name} |", " | ".join(f"{ratio:.2f}" for ratio in ratios), "|")


if __name__ == "__main__":
    main()
