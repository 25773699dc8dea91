"""Hyper-parameters of searches, chosen on a dev split with as many trials for each method.

    python -m benchmarks.path_bank models/modchain-moe --problems 400 --paths 128
    python -m benchmarks.search_tuning runs/paths/modchain-moe-dev.npz --problems 300

runs every setting of `TRIALS` on recorded paths (see `benchmarks.replay`) and keeps, for each
method, the one with the largest area under its curve of accuracy over log tokens, from 4 to 64
paths. What is kept goes to `search_settings.json`, which `benchmarks.search` reads. Methods that
ask a reward head need the engine, since nobody recorded scores:

    python -m benchmarks.search_tuning --engine models/modchain-moe --problems 200
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import search_methods, search_stats
from benchmarks.path_bank import Bank
from benchmarks.pool_search import BUDGETS, LENGTH, Asked, recorded, run
from benchmarks.reason_eval import task_of
from benchmarks.records import machine
from benchmarks.search_methods import SETTINGS, Field, sized
from benchmarks.search_stats import Runs
from reasoning.controllers import CONTROLLERS

RECORDED = 128  # paths of a question, at least, that a bank holds
SEARCH = {"novelty": 0.002, "safe": 2, "floor": 3.25}
TRIALS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "hyper": [
        SEARCH,
        SEARCH | {"safe": 1},
        SEARCH | {"safe": 3},
        SEARCH | {"novelty": 0.01},
        SEARCH | {"novelty": 0.0005},
        SEARCH | {"floor": 3.5},
        SEARCH | {"deep": 1.0},
        SEARCH | {"alike": 3},
    ],
    "deepconf": [
        {"keep": 0.9, "window": 16, "period": 16},  # as published, for these lengths
        {"keep": 0.9, "window": 1, "period": 4},
        {"keep": 0.5, "window": 1, "period": 4},
        {"keep": 0.3, "window": 1, "period": 4},
        {"keep": 0.1, "window": 1, "period": 4},
        {"keep": 0.3, "window": 4, "period": 4},
        {"floor": 3.25, "window": 1, "period": 4},
        {"floor": 3.5, "window": 1, "period": 4},
    ],
    "adaptive-consistency": [
        {"sure": sure} for sure in (0.8, 0.85, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995)
    ],
    "esc": [{"window": window} for window in (2, 3, 4, 5, 6, 8, 10, 12)],
    "slim-sc": [
        {"similar": similar, "window": window, "delay": 10, "period": 5}
        for similar in (0.8, 0.9, 0.95, 0.99)
        for window in (16, 32)
    ],
}


SCORED: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "hyper-prm": [{"trust": trust, "safe": safe} for trust in (1.0, 3.0) for safe in (0, 2)],
    "prm-vote": [{"power": power} for power in (1.0, 2.0, 3.0, 4.0)],
}


def tune_scored(field: Field) -> Iterator[tuple[str, Mapping[str, Any], Runs]]:
    """The curve of each trial with a reward head."""
    hyper = search_methods.settings_of("hyper")
    for settings in SCORED["hyper-prm"]:
        found = search_methods.runs(field, "hyper", BUDGETS, hyper | dict(settings), scorer="prm")
        yield "hyper-prm", settings, found
    paths = search_methods.sampled(field, BUDGETS[-1])
    for settings in SCORED["prm-vote"]:
        choose = partial(search_methods.by_score, **settings)
        yield "prm-vote", settings, search_methods.prefixes(field, paths, BUDGETS, choose)


def tune(
    asked: Sequence[Sequence[Asked]], names: Sequence[str]
) -> Iterator[tuple[str, Mapping[str, Any], Runs]]:
    """The curve of each trial on recorded paths."""
    for name in names:
        for settings in TRIALS[name]:
            yield name, settings, trial(name, settings, asked)


def trial(name: str, settings: Mapping[str, Any], asked: Sequence[Sequence[Asked]]) -> Runs:
    """A method at every budget of plain paths, for each seed."""
    right, tokens = list[list[np.ndarray]](), list[list[np.ndarray]]()
    for paths in BUDGETS:
        size = {key: min(n, RECORDED) for key, n in sized(name, paths).items()}
        policy = CONTROLLERS[name](**{**size, **settings})
        cells = [run(policy, questions, paths * LENGTH) for questions in asked]
        right.append([cell[0] for cell in cells])
        tokens.append([cell[1] for cell in cells])
    return Runs(np.array(right).swapaxes(1, 2), np.array(tokens).swapaxes(1, 2))


def area(found: Runs) -> float:
    """Mean accuracy over log tokens, from the least budget to the largest."""
    tokens, right = search_stats.curve(found)
    curves = np.stack([tokens, right])[None]
    return float(
        search_stats.area(curves, max(BUDGETS[0] * LENGTH, tokens[0]), BUDGETS[-1] * LENGTH)[0]
    )


def line_of(name: str, settings: Mapping[str, Any], found: Runs) -> dict[str, Any]:
    """A trial as it is written down."""
    tokens, right = search_stats.curve(found)
    return {
        "method": name,
        "settings": settings,
        "area": round(area(found), 4),
        "tokens": [round(float(t), 1) for t in tokens],
        "accuracy": [round(float(r), 4) for r in right],
    }


def keep_best(lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes down what was best of each method, the first of equals."""
    known = json.loads(SETTINGS.read_text()) if SETTINGS.exists() else {}
    for name in dict.fromkeys(line["method"] for line in lines):
        own = [line for line in lines if line["method"] == name]
        known[name] = max(own, key=lambda line: line["area"])["settings"]
    SETTINGS.write_text(json.dumps(known, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bank", type=Path, nargs="?")
    parser.add_argument("--engine", type=Path, help="a model, for methods that ask a reward head")
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=TRIALS, default=list(TRIALS))
    args = parser.parse_args()
    if (args.bank is None) == (args.engine is None):
        parser.error("give a bank, or --engine")
    about = {"name": "search-tuning", "problems": args.problems, "seeds": args.seeds}
    lines = list[dict[str, Any]]()

    def tell(trials: Iterator[tuple[str, Mapping[str, Any], Runs]], source: str) -> None:
        for found in trials:
            lines.append({**about, "source": source, **line_of(*found), **machine()})
            print(json.dumps(lines[-1]), flush=True)

    if args.bank:
        bank = Bank.load(args.bank)
        asked = [list(recorded(bank, seed, args.problems)) for seed in range(args.seeds)]
        tell(tune(asked, args.methods), args.bank.stem)
    else:
        from jaxserve import LLM

        with LLM(args.engine, progress=False) as llm:
            llm.wait_until_warm()
            seeds = list(range(args.seeds))
            field = Field.of(llm, task_of(args.engine), "dev", args.problems, seeds)
            tell(tune_scored(field), args.engine.name)
    keep_best(lines)


if __name__ == "__main__":
    main()
