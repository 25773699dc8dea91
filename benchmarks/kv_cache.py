"""What rounded caches cost a shipped model: `python -m benchmarks.kv_cache models/recall-dense`.

For each type of cache: the perplexity of solutions to held-out problems of the task that the model
was trained on, given their problems, and how much its log-probabilities differ from those over a
cache of floats. Every token of a solution attends to the cache, its own row included.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from benchmarks.reason_eval import task_of
from jaxserve import LLM, SamplingParams
from reasoning.tasks import distinct


def solution_logprobs(llm: Any, texts: list[tuple[str, str]]) -> np.ndarray:
    """The log-probabilities of all tokens of solutions, given the problems before them."""
    encode = llm.tokenizer.encode
    whole = [encode(f"{problem} {solution}") for problem, solution in texts]
    known = [len(encode(problem)) for problem, _ in texts]
    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    found = list[float]()
    for out, ids, first in zip(llm.generate(whole, asked), whole, known, strict=True):
        found += [out.prompt_logprobs[i][ids[i]].logprob for i in range(first, len(ids))]
    return np.array(found)


def measure(folder: Path, count: int) -> list[dict[str, Any]]:
    """One row for each type of cache."""
    task, rng = task_of(folder), Random(0)
    texts = [(p.prompt, task.solve(p, rng)) for p in distinct(task, "test", 0, count)]
    rows, exact = list[dict[str, Any]](), np.zeros(0)
    for kind in ("auto", "int8", "int4"):
        with LLM(folder, kv_cache_dtype=kind, progress=False) as llm:
            found = solution_logprobs(llm, texts)
            per_token = llm.plan.kv_bytes / (llm.plan.num_pages * llm.plan.page_size)
        exact = found if kind == "auto" else exact
        rows.append({
            "cache": kind, "bytes_per_token": per_token, "tokens": len(found),
            "perplexity": math.exp(-found.mean()),
            "mean_difference": float(np.abs(found - exact).mean()),
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--problems", type=int, default=256)
    args = parser.parse_args()
    for row in measure(args.model, args.problems):
        print(json.dumps(row))
