"""How well a model reasons: `python -m benchmarks.reason_eval models/modchain-moe`.

Samples are drawn by the engine at temperature 1, for held-out problems of the task that the
model's `recipe.toml` names. pass@k is the unbiased estimate of Chen et al. (2021), majority@k the
vote of the first k samples, and AUROC says how well a sample's mean log-probability tells right
from wrong. Intervals are 95 % bootstraps over problems.
"""

from __future__ import annotations

import argparse
import json
import math
import tomllib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.records import record, write
from reasoning.tasks import Grade, Problem, Split, Task, distinct, make_task

KS = (1, 4, 16, 64)


@dataclass(frozen=True)
class Sample:
    """One solution: how it was graded, and the mean log-probability of its tokens."""

    grade: Grade
    confidence: float


def task_of(folder: Path) -> Task:
    """The task that a shipped model was trained on."""
    data = tomllib.loads((folder / "recipe.toml").read_text())["data"]
    return make_task(data["task"], data["settings"])


def draw_samples(
    llm: Any, task: Task, problems: Sequence[Problem], count: int, *, temperature: float = 1.0
) -> list[list[Sample]]:
    """`count` solutions of each problem."""
    from jaxserve import SamplingParams

    params = SamplingParams(
        n=count, temperature=temperature, max_tokens=llm.max_model_len // 2, logprobs=0, seed=0
    )
    outs = llm.generate([problem.prompt for problem in problems], params)

    def sample(problem: Problem, o: Any) -> Sample:
        mean = o.cumulative_logprob / max(len(o.token_ids), 1)
        return Sample(task.grade(problem, o.text), mean)

    return [
        [sample(problem, o) for o in out.outputs]
        for problem, out in zip(problems, outs, strict=True)
    ]


def pass_at(right: int, count: int, k: int) -> float:
    """Probability that one of k samples is right, of `count` drawn of which `right` are."""
    return 1.0 - math.comb(count - right, k) / math.comb(count, k)


def majority(samples: Sequence[Sample]) -> float:
    """Whether the answer most often given is right; ties are shared."""
    votes = Counter(s.grade.answer for s in samples if s.grade.answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    leading = [answer for answer, n in votes.items() if n == most]
    right = {s.grade.answer for s in samples if s.grade.correct}
    return sum(answer in right for answer in leading) / len(leading)


def auroc(scores: np.ndarray, right: np.ndarray) -> float:
    """Probability that a right sample scores above a wrong one; NaN if there is only one kind."""
    if right.all() or not right.any():
        return float("nan")
    order = np.argsort(scores, kind="stable")
    ranks = np.empty(len(scores))
    ranks[order] = np.arange(1, len(scores) + 1)
    for value in np.unique(scores):  # ties share their mean rank
        same = scores == value
        ranks[same] = ranks[same].mean()
    n = right.sum()
    return float((ranks[right].sum() - n * (n + 1) / 2) / (n * (len(right) - n)))


def interval(
    values: Sequence[Any],
    statistic: Callable[[list[Any]], float],
    seed: int = 0,
    rounds: int = 1000,
) -> tuple[float, float, float]:
    """A statistic over problems, and its 95 % bootstrap interval."""
    rng = np.random.default_rng(seed)
    draws = [
        statistic([values[i] for i in rng.integers(0, len(values), len(values))])
        for _ in range(rounds)
    ]
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return statistic(list(values)), float(low), float(high)


def evaluate(samples: list[list[Sample]]) -> dict[str, tuple[float, float, float]]:
    """Every figure with its interval."""
    count = len(samples[0])
    right = [sum(s.grade.correct for s in group) for group in samples]
    figures = {}
    for k in (k for k in KS if k <= count):
        figures[f"pass@{k}"] = interval([pass_at(r, count, k) for r in right], _mean)
        if k > 1:
            figures[f"majority@{k}"] = interval([majority(g[:k]) for g in samples], _mean)
    pairs = [([s.confidence for s in group], [s.grade.correct for s in group]) for group in samples]
    figures["confidence_auroc"] = interval(pairs, _pooled_auroc, rounds=50)
    return figures


def _mean(values: list[float]) -> float:
    return float(np.mean(values))


def _pooled_auroc(pairs: list[tuple[list[float], list[bool]]]) -> float:
    scores = np.concatenate([np.asarray(s) for s, _ in pairs])
    right = np.concatenate([np.asarray(r) for _, r in pairs])
    return auroc(scores, right)


def run(
    folder: Path, split: Split, num_problems: int, num_samples: int
) -> dict[str, tuple[float, float, float]]:
    """Evaluates a shipped model."""
    from jaxserve import LLM

    task = task_of(folder)
    problems = distinct(task, split, 0, num_problems)
    with LLM(folder, progress=False) as llm:
        return evaluate(draw_samples(llm, task, problems, num_samples))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--split", choices=("train", "dev", "test"), default="test")
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--out", type=Path, help="append the records to this file")
    args = parser.parse_args()
    for folder in args.models:
        figures = run(folder, args.split, args.problems, args.samples)
        for name, (value, low, high) in figures.items():
            about = {"interval": [round(low, 4), round(high, 4)], "problems": args.problems}
            line = record(
                folder.name, name, [value], "", versions={}, split=args.split,
                samples_each=args.samples, **about,
            )  # fmt: skip
            write(line)
            if args.out:
                write(line, args.out)
        print(json.dumps({k: round(v[0], 3) for k, v in figures.items()}))


if __name__ == "__main__":
    main()
