"""Searches, measured: `python -m benchmarks.search --quick --seed 0 --json`.

Four parts. "simulated": speculation on engines whose clock counts steps, which repeats everywhere.
"engine": the same searches on the shipped model, equal or not, and how long they take.
"controller": what HyPER's own code takes of a step with 64 live paths.
"accuracy": methods on held-out problems at six budgets and more, paired, with 95 % bootstrap
intervals over problems and Holm's correction. One JSON line for each figure, and a summary at the
end. Hyper-parameters were chosen on the dev split; this opens the test split.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import search_engine, search_methods, search_simulated, search_stats
from benchmarks.reason_eval import task_of
from benchmarks.records import machine
from benchmarks.search_methods import BUDGETS, EVERY, PATH, Field
from benchmarks.search_stats import Difference, Runs
from reasoning.questions import question_of
from reasoning.tasks import distinct

MODEL = Path("models/modchain-moe")  # unless another one is asked for
PARTS = ("simulated", "engine", "controller", "accuracy")
METHODS = ("hyper", "deepconf", "adaptive-consistency", "esc", "slim-sc", "hyper-prm")
WITH_SCORES = "hyper-prm"  # HyPER that looks at a reward head's scores of whole paths
WHOLE = ("adaptive-consistency", "esc")  # decide by whole paths, whose text is known already
RIVALS = {
    "hyper": ("self-consistency", *METHODS[1:-1]),
    WITH_SCORES: ("prm-vote", "best-of-n", "self-consistency", "deepconf"),
}
SLACK = 1.01  # plain paths are a little longer or shorter than their mean
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
    task = task_of(args.model)
    count = args.problems or (16 if args.quick else 64)
    problems = distinct(task, "dev", args.seed, count)
    questions = [
        question_of(task, p, llm.tokenizer, seed=args.seed + i, max_tokens=128)
        for i, p in enumerate(problems)
    ]
    costs = search_engine.step_costs(llm, questions[0].prompt)
    for rows, seconds in costs.items():
        tell("engine", "c(b)", rows=rows, milliseconds=1e3 * seconds)
    lines = list[dict[str, Any]]()
    for line in search_engine.equality(llm, questions):
        tell("engine", "lossless", **line)
        lines.append(line)
    trees, speculative, different = (
        sum(line[name] for line in lines)
        for name in ("trees", "speculative_trees", "different_trees")
    )
    for name in ("mcts", "rebase"):
        for together in (1, 4):
            repeats = 10 if args.quick else 20
            line = search_engine.wall_time(llm, questions, name, together, repeats, costs=costs)
            tell("engine", "wall", **line)
    told = speculative and not different  # where none ran ahead, none shows anything
    high = 1 - 0.05 ** (1 / speculative) if told else None  # none of so many: rule of three
    return {
        "spex_lossless_equal": bool(told),
        "spex_lossless_equal_interval": {
            "trees": trees,
            "speculative": speculative,
            "different": different,
            "rate_below": high,
        },
    }


def controller(args: argparse.Namespace, tell: Callable[..., None], llm: Any) -> dict[str, Any]:
    """What HyPER's own code takes of a step with 64 live paths."""
    task = task_of(args.model)
    lines = list[dict[str, float]]()
    for i, p in enumerate(distinct(task, "dev", args.seed, 41)):
        question = question_of(task, p, llm.tokenizer, seed=args.seed + i, max_tokens=128)
        lines.append(search_engine.host_share(llm, question))
    for line in lines[1:]:  # the first one warms up
        tell("controller", "hyper", **line)
    middle = {key: float(np.median([line[key] for line in lines[1:]])) for key in lines[0]}
    return {
        "hyper_overhead_share": _interval([line["full_share"] for line in lines[1:]]),
        "hyper_overhead_share_median": round(middle["full_share"], 4),
        "hyper_overhead_share_of_whole_searches": _interval([line["share"] for line in lines[1:]]),
        "hyper_ms_of_a_step": round(1e3 * middle["policy_seconds"] / middle["steps"], 4),
        "step_ms": round(1e3 * middle["seconds"] / middle["steps"], 4),
        "hyper_live_paths": round(middle["live"], 1),
    }


def accuracy(args: argparse.Namespace, tell: Callable[..., None], llm: Any) -> dict[str, Any]:
    """Accuracy against tokens, for every method on the same problems and seeds."""
    budgets = _budgets(args)
    count, seeds = (args.problems or (150 if args.quick else 1000)), args.seeds or 1
    numbers = [args.seed + s for s in range(seeds)]
    field = Field.of(llm, task_of(args.model), args.split, count, numbers, tuple(args.share))
    scorer = "prm" if (args.model / "reward_head.safetensors").is_file() else None
    methods = dict(_measured(field, budgets, args.methods, scorer))
    if args.keep:
        whole = {
            f"{name} {key}": x for name, runs in methods.items() for key, x in vars(runs).items()
        }
        np.savez_compressed(args.keep, **whole)
    return judged(methods, budgets, tell)


def joined(files: Sequence[Path]) -> dict[str, Runs]:
    """What several runs have kept of the same methods: shares of the same problems."""
    parts = [_kept(file) for file in files]
    if any(part.keys() != parts[0].keys() for part in parts):
        raise SystemExit("--join: the files are of different methods")
    names = dict.fromkeys(key.rpartition(" ")[0] for key in parts[0])
    whole = {key: np.concatenate([part[key] for part in parts], 1) for key in parts[0]}
    return {name: Runs(whole[f"{name} right"], whole[f"{name} tokens"]) for name in names}


def _kept(file: Path) -> dict[str, np.ndarray]:
    with np.load(file) as arrays:
        return dict(arrays)


def judged(
    methods: Mapping[str, Runs], budgets: Sequence[int], tell: Callable[..., None]
) -> dict[str, Any]:
    """Curves and differences; the figures of a summary."""
    for name, runs in methods.items():
        tokens, right = search_stats.curve(runs)
        tell("accuracy", name, tokens=_rounded(tokens), accuracy=_rounded(right, 4))
    return _compared(methods, budgets, tell)


def _measured(
    field: Field, budgets: Sequence[int], names: Sequence[str], scorer: str | None
) -> Iterator[tuple[str, Runs]]:
    """Every method; without a reward head, those that ask none."""
    paths = search_methods.sampled(field, max(budgets), scorer)
    plain: dict[str, Any] = {"self-consistency": search_methods.majority}
    scored: Mapping[str, Any] = {
        "prm-vote": partial(search_methods.by_score, **search_methods.settings_of("prm-vote")),
        "best-of-n": search_methods.best,
    }
    for name, choose in (plain | (scored if scorer else {})).items():
        yield name, search_methods.prefixes(field, paths, budgets, choose)
    yield "pass@k", search_methods.oracle(field, paths, budgets)
    for name in names if scorer else [name for name in names if name != WITH_SCORES]:
        chosen = search_methods.settings_of(name)
        if name in WHOLE:
            yield name, search_methods.replayed(field, paths, name, budgets, chosen)
        elif name == WITH_SCORES:
            chosen = search_methods.settings_of("hyper") | chosen
            yield name, search_methods.runs(field, "hyper", budgets, chosen, scorer)
        else:
            yield name, search_methods.runs(field, name, budgets, chosen)


def _compared(
    methods: Mapping[str, Runs], budgets: Sequence[int], tell: Callable[..., None]
) -> dict[str, Any]:
    """HyPER against its rivals: accuracy at each budget, tokens at what `REFERENCE` reaches."""
    curves = dict(zip(methods, search_stats.bootstrap(list(methods.values())), strict=True))
    gains = dict[tuple[str, str, int], Difference]()
    savings = dict[tuple[str, str], Difference]()
    at = budgets.index(REFERENCE)
    for ours, other in _pairs(methods):
        for paths in budgets:
            mine, theirs = curves[ours], curves[other]
            cost = SLACK * paths * PATH
            gains[ours, other, paths] = search_stats.more_accurate(mine, theirs, cost)
        savings[ours, other] = search_stats.fewer_tokens(curves[ours], curves[other], at)
    adjusted = search_stats.holm({"@".join(map(str, key)): d.p for key, d in gains.items()})
    for (ours, other, paths), d in gains.items():
        p = round(adjusted[f"{ours}@{other}@{paths}"], 4)
        tell("gain", other, ours=ours, paths=paths, **_said(d), holm_p=p)
    for (ours, other), d in savings.items():
        tell("saving", other, ours=ours, value=_finite(d.value),
             interval=[_finite(d.low), _finite(d.high)])  # fmt: skip
    gain = gains.get(("hyper", "self-consistency", MATCHED))
    saving = savings.get(("hyper", "self-consistency"))
    if gain is None or saving is None:
        return {}
    alike = list(_gains_at_own_tokens(curves["hyper"], curves["self-consistency"], tell))
    least = min(alike, key=lambda d: d.value, default=None)
    return {
        **(_points("hyper_least_gain_points_where_it_spends_as_much", least) if least else {}),
        **_points("hyper_accuracy_gain_points", gain),
        "hyper_token_saving": _finite(saving.value),
        "hyper_token_saving_interval": [_finite(saving.low), _finite(saving.high)],
    }


def _gains_at_own_tokens(
    ours: np.ndarray, theirs: np.ndarray, tell: Callable[..., None]
) -> Iterator[Difference]:
    """Over self-consistency at the very tokens that HyPER has spent at each of its budgets.

    It ends of itself, so that at a large budget it is compared, above, to many times its tokens.
    Where it spends less than the first budget of the vote, nothing is known of that.
    """
    known = theirs[:, 0].min(1).max()  # by every resample
    for budget, cost in enumerate(ours[0, 0].tolist()):
        if cost >= known:
            there = search_stats.accuracy_at(theirs, cost)
            found = search_stats.difference(ours[:, 1, budget] - there)
            tell("gain", "where it spends as much", tokens=round(cost, 1), **_said(found))
            yield found


def _points(name: str, d: Difference) -> dict[str, Any]:
    """A difference of accuracies, in points."""
    interval = _rounded(100 * np.array([d.low, d.high]), 2)
    return {name: round(100 * d.value, 2), f"{name}_interval": interval}


def _pairs(methods: Mapping[str, Runs]) -> Iterator[tuple[str, str]]:
    for ours, others in RIVALS.items():
        yield from ((ours, other) for other in others if {ours, other} <= methods.keys())


def _budgets(args: argparse.Namespace) -> Sequence[int]:
    return args.budgets or (BUDGETS if args.quick else EVERY)


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
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--budgets", nargs="+", type=int, help="in paths of plain sampling")
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--keep", type=Path, help="a file for what came of every single search")
    parser.add_argument(
        "--share", nargs=2, type=int, default=(0, 1), metavar=("I", "N"),
        help="of the problems, the I-th of N parts, counted from 0: for --keep",
    )  # fmt: skip
    parser.add_argument("--join", nargs="+", type=Path, help="measures nothing: judges kept shares")
    parser.add_argument("--problems", type=int)
    parser.add_argument("--seeds", type=int)
    args = parser.parse_args()

    def tell(part: str, name: str, **figures: Any) -> None:
        line = {"part": part, "name": name, "model": args.model.name, **figures}
        print(json.dumps(line), flush=True)

    found = dict[str, Any]()
    parts = set[str]() if args.join else set(args.parts)
    if args.join:
        found |= _flat(judged(joined(args.join), _budgets(args), tell))
    if "simulated" in parts:
        found |= _flat(simulated(args, tell))
    if {"engine", "controller", "accuracy"} & parts:
        from jaxserve import LLM

        with LLM(args.model, progress=False) as llm:
            llm.wait_until_warm()
            for part in (engine, controller, accuracy):
                if part.__name__ in parts:
                    found |= _flat(part(args, tell, llm))
    asked = {key: getattr(args, key) for key in ("seed", "quick", "split", "problems", "seeds")}
    summary = {"name": "search", "model": args.model.name, **asked, **found, **machine()}
    print(json.dumps(summary))
    if not args.json:
        print(json.dumps(summary, indent=2), file=sys.stderr)


if __name__ == "__main__":
    main()
