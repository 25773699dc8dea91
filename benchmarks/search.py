"""Searches, measured: `python -m benchmarks.search --quick --seed 0 --json`.

Three parts. "simulated": speculation on engines whose clock counts steps, which repeats everywhere.
"engine": the same searches on the shipped model, equal or not, and how long they take.
"accuracy": methods on held-out problems at six budgets and more, paired, with 95 % bootstrap
intervals over problems and Holm's correction. One JSON line for each figure, and a summary at the
end. Hyper-parameters were chosen on the dev split; this opens the test split.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import search_engine, search_methods, search_simulated, search_stats
from benchmarks.reason_eval import task_of
from benchmarks.records import machine
from benchmarks.search_methods import BUDGETS, EVERY, Field
from benchmarks.search_stats import Difference, Runs
from reasoning.questions import question_of
from reasoning.tasks import distinct

MODEL = Path("models/modchain-moe")
PARTS = ("simulated", "engine", "accuracy")
METHODS = ("hyper", "deepconf", "adaptive-consistency", "esc", "slim-sc")
MATCHED = 16  # paths of plain sampling: where the summary compares accuracies
REFERENCE = 64  # paths whose accuracy is to be had with fewer tokens


def simulated(args: argparse.Namespace, tell: Callable[..., None]) -> dict[str, Any]:
    """Critical paths of speculative searches against sequential ones, over batches of queries."""
    rounds = 8 if args.quick else 25
    found = dict[str, list[dict[str, float]]]()
    for name, (case, spec) in search_simulated.goals().items():
        each = [search_simulated.compare(case, 1, spec, first=args.seed + i) for i in range(rounds)]
        found[name] = each
        makespans = [one["makespan"] for one in each]
        tell(
            "simulated",
            name,
            makespan=_mean(makespans),
            waste=_mean([e["waste_ratio"] for e in each]),
        )
    mcts, rebase = found["mcts-10"], found["rebase-16"]
    return {
        "spex_mcts_critical_path_speedup": _interval([one["makespan"] for one in mcts]),
        "spex_rebase_critical_path_speedup": _interval([one["makespan"] for one in rebase]),
        "spex_waste_ratio": _interval([one["waste_ratio"] for one in (*mcts, *rebase)]),
    }


def engine(args: argparse.Namespace, tell: Callable[..., None], llm: Any) -> dict[str, Any]:
    """The real engine: equality of trees, cost of steps, wall time."""
    task = task_of(MODEL)
    count = 16 if args.quick else 64
    problems = distinct(task, "dev", args.seed, count)
    questions = [
        question_of(task, p, llm.tokenizer, seed=args.seed + i, max_tokens=128)
        for i, p in enumerate(problems)
    ]
    for rows, seconds in search_engine.step_costs(llm, questions[0].prompt).items():
        tell("engine", "c(b)", rows=rows, milliseconds=1e3 * seconds)
    different = trees = 0
    for line in search_engine.equality(llm, questions):
        tell("engine", "lossless", **line)
        different, trees = different + line["different_trees"], trees + line["trees"]
    for name in ("mcts", "rebase"):
        for together in (1, 4):
            repeats = 10 if args.quick else 20
            tell(
                "engine", "wall", **search_engine.wall_time(llm, questions, name, together, repeats)
            )
    tell("engine", "controller", **search_engine.host_share(llm, questions[0]))
    high = 1 - 0.05 ** (1 / trees) if not different else None  # none of so many: rule of three
    return {
        "spex_lossless_equal": not different,
        "spex_lossless_equal_interval": {
            "trees": trees,
            "different": different,
            "rate_below": high,
        },
    }


def accuracy(args: argparse.Namespace, tell: Callable[..., None], llm: Any) -> dict[str, Any]:
    """Accuracy against tokens, for every method on the same problems and seeds."""
    budgets = BUDGETS if args.quick else EVERY
    count, seeds = (args.problems or (150 if args.quick else 1000)), args.seeds or 1
    field = Field.of(llm, task_of(MODEL), args.split, count, [args.seed + s for s in range(seeds)])
    methods = dict(_measured(field, budgets, args.methods))
    for name, runs in methods.items():
        tokens, right = search_stats.curve(runs)
        tell("accuracy", name, tokens=_rounded(tokens), accuracy=_rounded(right, 4))
    return _compared(methods, field, budgets, tell)


def _measured(
    field: Field, budgets: Sequence[int], names: Sequence[str]
) -> Iterator[tuple[str, Runs]]:
    paths = search_methods.sampled(field, max(budgets))
    plain: Mapping[str, Any] = {
        "self-consistency": search_methods.majority,
        "prm-vote": search_methods.by_score,
        "best-of-n": search_methods.best,
    }
    for name, choose in plain.items():
        yield name, search_methods.prefixes(field, paths, budgets, choose)
    yield "pass@k", search_methods.oracle(field, paths, budgets)
    for name in names:
        yield name, search_methods.runs(field, name, budgets)


def _compared(
    methods: Mapping[str, Runs], field: Field, budgets: Sequence[int], tell: Callable[..., None]
) -> dict[str, Any]:
    """HyPER against every other method, at every budget."""
    others = [name for name in methods if name not in ("hyper", "pass@k")]
    curves = dict(zip(methods, search_stats.bootstrap(list(methods.values())), strict=True))
    gains = dict[str, Difference]()
    for other in others:
        for paths in budgets:
            at = paths * field.path
            gains[f"{other}@{paths}"] = search_stats.more_accurate(
                curves["hyper"], curves[other], at
            )
    adjusted = search_stats.holm({name: d.p for name, d in gains.items()})
    for name, d in gains.items():
        other, paths = name.split("@")
        tell("gain", other, paths=int(paths), **_said(d), holm_p=round(adjusted[name], 4))
    saving = search_stats.fewer_tokens(
        curves["hyper"], curves["self-consistency"], budgets.index(REFERENCE)
    )
    gain = gains[f"self-consistency@{MATCHED}"]
    return {
        "hyper_accuracy_gain_points": round(100 * gain.value, 2),
        "hyper_accuracy_gain_points_interval": _rounded(100 * np.array([gain.low, gain.high]), 2),
        "hyper_token_saving": _finite(saving.value),
        "hyper_token_saving_interval": [_finite(saving.low), _finite(saving.high)],
    }


def _finite(value: float) -> float | None:
    """None where an accuracy is never reached, whatever is spent."""
    return round(value, 4) if np.isfinite(value) else None


def _said(d: Difference) -> dict[str, Any]:
    return {"value": round(d.value, 4), "interval": [round(d.low, 4), round(d.high, 4)], "p": d.p}


def _interval(values: Sequence[float]) -> tuple[float, list[float]]:
    """A mean and its 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    draws = np.array(values)[rng.integers(0, len(values), (10_000, len(values)))].mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return round(_mean(values), 4), [round(float(low), 4), round(float(high), 4)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _rounded(values: np.ndarray, digits: int = 1) -> list[float]:
    return [round(float(v), digits) for v in values]


def _flat(found: Mapping[str, Any]) -> dict[str, Any]:
    """Every figure with its interval beside it."""
    out = dict[str, Any]()
    for name, value in found.items():
        if isinstance(value, tuple):
            out[name], out[f"{name}_interval"] = value
        else:
            out[name] = value
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="under 15 minutes on two cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="lines for programs alone")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--problems", type=int)
    parser.add_argument("--seeds", type=int)
    args = parser.parse_args()

    def tell(part: str, name: str, **figures: Any) -> None:
        line = {"part": part, "name": name, **figures}
        print(json.dumps(line), flush=True)

    found = dict[str, Any]()
    if "simulated" in args.parts:
        found |= _flat(simulated(args, tell))
    if {"engine", "accuracy"} & set(args.parts):
        from jaxserve import LLM

        with LLM(MODEL, progress=False) as llm:
            llm.wait_until_warm()
            for part in (engine, accuracy):
                if part.__name__ in args.parts:
                    found |= _flat(part(args, tell, llm))
    summary = {"name": "search", "seed": args.seed, "quick": args.quick, **found, **machine()}
    print(json.dumps(summary))
    if not args.json:
        print(json.dumps(summary, indent=2), file=sys.stderr)


if __name__ == "__main__":
    main()
