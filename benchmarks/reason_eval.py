"""How well a model reasons: `python -m benchmarks.reason_eval models/modchain-moe`.

Samples are drawn by the engine at temperature 1, for held-out problems of the task that the
model's `recipe.toml` names. pass@k is the unbiased estimate of Chen et al. (2021), majority@k the
vote of the first k samples, and AUROC says how well a sample's mean log-probability tells right
from wrong. Intervals are 95 % bootstraps over problems.
"""

from __future__ import annotations

import argparse
import itertools
import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from benchmarks.records import record, write
from jaxserve.checkpoint import hf
from jaxserve.checkpoint.reward_head import load_reward_head
from jaxserve.models.family import family
from jaxserve.models.reward_head import log_odds
from jaxserve.train.reward import Judged, judged
from reasoning.step_labels import Generate, Labelled, label_steps
from reasoning.tasks import STEP, Grade, Problem, Recall, Split, Task, distinct, make_task

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
    llm: Any, task: Task, problems: Sequence[Problem], count: int
) -> list[list[Sample]]:
    """`count` solutions of each problem, at temperature 1."""
    from jaxserve import SamplingParams

    params = SamplingParams(n=count, max_tokens=llm.max_model_len // 2, logprobs=0, seed=0)
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
    """How likely a solution is right that says what most of them say; ties are shared.

    Where the answer decides, as in ModChain, that is 1 or 0. Where the way to it counts too, as in
    Countdown, whose answer is in the prompt, a vote does not tell ways apart.
    """
    groups: dict[str, list[bool]] = {}
    for s in samples:
        if s.grade.answer is not None:
            groups.setdefault(s.grade.answer, []).append(s.grade.correct)
    if not groups:
        return 0.0
    most = max(map(len, groups.values()))
    return _mean([_mean(group) for group in groups.values() if len(group) == most])


def auroc(scores: np.ndarray, right: np.ndarray) -> float:
    """Probability that a right sample scores above a wrong one; NaN if there is only one kind."""
    if right.all() or not right.any():
        return float("nan")
    ranks, n = rankdata(scores), right.sum()  # ties share their mean rank
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


def evaluate_kinds(
    problems: Sequence[Problem], samples: list[list[Sample]]
) -> dict[str, tuple[float, float, float]]:
    """pass@1 of each kind of problem in a mixture of Recall's."""
    kinds = [problem.facts[0] for problem in problems]
    right = [_mean([s.grade.correct for s in group]) for group in samples]
    return {
        f"{kind}_pass@1": interval(
            [r for r, k in zip(right, kinds, strict=True) if k == kind], _mean
        )
        for kind in sorted(set(kinds))
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _pooled_auroc(pairs: list[tuple[list[float], list[bool]]]) -> float:
    scores = np.concatenate([np.asarray(s) for s, _ in pairs])
    right = np.concatenate([np.asarray(r) for _, r in pairs])
    return auroc(scores, right)


def evaluate_head(
    llm: Any, folder: Path, task: Task, split: Split, num_problems: int
) -> dict[str, tuple[float, float, float]]:
    """How well the folder's reward heads tell right steps and right solutions from wrong ones."""
    problems = distinct(task, split, 1, num_problems)
    solutions = label_steps(task, problems, generator(llm, seed=1), samples=4, tries=8)
    data, figures = judge(llm, folder, solutions), {}
    ends = data.judged > 0
    last = ends.shape[1] - 1 - np.argmax(ends[:, ::-1], axis=1)
    correct = [s.correct for s in solutions if s.labels]
    for file in sorted(folder.glob("reward_head*.safetensors")):
        odds = np.asarray(log_odds(load_reward_head(file, data.hidden.shape[-1]), data.hidden))
        name = file.stem
        steps = [
            (list(o[e]), list(x[e] > 0)) for o, e, x in zip(odds, ends, data.labels, strict=True)
        ]
        whole = [([o[at]], [c]) for o, at, c in zip(odds, last, correct, strict=True)]
        figures[f"{name}_step_auroc"] = interval(steps, _pooled_auroc, rounds=50)
        figures[f"{name}_outcome_auroc"] = interval(whole, _pooled_auroc, rounds=50)
    return figures


def generator(llm: Any, seed: int) -> Generate:
    """Continuations for `label_steps`; every call draws anew, the same in each run."""
    calls = itertools.count(seed * 1000)

    def generate(prompts: Sequence[str], n: int) -> list[list[str]]:
        from jaxserve import SamplingParams

        params = SamplingParams(n=n, max_tokens=llm.max_model_len // 2, seed=next(calls))
        return [[o.text for o in out.outputs] for out in llm.generate(list(prompts), params)]

    return generate


def judge(llm: Any, folder: Path, solutions: Sequence[Labelled]) -> Judged:
    """What a reward head sees of solutions that have a step."""
    raw = hf.read_config(folder)
    module = family(raw["model_type"])
    cfg = hf.model_config(module, raw)
    params = hf.load_params(folder, module, cfg, "float32", progress=False)
    some = [s for s in solutions if s.labels]
    step = llm.tokenizer.encode(STEP, add_special_tokens=False)[-1]
    texts = llm.tokenizer.encode_batch([s.text for s in some])
    return judged(module, cfg, params, texts, step, [s.labels for s in some])


def run(
    folder: Path, split: Split, num_problems: int, num_samples: int
) -> dict[str, tuple[float, float, float]]:
    """Evaluates a shipped model, and its reward heads on a fifth as many problems."""
    from jaxserve import LLM

    task = task_of(folder)
    problems = distinct(task, split, 0, num_problems)
    with LLM(folder, progress=False) as llm:
        samples = draw_samples(llm, task, problems, num_samples)
        figures = evaluate(samples)
        if isinstance(task, Recall):
            figures |= evaluate_kinds(problems, samples)
        if any(folder.glob("reward_head*.safetensors")):
            figures |= evaluate_head(llm, folder, task, split, max(num_problems // 5, 20))
    return figures


def table(results: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> str:
    """Figures down, models across, in Markdown; "a (b-c)" is a value and its interval."""
    names = list(dict.fromkeys(name for figures in results.values() for name in figures))
    rows = [["figure", *results], ["---"] * (1 + len(results))]
    for name in names:
        found = [figures.get(name) for figures in results.values()]
        rows.append(
            [name, *("" if x is None else f"{x[0]:.3f} ({x[1]:.3f}-{x[2]:.3f})" for x in found)]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--split", choices=("train", "dev", "test"), default="test")
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--out", type=Path, help="append the records to this file")
    args = parser.parse_args()
    results = {}
    for folder in args.models:
        results[folder.name] = figures = run(folder, args.split, args.problems, args.samples)
        about = {"versions": {}, "split": args.split, "samples_each": args.samples}
        for name, (value, *bounds) in figures.items():
            line = record(
                folder.name, name, [value], "", **about, problems=args.problems,
                interval=[round(x, 4) for x in bounds],
            )  # fmt: skip
            write(line, args.out)
    print(table(results))


if __name__ == "__main__":
    main()
